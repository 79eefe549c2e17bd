"""Two things said of LoRA, tried out: it wants a higher learning rate than full fine-tuning, and it suffers more from
large batches.

The experiment fits on a CPU and needs nothing but what it makes itself:

    a language     the next token depends on the two before it; the probabilities are known, and with them the lowest
                   loss that any model can have
    old and new    the logits of the new one are cos(turn) of the old ones and sin(turn) of others
    the model      a Llama of one block, trained on the old language from random weights
    a trial        training on a fixed number of samples of the new language, by one method, at one learning rate, in
                   batches of one size; then the loss on held-out samples

    excess = held-out loss - loss of the true probabilities on the same tokens          nats a token; 0 is perfect

Every sample is fresh, so nothing can be learned by heart. All trials of a seed see the same samples in the same order,
cut into batches of one size or another; seeds differ in samples and in the first values of A. AdamW without weight
decay, no warm-up, cosine to zero. Methods are compared each at its own best rate: one rate for both would only say whom
it suits.

Left out: what this cannot say, how much of it holds for billions of parameters, texts of people and many epochs.

Source of both claims: LoRA Without Regret, Thinking Machines Lab, 2025.
"""

import copy
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minift.adapters.config import LoraConfig
from minift.adapters.method import Method
from minift.adapters.own import FullConfig
from minift.adapters.verbs import add_adapter
from minift.data.collate import FILLERS, Batch
from minift.data.encode import IGNORE
from minift.model.config import ModelConfig
from minift.model.decoder import CausalLM
from minift.optim.adamw import AdamW
from minift.optim.schedule import lr_factor
from minift.train.evaluate import evaluate
from minift.train.step import train_step

LENGTH, HELDOUT = 16, 512  # tokens of a sample; samples
METHODS: dict[str, LoraConfig | Method] = {"lora": LoraConfig(r=8, alpha=16), "full": FullConfig()}
RATES = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2, 0.128)
BATCHES = (16, 64, 256)
SEEDS = (0, 1, 2, 3)


@dataclass(frozen=True)
class Language:
    """Random text whose next token depends on the two before it.

    Attributes:
        log_p_vvv: log-probabilities [token before the last, last token, next token], fp32.
    """

    log_p_vvv: Tensor

    def sample(self, samples: int, generator: torch.Generator, length: int = LENGTH) -> Batch:
        """Texts of `length` tokens, of which the first two are drawn evenly and have no label."""
        size = len(self.log_p_vvv)
        ids_bs = torch.randint(size, (samples, length), generator=generator)
        for at in range(2, length):
            p_bv = self.log_p_vvv[ids_bs[:, at - 2], ids_bs[:, at - 1]].exp()
            ids_bs[:, at] = torch.multinomial(p_bv, 1, generator=generator)[:, 0]
        labels_bs = ids_bs.clone()
        labels_bs[:, :2] = IGNORE
        return Batch(ids_bs, labels_bs, torch.arange(length).expand_as(ids_bs), torch.zeros_like(ids_bs))

    def loss(self, batch: Batch) -> float:
        """Of the true probabilities, mean over the tokens with labels: no model does better but by luck."""
        ids_bs = batch.input_ids_bs
        return -self.log_p_vvv[ids_bs[:, :-2], ids_bs[:, 1:-1], ids_bs[:, 2:]].double().mean().item()


def languages(new: int = 1, turn: float = 0.6, vocabulary: int = 32, seed: int = 0) -> list[Language]:
    """The old language, and new ones that have nothing in common but the old one.

    Args:
        new: how many new ones.
        turn: angle between the logits of the old and a new one: 0 is the same language, pi / 2 an unrelated one.
    """
    generator = torch.Generator().manual_seed(seed)

    def logits_vvv() -> Tensor:  # a part for each of the two tokens before, of deviation 2 together
        shapes = (vocabulary, 1, vocabulary), (1, vocabulary, vocabulary)
        return math.sqrt(2) * sum((torch.randn(s, generator=generator) for s in shapes), torch.zeros(()))

    old_vvv = logits_vvv()
    others = [math.cos(turn) * old_vvv + math.sin(turn) * logits_vvv() for _ in range(new)]
    return [Language(logits.log_softmax(-1)) for logits in (old_vvv, *others)]


def speaker(language: Language, width: int = 64, samples: int = 16384, seed: int = 0) -> CausalLM:
    """A small model that was trained on a language from random weights."""
    shape = {
        "model_type": "llama", "vocab_size": len(language.log_p_vvv), "hidden_size": width,
        "intermediate_size": 4 * width, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4,
        "max_position_embeddings": 4 * LENGTH, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CausalLM(ModelConfig.from_dict(shape), attention="eager")
    fit(model, language.sample(samples, torch.Generator().manual_seed(seed)), batch_size=64, lr=1e-2)
    return model


def fit(model: CausalLM, samples: Batch, batch_size: int, lr: float) -> None:
    """Train on every sample once, in the given order."""
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    starts = range(0, len(samples.input_ids_bs), batch_size)
    model.train()
    for step, start in enumerate(starts):
        optimizer.param_groups[0]["lr"] = lr * lr_factor("cosine", step, len(starts))
        train_step(model, [_rows(samples, start, start + batch_size)], optimizer)


def _rows(samples: Batch, start: int, stop: int) -> Batch:
    columns = {name: getattr(samples, name)[start:stop] for name in FILLERS}
    return replace(samples, **columns)


@dataclass(frozen=True)
class Trial:
    """One training run.

    Attributes:
        excess: held-out loss above that of the true probabilities, nats a token; infinite if the run diverged.
    """

    method: str
    batch_size: int
    lr: float
    seed: int
    excess: float


def run_trials(
    model: CausalLM,
    language: Language,
    methods: Mapping[str, LoraConfig | Method] = METHODS,
    rates: Sequence[float] = RATES,
    batch_sizes: Sequence[int] = BATCHES,
    samples: int = 1024,
    seeds: Sequence[int] = SEEDS,
    say: Callable[[Trial], object] = lambda trial: None,
) -> list[Trial]:
    """Every method at every rate and batch size, for every seed; the model itself is left as it is.

    Args:
        say: told of each trial.

    Raises:
        ValueError: a batch size that does not divide the number of samples.
    """
    uneven = [size for size in batch_sizes if samples % size]
    if uneven:
        raise ValueError(f"{samples} samples do not make whole batches of {uneven[0]}")
    heldout = language.sample(HELDOUT, torch.Generator().manual_seed(-1))
    found = []
    for seed in seeds:
        drawn = language.sample(samples, torch.Generator().manual_seed(seed))
        for name, config in methods.items():
            for size in batch_sizes:
                for lr in rates:
                    loss = _trained_loss(model, config, drawn, size, lr, seed, heldout)
                    found.append(Trial(name, size, lr, seed, loss - language.loss(heldout)))
                    say(found[-1])
    return found


def _trained_loss(
    model: CausalLM, config: LoraConfig | Method, drawn: Batch, size: int, lr: float, seed: int, heldout: Batch
) -> float:
    model = copy.deepcopy(model)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        add_adapter(model, config)
    try:
        fit(model, drawn, size, lr)
        loss = evaluate(model, [heldout]).loss
    except FloatingPointError:
        return math.inf
    return loss if math.isfinite(loss) else math.inf


def best(trials: Sequence[Trial], method: str, batch_size: int, seed: int) -> Trial:
    """The trial with the lowest loss of all rates.

    Raises:
        ValueError: there is no such trial.
    """
    own = [t for t in trials if (t.method, t.batch_size, t.seed) == (method, batch_size, seed)]
    if not own:
        raise ValueError(f"no trial of {method!r} with batches of {batch_size} and seed {seed}")
    return min(own, key=lambda trial: trial.excess)


def at_edge(trials: Sequence[Trial], trial: Trial) -> bool:
    """Whether a rate is the lowest or highest that was tried: then the best one may lie outside."""
    rates = [t.lr for t in trials if t.method == trial.method and t.batch_size == trial.batch_size]
    return trial.lr in (min(rates), max(rates))


def rate_ratios(trials: Sequence[Trial], batch_size: int, one: str = "lora", other: str = "full") -> list[float]:
    """Best rate of one method divided by that of the other, for each seed."""
    return [best(trials, one, batch_size, s).lr / best(trials, other, batch_size, s).lr for s in _seeds(trials)]


def gaps(trials: Sequence[Trial], batch_size: int, one: str = "lora", other: str = "full") -> list[float]:
    """Loss of one method minus that of the other, each at its best rate, for each seed."""
    return [best(trials, one, batch_size, s).excess - best(trials, other, batch_size, s).excess for s in _seeds(trials)]


def _seeds(trials: Sequence[Trial]) -> list[int]:
    return sorted({trial.seed for trial in trials})


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and standard error of the mean (of at least two values)."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def means(trials: Sequence[Trial]) -> dict[tuple[str, int], dict[float, float]]:
    """Mean excess over the seeds, by method and batch size, and by rate in these."""
    groups: dict[tuple[str, int], dict[float, list[float]]] = {}
    for t in trials:
        groups.setdefault((t.method, t.batch_size), {}).setdefault(t.lr, []).append(t.excess)
    return {key: {lr: statistics.fmean(values) for lr, values in rows.items()} for key, rows in groups.items()}


def format_trials(trials: Sequence[Trial]) -> str:
    """Mean excess loss, a row for each method and batch size, a column for each rate; the lowest has a star."""
    rates = sorted({t.lr for t in trials})
    lines = [f"{'method':<12}{'batch':>6}" + "".join(f"{lr:>10.4g}" for lr in rates)]
    for (method, size), row in means(trials).items():
        lowest = min(row.values())
        cells = [f"{row[lr]:.3f}{'*' if row[lr] == lowest else ' '}" if lr in row else "" for lr in rates]
        lines.append(f"{method:<12}{size:>6}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)
