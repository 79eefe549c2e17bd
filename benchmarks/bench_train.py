"""The main job against transformers + PEFT + TRL + bitsandbytes: same model, rows, order, adapter, schedule, steps.

Each side runs in a process of its own, so that its peak memory is its own, and waits on a pipe before every step. The
parent lets them step in turn, so both see the same noise of a shared machine. The first two steps (allocation, caches)
are not timed.

Four comparisons:

    as shipped     what a user gets: TRL's defaults (fp32 weights, bf16 autocast, gradient checkpointing) and minift's
    packed         the same with documents packed into rows of 512 tokens
    bf16           the peers at their fastest: bf16 weights, no checkpointing
    fp32           both in fp32 with 32-bit AdamW, no checkpointing: the arithmetic is the same, so must be the losses

Trained tokens are the labels that count; both sides train on the same ones.
"""

import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from tqdm import tqdm

MODEL = "smollm2-135m-instruct"
BATCH, STEPS, WARM, LR = 16, 6, 2, 1e-3
PACKED_BATCH, PACKED_LENGTH = 2, 512
SETTINGS = ("as shipped", "packed", "bf16", "fp32")


@dataclass
class Side:
    """A worker process. `step()` lets it take one optimizer step and returns its record."""

    process: subprocess.Popen

    @classmethod
    def start(cls, side: str, setting: str) -> "Side":
        command = [sys.executable, "-m", "benchmarks.bench_train", side, setting]
        quiet = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TRANSFORMERS_VERBOSITY": "error"}
        pipe = subprocess.PIPE
        return cls(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=os.environ | quiet, bufsize=1))

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("RECORD "):
                return json.loads(line.removeprefix("RECORD "))
        raise RuntimeError(f"a benchmark process ended early (exit status {self.process.wait()})")

    def step(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        return self.answer()


def run() -> Iterator[dict[str, Any]]:
    """One row a setting, as harness.py reports rows. The rounds are few, so their range stands for percentiles."""
    from minift.sources.resolve import resolve

    resolve(MODEL)  # fetch it before anything is timed
    for setting in SETTINGS:
        yield summarize(setting, compare(setting))


def compare(setting: str) -> dict[str, list[dict[str, Any]]]:
    """Step both sides in turn; the records of each."""
    sides = {name: Side.start(name, setting) for name in ("ours", "theirs")}
    try:
        for side in sides.values():
            side.answer()  # loaded
        records: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
        for step in tqdm(range(STEPS), desc=setting, leave=False, disable=None):
            for name in sorted(sides, reverse=bool(step % 2)):  # who goes first changes
                records[name].append(sides[name].step())
        return records
    finally:
        for side in sides.values():
            side.process.kill()


def summarize(setting: str, records: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The row of one setting."""
    timed = {name: steps[WARM:] for name, steps in records.items()}
    rounds = zip(timed["theirs"], timed["ours"], strict=True)
    ratios = sorted(theirs["seconds"] / ours["seconds"] for theirs, ours in rounds)
    speed = {
        name: sum(r["trained_tokens"] for r in steps) / sum(r["seconds"] for r in steps)
        for name, steps in timed.items()
    }
    peak = {name: steps[-1]["peak_bytes"] for name, steps in records.items()}
    losses = {name: [r["loss"] for r in steps] for name, steps in records.items()}
    return {
        "name": setting,
        "ratio": {"least": ratios[0], "median": statistics.median(ratios), "most": ratios[-1]},
        "seconds": {name: statistics.median(r["seconds"] for r in steps) for name, steps in timed.items()},
        "trained_tokens_per_second": speed,
        "peak_bytes": peak,
        "losses": losses,
        "note": (
            f"a step; the range of {len(ratios)} rounds; minift against the peers: {speed['ours']:.0f} against "
            f"{speed['theirs']:.0f} trained tokens/s, peak memory {peak['ours'] / 1e9:.2f} against "
            f"{peak['theirs'] / 1e9:.2f} GB, loss after {len(losses['ours'])} steps {losses['ours'][-1]:.4f} against "
            f"{losses['theirs'][-1]:.4f}"
        ),
    }


# --- the workers ----------------------------------------------------------------------------------------------------


def say(record: dict[str, Any]) -> None:
    print("RECORD " + json.dumps(record), flush=True)


def wait() -> None:
    """Until the parent says go."""
    if not sys.stdin.readline():
        raise SystemExit


def measured(seconds: float, loss: float, trained_tokens: int) -> dict[str, Any]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "loss": loss, "trained_tokens": trained_tokens, "peak_bytes": peak}


def work_ours(setting: str) -> None:
    import torch

    import minift
    from minift.demo import yoda_rows
    from minift.train.loop import Plan, examine_rows, prepare
    from minift.train.step import train_step

    fp32 = setting == "fp32"
    tokenizer = minift.load_tokenizer(MODEL)
    attention = None if setting == "packed" else "eager"  # faster for short rows
    model = minift.load_model(MODEL, "nf4", torch.float32 if fp32 else torch.bfloat16, attention=attention)
    torch.manual_seed(0)
    minift.add_lora(model, minift.LoraConfig(r=8, alpha=16))
    config = minift.TrainConfig(batch_size=BATCH, max_steps=STEPS, shuffle=False)
    if setting == "packed":
        config = replace(config, batch_size=PACKED_BATCH, packing="bfd", max_length=PACKED_LENGTH)
    plan = Plan(
        prepare(examine_rows(tokenizer, yoda_rows("train"), config).examples, tokenizer, config), 0, config, share=True
    )
    optimizer = (minift.AdamW if fp32 else minift.AdamW8bit)((p for p in model.parameters() if p.requires_grad), lr=LR)
    model.train()
    say({})
    for step in range(STEPS):
        wait()
        began = time.perf_counter()
        stats = train_step(model, plan.micro_batches(step), optimizer)
        say(measured(time.perf_counter() - began, stats.loss, stats.trained_tokens))


def count(rows: list[list[int]], lengths: list[list[int]] | None) -> int:
    """Labels that count: not -100, and not the first of a document, which nothing predicts."""
    firsts = (
        [list(itertools.accumulate(sizes, initial=0))[:-1] for sizes in lengths] if lengths else [[0] for _ in rows]
    )
    trained = sum(label != -100 for labels in rows for label in labels)
    return trained - sum(labels[i] != -100 for labels, starts in zip(rows, firsts, strict=True) for i in starts)


def work_theirs(setting: str) -> None:
    import torch
    import transformers
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from minift.demo import yoda_rows
    from minift.sources.resolve import resolve

    transformers.utils.logging.disable_progress_bar()
    folder = str(resolve(MODEL))
    weights = torch.bfloat16 if setting == "bf16" else torch.float32
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32 if setting == "fp32" else torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=weights, quantization_config=quantization, device_map={"": "cpu"}
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
    # For a quantized base SFTTrainer rounds the adapter to bf16; in the fp32 comparison it is put back.
    drawn = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    rows = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in yoda_rows("train")]

    packing = {"packing": True, "max_length": PACKED_LENGTH} if setting == "packed" else {}
    rows_a_step = PACKED_BATCH if packing else BATCH

    class Pace(TrainerCallback):
        step = 0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            wait()
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds = time.perf_counter() - self.began

        def on_log(self, _args: Any, _state: Any, _control: Any, logs: Any = None, **__: Any) -> None:
            if logs and "loss" in logs:
                assert trainer.train_dataset is not None
                batch = trainer.train_dataset[self.step * rows_a_step : (self.step + 1) * rows_a_step]
                trained = count(batch["labels"], batch.get("seq_lengths"))
                self.step += 1
                say(measured(self.seconds, logs["loss"], trained))

    with tempfile.TemporaryDirectory() as place:
        config = SFTConfig(
            output_dir=place, use_cpu=True, bf16=setting != "fp32",
            gradient_checkpointing=setting in ("as shipped", "packed"),
            # One step more than it will be told to take: after the last one it would put away the model while
            # minift takes its own last step.
            per_device_train_batch_size=rows_a_step, max_steps=STEPS + 1, learning_rate=LR,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential", logging_steps=1, report_to="none", save_strategy="no",
            disable_tqdm=True, loss_type="nll", optim="adamw_torch", dataloader_pin_memory=False, **packing,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(folder),
            callbacks=[Pace()],
        )
        if setting == "fp32":
            for name, p in model.named_parameters():
                if name in drawn:
                    p.data = drawn[name].clone()
        say({})
        trainer.train()


if __name__ == "__main__":
    {"ours": work_ours, "theirs": work_theirs}[sys.argv[1]](sys.argv[2])
