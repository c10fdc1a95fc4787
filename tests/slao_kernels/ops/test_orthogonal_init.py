"""orthogonal_init_: the contract of the design, on every backend that this device has."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from on_triton import INTERPRETED, interpreted
from torch import Tensor

import slao_kernels
from slao_kernels import dispatch

BACKENDS = [name for name in dispatch.BACKENDS[1:] if dispatch.why_not("orthogonal_init", name, "cpu") is None]
if INTERPRETED:  # the others have had their turn
    assert "triton" in BACKENDS
    BACKENDS = ["triton"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
test_under_the_interpreter = interpreted(__file__, at_least=90)
# Half a unit of the storage dtype on entries of size 1/√n, times the worst case of r rows adding up.
STORAGE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def orthogonality(A: Tensor) -> float:
    """‖A Aᵀ − I‖₂."""
    wide = A.detach().double()
    return torch.linalg.matrix_norm(wide @ wide.T - torch.eye(wide.shape[0], dtype=torch.float64), 2).item()


def conditioned(r: int, n: int, kappa: float, seed: int = 0) -> Tensor:
    """(r, n) in fp64 with singular values from 1 down to 1/kappa, spread evenly in the exponent."""
    g = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(r, r, generator=g, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(n, r, generator=g, dtype=torch.float64))[0]
    return U @ torch.diag(torch.logspace(0, -math.log10(kappa), r, dtype=torch.float64)) @ V.T


def exact(A: Tensor) -> tuple[Tensor, Tensor]:
    """(Qᵀ, R) of Aᵀ = Q R with diag(R) > 0, in fp64, by LAPACK."""
    Q, R = torch.linalg.qr(A.detach().double().T)
    sign = torch.where(R.diagonal() < 0, -1.0, 1.0)
    return (Q * sign).T, R * sign[:, None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 7), (3, 3), (8, 33), (12, 100), (16, 768), (64, 200), (256, 256)], ids=str
)
def test_is_the_unique_qr(shape, dtype, backend):
    A = torch.randn(shape, dtype=torch.float64).to(dtype)
    Q, R = exact(A)
    report = slao_kernels.orthogonal_init_([A], return_r=True, backend=backend)
    assert A.dtype == dtype
    assert report.deficient == []
    # 256×256 Gaussians have κ near 1e3, where rows of Q move by κ·eps.
    slack = 100 if shape == (256, 256) else 1
    assert (A.double() - Q).abs().max() <= (1e-5 if dtype != torch.float64 else 1e-12 * slack) + torch.finfo(dtype).eps
    assert orthogonality(A) <= STORAGE[dtype] * math.sqrt(shape[0])
    (found,) = report.r
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (found.double() - R).abs().max() <= 1e-5 * R.abs().max()
    assert (found.diagonal() > 0).all()
    assert not found.tril(-1).any()


@pytest.mark.parametrize("kappa", [1.0, 1e2, 1e4, 1e6, 1e7])
@pytest.mark.parametrize("r", [8, 16, 64])
def test_orthonormal_up_to_a_condition_of_1e7(r, kappa, backend):
    A = conditioned(r, 512, kappa).float()
    Q, _ = exact(A)
    slao_kernels.orthogonal_init_([A], backend=backend)
    assert orthogonality(A) <= 1e-6
    if kappa <= 1e3:
        assert (A.double() - Q).abs().max() <= 1e-5


@pytest.mark.parametrize("kappa", [2.0, 3.9, 4.1, 10.0, 50.0, 290.0, 400.0, 1e4, 1e6])
@pytest.mark.parametrize("shape", [(2, 30), (16, 4096), (256, 256)], ids=str)
def test_one_short_direction_among_equals(shape, kappa, backend):
    """Where a whole-matrix measure of condition sees least: at (256, 256), κ = 50, one pass would leave 8e-6."""
    if backend == "triton" and shape != (2, 30) and kappa not in (50.0, 1e6):
        pytest.skip("interpreted, each takes seconds; two of them see both ways that such matrices can take")
    r, n = shape
    U = torch.linalg.qr(torch.randn(r, r, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(n, r, dtype=torch.float64)).Q
    lengths = torch.ones(r, dtype=torch.float64)
    lengths[-1] = 1 / kappa
    A = (U @ torch.diag(lengths) @ V.T).float()
    scaled = A * torch.logspace(-4, 4, r)[:, None]
    slao_kernels.orthogonal_init_([A, scaled], backend=backend)
    assert orthogonality(A) <= 1e-6
    assert orthogonality(scaled) <= 1e-6


@pytest.mark.parametrize("kappa", [2.0, 5.0, 1e2, 1e4, 1e6])
def test_r_times_q_is_the_input_whatever_its_condition(kappa, backend):
    """What `preserve=True` relies on: the rounding of Q, not that of the triangular solve, is all that is lost."""
    As = [conditioned(16, 300, kappa, seed).float() for seed in range(3)]
    before = [A.clone().double() for A in As]
    found = slao_kernels.orthogonal_init_(As, return_r=True, backend=backend)
    for A, R, old in zip(As, found.r, before, strict=True):
        assert (R.double().T @ A.double() - old).abs().max() <= 3e-7 * old.norm()


@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-30, 1e30])
def test_rows_at_the_edges_of_fp32(size, backend):
    A = (torch.randn(8, 100, dtype=torch.float64) * size).float()
    slao_kernels.orthogonal_init_([A], backend=backend)
    assert orthogonality(A) <= 5e-6


@pytest.mark.parametrize("size", [1e-300, 1e-170, 1e-162, 1e-160, 1e150, 1e160, 1e300])
def test_rows_whose_squares_fp64_cannot_hold(size, backend):
    A = torch.randn(8, 100, dtype=torch.float64) * size
    slao_kernels.orthogonal_init_([A], backend=backend)
    assert orthogonality(A) <= 1e-12


def test_many_small_matrices_stay_within_the_contract(backend):
    """A handful of products a row: rounding errors do not average, and κ takes every value."""
    count = 6 if backend == "triton" else 200  # interpreted, a matrix takes a tenth of a second
    As = [torch.randn(r, r + 1) for r in (2, 3, 5, 8, 16) for _ in range(count)]
    slao_kernels.orthogonal_init_(As, backend=backend)
    assert max(orthogonality(A) for A in As) <= 1e-6


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1.0, 1e6, 1e20])
@pytest.mark.parametrize("shape", [(16, 1024), (64, 4096), (256, 256), (256, 257), (256, 1024)], ids=str)
def test_what_was_orthonormal_stays_so_at_any_scale(shape, scale, backend):
    """And rows whose products are all alike, so that their rounding does not average: cosines, ±1, two values. Long
    fp32 sums left 7e-6 of such rows."""
    if backend == "triton" and (shape[0] > 16 or scale in (1e-6, 1.0, 1e20)):
        pytest.skip("interpreted, each takes seconds; the others see all ways that such matrices can take")
    (r, n), t = shape, torch.arange(shape[1], dtype=torch.float64)
    cosines = torch.cos(math.pi / n * (t + 0.5) * t[:r, None]) * math.sqrt(2 / n)
    cosines[0] /= math.sqrt(2)
    As = [cosines, cosines.roll(n // 2, 1)]
    for seed in range(1 if backend == "triton" else 3):
        g = torch.Generator().manual_seed(seed)
        As.append(torch.linalg.qr(torch.randn(n, r, generator=g, dtype=torch.float64)).Q.T)
        signs = torch.where(torch.rand(r, n, generator=g) < 0.5, -1.0, 1.0).double() / math.sqrt(n)
        if n > 2 * r:  # a square matrix of signs may be singular
            As += [signs, torch.where(signs > 0, signs * 1.05, signs)]
    As = [(A * scale).float().contiguous() for A in As]
    slao_kernels.orthogonal_init_(As, backend=backend)
    assert max(orthogonality(A) for A in As) <= 1e-6


@pytest.mark.parametrize("rho", [0.3, 0.6, 0.8, 0.86])
def test_rows_that_are_alike_and_not_orthogonal(rho, backend):
    """Correlated rows of few values: what the Gram matrix's rounding is multiplied by, 1/σ²_min, up to 7."""
    As = []
    for seed in range(3 if backend == "triton" else 40):
        g = torch.Generator().manual_seed(seed)
        n = 200 + 97 * seed
        signs = torch.where(torch.rand(2 + seed % 3, n, generator=g) < 0.5, -1.0, 1.0)
        signs[-1] = rho / math.sqrt(1 - rho**2) * signs[0] + signs[-1]
        As.append((signs * (0.3 + seed)).contiguous())
    slao_kernels.orthogonal_init_(As, backend=backend)
    assert max(orthogonality(A) for A in As) <= 1e-6


def _half_rank() -> Tensor:
    return torch.randn(16, 8) @ torch.randn(8, 300)


def _with_zero_row() -> Tensor:
    A = torch.randn(16, 300)
    A[5] = 0
    return A


def _with_duplicate() -> Tensor:
    A = torch.randn(16, 300)
    A[9] = A[2]
    return A


DEFICIENT = {
    "half rank": _half_rank,
    "zero row": _with_zero_row,
    "all zero": lambda: torch.zeros(16, 300),
    "duplicate row": _with_duplicate,
    "kappa 1e10": lambda: conditioned(16, 300, 1e10).float(),
    "square zero": lambda: torch.zeros(4, 4),
}


@pytest.mark.parametrize("case", DEFICIENT)
def test_deficient_input_is_completed_and_reported(case, backend):
    torch.manual_seed(1)
    A, regular = DEFICIENT[case](), torch.randn(16, 300)
    directions = A.clone()
    report = slao_kernels.orthogonal_init_([regular, A], backend=backend)
    assert report.deficient == [1]
    assert orthogonality(A) <= 5e-6
    # The completed set still spans the input's row space.
    residual = directions - directions @ A.T @ A
    assert residual.norm() <= 1e-5 * max(1.0, directions.norm())


@pytest.mark.parametrize("scale", [1e-38, 1e-25, 1.0, 1e25, 1e37])
def test_magnitude_does_not_matter(scale, backend):
    torch.manual_seed(2)
    A = torch.randn(16, 300)
    scaled = A * scale  # 1e-38: many entries are denormal
    reference, _ = exact(scaled)
    report = slao_kernels.orthogonal_init_([scaled], backend=backend)
    assert report.deficient == []
    assert orthogonality(scaled) <= 1e-6
    assert (scaled.double() - reference).abs().max() <= 1e-5


def test_rows_of_very_different_size(backend):
    torch.manual_seed(3)
    A = torch.randn(16, 300) * torch.logspace(0, -8, 16)[:, None]
    reference, _ = exact(A)
    report = slao_kernels.orthogonal_init_([A], backend=backend)
    assert report.deficient == []
    assert (A.double() - reference).abs().max() <= 1e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nothing_is_written_when_any_matrix_is_not_finite(bad, backend):
    As = [torch.randn(4, 20) for _ in range(4)]
    As[1][2, 3] = As[3][0, 0] = bad
    before = [A.clone() for A in As]
    with pytest.raises(ValueError, match=r"As\[1\]: has NaN or infinite.*As\[3\].*Nothing was written"):
        slao_kernels.orthogonal_init_(As, backend=backend)
    for A, old in zip(As, before, strict=True):
        assert torch.equal(A.view(torch.int32), old.view(torch.int32))


@settings(max_examples=40, deadline=None)
@given(
    r=st.integers(1, 24),
    extra=st.integers(0, 40),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["plain", "transposed", "sliced", "every other row"]),
    count=st.integers(1, 4),
    seed=st.integers(0, 2**20),
)
def test_any_shape_and_layout(r, extra, dtype, layout, count, seed):
    g = torch.Generator().manual_seed(seed)
    for name in BACKENDS:
        As, guards = [], []
        if name == "triton":  # interpreted, a matrix takes a tenth of a second
            count = 1
        for columns in range(r + extra, r + extra + count):
            whole = torch.randn(2 * r, columns + 3, generator=g, dtype=torch.float64).to(dtype)
            if layout == "transposed":
                whole = whole.t().contiguous().t()
            if layout == "plain":
                As.append(whole[:r].clone())
            else:
                As.append(whole[::2] if layout == "every other row" else whole[:r, :columns])
            guards.append((whole, whole.clone()))
        slao_kernels.orthogonal_init_(As, backend=name)
        for A, (whole, before) in zip(As, guards, strict=True):
            assert orthogonality(A) <= 2 * STORAGE[dtype] * r + 1e-6  # a square doubles its factors' rounding
            if layout in ("transposed", "sliced"):  # what lies around the view is untouched
                assert torch.equal(whole[r:], before[r:])
                assert torch.equal(whole[:, -3:], before[:, -3:])


def test_runs_are_bitwise_equal_and_parameters_work(backend):
    torch.manual_seed(4)
    A = torch.randn(16, 500)
    first, second = torch.nn.Parameter(A.clone()), A.clone()
    version = first._version
    slao_kernels.orthogonal_init_([first], backend=backend)
    slao_kernels.orthogonal_init_([second], backend=backend)
    assert torch.equal(first, second)
    assert first.requires_grad
    assert first.grad_fn is None
    assert first._version > version


def test_nothing_fresh_is_read_before_it_is_written(backend, poisoned):
    """Every new tensor is full of NaN here. One list with each kind of matrix: of few, some and many rows, of each
    dtype, for one pass and two, nearly dependent; and R of all."""
    As = [torch.randn(16, 40), torch.randn(20, 2050).half(), torch.randn(40, 50).double(), torch.randn(70, 90)]
    As += [conditioned(16, 60, 1e3).float(), conditioned(40, 60, 1e6).bfloat16(), torch.randn(70, 90).bfloat16()]
    As += [torch.zeros(5, 9), torch.zeros(70, 71).half(), torch.randn(12, 6).half() @ torch.randn(6, 30).half()]
    before = [A.clone().double() for A in As]
    report = slao_kernels.orthogonal_init_(As, return_r=True, backend=backend)
    assert report.deficient[:2] == [7, 8]
    for A, R, old in zip(As, report.r, before, strict=True):
        assert orthogonality(A) <= 5 * STORAGE[A.dtype] * math.sqrt(len(A))
        assert not R.tril(-1).any()
        assert (R.double().T @ A.double() - old).norm() <= max(1e-6, torch.finfo(A.dtype).eps) * max(1.0, old.norm())
