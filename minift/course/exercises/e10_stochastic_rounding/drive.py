"""e10: calls with known states of the given and of the global generator."""

import torch


def repeated(student, x, seed):
    """Twice from one seed, with another global state each time; then once more from where the generator stands."""
    answers, untouched = [], True
    generator = torch.Generator()
    for again in (1, 2):
        generator.manual_seed(seed)
        torch.manual_seed(again)
        before = torch.get_rng_state()
        answers.append(student.stochastic_round(x, generator))
        untouched = untouched and torch.equal(before, torch.get_rng_state())
    answers.append(student.stochastic_round(x, generator))
    return answers, untouched
