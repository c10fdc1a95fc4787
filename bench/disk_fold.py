"""`slao fold` on the disk: seconds and peak memory, beside PEFT's merge_and_unload, mergekit and a copy of the files.

    pytest bench/disk_fold.py --model llama-3-8b --blocks 8 --threads 1

The checkpoint has the shapes of a Llama of `--model`, `--blocks` deep (all unless said: of Llama-3-8B 16 GB, and as
much again for each contestant, twice for mergekit), random weights in bf16, four shards, and an adapter of r = 16 on
all linear layers. Every contestant runs in a process of its own, reads the base from the disk (its pages are given
back before) and is done when its files are on the disk (fsync). The peak is the process's largest resident set,
libraries included. PEFT holds the model in memory, so it runs where there is enough; mergekit, where it is installed,
has PEFT merge the adapter and save the model, and writes it once more with its "linear" merge of that one model.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from peft import LoraConfig
from race import machine
from safetensors import safe_open
from safetensors.torch import save_file
from shapes import GEOMETRIES, Geometry
from transformers import LlamaConfig

VOCABULARY, SHARDS, RANK = 128256, 4, 16
RANGE = 0.02  # of the weights, as transformers draws them

_HEAD = """
import json, os, sys, time
threads, base, adapter, out = sys.argv[1:]
import torch
torch.set_num_threads(int(threads))
"""
_TAIL = """
for name in sorted(os.listdir(out)):
    with open(os.path.join(out, name), "rb") as file:
        os.fsync(file.fileno())
seconds = time.perf_counter() - started
# Not ru_maxrss, which a new process has from the one that started it.
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([seconds, peak / 2**20]))
"""
CONTESTANTS = {
    "copy": """
import shutil
started = time.perf_counter()
shutil.copytree(base, out)
""",
    "slao fold": """
import slao.merging, transformers, peft, tqdm.auto
started = time.perf_counter()
slao.merging.fold_model(base, [adapter], out)
""",
    "PEFT": """
import peft, transformers
started = time.perf_counter()
model = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
merged.save_pretrained(out, max_shard_size=os.path.getsize(os.path.join(base, "model-00001-of-00004.safetensors")))
""",
    "mergekit": """
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
started = time.perf_counter()
models = [{"model": f"{base}+{adapter}", "parameters": {"weight": 1.0}}]
config = MergeConfiguration.model_validate({"merge_method": "linear", "models": models, "dtype": "bfloat16"})
size = os.path.getsize(os.path.join(base, "model-00001-of-00004.safetensors"))
options = {"lora_merge_cache": out + "-cache", "copy_tokenizer": False, "write_model_card": False}
run_merge(config, out, MergeOptions(out_shard_size=size, **options))
""",
}
IN_MEMORY = ("PEFT", "mergekit")


@pytest.fixture(scope="module")
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    if request.config.getoption("--device") != "cpu":
        pytest.skip("folds on the disk are computed on the CPU: choose --device cpu")
    geometry = GEOMETRIES[request.config.getoption("--model")]
    blocks = request.config.getoption("--blocks") or geometry.blocks
    parent = tmp_path_factory.mktemp("fold")
    base(geometry, blocks, parent / "base")
    adapter(geometry, blocks, parent / "adapter")
    return parent / "base", parent / "adapter"


def base(geometry: Geometry, blocks: int, folder: Path) -> None:
    """A shard in memory at a time."""
    sizes = {name: (n, k) for name, n, k in geometry.layers}
    hidden = sizes["q_proj"][1]
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=hidden, num_hidden_layers=blocks, head_dim=128,
                         num_attention_heads=sizes["q_proj"][0] // 128, num_key_value_heads=sizes["k_proj"][0] // 128,
                         intermediate_size=sizes["up_proj"][0], dtype="bfloat16")  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    for block in range(blocks):
        shapes |= {f"{prefix(block, name)}.weight": size for name, size in sizes.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        shapes |= {f"model.layers.{block}.{name}.weight": (hidden,) for name in norms}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (VOCABULARY, hidden)}
    each, places, done = sum(map(size, shapes.values())) / SHARDS, {}, 0
    for name, shape in shapes.items():
        places[name] = min(int((done + size(shape) / 2) / each), SHARDS - 1)
        done += size(shape)
    generator = torch.Generator().manual_seed(0)
    for shard in range(SHARDS):
        names = [name for name, place in places.items() if place == shard]
        drawn = {name: torch.empty(shapes[name], dtype=torch.bfloat16) for name in names}
        for tensor in drawn.values():
            tensor.uniform_(-RANGE, RANGE, generator=generator)
        save_file(drawn, folder / shard_name(shard), metadata={"format": "pt"})
    index = {"metadata": {"total_size": 2 * done}, "weight_map": {name: shard_name(at) for name, at in places.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def adapter(geometry: Geometry, blocks: int, folder: Path) -> None:
    """Of the sizes that training leaves: A as PEFT draws it, B about a tenth of that."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for block in range(blocks):
        for name, n, k in geometry.layers:
            A, B = torch.rand(RANK, k, generator=generator) * 2 - 1, torch.rand(n, RANK, generator=generator) * 2 - 1
            tensors[f"base_model.model.{prefix(block, name)}.lora_A.weight"] = A * k**-0.5
            tensors[f"base_model.model.{prefix(block, name)}.lora_B.weight"] = 0.1 * B * n**-0.5
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=[name for name, _, _ in geometry.layers])
    config.save_pretrained(str(folder))


def prefix(block: int, name: str) -> str:
    return f"model.layers.{block}.{'self_attn' if name in ('q_proj', 'k_proj', 'v_proj', 'o_proj') else 'mlp'}.{name}"


def size(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def shard_name(shard: int) -> str:
    return f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"


def forget(folder: Path) -> None:
    """Give the pages of its files back, so that they are read from the disk."""
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def largest_error(base: Path, adapter: Path, out: Path) -> float:
    """Of the first block's layers, in units of what rounding the exact weight to bf16 changes at most."""
    worst = 0.0
    places = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    before = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(adapter / "adapter_model.safetensors", "pt") as pairs:
        for key in pairs.keys():  # noqa: SIM118 (no dict)
            if not key.endswith("lora_A.weight") or ".layers.0." not in key:
                continue
            name = key.removeprefix("base_model.model.").replace("lora_A.", "")
            A, B = pairs.get_tensor(key)[:, :64].double(), pairs.get_tensor(key.replace("lora_A", "lora_B")).double()
            with safe_open(base / before[name], "pt") as old, safe_open(out / places[name], "pt") as new:
                exact = old.get_slice(name)[:, :64].double() + 2 * B @ A
                difference = (new.get_slice(name)[:, :64].double() - exact).abs()
            worst = max(worst, float((difference / (exact.abs() * 2**-8 + 1e-9)).max()))
    return worst


@pytest.mark.parametrize("name", CONTESTANTS)
def test_fold(
    benchmark: Any, name: str, device: str, folders: tuple[Path, Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base, adapter = folders
    shards = [path.stat().st_size / 2**30 for path in base.glob("*.safetensors")]
    needs = 1.2 * sum(shards)
    if name == "mergekit":
        pytest.importorskip("mergekit", reason="mergekit is not installed (pip install mergekit)")
    if name in IN_MEMORY and os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30 < needs:
        pytest.skip(f"{name} holds the model in memory: it takes {needs:.0f} GB, and less is free")
    times, peaks = [], []

    def once() -> None:
        for folder in folders:
            forget(folder)
        for made in ("out", "out-cache"):
            shutil.rmtree(tmp_path / made, ignore_errors=True)
        script = _HEAD + CONTESTANTS[name] + _TAIL
        words = [sys.executable, "-c", script, str(torch.get_num_threads()), str(base), str(adapter)]
        finished = subprocess.run([*words, str(tmp_path / "out")], capture_output=True, text=True, check=True)
        seconds, peak = json.loads(finished.stdout.splitlines()[-1])
        times.append(seconds)
        peaks.append(peak)

    benchmark.pedantic(once, rounds=request.config.getoption("--rounds") or 3, iterations=1)
    worst = 0.0 if name == "copy" else largest_error(base, adapter, tmp_path / "out")
    for made in ("out", "out-cache"):
        shutil.rmtree(tmp_path / made, ignore_errors=True)
    if name == "slao fold":
        assert worst <= 1.01, "not the exact weights rounded once"
    seconds = median(times)
    row = {
        "s": seconds,
        "GB/s": sum(shards) / seconds,
        "peak GB": max(peaks),
        "GB": sum(shards),
        "largest shard": max(shards),
    }
    row["error, roundings"] = worst
    benchmark.extra_info |= {"rows": [row], "ours_ms": seconds * 1e3, **machine("cpu")}
