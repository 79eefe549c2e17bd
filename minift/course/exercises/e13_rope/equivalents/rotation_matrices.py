"""One 2 x 2 matrix a pair, applied with einsum; in attention only the difference of two positions is ever used."""

import math

import torch


def frequencies(width, theta):
    return torch.tensor([math.exp(-2 * i / width * math.log(theta)) for i in range(width // 2)])


def tables(position_ids, width, theta):
    angles = torch.einsum("bl,f->blf", position_ids.float(), frequencies(width, theta))
    return torch.cos(torch.cat([angles, angles], -1)), torch.sin(torch.cat([angles, angles], -1))


def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    c, s = cos[..., :half], sin[..., :half]
    matrix = torch.stack([torch.stack([c, -s], -1), torch.stack([s, c], -1)], -2)
    return torch.einsum("blfij,bhljf->bhlif", matrix, x.unflatten(-1, (2, half)).float()).flatten(-2).to(x.dtype)


def attention(q, k, v, position_ids, theta):
    half = q.shape[-1] // 2
    apart = (position_ids[:, :, None] - position_ids[:, None, :]).unsqueeze(-1) * frequencies(2 * half, theta)
    (q1, q2), (k1, k2) = q.split(half, -1), k.split(half, -1)
    along = torch.einsum("bhif,bhjf,bijf->bhij", q1, k1, apart.cos()) + torch.einsum(
        "bhif,bhjf,bijf->bhij", q2, k2, apart.cos()
    )
    across = torch.einsum("bhif,bhjf,bijf->bhij", q1, k2, apart.sin()) - torch.einsum(
        "bhif,bhjf,bijf->bhij", q2, k1, apart.sin()
    )
    return ((along + across) / math.sqrt(2 * half)).softmax(-1) @ v
