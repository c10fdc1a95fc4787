"""The experts' LoRA layer in Triton against its fp64 formula, and how its programs find their rows."""

from __future__ import annotations

import pytest
import torch
from on_triton import DEVICE, INTERPRETED, draw, on_device
from oracle import DTYPES, SCALING, laid_out
from places import Place

import slao_kernels.ops.operators  # noqa: F401  (defines the operators)
from slao_kernels import dispatch
from slao_kernels.ops.expert_linear import expert_linear, reference
from slao_kernels.testing import TOLERANCE, error_ratio

triton = pytest.importorskip("triton", reason="triton is not installed")
import triton.language as tl  # noqa: E402

from slao_kernels.ops.expert_linear import device, kernels  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned")

# Rows of each expert, K, N, r.
SMALL = ((3, 0, 5), 24, 16, 4)
CASES = {
    "one row": ((1,), 16, 24, 8),
    "odd sizes, rank 1": ((3, 0, 5), 33, 17, 1),
    "all rows to one": ((0, 20, 0), 64, 48, 64),
    "a row each": ((1, 1, 1, 1, 1), 16, 16, 8),
    "tiles of rows and of columns": ((70, 0, 65), 48, 272, 20),
    "a rank of many steps": ((0, 2, 9), 16, 16, 200),
    "rank 8 of sizes not by 16": ((4, 0), 40, 24, 8),
}


def make(rows, k, n, r, dtype, seed=0):
    e = len(rows)
    found = {
        "x": draw(sum(rows), k, dtype=dtype, seed=seed),
        "weight": draw(e, n, k, dtype=dtype, seed=seed + 1, scale=k**-0.5),
        "A": draw(e, r, k, dtype=dtype, seed=seed + 2, scale=k**-0.5),
        "B": draw(e, n, r, dtype=dtype, seed=seed + 3, scale=r**-0.5 / 3),
    }
    return found, torch.tensor(rows).cumsum(0).int().to(DEVICE), draw(sum(rows), n, dtype=dtype, seed=seed + 4)


def run(op, tensors, ends, dy, needed=("x", "A", "B"), **options):
    """y and the gradients of what is needed."""
    leaves = {name: value.detach().requires_grad_(name in needed) for name, value in tensors.items()}
    y = op(leaves["x"], leaves["weight"], leaves.get("A"), leaves.get("B"), SCALING, ends, **options)
    y.backward(dy)
    return {"y": y.detach(), **{name: leaves[name].grad for name in needed}}


def ours(*args, **options):
    return run(expert_linear, *args, **options, backend="triton")


def exact(tensors, ends, dy, needed=("x", "A", "B")):
    wide = {name: value.double() for name, value in tensors.items()}
    return run(reference.expert_linear, wide, ends, dy.double(), needed)


def check(found, expected, dtype):
    for name, value in expected.items():
        assert found[name].dtype == dtype
        assert error_ratio(found[name], value) <= TOLERANCE[dtype], name


@on_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_forward_and_every_gradient(case, dtype):
    """fp64 is torch's."""
    tensors, ends, dy = make(*CASES[case], dtype)
    check(ours(tensors, ends, dy), exact(tensors, ends, dy), dtype)


@on_device
@pytest.mark.parametrize("sizes", [(24, 16), (32, 48)], ids=["odd", "by 16"])
def test_without_a_branch(sizes):
    tensors, ends, dy = make((3, 0, 5), *sizes, 4, torch.bfloat16)
    base = {name: tensors[name] for name in ("x", "weight")}
    check(ours(base, ends, dy, ("x",)), exact(base, ends, dy, ("x",)), torch.bfloat16)


@on_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_branch_beside_torchs_base(dtype, monkeypatch):
    """torch's grouped GEMM, then the branch in place; on a GPU in fp32 it is torch's loop."""
    monkeypatch.setattr(kernels, "grouped_serves", lambda left, right: True)
    tensors, ends, dy = make((3, 0, 70), 32, 48, 12, dtype)
    check(ours(tensors, ends, dy), exact(tensors, ends, dy), dtype)


@on_device
def test_launches(monkeypatch):
    """As kernels.py says."""
    names, launch = [], kernels.launch
    monkeypatch.setattr(
        kernels, "launch", lambda kernel, *rest, **more: (names.append(kernel), launch(kernel, *rest, **more))
    )
    tensors, ends, dy = make(*SMALL, torch.float32)
    ours(tensors, ends, dy)
    rows, outer = device.rows_kernel, device.outer_kernel
    assert names == [rows, rows, rows, rows, outer, outer]
    monkeypatch.setattr(kernels, "grouped_serves", lambda left, right: True)
    names.clear()
    ours(*make((3, 5), 16, 16, 4, torch.float32))
    assert names == [rows, rows, rows, rows, outer, outer]


@on_device
@pytest.mark.parametrize("layout", ["stored transposed", "transposed", "columns"])
def test_layouts_of_the_weight(layout):
    """transformers keeps some models' experts as (E, K, N)."""
    tensors, ends, dy = make((3, 0, 5), 32, 16, 8, torch.float32)
    weight, expected = tensors["weight"], exact(tensors, ends, dy)
    stored = weight.mT.contiguous().mT if layout == "stored transposed" else laid_out(weight, layout)
    assert stored.stride() != weight.stride()
    check(ours(tensors | {"weight": stored}, ends, dy), expected, torch.float32)


@on_device
@pytest.mark.parametrize("layout", ["transposed", "every other", "expanded"])
def test_layouts_of_rows(layout):
    tensors, ends, dy = make(*SMALL, torch.float32)
    tensors["x"], dy = laid_out(tensors["x"], layout), laid_out(dy, layout)
    check(ours(tensors, ends, dy), exact(tensors, ends, dy), torch.float32)


@on_device
@pytest.mark.parametrize("needed", ["x", "A", "B"])
def test_one_gradient_alone(needed):
    tensors, ends, dy = make(*SMALL, torch.float16)
    check(ours(tensors, ends, dy, (needed,)), exact(tensors, ends, dy, (needed,)), torch.float16)


@on_device
def test_no_rows():
    tensors, ends, dy = make((0, 0), 16, 24, 8, torch.bfloat16)
    found = ours(tensors, ends, dy)
    assert found["y"].shape == (0, 24)
    assert not found["A"].any()
    assert not found["B"].any()


@on_device
def test_rows_of_one_expert_do_not_reach_another():
    """NaN in what one expert has: in a tile of its own, and only in its gradients."""
    tensors, ends, dy = make((3, 4, 5), 16, 16, 8, torch.float32)
    expected = exact(tensors, ends, dy)
    for name in ("weight", "A", "B"):
        tensors[name][1] = torch.nan
    tensors["x"][3:7] = torch.nan
    found = ours(tensors, ends, dy)
    for name, value in expected.items():
        bad = slice(3, 7) if name in ("x", "y") else slice(1, 2)
        assert found[name][bad].isnan().all(), name
        kept = torch.ones(len(value), dtype=torch.bool, device=DEVICE)
        kept[bad] = False
        assert error_ratio(found[name][kept], value[kept]) <= TOLERANCE[torch.float32], name


@on_device
def test_again_and_without_a_wait():
    """Bitwise the same, and nothing that makes the host wait for the device."""
    tensors, ends, dy = make(*SMALL, torch.float16)
    first = ours(tensors, ends, dy)
    with Place(DEVICE, "triton").no_waiting():
        again = ours(tensors, ends, dy)
    for name, value in first.items():
        assert torch.equal(again[name], value), name


@on_device
def test_an_expert_beyond_2_31_elements():
    """Its weights begin 2^31 elements behind the first's; on a CPU nobody touches the pages between."""
    tensors, ends, dy = make((2, 0, 3), 16, 16, 4, torch.float16)
    torch.use_deterministic_algorithms(False)  # it would fill them
    memory = torch.empty(2**31 + 256, dtype=torch.float16, device=DEVICE)
    weight = memory.as_strided((3, 16, 16), (2**30, 16, 1))
    weight.copy_(tensors["weight"])
    check(ours(tensors | {"weight": weight}, ends, dy), exact(tensors, ends, dy), torch.float16)


@triton.jit
def _found_kernel(ends, experts, out, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    expert, first = device._find(ends, experts, tl.program_id(0), BLOCK_M, BLOCK_E)
    tl.store(out + 2 * tl.program_id(0), expert)
    tl.store(out + 2 * tl.program_id(0) + 1, first)


def rows_of(experts: int, seed: int) -> torch.Tensor:
    """Of each expert: mostly few, many of one, none of every third at least."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, 40, (experts,), generator=g)
    rows[::3] = 0
    rows[experts // 2] += 100
    return rows


@on_device
@pytest.mark.parametrize("experts", [1, 7, 128, pytest.param(512, marks=pytest.mark.exhaustive)])
def test_every_row_is_in_one_tile(experts):
    m, rows = 16, rows_of(experts, seed=1)
    ends = rows.cumsum(0).int().to(DEVICE)
    programs = kernels.tiles_at_most(int(rows.sum()), experts, m)
    out = torch.full((programs, 2), -1, dtype=torch.int32, device=DEVICE)
    _found_kernel[(programs,)](ends, experts, out, m, triton.next_power_of_2(experts))
    starts = [0, *ends.tolist()]
    expected = [[e, first] for e in range(experts) for first in range(starts[e], starts[e + 1], m)]
    assert out[: len(expected)].tolist() == expected
    assert (out[len(expected) :, 0] == experts).all()


@pytest.mark.parametrize("seed", range(20))
def test_there_are_programs_enough(seed):
    for experts in (1, 5, 64):
        for m in (32, 64):
            for rows in (rows_of(experts, seed), (rows_of(experts, seed) > 20).long(), rows_of(experts, seed) * 0):
                needed = int(((rows + m - 1) // m).sum())
                assert needed <= kernels.tiles_at_most(int(rows.sum()), experts, m) <= needed + min(experts, rows.sum())
    # Reached: one row beyond a tile in each.
    assert kernels.tiles_at_most(5 * 65, 5, 64) == 10


@on_device
def test_operators():
    tensors, ends, dy = make(*SMALL, torch.float32)
    ops, A, B = torch.ops.slao_kernels, tensors["A"], tensors["B"]
    args = tensors["x"], tensors["weight"], A, B, SCALING, ends, "triton"
    checks = "test_schema", "test_faketensor"  # the others, which look at autograd, in test_expert_linear.py
    torch.library.opcheck(ops.expert_linear.default, args, test_utils=checks)
    t = ops.expert_linear(*args)[1]
    back = dy, tensors["x"], tensors["weight"], t, A, B, SCALING, ends, True, True, True, "triton"
    torch.library.opcheck(ops.expert_linear_backward.default, back, test_utils=checks)


def test_auto_is_eager():
    """Nothing of this has been timed on a GPU."""
    assert dispatch._PREFERENCE["expert_linear"] == ("eager", "triton", "reference")
    assert dispatch.choose("expert_linear", "cpu") == "eager"
    if not INTERPRETED:
        with pytest.raises(ValueError, match="Triton has no such device"):
            dispatch.choose("expert_linear", "cpu", "triton")
