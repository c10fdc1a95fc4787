"""`slao merge` of ten adapters on the disk: seconds and peak memory, beside PEFT's add_weighted_adapter.

    pytest bench/disk_merge.py --model llama-3-8b --merge-dtype bfloat16

Every merge runs in a process of its own, whose peak is read from the kernel: all of it, and what is its own (without
the mapped files, which the kernel may drop), less what it had after the imports. PEFT merges adapters that are loaded
into a model; its seconds are those of add_weighted_adapter on one layer of each shape, times their number (svd only on
the smallest shape, since a dense SVD of the others takes minutes), without the loading that it needs before.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from race import clock, machine
from safetensors.torch import save_file
from shapes import GEOMETRIES
from torch import nn

ADAPTERS, RANK = 10, 16
METHODS = ("slao", "linear", "svd", "ties")

_ONE_MERGE = """
import json, os, sys, threading, time
import torch
import slao.merging, tqdm.auto, safetensors.torch, peft.utils.other
torch.set_num_threads(int(sys.argv[1]))

def now():
    lines = dict(line.split(':') for line in open('/proc/self/status') if line.startswith(('VmRSS', 'RssAnon')))
    return [int(lines[key].split()[0]) / 1024 for key in ('VmRSS', 'RssAnon')]

peak = before = now()
over = threading.Event()

def watch():
    global peak
    while not over.wait(0.005):
        peak = [max(pair) for pair in zip(peak, now())]

watcher = threading.Thread(target=watch)
watcher.start()
started = time.perf_counter()
merged = slao.merging.merge_adapters(sys.argv[4:], sys.argv[3], sys.argv[2])
seconds = time.perf_counter() - started
over.set()
watcher.join()
print(json.dumps([seconds, peak[0] - before[0], peak[1] - before[1], merged.lost]))
"""


@pytest.fixture(scope="module")
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of the sizes that training leaves: A as PEFT draws it, B about a tenth of that."""
    if request.config.getoption("--device") != "cpu":
        pytest.skip("merges on the disk are computed on the CPU: choose --device cpu")
    geometry = GEOMETRIES[request.config.getoption("--model")]
    dtype = getattr(torch, request.config.getoption("--merge-dtype"))
    parent, made = tmp_path_factory.mktemp("adapters"), []
    for index in range(ADAPTERS):
        g = torch.Generator().manual_seed(index)
        tensors = {}
        for block in range(geometry.blocks):
            for name, n, k in geometry.layers:
                prefix = f"base_model.model.model.layers.{block}.{name}"
                A, B = torch.rand(RANK, k, generator=g) * 2 - 1, torch.rand(n, RANK, generator=g) * 2 - 1
                tensors[f"{prefix}.lora_A.weight"] = (A * k**-0.5).to(dtype)
                tensors[f"{prefix}.lora_B.weight"] = (0.1 * B * n**-0.5).to(dtype)
        made.append(parent / f"task_{index}")
        made[-1].mkdir()
        save_file(tensors, made[-1] / "adapter_model.safetensors", metadata={"format": "pt"})
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=[name for name, _, _ in geometry.layers])
        config.save_pretrained(str(made[-1]))
    return made


def peft_seconds(method: str, layers: list[tuple[int, int]]) -> tuple[float, list[str]]:
    """(seconds for all layers of the shapes measured, these shapes)."""
    counts = Counter(layers)
    shapes = sorted(counts, key=lambda shape: shape[0] * shape[1])[: 1 if method == "svd" else None]
    names, total = [f"task_{index}" for index in range(ADAPTERS)], 0.0
    for n, k in shapes:
        model: Any = nn.Sequential(nn.Linear(k, n, bias=False))
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["0"], init_lora_weights=False)
        model = get_peft_model(model, config, names[0])
        for name in names[1:]:
            model.add_adapter(name, config)
        extra = {"density": 0.2} if method == "ties" else {}
        given = names, [1 / ADAPTERS] * ADAPTERS, "all", method
        total += counts[n, k] * clock(partial(model.add_weighted_adapter, *given, **extra), "cpu")
    return total, [f"{shape[0]}x{shape[1]} times {counts[shape]}" for shape in shapes]


@pytest.mark.parametrize("method", METHODS)
def test_merge(
    benchmark: Any,
    method: str,
    device: str,
    folders: list[Path],
    layers: list[tuple[int, int]],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    threads = str(torch.get_num_threads())
    out = tmp_path / "out"
    row: dict[str, Any] = {"method": method}

    def merge() -> None:
        command = [sys.executable, "-c", _ONE_MERGE, threads, method, str(out), *map(str, folders)]
        finished = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds, peak, own, lost = json.loads(finished.stdout.splitlines()[-1])
        row.update({"s": seconds, "peak MB": peak, "of it its own": own, "lost": lost})

    benchmark.pedantic(merge, rounds=1, iterations=1)
    paths = [*(folder / "adapter_model.safetensors" for folder in folders), out / "adapter_model.safetensors"]
    sizes = [path.stat().st_size / 2**20 for path in paths]
    row |= {"MB read": sum(sizes[:-1]), "MB written": sizes[-1]}
    started = time.perf_counter()
    for path in paths:  # the floor: to read what the merge reads, and what it wrote
        path.read_bytes()
    row["reading alone s"] = time.perf_counter() - started
    row |= {"PEFT s": None, "PEFT on": None}
    if method != "slao":
        row["PEFT s"], measured = peft_seconds(method, layers)
        row["PEFT on"] = " ".join(measured) if method == "svd" else "one layer a shape"
    benchmark.extra_info |= {"rows": [row], "ours_ms": row["s"] * 1e3, **machine("cpu")}
