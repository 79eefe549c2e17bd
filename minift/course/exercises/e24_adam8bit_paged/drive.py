"""e24: runs the optimizer for some steps and the pool through a list of actions."""

import torch


def trajectory(student, start, gradients, tables, options):
    """After each step: for each parameter its value and what is stored for it."""
    params = [torch.nn.Parameter(value.clone()) for value in start]
    optimizer = student.Adam8bit(params, tables[0].clone(), tables[1].clone(), **options)
    seen = []
    for row in gradients:
        for parameter, gradient in zip(params, row, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        stored = [[part.detach().clone() for part in optimizer.state(i)] for i in range(len(params))]
        seen.append([[p.detach().clone(), *parts] for p, parts in zip(params, stored, strict=True)])
    return seen


def stored_at_first(student, sizes, tables, options):
    """Dtypes of what is stored before the first step, and its bytes, for parameters of these sizes."""
    optimizer = student.Adam8bit([torch.ones(size) for size in sizes], *tables, **options)
    return [
        ([part.dtype for part in optimizer.state(i)], sum(part.nbytes for part in optimizer.state(i)))
        for i in range(len(sizes))
    ]


def pages(student, budget, store, actions):
    """What each action returned and what lies on the device after it.

    An action is ("acquire" | "release" | "use", name, what to add to the page or None); "use" is both at once.
    """
    pool = student.PagePool(budget)
    for name, page in store.items():
        own = page.clone()
        pool.add(name, own)
        own.zero_()  # the store has to hold a copy
    seen = []
    for verb, name, change in actions:
        value = None
        if verb != "release":
            try:
                page = pool.acquire(name)
            except RuntimeError:
                return [*seen, f"no room for {name}"]
            value = page.clone()
            if change is not None:
                page.add_(change)
        if verb != "acquire":
            pool.release(name)
        seen.append((value, list(pool.resident()), pool.used()))
    return seen
