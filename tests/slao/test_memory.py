"""A thousand tasks take no more memory than a few."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CYCLES = """
import gc, sys, torch
from peft import LoraConfig, get_peft_model
import slao_kernels
from slao.methods import make_method
from slao_kernels.testing import tiny_model

torch.set_num_threads(1)
torch.manual_seed(0)

def resident():
    gc.collect()
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS:")).split()[1])

model = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules="all-linear"))
slao_kernels.patch(model)
method = make_method(sys.argv[1], model)
generator = torch.Generator().manual_seed(1)

def cycle():
    method.begin_task("task")
    with torch.no_grad():
        for pair in method.pairs:
            pair.B.add_(torch.randn(pair.B.shape, generator=generator), alpha=0.01)
    method.end_task()

for _ in range(50):
    cycle()
before = resident()
for _ in range(int(sys.argv[2])):
    cycle()
print(method.task, before, resident())
"""


@pytest.mark.exhaustive
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the resident memory from /proc")
@pytest.mark.parametrize("name", ["slao", "clora"])
def test_a_thousand_tasks(name):
    """A merged B kept by every one of them would be 15 % of the process."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CYCLES, name, "1000"]
    done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
    done_tasks, before, after = map(int, done.stdout.split())
    assert done_tasks == 1050
    assert before > 50_000, "KiB of a process with torch in it"
    assert after < 1.01 * before
