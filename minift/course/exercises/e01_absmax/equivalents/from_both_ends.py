"""Takes the absmax from the minimum and the maximum, and rounds in float64."""

import torch


def quantize(x, dim=None):
    low, high = (x.amin(), x.amax()) if dim is None else (x.amin(dim, True), x.amax(dim, True))
    absmax = torch.maximum(-low, high)
    scale = absmax * (1 / 127)
    scale[absmax == 0] = 1
    return torch.special.round(x.double() / scale.double()).char(), scale


def dequantize(q, scale):
    return torch.mul(q.double(), scale.double()).to(scale.dtype)
