"""The compiled core itself: every instruction set gives the reference's answer, for any number of threads."""

from __future__ import annotations

import array
import math
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import slao_kernels
from slao_kernels import native
from slao_kernels.ops.fold import reference as fold_reference
from slao_kernels.ops.scaled_merge import reference as merge_reference

missing = native.why_not("cpu")
pytestmark = pytest.mark.skipif(missing is not None, reason=f"no compiled core: {missing}")
SETS = ["base", "avx2", "avx512"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=SETS)
def isa(request: pytest.FixtureRequest) -> str:
    best = native.instruction_set()
    if SETS.index(request.param) > SETS.index(best):
        pytest.skip(f"this processor has {best}, not {request.param}")
    return request.param


def orthogonal_init(As: list[Tensor], isa: str, threads: int = 1) -> list[int]:
    states = array.array("i", [0]) * len(As)
    table = native.table(map(native.matrix, As))
    native.core().orthogonal_init(table, array.array("q"), array.array("q"), states, threads, isa)
    return list(states)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1), (2, 3), (5, 37), (12, 100), (16, 768), (33, 65), (64, 200), (130, 257)], ids=str
)
def test_orthogonal_init_on_every_instruction_set(isa, shape, dtype):
    A = torch.randn(shape, dtype=torch.float64).to(dtype)
    Q, R = torch.linalg.qr(A.double().T)
    exact = (Q * torch.where(R.diagonal() < 0, -1.0, 1.0)).T
    assert orthogonal_init([A], isa) == [0]
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5 + torch.finfo(dtype).eps
    assert (A.double() - exact).abs().max() <= tolerance


@pytest.mark.parametrize("scale", [1e-6, 1.0, 3.3, 1e6])
@pytest.mark.parametrize("shape", [(16, 4096), (60, 2554), (256, 1024)], ids=str)
def test_orthonormal_to_1e_6_where_products_are_alike(isa, shape, scale):
    """Equal products are rounded the same way again and again: one fp32 sum over all columns left 7e-6 of cosines (on
    `base`), and many rows of two values 1.4e-6 even of short sums."""
    (r, n), t = shape, torch.arange(shape[1], dtype=torch.float64)
    cosines = torch.cos(math.pi / n * (t + 0.5) * t[1 : r + 1, None])
    two = torch.where(torch.rand(shape) < 0.5, -0.0236, 0.0249).double()
    for A in (cosines, cosines.flip(0), two, torch.randn(shape, dtype=torch.float64)):
        A = (A * scale).float().contiguous()
        assert orthogonal_init([A], isa) == [0]
        wide = A.double()
        assert torch.linalg.matrix_norm(wide @ wide.T - torch.eye(r, dtype=torch.float64), 2) <= 1e-6


@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize("lam", [0.3, 0.8, 1.0])
def test_scaled_merge_on_every_instruction_set(isa, target, source, lam):
    merged, tuned = torch.randn(1037).to(target), torch.randn(1037).to(source)
    tuned[:8] = torch.tensor([0.0, -0.0, 40000.0, 1e-7, -6e-8, 3e-5, 1e-3, -40000.0]).to(source)
    merged[4:12] = torch.tensor([1e-40, -1e-7, 6e-8, 3e4, -3e4, 1.0, -1.0, 2.0]).to(target)
    expected, size = merged.clone(), torch.maximum(merged.double().abs(), tuned.double().abs())
    merge_reference.scaled_merge_([expected], [tuned], [lam])
    table = native.table([native.matrix(merged[None]) + native.matrix(tuned[None])])
    native.core().scaled_merge(table, array.array("d", [lam]), 1, isa)
    # With and without a fused multiply-add: some units of the operands' size, or the rounding that they tip over.
    arithmetic = torch.finfo(torch.float64 if target == torch.float64 else torch.float32)
    slack = 4 * arithmetic.eps * size + torch.finfo(target).eps * expected.double().abs() + torch.finfo(target).tiny
    assert ((merged.double() - expected.double()).abs() <= slack).all()
    if lam == 1.0:
        assert torch.equal(bits(merged), bits(expected))


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 33, 3), (100, 200, 16), (6, 4100, 8)], ids=str)
@pytest.mark.parametrize("weight", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_fold_on_every_instruction_set(isa, shape, weight, transposed):
    n, k, r = shape
    W = torch.randn(k, n).to(weight).t() if transposed else torch.randn(n, k).to(weight)
    A, B = torch.randn(r, k).bfloat16(), torch.randn(n, r)
    expected = W.clone()
    fold_reference.fold_([expected], [A], [B], [0.7])
    table = native.table([native.matrix(W) + native.matrix(A) + native.matrix(B)])
    native.core().fold(table, array.array("d", [0.7]), 1, isa)
    # Another order of the r products: where W cancels them, fp32 leaves a few units of the largest.
    torch.testing.assert_close(W.double(), expected.double(), rtol=torch.finfo(weight).eps, atol=1e-5)


def test_every_16_bit_value_survives_a_copy(isa):
    """fp16 and bf16 in, through fp32, and back: all 65,536 bit patterns, NaN payloads aside."""
    patterns = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        values = patterns.view(dtype)
        wide, back = torch.empty(65536), torch.empty(65536, dtype=dtype)
        for target, source in ((wide, values), (back, wide)):
            table = native.table([native.matrix(target[None]) + native.matrix(source[None])])
            native.core().scaled_merge(table, array.array("d", [1.0]), 1, isa)
        nan = values.isnan()
        assert torch.equal(wide.isnan(), nan)
        assert torch.equal(wide[~nan].view(torch.int32), values.float()[~nan].view(torch.int32))
        assert torch.equal(back.view(torch.int16)[~nan], patterns[~nan])
        assert back[nan].isnan().all()


def test_rounding_to_16_bits_is_torchs(isa):
    """Random fp32 bit patterns, halfway cases among them, rounded by the kernels and by torch."""
    g = torch.Generator().manual_seed(0)
    random = torch.randint(-(2**31), 2**31 - 1, (200_000,), generator=g, dtype=torch.int64).to(torch.int32)
    halfway = (random & ~0x1FFF) | 0x1000  # exactly between two fp16 values
    between = (random & ~0xFFFF) | 0x8000  # exactly between two bf16 values
    values = torch.cat([random, halfway, between]).view(torch.float32)
    values = torch.cat(
        [values[~values.isnan()], torch.randn(100_000, generator=g) * 1e-5, torch.tensor([65519.9, 65520.0])]
    )
    for dtype in (torch.float16, torch.bfloat16):
        found = torch.empty(len(values), dtype=dtype)
        table = native.table([native.matrix(found[None]) + native.matrix(values[None])])
        native.core().scaled_merge(table, array.array("d", [1.0]), 1, isa)
        assert torch.equal(found.view(torch.int16), values.to(dtype).view(torch.int16))


def test_the_number_of_threads_does_not_matter():
    torch.manual_seed(5)
    As = [torch.randn(16, 300 + 7 * i) for i in range(9)] + [torch.randn(64, 4096)]
    Ws, Fs = [torch.randn(200, 333) for _ in range(3)], [torch.randn(200, 333) for _ in range(3)]
    lows, ups = [torch.randn(8, 333) for _ in range(3)], [torch.randn(200, 8) for _ in range(3)]
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            a, w, f = [A.clone() for A in As], [W.clone() for W in Ws], [W.clone() for W in Ws]
            slao_kernels.orthogonal_init_(a, backend="native")
            slao_kernels.scaled_merge_(w, Fs, 0.3, backend="native")
            slao_kernels.fold_(f, lows, ups, 0.5, backend="native")
            results.append(a + w + f)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_flagged_matrices_go_to_householder_and_the_others_do_not():
    torch.manual_seed(6)
    fine, dependent = torch.randn(8, 50), torch.randn(8, 50)
    dependent[3] = dependent[1] + 1e-8 * dependent[2]
    kept = dependent.clone()
    assert orthogonal_init([fine, dependent], "auto") == [0, 3]
    assert torch.equal(dependent, kept)


def test_writes_are_known_to_autograd():
    for call in (
        lambda t: slao_kernels.orthogonal_init_([t], backend="native"),
        lambda t: slao_kernels.scaled_merge_([t], [torch.zeros(3, 5)], 0.5, backend="native"),
        lambda t: slao_kernels.fold_([t], [torch.ones(1, 5)], [torch.ones(3, 1)], 1.0, backend="native"),
    ):
        tensor = torch.randn(3, 5)
        saved = tensor._version
        call(tensor)
        assert tensor._version > saved


def test_shares_torchs_thread_pool():
    """One OpenMP runtime in the process, so that torch.set_num_threads holds for both."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc/self/maps")
    code = (
        "import torch, slao_kernels\n"
        "slao_kernels.fold_([torch.ones(2, 2)], [torch.ones(1, 2)], [torch.ones(2, 1)], 1.0, backend='native')\n"
        "print(len({l.split()[-1] for l in open('/proc/self/maps') if 'libgomp' in l or 'libomp' in l}))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "SLAO_KERNELS_BACKEND"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "1"


def test_instruction_sets_share_no_definition(tmp_path):
    """What is compiled for one instruction set must have a name of its own: of two weak definitions of one name the
    linker keeps either, and code for AVX-512 would run on a processor without it."""
    if not sys.platform.startswith("linux") or not all(shutil.which(tool) for tool in ("make", "nm", "c++")):
        pytest.skip("needs Linux, make, nm and a C++ compiler")
    root = Path(__file__).resolve().parents[2]
    command = ["make", "-s", f"-j{os.cpu_count()}", "-f", "tests/csrc/Makefile"]
    command += ["MODE=shipped", "CXX=c++", f"OUT={tmp_path}", "objects"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sets = set()
    for made in sorted(tmp_path.glob("*.o")):
        isa = made.suffixes[0][1:]
        sets.add(isa)
        listed = subprocess.run(["nm", "-C", "--defined-only", made], capture_output=True, text=True, check=True).stdout
        symbols = [line.split(" ", 2)[1:] for line in listed.splitlines()]
        assert any(kind in "TRD" and f"slao::{isa}::" in name for kind, name in symbols), made.name
        shared = [name for kind, name in symbols if kind in "WwVvu" and f"slao::{isa}::" not in name]
        # The address of the library's handler of exceptions: the same data everywhere.
        assert set(shared) <= {"DW.ref.__gxx_personality_v0"}, f"{made.name}: {shared}"
    assert "base" in sets
    assert platform.machine() != "x86_64" or {"avx2", "avx512"} <= sets


def test_too_little_memory_is_an_error():
    """MemoryError, and nothing written, where an exception inside an OpenMP region would end the process."""
    if not sys.platform.startswith("linux"):
        pytest.skip("limits its address space as Linux does")
    code = """
import resource, torch, slao_kernels
from slao_kernels import native
from slao_kernels.ops.lora_linear import cpu
torch.set_num_threads(2)
As = [torch.randn(2000, 2000) for _ in range(2)]
before = [A.clone() for A in As]
x, A = torch.randn(64, 1 << 20).bfloat16(), torch.randn(64, 1 << 20).bfloat16()
slao_kernels.orthogonal_init_([torch.randn(16, 900) for _ in range(4)], backend="native")  # threads have their stacks
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (40 << 20),) * 2)
calls = [lambda: slao_kernels.orthogonal_init_(As, backend="native")]
if native.core().lora_rank:
    calls.append(lambda: cpu.products().shrink(x, A))
for call in calls:
    try:
        call()
    except MemoryError:
        print("refused", all(torch.equal(A, old) for A, old in zip(As, before)))
"""
    environment = {key: value for key, value in os.environ.items() if key != "SLAO_KERNELS_BACKEND"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    calls = 2 if native.core().lora_rank else 1
    assert (done.returncode, done.stdout) == (0, "refused True\n" * calls), done.stderr[-2000:]
