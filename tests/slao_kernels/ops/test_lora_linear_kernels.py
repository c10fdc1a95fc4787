"""The Triton backend against fp64: every product, value and gradients, workspaces, dropout.

On a GPU these tests run there. Elsewhere `test_under_the_interpreter` runs this file once more in a process of its
own, in which Triton interprets its kernels on CPU tensors: the variable that says so is read when triton is imported,
and torch.compile imports it too.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import slao_kernels
from slao_kernels.ops.lora_linear import reference, skinny
from slao_kernels.testing import TOLERANCE, error_ratio

pytest.importorskip("triton", reason="triton is not installed")
from slao_kernels.ops.lora_linear import kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
on_device = (lambda test: test) if INTERPRETED else pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RANKS = [1, 8, 12, 16, 64, 256]
NAMES = ("x", "weight", "bias", "A", "B")
# (M, K): one row, odd sizes, sums split into parts, several blocks of rows
SIZES = [(1, 2112), (3, 33), (70, 130), (300, 48), (1030, 17)]


def _sibling(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"slao_kernels_tests_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


eager_tests = _sibling("test_lora_linear")


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Every fresh tensor is NaN: what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def draw(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(size, generator=g, dtype=torch.float64) * scale).to(dtype).to(DEVICE)


def empty(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(size, dtype=dtype, device=DEVICE)


def close(found: Tensor, exact: Tensor, torchs: Tensor) -> None:
    """No further from the exact result than torch's own product is, but for the order of an fp32 sum."""
    assert found.dtype == torchs.dtype
    allowed = 1.1 * error_ratio(torchs, exact) + 16 * torch.finfo(torch.float32).eps
    assert error_ratio(found, exact) <= allowed, (error_ratio(found, exact), allowed)


def layouts(x: Tensor) -> dict[str, Tensor]:
    wide = torch.cat([x, x, x[:, :3]], 1)
    return {"dense": x, "transposed": x.t().contiguous().t(), "columns of a wider one": wide[:, : x.shape[1]]}


if not INTERPRETED:

    @pytest.mark.slow
    @pytest.mark.skipif(torch.cuda.is_available(), reason="the tests of this file run on the GPU here")
    def test_under_the_interpreter():
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))]
        env = os.environ | {"TRITON_INTERPRET": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=590, cwd=Path(__file__).parent)
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
        (passed,) = re.findall(r"(\d+) passed", done.stdout)
        assert int(passed) > 150, done.stdout[-2000:]


# Products


@on_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products(size, r, dtype):
    """shrink, grad_A and grad_t, both orders of its passes, each against fp64 and against torch's own."""
    (m, k), s = size, 0.7
    x, t, A = draw(m, k, dtype=dtype), draw(m, r, dtype=dtype, seed=1), draw(r, k, dtype=dtype, seed=2, scale=k**-0.5)
    close(kernels.shrink(x, A), x.double() @ A.double().t(), skinny.shrink(x, A))
    dA, torchs = empty(r, k, dtype=dtype), empty(r, k, dtype=dtype)
    kernels.grad_A(t, x, dA)
    skinny.grad_A(t, x, torchs)
    close(dA, t.double().t() @ x.double(), torchs)
    g, dB = empty(m, r, dtype=dtype), empty(k, r, dtype=dtype)
    torchs_g, torchs_dB = torch.empty_like(g), torch.empty_like(dB)
    B = A.t().contiguous()
    kernels.grad_t(x, t, B, s, g, dB)
    skinny.grad_t(x, t, B, s, torchs_g, torchs_dB)
    close(g, s * x.double() @ B.double(), torchs_g)
    close(dB, s * x.double().t() @ t.double(), torchs_dB)


@on_device
@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.parametrize("r", [5, 32, 128, 256])
@pytest.mark.parametrize("size", [(1, 720), (300, 1104), (65, 16)], ids=str)
def test_one_pass_and_two_passes(size, r, one_pass, monkeypatch):
    """The byte count chooses one of them; here each has every shape, and each subset of the outputs."""
    chosen = []
    monkeypatch.setattr(kernels, "one_pass_pays", lambda *args: chosen.append(args) or one_pass)
    (m, n), dtype = size, torch.float16
    dy, t, B = draw(m, n, dtype=dtype), draw(m, r, dtype=dtype, seed=1), draw(n, r, dtype=dtype, seed=2)
    exact_g, exact_dB = 0.3 * dy.double() @ B.double(), 0.3 * dy.double().t() @ t.double()
    for wanted in ((True, True), (True, False), (False, True)):
        g = empty(m, r, dtype=dtype) if wanted[0] else None
        dB = empty(n, r, dtype=dtype) if wanted[1] else None
        kernels.grad_t(dy, t, B, 0.3, g, dB)
        assert g is None or error_ratio(g, exact_g) <= TOLERANCE[dtype]
        assert dB is None or error_ratio(dB, exact_dB) <= TOLERANCE[dtype]
    assert len(chosen) == 1


@on_device
@pytest.mark.parametrize("layout", ["dense", "transposed", "columns of a wider one"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(layout, dtype):
    x = layouts(draw(70, 130, dtype=dtype))[layout]
    A = layouts(draw(12, 130, dtype=dtype, seed=1))[layout]
    g = layouts(draw(70, 12, dtype=dtype, seed=2))[layout]
    assert error_ratio(kernels.shrink(x, A), x.double() @ A.double().t()) <= TOLERANCE[dtype]
    dA = empty(12, 130, dtype=dtype)
    kernels.grad_A(g, x, dA)
    assert error_ratio(dA, g.double().t() @ x.double()) <= TOLERANCE[dtype]
    out, dB = empty(70, 12, dtype=dtype), empty(130, 12, dtype=dtype)
    kernels.grad_t(x, g, A.t(), 0.5, out, dB)
    assert error_ratio(out, 0.5 * x.double() @ A.double().t()) <= TOLERANCE[dtype]
    assert error_ratio(dB, 0.5 * x.double().t() @ g.double()) <= TOLERANCE[dtype]


@on_device
def test_sums_are_split_and_repeatable(monkeypatch):
    """Small batches cut K, large ones cut M; bitwise the same each time."""
    seen = []
    split = kernels.tiles.split
    monkeypatch.setattr(kernels.tiles, "split", lambda *args: seen.append(split(*args)) or seen[-1])
    for m, k in ((2, 3000), (2000, 40)):
        x, A, g = draw(m, k), draw(8, k, seed=1), draw(m, 8, seed=2)
        results = []
        for _ in range(2):
            dA, dB = empty(8, k, dtype=x.dtype), empty(k, 8, dtype=x.dtype)
            kernels.grad_A(g, x, dA)
            kernels.grad_t(x, g, A.t(), 1.0, torch.empty_like(g), dB)
            results.append((kernels.shrink(x, A), dA, dB))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert max(parts for parts, _ in seen) > 1
    assert min(parts for parts, _ in seen) == 1


@pytest.mark.parametrize("size", [1, 63, 64, 65, 1000, 4096, 11008])
@pytest.mark.parametrize("block", [16, 64, 128])
@pytest.mark.parametrize("programs", [1, 7, 500])
def test_parts_cover_the_sum_exactly(size, block, programs):
    parts, per_part = kernels.tiles.split(size, block, programs, 132)
    assert per_part % block == 0
    assert (parts - 1) * per_part < size <= parts * per_part
    assert parts == 1 or per_part >= 4 * block


# The whole operation


@on_device
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("shape", eager_tests.SHAPES, ids=str)
def test_value_and_gradients(shape, dtype):
    inputs = {name: value.to(DEVICE) for name, value in eager_tests.make(*shape, dtype).items()}
    found = eager_tests.ours(inputs, NAMES, backend="triton")
    assert all(found[name].dtype == dtype for name in ("y", *NAMES))
    eager_tests.compare(found, eager_tests.oracle(inputs, NAMES), TOLERANCE[dtype])
    again = eager_tests.ours(inputs, NAMES, backend="triton")
    assert all(torch.equal(found[name], again[name]) for name in found)


@on_device
@pytest.mark.parametrize("wanted", [("x",), ("A",), ("B",), ("A", "B"), ("weight",)], ids="+".join)
def test_subsets_of_gradients(wanted):
    inputs = {name: value.to(DEVICE) for name, value in eager_tests.make((70,), 40, 24, 8, torch.float32).items()}
    leaves = {name: inputs[name].requires_grad_(name in wanted) for name in NAMES}
    with slao_kernels.use_backend("triton"):
        y = slao_kernels.lora_linear(*leaves.values(), 0.7)
    exact = eager_tests.oracle({name: value.detach() for name, value in inputs.items()}, NAMES)
    for name, grad in zip(wanted, torch.autograd.grad(y, [leaves[n] for n in wanted], inputs["dy"]), strict=True):
        assert error_ratio(grad, exact[name]) <= TOLERANCE[torch.float32]


@on_device
@pytest.mark.parametrize("cores", [("core", "core_delta"), ("core_delta",), ("core",)], ids="+".join)
def test_routing_core(cores):
    names = ("x", "weight", "A", "B", *cores)
    inputs = {name: value.to(DEVICE) for name, value in eager_tests.make((5, 7), 48, 40, 8, torch.float32).items()}
    found = eager_tests.ours(inputs, names, backend="triton")
    eager_tests.compare(found, eager_tests.oracle(inputs, names), 1.5 * TOLERANCE[torch.float32])


@on_device
def test_a_rank_beyond_the_kernels_is_torchs():
    inputs = {name: value.to(DEVICE) for name, value in eager_tests.make((9,), 300, 280, 270, torch.float32).items()}
    found = eager_tests.ours(inputs, NAMES, backend="triton")
    eager_tests.compare(found, eager_tests.oracle(inputs, NAMES), TOLERANCE[torch.float32])


@on_device
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [((1,), 64, 48, 8), ((2, 5), 33, 17, 1), ((70,), 96, 80, 12), ((20,), 130, 110, 100)])
def test_fp32_adapters(shape, narrow, monkeypatch):
    """precision="adapter": t, g, dA and dB in fp32 by the kernels, at three times the rank (a tile has up to 256)."""

    def refuse(*args: object) -> None:
        raise AssertionError("not computed by the kernels")

    monkeypatch.setattr(skinny, "shrink_wide", refuse)
    monkeypatch.setattr(skinny, "outer_wide", refuse)
    inputs = {name: value.to(DEVICE) for name, value in eager_tests.make(*shape, narrow).items()}
    (k, n, r) = shape[1:]
    inputs |= {"A": draw(r, k, seed=1, scale=k**-0.5), "B": draw(n, r, seed=2, scale=3 * r**-0.5)}
    found = eager_tests.ours(inputs, NAMES, backend="triton", precision="adapter")
    for name, value in eager_tests.oracle(inputs, NAMES).items():
        dtype = torch.float32 if name in ("A", "B") else narrow
        assert found[name].dtype == dtype
        assert error_ratio(found[name], value) <= TOLERANCE[dtype], name


# Dropout


def philox_mask(seed: int, rows: int, columns: int, p: float) -> np.ndarray:
    """The mask of kernels.py's docstring, from Philox4x32-10 as its paper writes it (Salmon et al., SC'11)."""
    groups = -(-columns // 8)
    c = [np.zeros((rows, groups), np.uint64) for _ in range(4)]
    c[0] += np.arange(groups, dtype=np.uint64)[None, :]
    c[1] += np.arange(rows, dtype=np.uint64)[:, None]
    low, key = np.uint64(0xFFFFFFFF), [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        first, second = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (second >> np.uint64(32)) ^ c[1] ^ np.uint64(key[0]),
            second & low,
            (first >> np.uint64(32)) ^ c[3] ^ np.uint64(key[1]),
            first & low,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    halves = np.stack([half for word in c for half in (word & np.uint64(0xFFFF), word >> np.uint64(16))], -1)
    return halves.reshape(rows, -1)[:, :columns] < max(1, round((1 - p) * 65536))


def test_the_tests_own_philox():
    """Known answers of the generator's authors (Random123), for a counter and a key of zeros."""
    zeros = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    for cut in (0.1, 0.25, 0.5, 0.9):
        below = round((1 - cut) * 65536)
        words = [half < below for word in zeros for half in (word & 0xFFFF, word >> 16)]
        assert philox_mask(0, 1, 8, cut)[0].tolist() == words


SEEDS = [0, 12345, 2**32 + 7, 2**63 - 2]


@on_device
@pytest.mark.parametrize("p", [0.1, 0.95])
@pytest.mark.parametrize("seed", SEEDS)
def test_masks_are_philoxs(seed, p):
    """In shrink, grad_A and dx the same mask, at tiles that differ; columns far from the first too."""
    (m, k), columns = (80, 496), slice(330, 490)
    products = kernels.TritonProducts(torch.tensor([seed], device=DEVICE), p)
    kept = torch.from_numpy(philox_mask(seed, m, k, p)).to(DEVICE)
    scale = 65536 / kernels.keep_below(p)
    x, A = torch.ones(m, k, device=DEVICE), torch.eye(k, device=DEVICE)[columns]
    assert torch.equal(products.shrink(x, A), kept[:, columns] * scale)
    dA = empty(m, k, dtype=x.dtype)
    products.grad_A(torch.eye(m, device=DEVICE), x, dA)
    assert torch.equal(dA, kept * scale)
    dx = empty(m, k, dtype=x.dtype)
    backward = kernels._DroppedBackward(products.seed, p)
    backward.expand_(dx, torch.ones(m, 1, device=DEVICE), torch.ones(1, k, device=DEVICE).t(), 1.0)
    assert torch.equal(dx, kept * scale)


@on_device
def test_rate_and_mean():
    p, m, k = 0.3, 400, 256
    kept = kernels.TritonProducts(torch.tensor([99], device=DEVICE), p).shrink(
        torch.ones(m, k, device=DEVICE), torch.eye(k, device=DEVICE)
    )
    share = (kept != 0).double().mean().item()
    assert abs(share - 0.7) < 5 * (0.3 * 0.7 / (m * k)) ** 0.5
    assert kept.double().mean().item() == pytest.approx(1.0, abs=0.02)
    by_column = (kept != 0).double().mean(0)
    assert (by_column - 0.7).abs().max() < 6 * (0.3 * 0.7 / m) ** 0.5


def with_mask(inputs: dict[str, Tensor], mask: Tensor, names: tuple[str, ...], s: float = 0.7) -> dict[str, Tensor]:
    """Value and gradients in fp64, by autograd through an explicit mask."""

    def function(t: dict[str, Tensor]) -> Tensor:
        core, delta = t.get("core"), t.get("core_delta")
        return reference.lora_linear(t["x"], t["x"] * mask, t["weight"], t.get("bias"), t["A"], t["B"], s, core, delta)

    return eager_tests.run(function, {name: value.double() for name, value in inputs.items()}, names)


@on_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [((7,), 33, 17, 1), ((2, 50), 40, 24, 12), ((150,), 96, 80, 64)], ids=str)
def test_dropout_gradients(shape, dtype):
    inputs = {name: value.to(DEVICE) for name, value in eager_tests.make(*shape, dtype).items()}
    torch.manual_seed(3)
    seed = torch.randint(2**63 - 1, (1,), device=DEVICE).item()
    rows, k = inputs["x"].numel() // shape[1], shape[1]
    mask = torch.from_numpy(philox_mask(seed, rows, k, 0.4)).to(DEVICE) * (65536 / kernels.keep_below(0.4))
    expected = with_mask(inputs, mask.view(inputs["x"].shape), NAMES)
    torch.manual_seed(3)
    found = eager_tests.ours(inputs, NAMES, dropout=0.4, backend="triton")
    # The branch's share of dx is rounded before it is masked and joined.
    eager_tests.compare(found, expected, 1.5 * TOLERANCE[dtype])


@on_device
def test_dropout_with_a_routing_core():
    names = ("x", "weight", "A", "B", "core", "core_delta")
    inputs = {name: value.to(DEVICE) for name, value in eager_tests.make((40,), 48, 40, 8, torch.float32).items()}
    torch.manual_seed(3)
    seed = torch.randint(2**63 - 1, (1,), device=DEVICE).item()
    mask = torch.from_numpy(philox_mask(seed, 40, 48, 0.2)).to(DEVICE) * (65536 / kernels.keep_below(0.2))
    torch.manual_seed(3)
    found = eager_tests.ours(inputs, names, dropout=0.2, backend="triton")
    eager_tests.compare(found, with_mask(inputs, mask, names), 1.5 * TOLERANCE[torch.float32])


@on_device
@pytest.mark.parametrize("case", ["fp64", "adapter precision", "p = 1", "empty batch", "rank 257"])
def test_dropout_that_the_kernels_do_not_draw(case):
    """Then it is torch's own, with torch's own mask."""
    dtype = torch.float64 if case == "fp64" else torch.bfloat16 if case == "adapter precision" else torch.float32
    inputs = eager_tests.make((0,) if case == "empty batch" else (20,), 32, 24, 257 if case == "rank 257" else 4, dtype)
    inputs = {name: value.to(DEVICE) for name, value in inputs.items()}
    options = {"dropout": 0.4}
    if case == "adapter precision":
        inputs |= {name: inputs[name].float() for name in ("A", "B")}
        options["precision"] = "adapter"
    if case == "p = 1":
        from slao_kernels.ops.lora_linear import apply

        y = apply(*(inputs[name] for name in NAMES), 0.7, dropout=1.0, backend="triton")
        assert error_ratio(y, inputs["x"] @ inputs["weight"].t() + inputs["bias"]) <= TOLERANCE[dtype]
        return
    torch.manual_seed(3)
    found = eager_tests.ours(inputs, NAMES, backend="triton", **options)
    torch.manual_seed(3)
    expected = eager_tests.ours(inputs, NAMES, backend="eager", **options)
    if case == "adapter precision":  # the mask is torch's, the products are not
        for name, value in expected.items():
            assert error_ratio(found[name], value) <= TOLERANCE[value.dtype], name
    else:
        assert all(torch.equal(found[name], expected[name]) for name in found)


@on_device
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_masks(reentrant):
    inputs = {name: value.to(DEVICE) for name, value in eager_tests.make((60,), 40, 40, 8, torch.float32).items()}
    leaves = {name: inputs[name].requires_grad_() for name in NAMES}

    def block(x: Tensor) -> Tensor:
        rest = [leaves[name] for name in NAMES[1:]]
        for _ in range(2):
            x = slao_kernels.lora_linear(x, *rest, 0.7, dropout=0.3, backend="triton").tanh()
        return x

    results = []
    for recompute in (False, True):
        torch.manual_seed(11)
        y = checkpoint(block, leaves["x"], use_reentrant=reentrant) if recompute else block(leaves["x"])
        y.backward(inputs["dy"])
        results.append([y.detach(), *(leaf.grad for leaf in leaves.values())])
        for leaf in leaves.values():
            leaf.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@on_device
def test_calls_differ_and_seeds_repeat():
    inputs = {name: value.to(DEVICE) for name, value in eager_tests.make((20,), 40, 24, 8, torch.float32).items()}
    leaves = [inputs[name] for name in NAMES]

    def call() -> Tensor:
        return slao_kernels.lora_linear(*leaves, 0.7, dropout=0.3, backend="triton")

    torch.manual_seed(5)
    first, second = call(), call()
    torch.manual_seed(5)
    assert torch.equal(call(), first)
    assert torch.equal(call(), second)
    assert not torch.equal(first, second)


@on_device
def test_dropout_keeps_no_mask_and_no_copy():
    """Kept for backward: x, weight, t, the adapters, and one number."""
    inputs = {name: value.to(DEVICE) for name, value in eager_tests.make((96,), 64, 48, 4, torch.float32).items()}
    leaves = [inputs[name].requires_grad_(name in ("x", "A", "B")) for name in NAMES]
    saved: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        slao_kernels.lora_linear(*leaves, 0.5, dropout=0.1, backend="triton")
    assert sorted(map(tuple, saved)) == sorted([(96, 64), (48, 64), (96, 4), (4, 64), (48, 4), (1,)])


# Through torch's machinery


@on_device
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_operator_contract(p):
    inputs = {name: value.to(DEVICE) for name, value in eager_tests.make((6,), 16, 24, 4, torch.float32).items()}
    dropout = (torch.tensor([7], device=DEVICE) if p else None, p)
    x, weight, bias, A, B = (inputs[name] for name in NAMES)
    ops = torch.ops.slao_kernels
    torch.library.opcheck(ops.lora_linear.default, (x, None, weight, bias, A, B, 0.5, "triton", *dropout))
    t = x @ A.T
    for needs in ((True, False, True, True), (False, False, False, True), (True, False, False, False)):
        backward = (inputs["dy"], x, None, weight, t, A, B, 0.5, *needs, "triton", *dropout)
        torch.library.opcheck(ops.lora_linear_backward.default, backward)


@on_device
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_compiles_without_a_graph_break(p):
    inputs = {name: value.to(DEVICE) for name, value in eager_tests.make((12,), 32, 24, 4, torch.float32).items()}
    leaves = [inputs[name].requires_grad_() for name in NAMES]
    results = []
    for function in (
        slao_kernels.lora_linear,
        torch.compile(slao_kernels.lora_linear, fullgraph=True, backend="aot_eager"),
    ):
        torch.manual_seed(4)
        y = function(*leaves, 0.7, dropout=p, backend="triton")
        results.append([y, *torch.autograd.grad(y, leaves, inputs["dy"])])
    for found, expected in zip(*results, strict=True):
        assert error_ratio(found, expected) <= TOLERANCE[torch.float32]


# At real sizes, on a GPU


LARGE = [
    ((8192,), 4096, 4096, 16),
    ((2, 2048), 4096, 14336, 64),
    ((1,), 4096, 4096, 8),
    ((4095,), 1536, 2560, 128),
    ((513,), 4096, 1024, 256),
]


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large(shape, dtype, p):
    inputs = {name: value.cuda() for name, value in eager_tests.make(*shape, dtype).items()}
    torch.manual_seed(3)
    seed = torch.randint(2**63 - 1, (1,), device="cuda").item()
    mask = torch.ones_like(inputs["x"], dtype=torch.float64)
    if p:
        kept = philox_mask(seed, mask.numel() // shape[1], shape[1], p)
        mask = (torch.from_numpy(kept).cuda() * (65536 / kernels.keep_below(p))).view(inputs["x"].shape)
    expected = with_mask(inputs, mask, NAMES)
    torch.manual_seed(3)
    found = eager_tests.ours(inputs, NAMES, dropout=p, backend="triton")
    torch.manual_seed(3)
    again = eager_tests.ours(inputs, NAMES, dropout=p, backend="triton")
    # dA and dB add up thousands of rows of rounded t and g; fp32 sums of that length lose a few more bits.
    eager_tests.compare(found, expected, (4 if dtype == torch.float32 else 1.5) * TOLERANCE[dtype])
    assert all(torch.equal(found[name], again[name]) for name in found)


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_cuda_graph(p):
    """Forward and backward in one graph; each replay draws new masks."""
    inputs = {name: value.cuda() for name, value in eager_tests.make((512,), 512, 384, 16, torch.bfloat16).items()}
    leaves = [inputs[name].requires_grad_() for name in NAMES]

    def step() -> list[Tensor]:
        y = slao_kernels.lora_linear(*leaves, 0.7, dropout=p, backend="triton")
        return [y.detach(), *torch.autograd.grad(y, leaves, inputs["dy"])]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            plain = [value.clone() for value in step()]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    replays = []
    for _ in range(2):
        graph.replay()
        replays.append([value.clone() for value in captured])
    torch.cuda.synchronize()
    assert all(value.isfinite().all() for replay in replays for value in replay)
    if p == 0.0:
        assert all(torch.equal(a, b) for a, b in zip(*replays, strict=True))
        # cuBLAS may pick another GEMM under capture.
        for found, expected in zip(replays[0], plain, strict=True):
            assert error_ratio(found, expected) <= 2 * TOLERANCE[torch.bfloat16]
    else:
        assert not torch.equal(replays[0][0], replays[1][0])


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_compiled_by_inductor(p):
    inputs = {name: value.cuda() for name, value in eager_tests.make((512,), 512, 384, 16, torch.bfloat16).items()}
    leaves = [inputs[name].requires_grad_() for name in NAMES]
    function = torch.compile(slao_kernels.lora_linear, fullgraph=True)
    y = function(*leaves, 0.7, dropout=p, backend="triton")
    grads = torch.autograd.grad(y, leaves, inputs["dy"])
    assert all(value.isfinite().all() for value in (y, *grads))
    if p == 0.0:
        exact = eager_tests.oracle({name: value.detach() for name, value in inputs.items()}, NAMES)
        found = {"y": y, **dict(zip(NAMES, grads, strict=True))}
        eager_tests.compare(found, exact, TOLERANCE[torch.bfloat16])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU here")
def test_on_a_device_that_is_not_the_current_one():
    inputs = {name: value.to("cuda:1") for name, value in eager_tests.make((70,), 40, 24, 8, torch.float32).items()}
    found = eager_tests.ours(inputs, NAMES, backend="triton")
    eager_tests.compare(found, eager_tests.oracle(inputs, NAMES), TOLERANCE[torch.float32])
