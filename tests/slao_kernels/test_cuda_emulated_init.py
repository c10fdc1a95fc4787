"""orthogonal_init's GPU kernels on the CPU; see test_cuda_emulated.py for what that proves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from slao_kernels import native
from slao_kernels.ops.orthogonal_init import native as orthogonal_init
from slao_kernels.ops.orthogonal_init import reference as orthogonal_reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# As in ops/test_orthogonal_init.py, with its reasons.
STORAGE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
ORDERS = [(blocks, last_thread_first) for blocks in (0, 1, 2) for last_thread_first in (False, True)]


@pytest.fixture
def core(emulated: ModuleType) -> Iterator[ModuleType]:
    yield emulated
    emulated.set_order(0, False)
    emulated.set_driver(12010)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def init(core: ModuleType, As: Sequence[Tensor], r: Sequence[Tensor] = ()) -> list[int]:
    """The states; the workspace holds garbage before, and nothing is written behind it."""
    table, triangles = native.table(map(native.matrix, As)), native.table(map(native.matrix, r))
    size = core.cuda_orthogonal_init_workspace(table)
    whole = torch.full((size + 512,), 0xFF, dtype=torch.uint8)
    start = -whole.data_ptr() % 256
    states = torch.full((len(As),), 77, dtype=torch.int32)
    core.cuda_orthogonal_init(table, triangles, states.data_ptr(), whole.data_ptr() + start, 0, 0)
    assert (whole[start + size :] == 0xFF).all()
    return states.tolist()


def triangles_for(As: Sequence[Tensor]) -> list[Tensor]:
    dtypes = [torch.float64 if A.dtype == torch.float64 else torch.float32 for A in As]
    return [torch.full((len(A), len(A)), math.nan, dtype=dtype) for A, dtype in zip(As, dtypes, strict=True)]


def orthogonality(A: Tensor) -> float:
    wide = A.double()
    return torch.linalg.matrix_norm(wide @ wide.T - torch.eye(wide.shape[0], dtype=torch.float64), 2).item()


def exact(A: Tensor) -> tuple[Tensor, Tensor]:
    Q, R = torch.linalg.qr(A.double().T)
    sign = torch.where(R.diagonal() < 0, -1.0, 1.0)
    return (Q * sign).T, R * sign[:, None]


def orthonormal(r: int, n: int) -> tuple[Tensor, Tensor]:
    """(r, n) in fp64 with orthonormal rows: of random numbers, and cosines, whose products are alike."""
    t = torch.arange(n, dtype=torch.float64)
    cosines = torch.cos(math.pi / n * (t + 0.5) * t[1 : r + 1, None]) * math.sqrt(2 / n)
    return torch.linalg.qr(torch.randn(n, r, dtype=torch.float64)).Q.T, cosines[: min(r, n - 1)]


def conditioned(r: int, n: int, kappa: float) -> Tensor:
    U = torch.linalg.qr(torch.randn(r, r, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(n, r, dtype=torch.float64))[0]
    return U @ torch.diag(torch.logspace(0, -math.log10(kappa), r, dtype=torch.float64)) @ V.T


SHAPES = [(1, 1), (1, 7), (3, 3), (8, 33), (12, 100), (16, 768), (17, 40), (16, 2051), (33, 1030), (64, 200), (65, 70)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (130, 257), (256, 256)], ids=str)
def test_is_the_unique_qr(core, shape, dtype):
    A = torch.randn(shape, dtype=torch.float64).to(dtype)
    Q, R = exact(A)
    (found,) = triangles = triangles_for([A])
    assert init(core, [A], triangles) == [0]
    slack = 100 if shape[0] == shape[1] else 1  # square Gaussians have κ up to 1e3
    assert (A.double() - Q).abs().max() <= (1e-5 if dtype != torch.float64 else 1e-12 * slack) + torch.finfo(dtype).eps
    assert orthogonality(A) <= STORAGE[dtype] * math.sqrt(shape[0])
    assert (found.double() - R).abs().max() <= 1e-5 * R.abs().max()
    assert (found.diagonal() > 0).all()
    assert not found.tril(-1).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kappa", [1.0, 1e2, 1e4, 1e6, 1e7])
@pytest.mark.parametrize("r", [8, 16, 64])
def test_orthonormal_up_to_a_condition_of_1e7(core, r, kappa, dtype):
    A = conditioned(r, 512, kappa).to(dtype)
    start, (Q, _) = A.double().clone(), exact(A)
    (R,) = triangles = triangles_for([A])
    init(core, [A], triangles)
    assert orthogonality(A) <= {torch.float64: 1e-13, torch.float32: 1e-6}.get(dtype, STORAGE[dtype] * math.sqrt(r))
    if kappa <= 1e3:
        assert (A.double() - Q).abs().max() <= 1e-5 + torch.finfo(dtype).eps
    assert (R.double().T @ A.double() - start).norm() <= max(1e-6, STORAGE[dtype]) * math.sqrt(r) * start.norm()


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
    "kappa 1e10": lambda: conditioned(16, 300, 1e10).float(),
    "square zero": lambda: torch.zeros(4, 4),
    "40 rows": lambda: torch.randn(40, 8) @ torch.randn(8, 90),
    "tiny": lambda: 1e-30 * (torch.randn(16, 8) @ torch.randn(8, 300)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", DEFICIENT)
def test_deficient_input_is_completed_and_reported(core, case, dtype):
    A = DEFICIENT[case]().to(dtype)
    if dtype in (torch.float64, torch.bfloat16, torch.float16) and case not in ("all zero", "square zero"):
        # Rounding made independent noise of what was dependent; a repeated row is dependent in any dtype.
        A[len(A) // 2] = A[0]
    regular, start = torch.randn(16, 300), A.double().clone()
    (_, R) = triangles = triangles_for([regular, A])
    assert init(core, [regular, A], triangles) == [0, 1]
    assert orthogonality(A) <= max(5e-6, STORAGE[dtype] * math.sqrt(len(A)))
    slack = max(1e-5, 2 * STORAGE[dtype]) * start.norm()
    assert (start - start @ A.double().T @ A.double()).norm() <= slack  # still spans the input's rows
    assert (R.double().T @ A.double() - start).norm() <= slack
    assert (R.diagonal() == 0).any()
    assert not R.tril(-1).any()


def test_zeros_give_the_unit_matrix(core):
    A = torch.zeros(5, 9)
    assert init(core, [A]) == [1]
    assert torch.equal(A, torch.eye(5, 9))


@pytest.mark.parametrize("angle", [5e-7, 3e-6])
def test_flagged_but_independent_rows_are_not_reported(core, angle):
    """Below 1e-6 the Gram cannot tell; the reference's limit of 2^-23 decides what is deficient."""
    A = torch.randn(8, 400)
    A[3] = A[1] + angle * A[1].norm() / 20 * torch.randn(400)
    start, expected, status = A.clone(), A.clone(), torch.empty(1, dtype=torch.int32)
    (R,) = triangles = triangles_for([A])
    orthogonal_reference.orthogonal_init_([expected], [], status)
    assert init(core, [A], triangles) == status.tolist() == [0]
    assert orthogonality(A) <= 1e-6
    assert (A[:3] - expected[:3]).abs().max() <= 1e-5  # the fourth row is mostly rounding, and turns those after it
    assert (R.T @ A - start).norm() <= 1e-6 * start.norm()


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-25, 1.0, 1e25, 1e37])
def test_magnitude_does_not_matter(core, scale):
    A = torch.randn(16, 300) * 3 * scale  # the smallest: denormals of a few units, their rounding is the input
    Q, _ = exact(A.double() / scale)
    assert init(core, [A]) == [0]
    assert orthogonality(A) <= 1e-6
    assert (A.double() - Q).abs().max() <= 1e-5


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e-160, 1e-120, 1e120, 1e160, 1e200, 1e300])
def test_magnitude_does_not_matter_in_fp64(core, scale):
    plain = torch.randn(16, 300, dtype=torch.float64)
    A, (Q, R) = plain * scale, exact(plain)
    (found,) = triangles = triangles_for([A])
    assert init(core, [A], triangles) == [0]
    assert (A - Q).abs().max() <= 1e-12
    assert (found / scale - R).abs().max() <= 1e-12 * R.abs().max()


def test_rows_of_very_different_size(core):
    A = torch.randn(16, 300) * torch.logspace(0, -30, 16)[:, None]
    Q, _ = exact(A)
    assert init(core, [A]) == [0]
    assert (A.double() - Q).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nothing_is_written_when_any_matrix_is_not_finite(core, bad, dtype):
    shapes = [(4, 20), (20, 40), (4, 1500), (16, 16), (2, 9)]
    As = [torch.randn(shape).to(dtype) for shape in shapes]
    As[4].zero_()  # would be completed
    As[1][2, 3] = As[3][0, 0] = bad
    triangles = triangles_for(As)
    before = [bits(A).clone() for A in As]
    assert init(core, As, triangles) == [0, 2, 0, 2, 0]
    assert all(torch.equal(bits(A), old) for A, old in zip(As, before, strict=True))
    assert all(R.isnan().all() for R in triangles)


def test_more_matrices_than_one_launch_takes(core):
    g = torch.Generator().manual_seed(1)
    sizes = [(1 + i % 9, 10 + i % 23) if i % 5 else (17 + i % 4, 30 + i % 13) for i in range(700)]
    As = [torch.randn(size, generator=g).to(DTYPES[i % 4]) for i, size in enumerate(sizes)]
    expected = [A.clone() for A in As]
    start = core.launches()
    assert init(core, As) == [0] * len(As)
    assert core.launches() - start > 4 * 2
    alone = [0, 5, 314, 315, 316, 560, 699]
    for i in alone:  # and each is what it would be by itself
        init(core, [expected[i]])
        assert torch.equal(bits(As[i]), bits(expected[i]))
    for A in As:
        assert orthogonality(A) <= STORAGE[A.dtype] * math.sqrt(len(A))
    before = [bits(A).clone() for A in As]
    As[690][0, 0] = math.nan  # in the last launch: the first must know
    before[690] = bits(As[690]).clone()
    assert init(core, As) == [2 if i == 690 else 0 for i in range(700)]
    assert all(torch.equal(bits(A), old) for A, old in zip(As, before, strict=True))


def test_an_older_driver_gets_smaller_tables(core):
    As, results = [torch.randn(1 + i % 9, 10 + i % 23) for i in range(60)], []
    for version, launches in ((12010, 4), (12000, 8)):  # 39 matrices a launch
        core.set_driver(version)
        found, start = [A.clone() for A in As], core.launches()
        triangles = triangles_for(found)
        assert init(core, found, triangles) == [0] * 60
        assert core.launches() - start == launches
        results.append([bits(tensor) for tensor in found + triangles])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1.0, 1e6, 1e20])
@pytest.mark.parametrize("shape", [(16, 1024), (64, 1024), (256, 257)], ids=str)
def test_what_was_orthonormal_stays_so_at_any_scale(core, shape, scale):
    (Q, cosines), cols = orthonormal(*shape), shape[1]
    As = [(Q * scale).float(), (cosines * scale).float(), (torch.randn(shape).sign() * scale / cols**0.5).float()]
    assert init(core, As) == [0, 0, 0]
    assert max(orthogonality(A) for A in As) <= 1e-6


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    r=st.integers(1, 40),
    extra=st.integers(0, 40),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["plain", "transposed", "sliced", "every other row", "shifted"]),
    count=st.integers(1, 4),
    kappa=st.sampled_from([1.0, 1e5]),
    seed=st.integers(0, 2**20),
)
def test_any_shape_and_layout(core, r, extra, dtype, layout, count, kappa, seed):
    g = torch.Generator().manual_seed(seed)
    As, guards = [], []
    for columns in range(r + extra, r + extra + count):
        whole = torch.randn(2 * r, columns + 3, generator=g, dtype=torch.float64)
        whole = (whole * torch.logspace(0, -math.log10(kappa), 2 * r, dtype=torch.float64)[:, None]).to(dtype)
        if layout == "transposed":
            whole = whole.t().contiguous().t()
        if layout == "every other row":
            As.append(whole[::2])
        elif layout == "shifted":  # not aligned to what a vector load needs
            As.append(whole[:r, 1 : columns + 1])
        else:
            As.append(whole[:r].clone() if layout == "plain" else whole[:r, :columns])
        guards.append((whole, whole.clone()))
    assert not any(init(core, As))
    for A, (whole, before) in zip(As, guards, strict=True):
        assert orthogonality(A) <= 2 * STORAGE[dtype] * r + 1e-6  # rounding enters A Aᵀ from both sides
        if layout in ("transposed", "sliced", "shifted"):  # what lies around the view is untouched
            assert torch.equal(whole[r:], before[r:])
            assert torch.equal(whole[:, -2:], before[:, -2:])
        if layout == "shifted":
            assert torch.equal(whole[:, 0], before[:, 0])


def test_the_operators_own_path(core):
    As, status = [torch.randn(4, 9), torch.zeros(3, 5)], torch.empty(4, dtype=torch.int32)[::2]
    triangles = triangles_for(As)
    orthogonal_init.on_gpu(core, orthogonal_init.tables(As), triangles, status, 0, 0)
    assert status.tolist() == [0, 1]
    assert all(orthogonality(A) <= 1e-6 for A in As)
    orthogonal_init.on_gpu(core, orthogonal_init.tables([]), [], torch.empty(0, dtype=torch.int32), 0, 0)


def test_too_many_rows_are_refused(core):
    assert core.cuda_max_rank == 1024
    with pytest.raises(ValueError, match="between 1 and 1024 rows"):
        init(core, [torch.zeros(1025, 1025)])


def test_the_order_of_blocks_and_threads_does_not_matter(core):
    As = [torch.randn(16, 3000), torch.randn(40, 2100), torch.zeros(6, 50), conditioned(16, 1500, 1e5).float()]
    As += [conditioned(16, 1100, 1e5).bfloat16(), torch.randn(5, 400).double(), torch.randn(70, 80).half()]
    As += [torch.randn(16, 8) @ torch.randn(8, 300), torch.randn(8, 300).repeat(2, 1).bfloat16()]
    results = []
    for order in ORDERS:
        core.set_order(*order)
        found = [A.clone() for A in As]
        triangles = triangles_for(found)
        assert init(core, found, triangles) == [0, 0, 1, 0, 0, 0, 0, 1, 1]
        results.append([bits(tensor) for tensor in found + triangles])
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))
