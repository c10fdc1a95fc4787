"""Every CUDA kernel compiles for each GPU generation without spilling a register: the check that needs no GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
KERNELS = {"scaled_merge": 1, "fold": 2, "orthogonal_init": 3}
# 256 threads at this many registers leave room for two CTAs a multiprocessor; the two exceptions run alone.
TWO_CTAS, ALONE = 128, ("fold_kernelId", "gram_kernelILi4")


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")


def test_every_source_is_here():
    assert {path.stem for path in CUDA.glob("*.cu")} == {*KERNELS, "driver"}  # which has no kernel


@pytest.mark.parametrize(
    ("gpu", "tables"),
    [("90", "many"), ("80", "few"), *(pytest.param(g, "many", marks=pytest.mark.exhaustive) for g in ("80", "100"))],
)
@pytest.mark.parametrize("stem", KERNELS)
def test_compiles_without_spills(stem, gpu, tables, tmp_path):
    compiler = nvcc()
    if compiler is None:
        pytest.skip("no nvcc in CUDA_HOME/bin or on PATH")
    known = subprocess.run([compiler, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    if f"compute_{gpu}" not in known:
        pytest.skip(f"this nvcc does not know sm_{gpu}")
    flags = f"-std=c++17 -O3 -DNDEBUG -arch=sm_{gpu} -DSLAO_TABLES={tables} -cubin -Xptxas=-v -Werror=all-warnings"
    command = [compiler, *flags.split(), str(CUDA / f"{stem}.cu"), "-o", str(tmp_path / f"{stem}.cubin")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # One paragraph a kernel: its mangled name, its stack, what it uses.
    kernels = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)",
        done.stderr,
        flags=re.DOTALL,
    )
    assert len(kernels) == KERNELS[stem], done.stderr
    for mangled, stack, stores, loads, registers, rest in kernels:
        name = re.search(r"[a-z]+_kernel(I\w+?E)?", mangled)[0]
        print(
            f"sm_{gpu} {name}: {registers} registers{rest}, stack {stack}, spill stores {stores}, spill loads {loads}"
        )
        assert (stack, stores, loads) == ("0", "0", "0"), name
        assert int(registers) <= (255 if any(one in mangled for one in ALONE) else TWO_CTAS), name
