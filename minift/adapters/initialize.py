"""Where A and B start.

    default    A uniform in +-1/sqrt(in), B zero: the model starts unchanged, and so it does with
    gaussian   A normal with deviation 1/r, B zero
    random     A and B both uniform: the model starts changed (for tests of what zeros would hide)
    pissa      the r largest singular directions of W = U S V^T are cut out of W and trained:

                   B = U_r sqrt(S_r / s)    A = sqrt(S_r / s) V_r^T    W <- W - s B A          the sum is unchanged

               `pissa_niter_<n>` finds them with n rounds of a randomized method, faster and not quite exact
    loftq      W is quantized to NF4, and A and B start as the best low-rank repair of what that loses:

                   Q = quantize(W - B A),  then  B A = the r largest directions of W - Q;   as often as asked

pissa and loftq put another weight in place of W. Adapter files do not hold it: it is computed again when they are
loaded on the original model, so that needs the unquantized one (and `pissa_niter_<n>` cannot be loaded: its result
depends on random numbers). loftq quantizes only the layers that it adapts, without double quantization, as PEFT does;
like PEFT, it repairs without dividing by s, so it fits exactly only for s = 1 (alpha = r).

Random numbers are drawn on the CPU in fp32, in PEFT's order (A, B, and A again), so that one seed gives the same values
everywhere.

Sources: PiSSA, arXiv 2404.02948; LoftQ, arXiv 2310.08659; PEFT `tuners/lora/layer.py`, `utils/loftq_utils.py`.
"""

import math

import torch
from torch import Tensor, nn

from minift.adapters.config import LoraConfig
from minift.quant.config import QuantConfig
from minift.quant.linear import Linear4bit, QuantizedLinear, plain_linear

Base = nn.Linear | QuantizedLinear


@torch.no_grad()
def initialize(base: Base, config: LoraConfig) -> tuple[Base, Tensor, Tensor]:
    """The layer to adapt, and the initial A [r, in] and B [out, r], fp32.

    Raises:
        ValueError: "pissa" or "loftq" for a quantized layer.
    """
    a = nn.Linear(base.in_features, config.r, bias=False).weight
    b = nn.Linear(config.r, base.out_features, bias=False).weight
    if config.init == "default":
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    elif config.init == "gaussian":
        nn.init.normal_(a, std=1 / config.r)
    elif config.init != "random":
        return _from_weight(base, config)
    return base, a.detach(), b.detach() if config.init == "random" else torch.zeros_like(b)


def _from_weight(base: Base, config: LoraConfig) -> tuple[Base, Tensor, Tensor]:
    if not isinstance(base, nn.Linear):
        raise ValueError(
            f"init {config.init!r} starts from the original weight and this layer is quantized; "
            "load the model without quantization (loftq quantizes the layers that it adapts)"
        )
    weight_oi = base.weight.detach()
    if config.init == "loftq":
        return loftq(base, config.r, config.loftq_iterations)
    a_ri, b_or = principal(weight_oi.float(), config)
    residual_oi = weight_oi.float() - config.scaling * b_or @ a_ri
    return plain_linear(residual_oi.to(weight_oi.dtype), base.bias), a_ri, b_or


def principal(weight_oi: Tensor, config: LoraConfig) -> tuple[Tensor, Tensor]:
    """A and B whose scaled product is the best approximation of the weight with this rank."""
    if config.init == "pissa":
        u_or, s_r, vh_ri = torch.linalg.svd(weight_oi, full_matrices=False)
        u_or, s_r, vh_ri = u_or[:, : config.r], s_r[: config.r], vh_ri[: config.r]
    else:
        rounds = int(config.init.rpartition("_")[2])
        u_or, s_r, v_ir = torch.svd_lowrank(weight_oi, config.r, niter=rounds)
        vh_ri = v_ir.T
    root_r = (s_r / config.scaling).sqrt()
    return root_r.unsqueeze(1) * vh_ri, u_or * root_r


def loftq(base: nn.Linear, r: int, iterations: int) -> tuple[Linear4bit, Tensor, Tensor]:
    """An NF4 layer, A and B such that together they are near the original weight."""
    weight_oi = base.weight.detach().float()
    layer = Linear4bit.from_linear(base, QuantConfig(double_quant=False))
    a_ri = b_or = torch.empty(0)
    for iteration in range(iterations):
        layer.quantize_weight(weight_oi - b_or @ a_ri if iteration else weight_oi)
        u_or, s_r, vh_ri = torch.linalg.svd(weight_oi - layer.dequantize(torch.float32), full_matrices=False)
        root_r = s_r[:r].sqrt()
        a_ri, b_or = root_r.unsqueeze(1) * vh_ri[:r], u_or[:, :r] * root_r
    layer.stored_dtype = base.weight.dtype
    return layer, a_ri, b_or
