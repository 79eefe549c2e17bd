"""What a wrong tensor looks like: patterns that hint at the cause where no known mistake gives the same numbers."""

import torch

CLOSE = 1e-4  # relative: far above rounding in float32, far below any mistake


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.numel() < 2:
        return False
    return torch.allclose(a, b, rtol=CLOSE, atol=CLOSE * float(b.abs().max()))


def _nibbles_swapped(expected: torch.Tensor, actual: torch.Tensor) -> bool:
    if expected.dtype != torch.uint8:
        return False
    return bool(torch.equal(((actual & 15) << 4) | (actual >> 4), expected))


def _pairs_swapped(want: torch.Tensor, have: torch.Tensor) -> bool:
    """Neighbours two by two: the codes of a byte taken out low half first. Of an odd number the last has no partner."""
    even = want.numel() // 2 * 2
    if even < 4:
        return False
    return _same(have.flatten()[:even].view(-1, 2).flip(1).flatten(), want.flatten()[:even])


def _factor(want: torch.Tensor, have: torch.Tensor) -> float | None:
    """The one factor between all elements, if there is one."""
    used = want.abs() > CLOSE * want.abs().max()
    if int(used.sum()) < 2:
        return None
    ratio = have[used] / want[used]
    middle = float(ratio.median())
    return middle if bool((ratio - middle).abs().max() <= CLOSE * abs(middle)) and _same(have, want * middle) else None


def _finite_cause(want: torch.Tensor, have: torch.Tensor) -> str | None:
    if not have.any():
        return "yours is all zero"
    factor = _factor(want, have)
    if factor is not None and abs(factor) > CLOSE and abs(factor - 1) > 100 * CLOSE:
        if abs(factor + 1) < CLOSE:
            return "every element has the wrong sign"
        return f"yours is {factor:.6g} times the expected"
    if have.dim() >= 2 and have.shape[-1] == have.shape[-2] and _same(have.mT, want):
        return "yours is transposed"
    if _pairs_swapped(want, have):
        return "neighbours have changed places two by two (which half of a byte comes first?)"
    for dim in range(have.dim()):
        size = have.shape[dim]
        for step in (1, -1):
            if size > 2 and _same(have.narrow(dim, max(step, 0), size - 1), want.narrow(dim, max(-step, 0), size - 1)):
                return f"yours is shifted by one along dimension {dim}"
    return None


def likely_cause(expected: torch.Tensor, actual: torch.Tensor, wrong: torch.Tensor) -> str | None:
    """A short clause about two tensors of one shape and dtype that differ where `wrong`, or None."""
    if _nibbles_swapped(expected, actual):
        return "the two halves of every byte are swapped"
    want, have = expected.detach().double(), actual.detach().double()
    if have.isnan().any() and not want.isnan().any():
        return f"{int(have.isnan().sum())} of yours are NaN"
    if have.isinf().any() and not want.isinf().any():
        return f"{int(have.isinf().sum())} of yours are infinite"
    if not bool(have.isfinite().all() and want.isfinite().all()):
        return None
    found = _finite_cause(want, have)
    if found is None and wrong.dim() and not wrong.all():
        rows = wrong.reshape(wrong.shape[0], -1).any(1)
        if int(rows.sum()) == 1 and wrong.shape[0] > 1:
            return f"only index {int(rows.nonzero()[0])} of the first dimension is wrong"
    smaller = have.abs() < want.abs()
    if found is None and int(wrong.sum()) > 3 and bool(smaller[wrong].all() or (~smaller[wrong]).all()):
        return f"all of these are too {'small' if bool(smaller[wrong].all()) else 'large'}"
    return found
