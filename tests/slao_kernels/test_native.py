"""The compiled core itself: threads, memory, symbols. What it computes, with every instruction set: ops/test_*.py."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from on_lists import FINE, Core

import slao_kernels
from slao_kernels import native

missing = native.why_not("cpu")
pytestmark = pytest.mark.skipif(missing is not None, reason=f"no compiled core: {missing}")


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
    assert Core("auto").init([fine, dependent])[0] == [FINE, Core.FLAGGED]
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


@pytest.mark.exhaustive  # compiles the core
def test_instruction_sets_share_no_definition(tmp_path):
    """What is compiled for one instruction set must have a name of its own: of two weak definitions of one name the
    linker keeps either, and code for AVX-512 would run on a processor without it."""
    if not sys.platform.startswith("linux") or not all(shutil.which(tool) for tool in ("make", "nm", "c++")):
        pytest.skip("needs Linux, make, nm and a C++ compiler")
    root = Path(__file__).resolve().parents[2]
    command = ["make", "-s", f"-j{os.cpu_count()}", "-f", "tests/csrc/Makefile"]
    # A quarter of the time that -O3 takes, and less is inlined, so that more names are there to be seen.
    command += [
        "MODE=shipped",
        "OPTIONS=-O1 -DNDEBUG -fPIC -fvisibility=hidden",
        "CXX=c++",
        f"OUT={tmp_path}",
        "objects",
    ]
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
x, A, W = (torch.randn(rows, 1 << 20).bfloat16() for rows in (64, 64, 4))
B = torch.randn(4, 64).bfloat16()
slao_kernels.orthogonal_init_([torch.randn(16, 900) for _ in range(4)], backend="native")  # threads have their stacks
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (40 << 20),) * 2)
calls = [lambda: slao_kernels.orthogonal_init_(As, backend="native")]
if native.core().lora_rank:
    calls.append(lambda: cpu.products().forward(x, None, W, None, A, B, 1.0))
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
