"""Encoding and packing short conversations against TRL: from rows to packs, on the same cores.

Both sides get the same JSON Lines file. minift reads it row by row while it encodes, which is timed, too; TRL finds it
loaded, and `SFTTrainer._prepare_dataset` is timed; each with one and with two processes. TRL's packs lie in a file,
minift's are made of the encoded documents when they are asked for, which is done once for each.

The sides run one after the other, each in a session of its own whose memory is watched: the sum over its processes,
pages that several share counted in parts. That includes the libraries that each imports.

On the first 1000 rows, which is what TRL packs at once, both must make the same packs: ids, labels, lengths. (The first
label of a document is never used, so it is not compared.)
"""

import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

MODEL, LENGTH = "smollm2-135m-instruct", 1024
ROWS, QUICK, ROUNDS, CHECKED = 100_000, 2_000, 3, 1000
SIDES = ("ours", "theirs")


def conversations(count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Rows of one to three pairs of short turns, out of the words of the embedded data."""
    text = (files("minift") / "assets" / "yoda_train.jsonl").read_text(encoding="utf-8")
    messages = [message for line in text.splitlines() for message in json.loads(line)["messages"]]
    words = [word for message in messages for word in message["content"].split()]
    draw = random.Random(seed)
    for _ in range(count):
        turns = [
            {"role": role, "content": " ".join(draw.choices(words, k=draw.randint(4, 12)))}
            for _ in range(draw.randint(1, 3))
            for role in ("user", "assistant")
        ]
        yield {"prompt": turns[:-1], "completion": turns[-1:]}


def run(count: int = ROWS, rounds: int = ROUNDS) -> Iterator[dict[str, Any]]:
    """One row for each number of processes, as harness.py reports rows."""
    from minift.sources.resolve import resolve

    folder = resolve(MODEL)  # fetch it before anything is timed
    with tempfile.TemporaryDirectory() as place:
        data = Path(place) / "rows.jsonl"
        with data.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in conversations(count))
        for processes in (1, 2):
            records: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
            for number in range(rounds):
                for side in sorted(SIDES, reverse=bool(number % 2)):  # who goes first changes
                    records[side].append(measure(side, folder, data, processes))
            yield summarize(count, processes, records)


def measure(side: str, folder: Path, data: Path, processes: int) -> dict[str, Any]:
    """Run one side; its record, with the most memory that it had at any time."""
    command = [sys.executable, "-m", "benchmarks.bench_data", side, str(folder), str(data), str(processes)]
    with tempfile.TemporaryDirectory(dir=data.parent) as cache:  # or `datasets` would find its last result
        quiet = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TRANSFORMERS_VERBOSITY": "error"}
        env = os.environ | quiet | {"HF_DATASETS_CACHE": cache, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env, start_new_session=True)
        watch = Watch(process.pid)
        watch.start()
        out, _ = process.communicate()
        peak = watch.finish()
    found = [line.removeprefix("RECORD ") for line in out.splitlines() if line.startswith("RECORD ")]
    if process.returncode or not found:
        raise RuntimeError(f"a benchmark process ended early (exit status {process.returncode})")
    return json.loads(found[-1]) | {"peak_bytes": peak}


def summarize(count: int, processes: int, records: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The row of one number of processes."""
    name = f"{count:,} conversations, {processes} process{'es' if processes > 1 else ''}"
    if len({record["digest"] for side in SIDES for record in records[side]}) > 1:
        return {"name": name, "disagrees": f"packs of the first {CHECKED} rows differ"}
    rounds = zip(records["theirs"], records["ours"], strict=True)
    ratios = sorted(theirs["seconds"] / ours["seconds"] for theirs, ours in rounds)
    seconds = {side: statistics.median(record["seconds"] for record in records[side]) for side in SIDES}
    peak = {side: max(record["peak_bytes"] for record in records[side]) for side in SIDES}
    packs = {side: records[side][0]["packs"] for side in SIDES}
    return {
        "name": name,
        "ratio": {"least": ratios[0], "median": statistics.median(ratios), "most": ratios[-1]},
        "seconds": seconds,
        "rows_per_second": {side: count / seconds[side] for side in SIDES},
        "peak_bytes": peak,
        "packs": packs,
        "note": (
            f"the range of {len(ratios)} rounds; minift against TRL: {count / seconds['ours']:.0f} against "
            f"{count / seconds['theirs']:.0f} rows/s, peak memory {peak['ours'] / 1e6:.0f} against "
            f"{peak['theirs'] / 1e6:.0f} MB, {packs['ours']} against {packs['theirs']} packs"
        ),
    }


class Watch(threading.Thread):
    """The most memory that the processes of a session have had together."""

    def __init__(self, session: int):
        super().__init__(daemon=True)
        self._session, self._over, self._most = session, threading.Event(), 0

    def run(self) -> None:
        while not self._over.wait(0.1):
            self._most = max(self._most, proportional_bytes(self._session))

    def finish(self) -> int:
        self._over.set()
        self.join()
        return self._most


def proportional_bytes(session: int) -> int:
    """Memory of all processes of a session; a page that n processes share counts 1/n for each."""
    total = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[3]) == session:
                lines = (stat.parent / "smaps_rollup").read_text().splitlines()
                total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
        except OSError:  # it has ended meanwhile
            continue
    return total


# --- the workers ------------------------------------------------------------------------------------------------------


def say(seconds: float, packs: int, checked: list[tuple[list[int], list[int], list[int]]]) -> None:
    """`checked`: ids, labels and lengths of each pack of the first rows."""
    for _, labels, lengths in checked:
        for end in range(len(lengths)):
            labels[sum(lengths[:end])] = -100
    digest = hashlib.sha256(json.dumps([[*map(list, pack)] for pack in checked]).encode()).hexdigest()
    print("RECORD " + json.dumps({"seconds": seconds, "packs": packs, "digest": digest}), flush=True)


def work_ours(folder: str, data: str, processes: int) -> None:
    import numpy as np

    import minift
    from minift.data.cache import encode_cached
    from minift.data.files import read_records
    from minift.data.formats import to_row
    from minift.data.packing import lay_out, pack

    tokenizer = minift.load_tokenizer(folder)
    began = time.perf_counter()
    rows = (to_row(record, where) for where, record in read_records(data))
    store = encode_cached(tokenizer, rows, max_length=LENGTH, processes=processes)
    layout = lay_out(store.lengths, LENGTH)
    for number in range(len(layout)):
        layout.row(store, number)
    seconds = time.perf_counter() - began
    checked = [
        (row.input_ids_bs[0].tolist(), row.labels_bs[0].tolist(), np.bincount(row.documents_bs[0]).tolist())
        for row in pack(store[:CHECKED], LENGTH)
    ]
    say(seconds, len(layout), checked)


def work_theirs(folder: str, data: str, processes: int) -> None:
    from datasets import Dataset, load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tiny = LlamaConfig(  # only the data is of interest
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    dataset = load_dataset("json", data_files=data, split="train")
    assert isinstance(dataset, Dataset)
    with tempfile.TemporaryDirectory() as place:
        config = SFTConfig(
            output_dir=place, use_cpu=True, bf16=False, report_to="none", max_length=LENGTH, packing=True,
            dataset_num_proc=processes if processes > 1 else None,
        )  # fmt: skip
        few = dataset.select(range(2))
        model = AutoModelForCausalLM.from_config(tiny)
        trainer = SFTTrainer(model=model, args=config, train_dataset=few, processing_class=tokenizer)

        def prepare(part: Dataset) -> Any:
            return trainer._prepare_dataset(part, tokenizer, config, True, None, "train")

        began = time.perf_counter()
        packs = prepare(dataset)
        seconds = time.perf_counter() - began
        config.dataset_num_proc = None  # each process would pack its share
        first = prepare(dataset.select(range(min(CHECKED, len(dataset)))))
        say(seconds, len(packs), [(row["input_ids"], row["labels"], row["seq_lengths"]) for row in first])


if __name__ == "__main__":
    if sys.argv[1:2] in (["ours"], ["theirs"]):
        {"ours": work_ours, "theirs": work_theirs}[sys.argv[1]](sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        for row in run(QUICK, rounds=1) if sys.argv[1:] == ["--quick"] else run():
            print(json.dumps(row, indent=2))
