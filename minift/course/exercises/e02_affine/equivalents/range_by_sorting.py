"""Finds the range by sorting x with a 0 thrown in, adds the zero point before rounding, in float64."""

import torch


def parameters(x):
    ordered = torch.cat([x.flatten(), x.new_zeros(1)]).sort().values
    width = ordered[-1] - ordered[0]
    scale = width / 255 if width > 0 else torch.ones_like(width)
    return scale, (-ordered[0] / scale + 0.5).floor().int()


def quantize(x, scale, zero_point):
    place = x.double() / scale.double() + zero_point
    return torch.floor(place + 0.5).clip(min=0).clip(max=255).byte()


def dequantize(q, scale, zero_point):
    return ((q.double() - zero_point.double()) * scale.double()).to(scale.dtype)
