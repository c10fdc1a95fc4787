"""The GPU kernels' source on the CPU: their logic (indices, edges, arithmetic, barriers) without a GPU.

csrc/cuda/*.cu is compiled by the C++ compiler against tests/csrc/cuda_on_cpu.h into a temporary folder. What passes
here has correct logic; it says nothing about speed, and finds only those races that the order of blocks and threads
brings to light. tests/slao_kernels/test_cuda.py is for the GPU itself.
"""

from __future__ import annotations

import array
import importlib.util
import math
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from slao_kernels import native
from slao_kernels.ops.fold import native as fold
from slao_kernels.ops.fold import reference as fold_reference
from slao_kernels.ops.orthogonal_init import native as orthogonal_init
from slao_kernels.ops.orthogonal_init import reference as orthogonal_reference
from slao_kernels.ops.scaled_merge import native as scaled_merge
from slao_kernels.ops.scaled_merge import reference as merge_reference
from slao_kernels.testing import error_ratio

ROOT = Path(__file__).resolve().parents[2]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# As in ops/test_orthogonal_init.py and ops/test_fold.py, with their reasons.
STORAGE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
ONCE = {torch.float64: 2e-15, torch.float32: 4e-7, torch.bfloat16: 0.3 * 2**-7, torch.float16: 0.3 * 2**-10}
ORDERS = [(blocks, last_thread_first) for blocks in (0, 1, 2) for last_thread_first in (False, True)]
FLAGS = (
    "-std=c++17 -O1 -fPIC -fvisibility=hidden -fno-strict-aliasing -U_FORTIFY_SOURCE -Wall -Wextra -Wno-sign-compare"
)
FLAGS += " -Wno-unknown-pragmas -Wno-psabi"


def compiler() -> str | None:
    return os.environ.get("CXX") or next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is not installed: the emulated kernels need it")
    cxx = compiler()
    if cxx is None:
        pytest.skip("no C++ compiler for the emulated kernels")
    folder = tmp_path_factory.mktemp("emulated")
    (folder / "empty.cpp").write_text("int probe() { return 0; }\n")
    checked = ["-fsanitize=undefined", "-fno-sanitize-recover=all"]  # misaligned vectors among the rest
    probe = [*cxx.split(), "-shared", "-fPIC", *checked, str(folder / "empty.cpp"), "-o", str(folder / "empty.so")]
    if subprocess.run(probe, capture_output=True).returncode:
        checked = []
    include = [f"-I{ROOT / 'tests' / 'csrc'}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    sources = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ROOT / "tests" / "csrc" / "emulated.cpp"]
    assert len(sources) == 4
    objects = [str(folder / f"{source.stem}.o") for source in sources]
    commands = [
        [*cxx.split(), *FLAGS.split(), *checked, *include, "-x", "c++", "-c", str(source), "-o", to]
        for source, to in zip(sources, objects, strict=True)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda command: run(*command), commands))
    library = folder / "slao_cuda_emulated.so"
    run(*cxx.split(), "-shared", *checked, *objects, "-o", str(library))
    spec = importlib.util.spec_from_file_location("slao_cuda_emulated", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _seed(core) -> Iterator[None]:
    torch.manual_seed(0)
    yield
    core.set_order(0, False)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


# --- orthogonal_init -------------------------------------------------------------------------------------------------


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
        assert orthogonality(A) <= STORAGE[dtype] * r + 1e-6
        if layout in ("transposed", "sliced", "shifted"):  # what lies around the view is untouched
            assert torch.equal(whole[r:], before[r:])
            assert torch.equal(whole[:, -2:], before[:, -2:])
        if layout == "shifted":
            assert torch.equal(whole[:, 0], before[:, 0])


def test_the_operators_own_path(core):
    As, status = [torch.randn(4, 9), torch.zeros(3, 5)], torch.empty(4, dtype=torch.int32)[::2]
    triangles = triangles_for(As)
    orthogonal_init.on_gpu(core, As, triangles, status, 0, 0)
    assert status.tolist() == [0, 1]
    assert all(orthogonality(A) <= 1e-6 for A in As)
    orthogonal_init.on_gpu(core, [], [], torch.empty(0, dtype=torch.int32), 0, 0)


def test_too_many_rows_are_refused(core):
    assert core.cuda_max_rank == 1024
    with pytest.raises(ValueError, match="between 1 and 1024 rows"):
        init(core, [torch.zeros(1025, 1025)])


# --- scaled_merge ----------------------------------------------------------------------------------------------------


def merge(core: ModuleType, merged: list[Tensor], tuned: list[Tensor], lam: list[float]) -> None:
    scaled_merge.on_gpu(core, merged, tuned, lam, 0, 0)


@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize("lam", [0.3, 0.5, 0.8, 1.0])
def test_scaled_merge(core, target, source, lam):
    sizes = [1037, 8195, 4096, 3]
    merged, tuned = [torch.randn(n).to(target) for n in sizes], [torch.randn(n).to(source) for n in sizes]
    tuned[0][:8] = torch.tensor([0.0, -0.0, 40000.0, 1e-7, -6e-8, 3e-5, 1e-3, -40000.0]).to(source)
    merged[0][4:12] = torch.tensor([1e-40, -1e-7, 6e-8, 3e4, -3e4, 1.0, -1.0, 2.0]).to(target)
    expected = [m.clone() for m in merged]
    size = [torch.maximum(m.double().abs(), t.double().abs()) for m, t in zip(merged, tuned, strict=True)]
    merge_reference.scaled_merge_(expected, tuned, [lam] * len(sizes))
    merge(core, merged, tuned, [lam] * len(sizes))
    # As in test_native.py: with and without a fused multiply-add, or the rounding that it tips over.
    arithmetic = torch.finfo(torch.float64 if target == torch.float64 else torch.float32)
    for found, exact_, big in zip(merged, expected, size, strict=True):
        slack = 4 * arithmetic.eps * big + torch.finfo(target).eps * exact_.double().abs() + torch.finfo(target).tiny
        assert ((found.double() - exact_.double()).abs() <= slack).all()
        if lam == 1.0 and source != torch.float64:  # torch rounds fp64 to 16 bits twice
            assert torch.equal(bits(found), bits(exact_))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ends_of_the_merge_are_exact(core, dtype):
    merged, tuned = torch.randn(5000).to(dtype), torch.randn(5000).to(dtype)
    tuned[0], merged[1] = math.inf, math.nan
    start = bits(merged).clone()
    merge(core, [merged], [tuned], [0.0])
    assert torch.equal(bits(merged), start)
    merge(core, [merged], [tuned], [1.0])
    assert torch.equal(bits(merged), bits(tuned))


def test_every_16_bit_value_survives_a_copy(core):
    patterns = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        values = patterns.view(dtype)
        wide, back = torch.empty(65536), torch.empty(65536, dtype=dtype)
        merge(core, [wide], [values], [1.0])
        merge(core, [back], [wide], [1.0])
        nan = values.isnan()
        assert torch.equal(wide.isnan(), nan)
        assert torch.equal(wide[~nan].view(torch.int32), values.float()[~nan].view(torch.int32))
        assert torch.equal(back.view(torch.int16)[~nan], patterns[~nan])
        assert back[nan].isnan().all()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.tuples(st.integers(0, 90), st.integers(1, 90)), min_size=1, max_size=5),
    layout=st.sampled_from(["plain", "transposed", "strided", "shifted", "mixed"]),
    target=st.sampled_from(DTYPES),
    source=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**20),
)
def test_merge_of_any_shape_layout_and_weight(core, shapes, layout, target, source, seed):
    g = torch.Generator().manual_seed(seed)
    whole = [torch.randn(2 * a, b + 1, generator=g).to(target) for a, b in shapes]
    guards = [w.clone() for w in whole]
    cut = {"plain": lambda w: w[: len(w) // 2, :-1], "shifted": lambda w: w.view(-1)[1 : w.numel() // 2]}
    merged = [cut.get(layout, lambda w: w[::2, :-1])(w) for w in whole]
    merged = [m.t() if layout == "transposed" else m for m in merged]
    tuned = [torch.randn(m.shape, generator=g).to(source) for m in merged]
    if layout == "mixed":
        tuned = [t.t().contiguous().t() for t in tuned]
    lam = torch.rand(len(shapes), generator=g).tolist()
    expected = [m.double() + w * (f.double() - m.double()) for m, f, w in zip(merged, tuned, lam, strict=True)]
    merge(core, merged, tuned, lam)
    for m, e, w, guard in zip(merged, expected, whole, guards, strict=True):
        torch.testing.assert_close(m.double(), e, rtol=torch.finfo(target).eps, atol=4e-6)
        if layout == "shifted" and w.numel():
            assert torch.equal(w.view(-1)[0], guard.view(-1)[0])
            assert torch.equal(w.view(-1)[w.numel() // 2 :], guard.view(-1)[w.numel() // 2 :])
        elif layout != "shifted":
            assert torch.equal(w[:, -1], guard[:, -1])
            if layout != "plain":
                assert torch.equal(w[1::2], guard[1::2])


def test_more_pairs_than_one_launch_takes(core):
    merged = [torch.randn(1 + i % 70).to(DTYPES[i % 4]) for i in range(1000)]
    tuned = [torch.randn(len(m)).to(DTYPES[i % 3]) for i, m in enumerate(merged)]
    lam = torch.rand(1000).tolist()
    expected = [m.double() + w * (f.double() - m.double()) for m, f, w in zip(merged, tuned, lam, strict=True)]
    start = core.launches()
    merge(core, merged, tuned, lam)
    assert core.launches() - start == 3
    for m, e in zip(merged, expected, strict=True):
        torch.testing.assert_close(m.double(), e, rtol=torch.finfo(m.dtype).eps, atol=4e-6)
    merge(core, [], [], [])
    assert core.launches() - start == 3


# --- fold ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", DTYPES, ids=str)
@pytest.mark.parametrize("weight", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (17, 33, 5), (64, 48, 16), (65, 129, 12), (40, 300, 64), (70, 140, 130)], ids=str
)
def test_fold_equals_the_exact_sum_rounded_once(core, shape, weight, adapter):
    n, k, r = shape
    W, A, B = torch.randn(n, k).to(weight), torch.randn(r, k).to(adapter), torch.randn(n, r).to(adapter)
    expected = W.double() + 0.7 * B.double() @ A.double()
    fold.on_gpu(core, [W], [A], [B], [0.7], 0, 0)
    # fp32 sums of 130 products have more rounding than those of 64.
    slack = 4 if r > 64 and weight in (torch.float32, torch.float64) else 1
    assert error_ratio(W, expected) <= ONCE[weight] * slack


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.tuples(st.integers(1, 80), st.integers(1, 150), st.integers(1, 40)), min_size=1, max_size=4),
    layouts=st.tuples(*[st.sampled_from(["plain", "transposed", "sliced", "shifted"])] * 3),
    weight=st.sampled_from(DTYPES),
    adapter=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**20),
)
def test_fold_of_any_shape_and_layout(core, sizes, layouts, weight, adapter, seed):
    g = torch.Generator().manual_seed(seed)

    def laid_out(rows: int, cols: int, layout: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if layout == "transposed":
            whole = torch.randn(cols + 2, rows + 3, generator=g).to(dtype)
            return whole, whole.t()[:rows, :cols]
        whole = torch.randn(rows + 2, cols + 8, generator=g).to(dtype)
        return whole, {"plain": whole[:rows, :cols].clone(), "sliced": whole[:rows, :cols]}.get(
            layout, whole[1 : rows + 1, 3 : cols + 3]
        )

    wholes, Ws = zip(*[laid_out(n, k, layouts[0], weight) for n, k, _ in sizes], strict=True)
    As = [laid_out(r, k, layouts[1], adapter)[1] for _, k, r in sizes]
    Bs = [laid_out(n, r, layouts[2], torch.bfloat16)[1] for n, _, r in sizes]
    scalings = torch.rand(len(sizes), generator=g).tolist()
    expected = [W.clone() for W in Ws]
    outside = [whole.double().sum() - W.double().sum() for whole, W in zip(wholes, Ws, strict=True)]
    fold_reference.fold_(expected, As, Bs, scalings)
    fold.on_gpu(core, list(Ws), As, Bs, scalings, 0, 0)
    for W, e, whole, rest in zip(Ws, expected, wholes, outside, strict=True):
        torch.testing.assert_close(W.double(), e.double(), rtol=torch.finfo(weight).eps, atol=2e-5)
        if layouts[0] != "plain":
            torch.testing.assert_close(whole.double().sum() - W.double().sum(), rest, rtol=1e-9, atol=1e-9)


def test_more_weights_than_one_launch_takes(core):
    Ws = [torch.randn(3 + i % 5, 7).to(DTYPES[i % 4]) for i in range(600)]
    As, Bs = [torch.randn(2, 7) for _ in Ws], [torch.randn(len(W), 2) for W in Ws]
    expected = [W.double() + 0.5 * B.double() @ A.double() for W, A, B in zip(Ws, As, Bs, strict=True)]
    start = core.launches()
    fold.on_gpu(core, Ws, As, Bs, [0.5] * 600, 0, 0)
    assert core.launches() - start == 3  # 450 in fp32, 150 in fp64
    for W, e in zip(Ws, expected, strict=True):
        torch.testing.assert_close(W.double(), e, rtol=torch.finfo(W.dtype).eps, atol=1e-5)
    fold.on_gpu(core, [torch.empty(0, 4)], [torch.ones(1, 4)], [torch.ones(0, 1)], [1.0], 0, 0)
    assert core.launches() - start == 3


# --- all three -------------------------------------------------------------------------------------------------------


def test_the_order_of_blocks_and_threads_does_not_matter(core):
    As = [torch.randn(16, 3000), torch.randn(40, 2100), torch.zeros(6, 50), conditioned(16, 1500, 1e5).float()]
    As += [conditioned(16, 1100, 1e5).bfloat16(), torch.randn(5, 400).double(), torch.randn(70, 80).half()]
    As += [torch.randn(16, 8) @ torch.randn(8, 300), (torch.randn(16, 8) @ torch.randn(8, 300)).bfloat16()]
    Ws, Fs = [torch.randn(200, 333), torch.randn(65, 129).bfloat16()], [torch.randn(200, 333), torch.randn(65, 129)]
    lows, ups = [torch.randn(40, 333), torch.randn(8, 129)], [torch.randn(200, 40), torch.randn(65, 8)]
    results = []
    for order in ORDERS:
        core.set_order(*order)
        a, w, f = [A.clone() for A in As], [W.clone() for W in Ws], [W.clone() for W in Ws]
        triangles = triangles_for(a)
        states = init(core, a, triangles)
        assert states == [0, 0, 1, 0, 0, 0, 0, 1, states[8]]
        merge(core, w, Fs, [0.3, 0.9])
        fold.on_gpu(core, f, lows, ups, [0.5, 0.5], 0, 0)
        results.append([bits(t) for t in a + triangles + w + f] + [torch.tensor(states)])
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_incomplete_tables_are_refused(core):
    with pytest.raises(ValueError, match="incomplete record"):
        core.cuda_scaled_merge(array.array("q", [0] * 11), array.array("d", [0.5]), 0, 0)
    with pytest.raises(ValueError, match="one a record"):
        core.cuda_fold(array.array("q", [0] * 18), array.array("d"), 0, 0)
