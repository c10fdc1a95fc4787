"""`slao extract` and `slao compress` on the disk, on a block of Llama-3-8B's geometry in bf16: seconds, peak memory,
and what they say to have lost beside the dense SVD, for layers of up to 4096 x 4096.

    python bench/disk_cuts.py [--rank 64] [--threads 1] [--dtype float32] [--no-dense]

The tuned model differs from its base as a fine-tune does (bench/engines_svd.py, "tuned"), by 1 % of each weight's norm.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from engines_svd import sample
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig

from slao.folders import read_adapter
from slao.merging.compress import compress_adapter
from slao.merging.extract import extract_adapter

SHAPES = {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096)}
SHAPES |= {"gate": (14336, 4096), "up": (14336, 4096), "down": (4096, 14336)}
LARGEST = 4096 * 4096  # of which a dense SVD is taken


def name_of(layer: str) -> str:
    part = "self_attn" if layer in "qkvo" else "mlp"
    return f"model.layers.0.{part}.{layer}_proj.weight"


def make(folder: Path, dtype: torch.dtype) -> None:
    """base/ and tuned/ in `folder`."""
    config = LlamaConfig(vocab_size=256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=1,
                         num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True)  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    g = torch.Generator().manual_seed(0)
    one: dict[str, Tensor] = {"model.embed_tokens.weight": torch.randn(256, 4096, generator=g).to(dtype)}
    for norm in ("norm", "layers.0.input_layernorm", "layers.0.post_attention_layernorm"):
        one[f"model.{norm}.weight"] = torch.ones(4096, dtype=dtype)
    other = dict(one)
    for layer, (m, n) in SHAPES.items():
        weight = 0.02 * torch.randn(m, n, generator=g)
        delta = sample("tuned", m, n)
        one[name_of(layer)] = weight.to(dtype)
        other[name_of(layer)] = (weight + delta * (0.01 * weight.norm() / delta.norm())).to(dtype)
    for name, tensors in (("base", one), ("tuned", other)):
        config.save_pretrained(folder / name)
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})


def peak() -> float:
    """GiB that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def dense_extract(folder: Path, layers: Any, rank: int) -> None:
    """The residuals beside the least there are."""
    one, other = (load_file(folder / name / "model.safetensors") for name in ("base", "tuned"))
    print("| layer | shape | lost | the least | ratio | dense SVD |\n| --- | --- | ---: | ---: | ---: | ---: |")
    for layer, shape in SHAPES.items():
        if shape[0] * shape[1] > LARGEST:
            continue
        started = time.perf_counter()
        S = torch.linalg.svdvals(other[name_of(layer)].float() - one[name_of(layer)].float()).double()
        seconds, least = time.perf_counter() - started, float(S[rank:].norm() / S.norm())
        lost = layers[name_of(layer).removesuffix(".weight")].lost
        print(f"| {layer} | {shape} | {lost:.6f} | {least:.6f} | {lost / least:.5f} | {seconds:.1f} s |", flush=True)


def dense_compress(folder: Path, layers: Any) -> None:
    """What is said to be lost beside ‖Δ − B A‖ / ‖Δ‖ of the matrices written out in fp64."""
    before, after = read_adapter(folder / "lora"), read_adapter(folder / "cut")
    worst = 0.0
    for name, (A, B, s) in before.items():
        delta = s * B.double() @ A.double()
        left = float((delta - after[name][2] * after[name][1].double() @ after[name][0].double()).norm() / delta.norm())
        worst = max(worst, abs(left - layers[name].lost))
    print(f"compress: `lost` is off by {worst:.1e} at most", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16", help="of the models")
    parser.add_argument("--no-dense", action="store_true", help="seconds and memory alone")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.make:
        make(options.make, getattr(torch, options.dtype))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        # In a process of its own, so that the peak is the extraction's.
        subprocess.run([sys.executable, __file__, "--make", scratch, "--dtype", options.dtype], check=True)
        before, started, worked = peak(), time.perf_counter(), time.process_time()
        made = extract_adapter(folder / "tuned", folder / "base", folder / "lora", rank=options.rank)
        seconds, worked = time.perf_counter() - started, time.process_time() - worked
        print(made)
        print(f"extract: {seconds:.1f} s, {worked:.1f} s of processor time", flush=True)
        print(f"peak {peak():.2f} GiB, before it {before:.2f}", flush=True)
        started, worked = time.perf_counter(), time.process_time()
        cut = compress_adapter(folder / "lora", folder / "cut", rank=max(1, options.rank // 4))
        print(cut)
        seconds, worked = time.perf_counter() - started, time.process_time() - worked
        print(f"compress: {seconds:.2f} s, {worked:.2f} s of processor time", flush=True)
        if not options.no_dense:
            dense_compress(folder, cut.layers)
            dense_extract(folder, made.layers, options.rank)


if __name__ == "__main__":
    main()
