"""All methods on SmolLM2-135M and the embedded data: `python -m benchmarks.methods`.

Twelve steps of eight rows each, in bf16, so that full fine-tuning can take part, too; the loss is that of these rows,
before and after. Writes results/methods/.
"""

import json
import platform
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

import minift
from benchmarks.__main__ import machine, versions
from minift.atomic import atomic_file
from minift.demo import yoda_rows
from minift.study.methods import compare, every_method, format_methods
from minift.study.plots.lora import method_bars
from minift.train.plan import examine_rows

MODEL, BATCH, STEPS = "smollm2-135m-instruct", 8, 12
RESULTS = Path(__file__).parent / "results" / "methods"


def main() -> None:
    tokenizer = minift.load_tokenizer(MODEL)
    examples = examine_rows(tokenizer, yoda_rows("train"), minift.TrainConfig()).examples[: BATCH * STEPS]
    batches = [
        minift.collate(examples[i : i + BATCH], tokenizer.pad_id or 0) for i in range(0, len(examples), BATCH)
    ]  # fmt: skip

    def load() -> minift.CausalLM:
        return minift.load_model(MODEL, dtype=torch.bfloat16, attention="eager")

    rows = []
    for name, config in tqdm(every_method().items()):
        rows += compare(load, {name: config}, batches, STEPS)
        tqdm.write(format_methods(rows[-1:]))
    print(format_methods(rows))
    content = {
        "machine": machine("cpu"), "system": platform.platform(), "versions": versions(), "steps": STEPS,
        "rows_a_step": BATCH, "rows": [asdict(row) for row in rows],
    }  # fmt: skip
    with atomic_file(RESULTS / "table.json") as place:
        place.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "table.txt").write_text(format_methods(rows) + "\n", encoding="utf-8")
    method_bars(rows, seconds=True).save(RESULTS / "table.png")


if __name__ == "__main__":
    main()
