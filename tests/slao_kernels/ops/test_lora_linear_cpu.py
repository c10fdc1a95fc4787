"""The compiled core, a whole layer at a time: every instruction set against fp64, and any number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from oracle import check, exact, make, ours
from torch import Tensor

from slao_kernels import dispatch, native
from slao_kernels.ops.lora_linear import cpu
from slao_kernels.ops.lora_linear.products import TorchProducts
from slao_kernels.testing import error_ratio

MISSING = dispatch.why_not("lora_linear", "native", "cpu")
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
core = cpu.products()

bf16, fp32 = torch.bfloat16, torch.float32
# One fp32 sum of thousands of products errs by some 3e-7; a bf16 result is rounded once, 1.7e-3 RMS.
RATIO = {fp32: 4e-7, bf16: 2e-3}
# (tokens, K, N, r): odd ones, one of each, more columns than one strip, more rows than a block.
SHAPES = [
    ((1,), 8, 6, 1),
    ((3,), 2, 1, 2),
    ((3,), 1, 2, 1),
    ((7,), 33, 35, 12),
    ((2, 25), 35, 24, 3),
    ((33,), 96, 130, 16),
    ((5,), 1000, 17, 32),
    ((40,), 64, 64, 64),
    ((300,), 700, 130, 8),
]


@pytest.fixture(params=["avx512bf16", "amx"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    try:
        native.core().use_lora_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    native.core().use_lora_isa("auto")


@pytest.fixture
def torchs_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's versions are out of reach: what is computed, the core has computed."""

    def refuse(*args: object) -> None:
        raise AssertionError("not computed by the core")

    for name in ("forward", "backward"):
        monkeypatch.setattr(TorchProducts, name, refuse)


def strided(rows: int, columns: int, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    """Unit columns in rows that lie further apart; NaN between them."""
    whole = torch.full((rows, columns + 3), torch.nan, dtype=dtype)
    whole[:, 1 : columns + 1] = torch.randn(rows, columns, generator=g, dtype=torch.float64).to(dtype)
    return whole[:, 1 : columns + 1]


@pytest.mark.parametrize("adapter", [bf16, fp32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_call_for_a_layer(isa, shape, adapter, torchs_products, poisoned):
    """Forward and backward of one layer, whatever is wanted of it; A and B may be fp32, and so are dA and dB then."""
    inputs = make(*shape, bf16, adapter, seed=1)  # one token and rank 1: a g that does not cancel
    expected = exact("linear", inputs)
    for names in (("x", "A", "B"), ("A",), ("B",), ("x",)):
        found = ours("linear", inputs, names, backend="native")
        check("linear", found, {name: expected[name] for name in ("out", *names)}, inputs)


def test_the_answer_does_not_depend_on_the_threads(isa):
    inputs = make((700,), 600, 500, 16, bf16, fp32)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        results.append(ours("linear", inputs, ("x", "A", "B"), backend="native"))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in results[0])


@pytest.mark.parametrize("why", ["rank", "fp64", "fp32", "fp16", "column stride", "empty", "mixed dtypes"])
def test_what_the_core_cannot_do_is_torchs(why):
    """The same answer as the eager backend, bit for bit."""
    dtype = {"fp64": torch.float64, "fp16": torch.float16, "fp32": fp32}.get(why, bf16)
    inputs = make((0 if why == "empty" else 6,), 32, 24, 80 if why == "rank" else 4, dtype)
    options = {}
    if why == "column stride":
        inputs["x"] = inputs["x"].t().contiguous().t()
    if why == "mixed dtypes":
        inputs |= {name: inputs[name].float() for name in ("A", "B")}
        options["precision"] = "adapter"
    found, torchs = (ours("linear", inputs, backend=name, **options) for name in ("native", "eager"))
    assert all(torch.equal(found[name], torchs[name]) for name in torchs)


@pytest.mark.parametrize("r", [1, 16, 64, 80])
def test_fp32_outer_of_a_split(isa, r, monkeypatch):
    """precision="adapter": dA and dB in fp32 from a bf16 x, more ranks than the core takes at once."""
    monkeypatch.setattr(cpu, "_SPLIT_FROM", 1)
    monkeypatch.setattr(TorchProducts, "outer_wide", None)
    g = torch.Generator().manual_seed(r)
    x, t = strided(70, 130, bf16, g), torch.randn(70, r, generator=g)
    found = core.outer_wide(t, x, 0.7)
    assert error_ratio(found, 0.7 * t.double().t() @ x.double()) <= RATIO[fp32]
