"""lora_linear on a real GPU, by the bodies that a CPU runs too: large sizes, dropout, graphs, compile, syncs, memory.

All shapes and dtypes there: ops/test_every_op.py. Training whole layers, and streams: test_training_gpu.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import lora_cases
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import slao_kernels
from slao_kernels.testing import TOLERANCE, error_ratio

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NAMES = ("x", "weight", "bias", "A", "B")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [((1024,), 4096, 4096, 16), ((4, 500), 2048, 8192, 64), ((3000,), 4096, 1024, 8)]


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_under_the_interpreter():
    """The same bodies with Triton's kernels, on CPU tensors: triton reads the variable when it is imported."""
    pytest.importorskip("triton", reason="triton is not installed")
    files = [str(Path(__file__)), str(Path(__file__).with_name("test_training_gpu.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=590, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    (passed,) = re.findall(r"(\d+) passed", done.stdout)
    assert int(passed) >= 40, done.stdout[-2000:]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_large_sizes(shape, dtype, place):
    """And bitwise the same at the next run. A CPU has smaller ones."""
    inputs = place.put(lora_cases.make(*(shape if place.on_gpu else ((20,), 96, 80, shape[-1])), dtype))
    found, again = (lora_cases.ours(inputs, NAMES, backend=place.backend) for _ in range(2))
    for name in ("y", *NAMES):
        assert (found[name].device.type, found[name].dtype) == (place.device, dtype)
        assert torch.equal(found[name], again[name]), name
    # Sums over thousands of rows: fp32 loses a few more bits there.
    slack = 4 if place.on_gpu and dtype == torch.float32 else 1
    lora_cases.compare(found, lora_cases.oracle(inputs, NAMES), slack * TOLERANCE[dtype])


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpoint", "reentrant checkpoint"])
def test_dropout_repeats_under_a_seed(reentrant, place):
    """Bitwise the same under one seed, recomputed or not; another seed gives another mask."""
    inputs = place.put(lora_cases.make((60,), 40, 40, 8, torch.float32))

    def run(seed: int, recompute: bool) -> list[Tensor]:
        leaves = {name: inputs[name].detach().requires_grad_() for name in NAMES}

        def block(x: Tensor) -> Tensor:
            rest = [leaves[name] for name in NAMES[1:]]
            for _ in range(2):
                x = slao_kernels.lora_linear(x, *rest, 0.7, dropout=0.3, backend=place.backend).tanh()
            return x

        torch.manual_seed(seed)
        y = checkpoint(block, leaves["x"], use_reentrant=reentrant) if recompute else block(leaves["x"])
        y.backward(inputs["dy"])
        return [y.detach(), *(leaf.grad for leaf in leaves.values())]

    first, second, other = run(11, False), run(11, reentrant is not None), run(12, False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for a, b in zip(first, other, strict=True):
        assert error_ratio(a, b) > 0.01


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_forward_and_backward_in_a_graph(p, place):
    """Without dropout every replay gives the exact result of the inputs that lie there then; with it, a new mask."""
    inputs = place.put(lora_cases.make((96,), 64, 48, 8, torch.float32))
    later = place.put(lora_cases.make((96,), 64, 48, 8, torch.float32, seed=1))
    leaves = [inputs[name].requires_grad_() for name in NAMES]

    def step() -> list[Tensor]:
        y = slao_kernels.lora_linear(*leaves, 0.7, dropout=p, backend=place.backend)
        return [y.detach(), *torch.autograd.grad(y, leaves, inputs["dy"])]

    replay = place.captured(step)
    first = [value.clone() for value in replay()]
    second = [value.clone() for value in replay()]
    if p:
        assert all(value.isfinite().all() for value in first + second)
        assert error_ratio(first[0], second[0]) > 0.01
        return
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with torch.no_grad():
        for name, value in later.items():
            inputs[name].copy_(value)
    found = dict(zip(("y", *NAMES), replay(), strict=True))
    lora_cases.compare(found, lora_cases.oracle(later, NAMES), TOLERANCE[torch.float32])


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_in_one_graph(dtype, p, place):
    inputs = place.put(lora_cases.make((130,), 96, 80, 16, dtype))
    leaves = [inputs[name].requires_grad_() for name in NAMES]
    torch._dynamo.reset()
    function = torch.compile(slao_kernels.lora_linear, fullgraph=True, backend=place.compiler)

    def run() -> dict[str, Tensor]:
        y = function(*leaves, 0.7, dropout=p, backend=place.backend)
        grads = torch.autograd.grad(y, leaves, inputs["dy"])
        return dict(zip(("y", *NAMES), (y.detach(), *grads), strict=True))

    if p:
        first, second = run(), run()
        assert all(value.isfinite().all() for value in (first | second).values())
        assert error_ratio(first["y"], second["y"]) > 0.01
        return
    exact = lora_cases.oracle({name: value.detach() for name, value in inputs.items()}, NAMES)
    lora_cases.compare(run(), exact, TOLERANCE[dtype])


WAYS = {
    "plain": {},
    "dropout": {"dropout": 0.3},
    "fp32 adapters": {},
    "adapter precision": {"precision": "adapter"},
    "core": {},
    "autocast": {},
}


@pytest.mark.parametrize("way", WAYS)
def test_nothing_waits_for_the_device(way, place):
    """Neither forward nor backward; and not waiting changes nothing."""
    narrow = torch.float32 if way in ("autocast", "core") else torch.bfloat16
    inputs = place.put(lora_cases.make((64,), 96, 80, 16, narrow))
    if way in ("fp32 adapters", "adapter precision"):
        inputs |= {name: inputs[name].float() for name in ("A", "B")}
    names = (*NAMES, "core", "core_delta") if way == "core" else NAMES

    def run() -> dict[str, Tensor]:
        torch.manual_seed(3)
        with place.autocast(way == "autocast"):
            return lora_cases.ours(inputs, names, backend=place.backend, **WAYS[way])

    expected = run()  # kernels are compiled, libraries are loaded
    with place.no_waiting():
        found = run()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert found["y"].isfinite().all()


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("wide", [False, True], ids=["one dtype", "fp32 adapters"])
def test_memory_of_a_step(wide, p, place):
    """Forward keeps y and t; at its peak a step holds these, x's gradient, and tensors of the adapters' size."""
    m, k, n, r = (16384, 4096, 4096, 16) if place.on_gpu else (256, 96, 80, 8)
    dtype = torch.bfloat16 if place.on_gpu else torch.float32  # a CPU's bf16 GEMM has copies of its own
    inputs = place.put(lora_cases.make((m,), k, n, r, dtype))
    if wide:
        inputs |= {name: inputs[name].to(torch.float32 if place.on_gpu else torch.float64) for name in ("A", "B")}
    leaves = {name: inputs[name].requires_grad_(name in ("x", "A", "B")) for name in NAMES}
    wanted = [leaves[name] for name in ("x", "A", "B")]

    def forward() -> Tensor:
        return slao_kernels.lora_linear(*leaves.values(), 0.7, dropout=p, backend=place.backend)

    def step() -> tuple[Tensor, tuple[Tensor, ...]]:
        y = forward()
        return y, torch.autograd.grad(y, wanted, inputs["dy"])

    step()  # kernels are compiled, the libraries have their workspaces
    size = dtype.itemsize
    y, t, x, adapters = m * n * size, m * r * size, m * k * size, (k + n) * r * size
    drawn = p > 0 and place.backend == "eager"  # F.dropout keeps the masked x, and its mask for backward
    mask = m * k if place.on_gpu else x  # bytes on a GPU, numbers on a CPU
    kept = y + t + wide * adapters + drawn * (x + mask)
    # dx, g, dA and dB, and these once more in the adapters' own dtype; F.dropout's backward makes x's gradient anew.
    added = x + t + adapters + wide * 2 * adapters + drawn * x
    # A few numbers, or a GPU library's workspace (32 MiB on Hopper); and the parts of Triton's sums, which
    # one_pass_pays keeps under half of dy. Less than x altogether, so that nothing of its size can hide in it.
    slack = (48 << 20 if place.on_gpu else 4096) + (y // 2 if place.backend == "triton" else 0)
    assert slack < x
    peak, left, result = place.memory(forward)
    assert left <= kept + slack, (left, kept)
    del result
    peak, _, _ = place.memory(step)
    assert peak <= kept + added + slack, (peak, kept, added)
