"""The batch that fits where memory really ends: a process that the system refuses more than so much."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import resource, sys
import torch
import minift
from minift.study import fit
from minift.train.config import TrainConfig

torch.set_num_threads(1)
model = minift.load_model(sys.argv[1], dtype=torch.float32, attention="eager").train()
minift.add_lora(model, minift.LoraConfig(r=4))
config = TrainConfig(batch_size=64, output_dir=sys.argv[2])
fit.backward(model, fit._batch(model, 1, 64), 63)  # what is made once
model.zero_grad()
with open("/proc/self/statm") as file:
    taken = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + int(sys.argv[3]),) * 2)
fit.free_memory = lambda device: 1 << 40  # the prediction is told that there is plenty
found = fit.fit_batch(model, config, 512)
print("found", found.batch_size, found.gradient_accumulation, fit._more_bytes(model, config, found.batch_size, 512))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the address space")
def test_halved_until_the_system_gives_enough(tiny: Path, tmp_path: Path):
    """With 256 MB more than what it began with. What was found fits; twice that was refused."""
    limit = 256 << 20
    command = [sys.executable, "-c", PROGRAM, str(tiny), str(tmp_path), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    word, size, accumulation, bytes_ = done.stdout.split()
    assert word == "found" and int(size) * int(accumulation) == 64
    # The prediction says what it found would take, and twice that does not: the allocator rounds up, and keeps gaps.
    assert 1 <= int(size) < 64 and 0.2 * limit < int(bytes_) < limit
