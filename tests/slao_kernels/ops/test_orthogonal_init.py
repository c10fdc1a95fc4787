"""orthogonal_init_: the contract of the design, wherever it runs (on_lists.py)."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from on_lists import (
    COMPLETED,
    CORES,
    DTYPES,
    EMULATED,
    FINE,
    GPU,
    INTERPRETED,
    NOT_FINITE,
    PUBLIC,
    STORAGE,
    at,
    bits,
    conditioned,
    exact_qr,
    orthogonality,
    orthonormal,
)
from torch import Tensor

import slao_kernels

fp64, fp32 = torch.float64, torch.float32
SHAPES = [(1, 1), (1, 7), (3, 3), (8, 33), (12, 100), (16, 768), (64, 200), (70, 90)]
if not INTERPRETED:  # where each takes seconds
    SHAPES += [
        (256, 256),
        (2, 3),
        (5, 37),
        (17, 40),
        (33, 65),
        (65, 70),
        (16, 2051),
        (16, 4096),
        (33, 1030),
        (130, 257),
    ]


@at(PUBLIC, CORES, EMULATED, GPU)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_unique_qr(shape, dtype, ops):
    A = torch.randn(shape, dtype=fp64).to(dtype)
    Q, R = exact_qr(A)
    states, (found,) = ops.init([A], triangles=True)
    assert (states, A.dtype) == ([FINE], dtype)
    # A square Gaussian of this size has κ up to 1e3, where rows of Q move by κ·eps.
    slack = 100 if shape == (256, 256) else 1
    assert (A.double() - Q).abs().max() <= (1e-5 if dtype != fp64 else 1e-12 * slack) + torch.finfo(dtype).eps
    assert orthogonality(A) <= STORAGE[dtype] * math.sqrt(shape[0])
    assert found.dtype == (fp64 if dtype == fp64 else fp32)
    assert (found.double() - R).abs().max() <= 1e-5 * R.abs().max()
    assert (found.diagonal() > 0).all()
    assert not found.tril(-1).any()


@at(PUBLIC, EMULATED, GPU)
@pytest.mark.parametrize("dtype", [fp32] if INTERPRETED else DTYPES, ids=str)
@pytest.mark.parametrize("kappa", [1.0, 2.0, 5.0, 1e2, 1e4, 1e6, 1e7])
@pytest.mark.parametrize("r", [8, 16, 64])
def test_orthonormal_up_to_a_condition_of_1e7(r, kappa, dtype, ops):
    """And R Q is the input, what `preserve=True` relies on: the rounding of Q, not that of the triangular solve, is all
    that is lost."""
    A = conditioned(r, 512, kappa).to(dtype)
    start, (Q, _) = A.double().clone(), exact_qr(A)
    _, (R,) = ops.init([A], triangles=True)
    assert orthogonality(A) <= {fp64: 1e-13, fp32: 1e-6}.get(dtype, STORAGE[dtype] * math.sqrt(r))
    if kappa <= 1e3:
        assert (A.double() - Q).abs().max() <= 1e-5 + torch.finfo(dtype).eps
    lost = R.double().T @ A.double() - start
    assert lost.norm() <= max(1e-6, STORAGE[dtype]) * math.sqrt(r) * start.norm()
    assert dtype not in (fp64, fp32) or lost.abs().max() <= 3e-7 * start.norm()


@at(PUBLIC)
@pytest.mark.parametrize("kappa", [2.0, 3.9, 4.1, 10.0, 50.0, 290.0, 400.0, 1e4, 1e6])
@pytest.mark.parametrize("shape", [(2, 30), (16, 4096), (256, 256)], ids=str)
def test_one_short_direction_among_equals(shape, kappa, ops):
    """Where a whole-matrix measure of condition sees least: at (256, 256), κ = 50, one pass would leave 8e-6."""
    if INTERPRETED and shape != (2, 30) and (shape, kappa) not in (((256, 256), 50.0), ((16, 4096), 1e6)):
        pytest.skip("interpreted, each takes many seconds; two of them see both ways that such matrices can take")
    r, n = shape
    lengths = torch.ones(r, dtype=fp64)
    lengths[-1] = 1 / kappa
    A = (orthonormal(r, r) @ torch.diag(lengths) @ orthonormal(r, n)).float()
    scaled = A * torch.logspace(-4, 4, r)[:, None]
    ops.init([A, scaled])
    assert orthogonality(A) <= 1e-6
    assert orthogonality(scaled) <= 1e-6


# Of fp32 the smallest are denormals of a few units, their rounding is the input; of fp64 no square is a number.
SCALES = [(fp32, scale) for scale in (1e-45, 1e-44, 1e-40, 1e-38, 1e-30, 1e-25, 1.0, 1e25, 1e30, 1e37)]
SCALES += [(fp64, s) for s in (1e-300, 1e-200, 1e-170, 1e-162, 1e-160, 1e-120, 1e120, 1e150, 1e160, 1e200, 1e300)]


@at(PUBLIC, EMULATED)
@pytest.mark.parametrize(("dtype", "scale"), SCALES, ids=str)
def test_magnitude_does_not_matter(dtype, scale, ops):
    A = (3 * torch.randn(16, 300, dtype=fp64) * scale).to(dtype)
    Q, R = exact_qr(A.double() / scale)
    states, (found,) = ops.init([A], triangles=True)
    # The reference's norms of R overflow there, and it calls what is not dependent so.
    assert states == [FINE] or (scale > 1e154 and not INTERPRETED and ops in PUBLIC)
    assert orthogonality(A) <= {fp64: 1e-12, fp32: 1e-6}[dtype]
    assert (A.double() - Q).abs().max() <= {fp64: 1e-12, fp32: 1e-5}[dtype]
    assert dtype == fp32 or (found / scale - R).abs().max() <= 1e-12 * R.abs().max()


@at(PUBLIC, EMULATED)
@pytest.mark.parametrize("smallest", [-8, -30])
def test_rows_of_very_different_size(smallest, ops):
    A = torch.randn(16, 300) * torch.logspace(0, smallest, 16)[:, None]
    Q, _ = exact_qr(A)
    assert ops.init([A])[0] == [FINE]
    assert (A.double() - Q).abs().max() <= 1e-5


@at(PUBLIC)
def test_many_small_matrices_stay_within_the_contract(ops):
    """A handful of products a row: rounding errors do not average, and κ takes every value."""
    count = 2 if INTERPRETED else 200  # interpreted, a matrix takes a tenth of a second
    As = [torch.randn(r, r + 1) for r in (2, 3, 5, 8, 16) for _ in range(count)]
    ops.init(As)
    assert max(orthogonality(A) for A in As) <= 1e-6


# (where, shapes, scales)
ALIKE = [
    (PUBLIC, [(16, 1024), (64, 4096), (256, 256), (256, 257), (256, 1024)], [1e-20, 1e-6, 1.0, 1e6, 1e20]),
    (CORES, [(16, 4096), (60, 2554), (256, 1024)], [1e-6, 1.0, 3.3, 1e6]),
    (EMULATED, [(16, 1024), (64, 1024), (256, 257)], [1e-20, 1e-6, 1.0, 1e6, 1e20]),
]
if INTERPRETED:  # each takes seconds; these see all ways that such matrices can take
    ALIKE = [(PUBLIC, [(16, 512)], [1e-20, 1e6])]


def alike() -> list:
    """All of it; those in the middle of the scales are exhaustive for the slow emulator's largest."""
    found = []
    for places, shapes, scales in ALIKE:
        for place, shape, scale in product(places, shapes, scales):
            few = place not in EMULATED or shape[1] != 257 or scale in (scales[0], scales[-1])
            marks = [] if few else [pytest.mark.exhaustive]
            found.append(pytest.param(place, shape, scale, marks=marks, id=f"{place}-{shape}-{scale}"))
    return found


@pytest.mark.parametrize(("ops", "shape", "scale"), alike(), indirect=["ops"])
def test_what_was_orthonormal_stays_so_at_any_scale(shape, scale, ops):
    """And rows whose products are all alike, so that they are rounded the same way again and again: cosines, signs, two
    values. One fp32 sum over all columns left 7e-6 of cosines, and many rows of two values 1.4e-6 of short sums."""
    (r, n), t = shape, torch.arange(shape[1], dtype=fp64)
    cosines = torch.cos(math.pi / n * (t + 0.5) * t[:r, None]) * math.sqrt(2 / n)
    cosines[0] /= math.sqrt(2)
    signs = torch.where(torch.rand(r, n) < 0.5, -1.0, 1.0).double() / math.sqrt(n)
    As = [cosines, cosines.roll(n // 2, 1), cosines.flip(0), orthonormal(r, n), torch.randn(r, n, dtype=fp64)]
    if n > 2 * r:  # a square matrix of signs may be singular
        As += [signs, torch.where(signs > 0, signs * 1.05, signs)]
    As = [(A * scale).float().contiguous() for A in As]
    assert ops.init(As)[0] == [FINE] * len(As)
    assert max(orthogonality(A) for A in As) <= 1e-6


@at(PUBLIC)
@pytest.mark.parametrize("rho", [0.3, 0.6, 0.8, 0.86])
def test_rows_that_are_alike_and_not_orthogonal(rho, ops):
    """Correlated rows of few values: what the Gram matrix's rounding is multiplied by, 1/σ²_min, up to 7."""
    As = []
    for i in range(3 if INTERPRETED else 40):
        signs = torch.where(torch.rand(2 + i % 3, 200 + 97 * i) < 0.5, -1.0, 1.0)
        signs[-1] = rho / math.sqrt(1 - rho**2) * signs[0] + signs[-1]
        As.append((signs * (0.3 + i)).contiguous())
    ops.init(As)
    assert max(orthogonality(A) for A in As) <= 1e-6


def _with(change) -> Tensor:
    A = torch.randn(16, 300)
    change(A)
    return A


DEFICIENT = {
    "half rank": lambda: torch.randn(16, 8) @ torch.randn(8, 300),
    "zero row": lambda: _with(lambda A: A[5].zero_()),
    "first row zero": lambda: _with(lambda A: A[0].zero_()),
    "all zero": lambda: torch.zeros(16, 300),
    "duplicate row": lambda: _with(lambda A: A[9].copy_(A[2])),
    "every row twice": lambda: torch.randn(8, 300).repeat(2, 1),
    "kappa 1e10": lambda: conditioned(16, 300, 1e10).float(),
    "square zero": lambda: torch.zeros(4, 4),
    "40 rows": lambda: torch.randn(40, 8) @ torch.randn(8, 90),
    "tiny": lambda: 1e-30 * (torch.randn(16, 8) @ torch.randn(8, 300)),
}


@at(PUBLIC, EMULATED, GPU)
@pytest.mark.parametrize("dtype", [fp32] if INTERPRETED else DTYPES, ids=str)
@pytest.mark.parametrize("case", DEFICIENT)
def test_deficient_input_is_completed_and_reported(case, dtype, ops):
    A = DEFICIENT[case]().to(dtype)
    if dtype != fp32 and case not in ("all zero", "square zero"):
        # Rounding made independent noise of what was dependent; a repeated row is dependent in any dtype.
        A[len(A) // 2] = A[0]
    regular, start = torch.randn(16, 300), A.double().clone()
    states, (_, R) = ops.init([regular, A], triangles=True)
    assert states == [FINE, COMPLETED]
    assert orthogonality(A) <= max(5e-6, STORAGE[dtype] * math.sqrt(len(A)))
    slack = max(1e-5, 2 * STORAGE[dtype]) * start.norm()
    assert (start - start @ A.double().T @ A.double()).norm() <= slack  # still spans the input's rows
    assert (R.double().T @ A.double() - start).norm() <= slack
    # The GPU's Cholesky writes the zero; Householder leaves its rounding.
    assert R.diagonal().abs().min() <= (0 if ops in EMULATED else 1e-6 * R.abs().max())
    assert not R.tril(-1).any()


@at(PUBLIC, EMULATED, GPU)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nothing_is_written_when_any_matrix_is_not_finite(bad, dtype, ops):
    As = [torch.randn(shape).to(dtype) for shape in ((4, 20), (20, 40), (4, 1500), (16, 16), (2, 9))]
    As[4].zero_()  # would be completed
    As[1][2, 3] = As[3][0, 0] = bad
    # The reference hands a NaN through fp64: its payload aside.
    kept = (lambda A: A.nan_to_num(7.0)) if str(ops) == "reference" else bits
    before = [kept(A).clone() for A in As]
    states, triangles = ops.init(As, triangles=True)
    assert states == [FINE, NOT_FINITE, FINE, NOT_FINITE, FINE]
    assert all(torch.equal(kept(A), old) for A, old in zip(As, before, strict=True))
    assert all(R.isnan().all() for R in triangles)  # as they were


@at(PUBLIC, EMULATED)
@settings(
    max_examples=20 if INTERPRETED else 60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    r=st.integers(1, 40),
    extra=st.integers(0, 40),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["plain", "transposed", "sliced", "every other row", "shifted"]),
    count=st.integers(1, 4),
    kappa=st.sampled_from([1.0, 1e5]),
    seed=st.integers(0, 2**20),
)
def test_any_shape_and_layout(ops, r, extra, dtype, layout, count, kappa, seed):
    g = torch.Generator().manual_seed(seed)
    As, guards = [], []
    if INTERPRETED:  # a matrix takes a tenth of a second
        r, count = (r + 1) // 2, 1
    for columns in range(r + extra, r + extra + count):
        whole = torch.randn(2 * r, columns + 3, generator=g, dtype=fp64)
        whole = (whole * torch.logspace(0, -math.log10(kappa), 2 * r, dtype=fp64)[:, None]).to(dtype)
        if layout == "transposed":
            whole = whole.t().contiguous().t()
        if layout == "every other row":
            As.append(whole[::2])
        elif layout == "shifted":  # not aligned to what a vector load needs
            As.append(whole[:r, 1 : columns + 1])
        else:
            As.append(whole[:r].clone() if layout == "plain" else whole[:r, :columns])
        guards.append((whole, whole.clone()))
    assert not any(ops.init(As)[0])
    for A, (whole, before) in zip(As, guards, strict=True):
        assert orthogonality(A) <= 2 * STORAGE[dtype] * r + 1e-6  # rounding enters A Aᵀ from both sides
        if layout in ("transposed", "sliced", "shifted"):  # what lies around the view is untouched
            assert torch.equal(whole[r:], before[r:])
            assert torch.equal(whole[:, -2:], before[:, -2:])
        if layout == "shifted":
            assert torch.equal(whole[:, 0], before[:, 0])


@at(PUBLIC)
def test_runs_are_bitwise_equal_and_parameters_work(ops):
    A = torch.randn(16, 500)
    first, second = torch.nn.Parameter(A.clone()), A.clone()
    version = first._version
    ops.init([first])
    ops.init([second])
    assert torch.equal(first, second)
    assert first.requires_grad
    assert first.grad_fn is None
    assert first._version > version


@at(PUBLIC)
def test_nothing_fresh_is_read_before_it_is_written(ops, poisoned):
    """Every new tensor is full of NaN here. One list with each kind of matrix: of few, some and many rows, of each
    dtype, for one pass and two, nearly dependent; and R of all."""
    As = [torch.randn(16, 40), torch.randn(40, 50).double(), torch.randn(70, 90), conditioned(16, 60, 1e3).float()]
    dependent = [torch.zeros(5, 9), torch.randn(12, 6).half() @ torch.randn(6, 30).half()]
    if not INTERPRETED:  # each of many rows takes seconds
        As += [torch.randn(20, 2050).half(), conditioned(40, 60, 1e6).bfloat16(), torch.randn(70, 90).bfloat16()]
        dependent.insert(0, torch.zeros(70, 71).half())
    fine = len(As)
    As += dependent
    before = [A.clone().double() for A in As]
    states, triangles = ops.init(As, triangles=True)
    assert states[:-1] == [FINE] * fine + [COMPLETED] * (len(dependent) - 1)
    for A, R, old in zip(As, triangles, before, strict=True):
        assert orthogonality(A) <= 5 * STORAGE[A.dtype] * math.sqrt(len(A))
        assert not R.tril(-1).any()
        assert (R.double().T @ A.double() - old).norm() <= max(1e-6, torch.finfo(A.dtype).eps) * max(1.0, old.norm())


# What is refused, whichever backend would compute it, and what looks bad and is not

shared = torch.randn(6, 40)
BAD = {
    "r > n": ([torch.randn(5, 4)], r"As\[0\]: is \(5, 4\); it needs the shape \(r, n\)"),
    "vector": ([torch.randn(5)], r"As\[0\]: is \(5,\)"),
    "no rows": ([torch.randn(0, 5)], r"As\[0\]: is \(0, 5\)"),
    "integers": ([torch.ones(2, 4, dtype=torch.int32)], r"As\[0\]: is torch.int32"),
    "meta": ([torch.empty(2, 4, device="meta")], r"As\[0\]: is on the meta device; load the weights first"),
    "list": ([[1.0]], r"As\[0\]: is a list, expected a tensor"),
    "twice": ([shared, shared], r"As\[1\]: overlaps the memory of As\[0\]"),
    "overlap": ([shared[:4], shared[3:]], r"As\[1\]: overlaps the memory of As\[0\]"),
    "expanded": ([torch.randn(1, 9).expand(3, 9)], r"As\[0\]: is an expanded view"),
    "sparse": ([torch.eye(3).to_sparse()], r"As\[0\]: has layout torch.sparse_coo"),
    "many": ([torch.randn(5, 4)] * 20, "and 12 more"),
}


@pytest.mark.skipif(INTERPRETED, reason="no backend is reached")
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_before_anything_is_written(case):
    As, message = BAD[case]
    good = torch.randn(3, 7)
    before, shared_before = good.clone(), shared.clone()
    with pytest.raises(ValueError, match=message):
        slao_kernels.orthogonal_init_([*As, good])
    assert torch.equal(good, before)
    assert torch.equal(shared, shared_before)


@at(PUBLIC)
def test_side_by_side_views_are_not_an_overlap(ops):
    """Columns of one matrix interleave in memory without sharing a byte (stacked A of q, k and v)."""
    both = torch.randn(4, 30)
    ops.init([both[:, :13], both[:, 13:]])
    assert max(orthogonality(A) for A in (both[:, :13], both[:, 13:])) <= 1e-6
