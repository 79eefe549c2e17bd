"""e23: runs the class for some steps. The parameters are made here, because an optimizer changes them in place."""

import torch


def trajectory(student, start, gradients, options):
    """Parameters after each step; gradients[step][parameter] may be None."""
    params = [torch.nn.Parameter(value.clone()) for value in start]
    optimizer = student.AdamW(params, **options)
    seen = []
    for row in gradients:
        for parameter, gradient in zip(params, row, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        optimizer.step()
        seen.append([parameter.detach().clone() for parameter in params])
    return seen
