"""Which rows each step sees: a pure function of the seed and the step's number, so that resuming needs no replay.

rows of the data set -> examples (examined) -> rows that can be drawn (an example, or a pack) -> micro-batches
"""

from collections.abc import Callable, Sequence

from minift.adapters.method import method_of
from minift.adapters.switched import switched
from minift.data.batching import by_length, order
from minift.data.cache import cache_key, find, keep
from minift.data.collate import Batch, collate, share_prefix, stack
from minift.data.encode import Example
from minift.data.formats import Row
from minift.data.packing import lay_out, pack_report
from minift.data.report import DataReport, examine
from minift.data.store import flat
from minift.data.tokenizer import Tokenizer
from minift.model.decoder import CausalLM
from minift.quant.linear import QuantizedLinear
from minift.train.config import TrainConfig


def encoded(
    tokenizer: Tokenizer, rows: Sequence[Row], config: TrainConfig, say: Callable[[str], object]
) -> Sequence[Example]:
    """The examples to train on: with a report of what they train, or out of the cache."""
    key = ""
    if config.cache:
        key = cache_key(tokenizer, rows, config.loss_on, config.row_limit, False, config.problems == "drop")
        key = f"{key}-examined"  # encode_cached refuses less than a report does
        if (store := find(config.cache, key)) is not None:
            say(f"{len(store):,} rows of {int(store.lengths.sum()):,} tokens from {store.path}")
            return store
    data = examine_rows(tokenizer, rows, config)
    say(data.format())
    return keep(config.cache, key, [flat(data.examples)]) if config.cache else data.examples


def examine_rows(tokenizer: Tokenizer, rows: Sequence[Row], config: TrainConfig) -> DataReport:
    """Encode every row, and stop where a row would train nothing (see data/report.py)."""
    return examine(tokenizer, rows, config.loss_on, config.row_limit, problems=config.problems)


def longest_row(tokenizer: Tokenizer, rows: Sequence[Row], config: TrainConfig) -> int:
    """Tokens of the longest row that a batch can hold."""
    if config.packing != "none":
        return config.max_length
    return max(len(example) for example in encoded(tokenizer, rows, config, lambda text: None))


def drawable(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    config: TrainConfig,
    say: Callable[[str], object] = lambda text: None,
) -> list[Batch]:
    """One Batch of one row for each row that a micro-batch can draw: an example, or a pack; says how full packs are."""
    if not examples:
        raise ValueError("nothing to train on: no rows")
    if config.packing == "none":
        return [collate([example], tokenizer.pad_id or 0) for example in examples]
    layout = lay_out([len(example) for example in examples], config.max_length, config.packing)
    packs = [layout.row(examples, number) for number in range(len(layout))]
    say(pack_report(layout, packs).format())
    return [row for row in packs if row.trained_tokens]  # a wrapped row may hold nothing but a long prompt


def prepare(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    config: TrainConfig,
    say: Callable[[str], object] = lambda text: None,
) -> list[Batch]:
    """`drawable`, or ValueError if that is less than one batch."""
    rows = drawable(examples, tokenizer, config, say)
    if len(rows) < config.batch_size:
        kind = "rows" if config.packing == "none" else "packed rows"
        raise ValueError(
            f"the data holds {len(rows)} {kind}, fewer than one batch of {config.batch_size}: lower batch_size"
        )
    return rows


def evaluation_batches(examples: Sequence[Example], tokenizer: Tokenizer, config: TrainConfig) -> list[Batch]:
    """All rows once, those of similar length together, laid out as in training."""
    rows = sorted(drawable(examples, tokenizer, config), key=lambda row: row.input_ids_bs.shape[1])
    groups = [rows[start : start + config.batch_size] for start in range(0, len(rows), config.batch_size)]
    batches = [stack(group, tokenizer.pad_id or 0) for group in groups]
    return [share_prefix(batch) for batch in batches] if config.share_prefix else batches


def check_trainable(model: CausalLM) -> None:
    """Refuse a quantized model without an adapter: its weights have no gradient, only those around them have one."""
    path = next((path for path, module in model.named_modules() if isinstance(module, QuantizedLinear)), None)
    if path is not None and not switched(model) and method_of(model) is None:
        raise ValueError(
            f"{path} is quantized, so it has no gradient, and the model has no adapter: only embeddings and norms "
            "would be trained; add an adapter (add_lora), or load the model without quantization"
        )


def check_ids(rows: Sequence[Batch], tokenizer: Tokenizer, embedding_rows: int) -> None:
    """Refuse tokens that the embedding has no row for, which a GPU reports as a "device-side assert", too late."""
    for row in rows:
        highest = int(row.input_ids_bs.max())
        if highest >= embedding_rows:
            raise ValueError(
                f"token {highest} ({tokenizer.decode([highest])!r}) has no row in the embedding, which has "
                f"{embedding_rows}: call resize_embeddings(model, len(tokenizer)) before adapters are added, or take "
                "the tokenizer that belongs to the model"
            )


class Plan:
    """Which rows each optimizer step sees.

    An epoch is ceil(rows / batch_size) micro-batches, the last one possibly smaller; a step takes
    `gradient_accumulation` of them, and the last step of an epoch what is left (transformers' Trainer counts the same
    way).
    """

    def __init__(self, rows: Sequence[Batch], pad_id: int, config: TrainConfig, share: bool):
        self.rows, self.pad_id, self.config, self.share = rows, pad_id, config, share
        per_step = config.batch_size * config.gradient_accumulation
        self.steps_per_epoch = -(-len(rows) // per_step)
        self.total_steps = config.max_steps or config.epochs * self.steps_per_epoch
        self._epoch, self._groups = -1, []

    def check(self) -> None:
        """ValueError if no step of an epoch could ever hold as many micro-batches as were asked for."""
        batches, asked = -(-len(self.rows) // self.config.batch_size), self.config.gradient_accumulation
        if batches < asked:
            raise ValueError(
                f"gradient_accumulation {asked} asks for more than the data holds: {len(self.rows)} rows make "
                f"{batches} micro-batches of {self.config.batch_size}; lower it to {batches}, or lower batch_size"
            )

    def micro_batches(self, step: int) -> list[Batch]:
        """The micro-batches of step number `step`, counted from 0."""
        epoch, within = divmod(step, self.steps_per_epoch)
        first = within * self.config.gradient_accumulation
        groups = self._batches(epoch)[first : first + self.config.gradient_accumulation]
        batches = [stack([self.rows[index] for index in group], self.pad_id) for group in groups]
        return [share_prefix(batch) for batch in batches] if self.share else batches

    def _batches(self, epoch: int) -> list[list[int]]:
        """The rows of every micro-batch of an epoch; kept until another epoch is asked for."""
        if self._epoch != epoch:
            config, count = self.config, len(self.rows)
            if config.group_by_length:
                lengths = [row.input_ids_bs.shape[1] for row in self.rows]
                groups = by_length(lengths, config.batch_size, config.seed, epoch)
            else:
                drawn = order(count, config.seed, epoch) if config.shuffle else list(range(count))
                groups = [drawn[start : start + config.batch_size] for start in range(0, count, config.batch_size)]
            self._epoch, self._groups = epoch, groups
        return self._groups
