"""In float64: the two neighbours, the way between them, and a coin for each element."""

import torch


def stochastic_round(x, generator):
    down = (x.view(torch.int32) >> 16 << 16).view(torch.float32)
    up = torch.nextafter(down.bfloat16(), torch.full_like(x, torch.inf).copysign(x).bfloat16())
    way = (x.double() - down.double()) / (up.double() - down.double())
    way = torch.nan_to_num(way, nan=0.0, posinf=0.0, neginf=0.0)
    goes_up = torch.bernoulli(way, generator=generator).bool()
    rounded = torch.where(goes_up, up, down.bfloat16())
    return torch.where(torch.isfinite(x), rounded, x.bfloat16())
