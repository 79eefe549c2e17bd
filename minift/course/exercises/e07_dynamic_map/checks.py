"""e07: the maps are compared with those of bitsandbytes; the inputs of the search are made from their codes."""

import struct

import torch

from minift.course.spec import Case, check

# Some roundings of float32 each for edge, middle and power of ten; seven decades of them never add up.
RTOL = 16 * torch.finfo(torch.float32).eps

# The values above zero of bitsandbytes 0.50.2, functional.create_dynamic_map(signed), float32, little-endian bytes.
SIGNED = (
    "b7a31335941a5a36ff0502370642b23734803738b3ef8a384b1fba380bd7233905e78c3983e2c739016f013ac1ec1e3a806a3c3a3ee8593a"
    "ff65773a9defa73afca9f13a2db21d3b5c8f423b8a6c673bdd24863b7493983b0d02ab3ba470bd3b3bdfcf3bd34de23b6abcf43b8195033c"
    "cdcc0c3c1804163c643b1f3c48e13a3cc3f5683c1f858b3c5d8fa23c9a99b93cd7a3d03c15aee73c52b8fe3c48e10a3d6766163d85eb213d"
    "a3702d3dc3f5383de17a443d0000503d1f855b3d3d0a673d5d8f723d7b147e3dcdcc843d5d8f8a3deb51903d7b14963d0ad79b3d9a99a13d"
    "2a5ca73db81ead3d48e1b23dd7a3b83d6766be3df728c43d85ebc93d3433db3d0000f83d66660a3ecdcc183e3333273e9a99353e0000443e"
    "6666523ecdcc603e33336f3e99997d3e0000863e34338d3e6666943e9a999b3ecccca23e0000aa3e3333b13e6666b83e9a99bf3eccccc63e"
    "0000ce3e3333d53e6666dc3e9a99e33eccccea3e0000f23e3233f93e3333003fcccc033f6666073f00000b3f9a990e3f3433123fcdcc153f"
    "6666193f00001d3f9a99203f3433243fcdcc273f66662b3f00002f3f9a99323f3433363fcdcc393f66663d3f0000413f9a99443f3333483f"
    "cdcc4b3f66664f3f0000533f9a99563f33335a3fcdcc5d3f6666613f0000653f9a99683f33336c3fcdcc6f3f6666733f0000773f9a997a3f"
    "33337e3f0000803f"
)
UNSIGNED = (
    "aa7bae3498095035389b0e36f6cc9236514cde36d5e514376e128337a071e13768e81f3800184f389a477e3899bb96386453ae3831ebc538"
    "4b590639ca54413949507c39e4a59b39a223b93963a1d639221ff43971ce083a508d173a304c263a100b353aefc9433ad088523aaf47613a"
    "8e06703a6ec57e3a0681953a355eba3a643bdf3a4a0c023be17a143b78e9263b1058393ba7c64b3b40355e3bd7a3703b3789813b82c08a3b"
    "cff7933b1a2f9d3b6666a63bb29daf3bfdd4b83b4a0cc23b9543cb3be17ad43b2eb2dd3b78e9e63bc520f03b0f58f93bae47013c54e3053c"
    "f97e0a3ca01a0f3c45b6133ceb51183c92ed1c3c3789213c2a5c2f3c6766463ca3705d3ce27a743c8fc2853caf47913ccdcc9c3ceb51a83c"
    "0bd7b33c295cbf3c47e1ca3c6766d63c87ebe13ca370ed3cc3f5f83c703d023d0000083d8fc20d3d1f85133daf47193d3d0a1f3dcdcc243d"
    "5c8f2a3deb51303d7b14363d0ad73b3d9a99413d285c473db81e4d3d47e1523dd7a3583d67665e3df728643d87eb693d15ae6f3da370753d"
    "33337b3de27a803d2a5c833d713d863db81e893d00008c3d48e18e3d90c2913dd7a3943d1f85973d67669a3daf479d3df628a03d3e0aa33d"
    "85eba53dcdcca83d15aeab3d5c8fae3da470b13deb51b43d3333b73d7b14ba3dc3f5bc3d0bd7bf3d52b8c23d9a99c53de27ac83d295ccb3d"
    "0000d43d6666e23dcdccf03d3333ff3dcccc063e00000e3e3433153e66661c3e9a99233ecccc2a3e0000323e3433393e6666403e9a99473e"
    "cccc4e3e0000563e34335d3e6666643e9a996b3ecccc723e00007a3e9999803e3333843ecdcc873e66668b3e00008f3e9a99923e3333963e"
    "cccc993e66669d3e0000a13e9a99a43e3333a83eccccab3e6666af3e0000b33e9a99b63e3333ba3eccccbd3e6666c13e0000c53e9a99c83e"
    "3333cc3ecccccf3e6666d33e0000d73e9a99da3e3333de3ecccce13e6666e53e0000e93e9a99ec3e3333f03eccccf33e6666f73e0000fb3e"
    "9999fe3e9a19013f66e6023f33b3043f0080063fcc4c083f9a190a3f66e60b3f34b30d3f00800f3fcd4c113f9a19133f66e6143f34b3163f"
    "0080183fcd4c1a3f9a191c3f66e61d3f34b31f3f0080213fcd4c233f9a19253f66e6263f34b3283f00802a3fcd4c2c3f9a192e3f66e62f3f"
    "34b3313f0080333fcd4c353f9a19373f66e6383f34b33a3f00803c3fcd4c3e3f9a19403f66e6413f34b3433f0080453fcc4c473f9a19493f"
    "66e64a3f34b34c3f00804e3fcc4c503f9a19523f66e6533f34b3553f0080573fcc4c593f9a195b3f66e65c3f34b35e3f0080603fcc4c623f"
    "9a19643f66e6653f34b3673f0080693fcc4c6b3f9a196d3f66e66e3f34b3703f0080723fcc4c743f9a19763f66e6773f34b3793f00807b3f"
    "cc4c7d3f9a197f3f0000803f"
)


def floats(text: str) -> torch.Tensor:
    raw = bytes.fromhex(text)
    return torch.tensor(struct.unpack(f"<{len(raw) // 4}f", raw))


def golden(signed: bool) -> torch.Tensor:
    """The recorded map. Signed, every value but the highest (1.0) has its negative."""
    above = floats(SIGNED if signed else UNSIGNED)
    return torch.cat([-above[:-1].flip(0), torch.zeros(1), above] if signed else [torch.zeros(1), above])


def wrong_with(code) -> str | None:
    """What a map must be, whatever its values are."""
    if not isinstance(code, torch.Tensor) or code.shape != (256,) or code.dtype != torch.float32:
        kind = f"{code.dtype} of shape {tuple(code.shape)}" if isinstance(code, torch.Tensor) else type(code).__name__
        return f"the map is {kind}, expected float32 of shape (256,)"
    if not bool((code[1:] > code[:-1]).all()):
        place = int((code[1:] <= code[:-1]).nonzero()[0])
        return f"the values do not rise: [{place}] is {code[place]:.6g}, [{place + 1}] is {code[place + 1]:.6g}"
    if not bool((code == 0).any()):
        return f"0.0 is not among the values; the one nearest to it is {code[code.abs().argmin()]:.6g}"
    return None if code[-1] == 1 else f"the highest value is {code[-1]:.9g}, expected 1.0"


@check(points=1)
def zero_and_one(draw):
    """Both maps have 256 different values in rising order, 0.0 and 1.0 exactly among them."""
    for signed in (True, False):
        yield Case("dynamic_map", {"signed": signed}, accept=wrong_with, about=f"signed={signed}")


@check(points=1)
def signed_map(draw):
    """The signed map has 2^i values and as many negative ones in decade i, the middles of equal bins."""
    yield Case("dynamic_map", {"signed": True}, golden(True), rtol=RTOL, about="signed=True")
    yield Case("dynamic_map", {}, golden(True), rtol=RTOL, about="no argument: signed")


@check(points=1)
def unsigned_map(draw):
    """The unsigned map has 2^(i+1) values in decade i and nothing below zero."""
    yield Case("dynamic_map", {"signed": False}, golden(False), rtol=RTOL, about="signed=False")


def near(draw: torch.Generator, code: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every index of a table once, in any order, and numbers up to 0.4 of the way to a neighbour of its value."""
    count = len(code)
    index = torch.randperm(count, generator=draw)
    wide = code.double()
    side = 2 * torch.randint(0, 2, (count,), generator=draw) - 1
    neighbour = (index + side).clamp(0, count - 1)
    part = torch.rand(count, generator=draw, dtype=torch.float64) * 0.4
    return (wide[index] + part * (wide[neighbour] - wide[index])).float(), index.to(torch.uint8)


@check(points=2)
def nearest_value(draw):
    """encode gives the index of the nearest value, for any table, also at and beyond its ends."""
    for signed, shape in ((True, (8, 32)), (False, (4, 2, 32))):
        x, index = near(draw, golden(signed))
        about = f"numbers up to 0.4 of the way to a neighbour, signed={signed}"
        yield Case("encode", {"x": x.reshape(shape), "code": golden(signed)}, index.reshape(shape), about=about)
    steps = torch.rand(37, generator=draw) + 0.1
    table = steps.cumsum(0) / steps.sum() * 1.6 - 0.9
    x, index = near(draw, table)
    x, index = torch.cat([x, torch.tensor([-1.0, 1.0])]), torch.cat([index, torch.tensor([0, 36]).byte()])
    yield Case("encode", {"x": x, "code": table}, index, about="a table of 37 values from about -0.9 to 0.7; -1 and 1")
    x = torch.tensor([-1.0, -0.996, 0.0, 1.0, 0.9975])
    index = torch.tensor([0, 0, 127, 255, 255], dtype=torch.uint8)
    yield Case("encode", {"x": x, "code": golden(True)}, index, about="-1, 0, 1 and numbers close to the ends")
