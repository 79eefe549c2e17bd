"""The main job: fine-tune a real model on a small data set and see it change.

    find the model -> load it in NF4 -> add LoRA -> ask -> train -> ask again -> save

The data are 500 plain English sentences with their Yoda-like form (`minift/assets`), 450 to train on and 50 held out.
The rule behind them is one rotation: what follows the finite verb goes to the front,

    The bread is | still warm.      ->      Still warm, the bread is.

so whether an answer has the right word order can be checked word by word.
"""

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from minift.adapters.inject import add_lora, count_parameters
from minift.adapters.lora import LoraConfig
from minift.atomic import atomic_file
from minift.data.formats import Row, read_dataset
from minift.data.tokenizer import load_tokenizer
from minift.model.generate import generate_batch
from minift.model.load import load_model
from minift.model.sampling import GREEDY
from minift.study.memory import name_of, peak_memory
from minift.study.plots.runs import loss_curve
from minift.study.watch import MemoryWatch
from minift.train.config import TrainConfig
from minift.train.loop import TrainResult, train

SHOWN = 5  # held-out sentences that are printed


@dataclass(frozen=True)
class DemoResult:
    """What the demo returns: the run, and the share of held-out sentences in the right word order, before and after."""

    training: TrainResult
    right_before: float
    right_after: float


def yoda_rows(part: str) -> list[Row]:
    """The embedded data: part "train" (450 rows) or "heldout" (50 rows)."""
    return read_dataset(str(files("minift") / "assets" / f"yoda_{part}.jsonl"))


def same_word_order(answer: str, reference: str) -> bool:
    """Whether both texts are the same words in the same order; case and punctuation do not count."""
    return re.findall(r"[\w']+", answer.lower()) == re.findall(r"[\w']+", reference.lower())


def run_demo(
    model_name: str,
    quantize: str | None,
    dtype: torch.dtype,
    device: str,
    lora: LoraConfig,
    config: TrainConfig,
    say: Callable[[str], Any] = print,
) -> DemoResult:
    """Run the main job; `say` receives every line of the report."""
    began = time.perf_counter()
    tokenizer = load_tokenizer(model_name)
    # Rows of some 50 tokens on a CPU: the written-out form is twice as fast as the fused one (attention.py).
    model = load_model(model_name, quantize, dtype, device, attention="eager" if device == "cpu" else "sdpa")
    heldout = yoda_rows("heldout")
    wrapped = add_lora(model, lora)
    trained, total = count_parameters(model)
    say(f"Model      {model_name}, {total - trained:,} weights, linears in {quantize or name_of(dtype)}")
    say(f"Compute    {name_of(dtype)} on {device}, {torch.get_num_threads()} threads")
    say(f"LoRA       r={lora.r}, alpha={lora.alpha:g} on {len(wrapped)} layers: {trained:,} trained parameters")

    before = _answers(model, tokenizer, heldout)
    result = train(model, tokenizer, yoda_rows("train"), config, watch=MemoryWatch(config, say))
    if not result.finished:
        return DemoResult(result, _share(before, heldout), float("nan"))
    after = _answers(model, tokenizer, heldout)

    for row, old, new in list(zip(heldout, before, after, strict=True))[:SHOWN]:
        say(f"\nsentence   {row['messages'][0]['content']}\nbefore     {_one_line(old)}\nafter      {_one_line(new)}")
    shares = _share(before, heldout), _share(after, heldout)
    first, last = result.steps[0], result.steps[-1]
    seconds = sum(record.seconds for record in result.steps)
    trained_tokens = sum(record.trained_tokens for record in result.steps)
    _save_answers(result.output_dir / "answers.json", heldout, before, after)
    loss_curve(result.steps, f"{model_name}: training loss").save(result.output_dir / "loss.png")
    say(f"\nHeld-out   {shares[1]:.0%} of {len(heldout)} sentences in the right word order (before: {shares[0]:.0%})")
    say(f"Loss       {first.loss:.3f} -> {last.loss:.3f} in {len(result.steps)} steps")
    say(
        f"Speed      {seconds / len(result.steps):.2f} s a step, {trained_tokens / seconds:.0f} trained tokens a second"
    )
    peak = peak_memory(max(record.peak_memory or 0 for record in result.steps))
    say(f"Peak       {peak / 1e9:.2f} GB of memory; {time.perf_counter() - began:.0f} s in all")
    say(
        f"Saved      {result.adapter} (adapter, PEFT's format), loss.png, log.json, answers.json in {result.output_dir}"
    )
    say(f"Try it     minift chat --model {model_name} --adapter {result.adapter}")
    return DemoResult(result, *shares)


def _answers(model: Any, tokenizer: Any, rows: Sequence[Row]) -> list[str]:
    return generate_batch(model, tokenizer, [row["messages"][:1] for row in rows], max_new_tokens=24, sampling=GREEDY)


def _share(answers: Sequence[str], rows: Sequence[Row]) -> float:
    right = [same_word_order(a, row["messages"][1]["content"]) for a, row in zip(answers, rows, strict=True)]
    return sum(right) / len(right)


def _one_line(text: str, width: int = 100) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


def _save_answers(path: Path, rows: Sequence[Row], before: Sequence[str], after: Sequence[str]) -> None:
    content = [
        {"sentence": row["messages"][0]["content"], "reference": row["messages"][1]["content"], "before": b, "after": a}
        for row, b, a in zip(rows, before, after, strict=True)
    ]
    with atomic_file(path) as place:
        place.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
