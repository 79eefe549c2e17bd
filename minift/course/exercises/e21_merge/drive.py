"""e21: makes a layer, does a few things with it one after the other, and shows what is asked for in between."""


def _play(layer, attributes, x, steps):
    seen = []
    for step in steps:
        if step == "forward":
            seen.append(layer.forward(x).detach())
        elif step == "show":
            seen += [getattr(layer, name).detach().clone() for name in attributes]
        else:
            getattr(layer, step)()
    return seen


def play(student, weight, a, b, alpha, x, steps):
    """Steps are merge, unmerge, forward (its answer is returned) and show (the weight is returned)."""
    return _play(student.LoRALinear(weight.clone(), a, b, alpha), ["weight"], x, steps)


def play_4bit(student, packed, absmax, shape, a, b, alpha, x, steps):
    """The same in NF4; show returns packed and absmax."""
    layer = student.LoRALinear4bit(packed.clone(), absmax.clone(), shape, a, b, alpha)
    return _play(layer, ["packed", "absmax"], x, steps)
