"""The CUDA kernels in the extension as it was built, for each GPU generation: all are there, none spills a register,
and each leaves room for as many blocks as it counts on. What a build says without a GPU.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from slao_kernels import native

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
KERNELS = {"scaled_merge": 1, "fold": 2, "orthogonal_init": 3}
GPUS = {"sm_80", "sm_90", "sm_100"}  # as in setup.py, where nvcc knows them
# 256 threads at this many registers leave room for two CTAs a multiprocessor; the two exceptions run alone.
TWO_CTAS, ALONE = 128, ("fold_kernelId", "gram_kernelILi4")


def cuobjdump() -> str | None:
    """CUDA's, or the one in Triton's wheel."""
    found = shutil.which("cuobjdump")
    if found is None:
        triton = pytest.importorskip("triton", reason="no cuobjdump on PATH, nor Triton, which brings one")
        found = shutil.which("cuobjdump", path=str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin"))
    return found


@pytest.fixture(scope="module")
def listed() -> list[tuple[str, str, int, int, int]]:
    """(GPU, mangled name, registers, bytes of stack, bytes of local memory) of every kernel."""
    if not (native.why_not("cpu") is None and native.core().cuda):
        pytest.skip(f"no CUDA kernels to look at: {native.why_not('cuda')}")
    tool = cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump")
    extension = Path(native.core().__file__)
    if extension.stat().st_mtime < max(path.stat().st_mtime for path in CUDA.iterdir()):
        pytest.fail(f"{extension.name} is older than csrc/cuda: run `python setup.py build_ext --inplace` first")
    command = [tool, "--dump-resource-usage", str(extension)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found, gpu = [], ""
    for line in printed.splitlines():
        gpu = line.removeprefix("arch = ") if line.startswith("arch = ") else gpu
        if named := re.match(r" *Function (\w+):", line):
            name = named[1]
        elif used := re.match(r" *REG:(\d+) STACK:(\d+) .*LOCAL:(\d+) ", line):
            found.append((gpu, name, *map(int, used.groups())))
    return found


def test_every_kernel_is_there_for_every_gpu(listed):
    assert {path.stem for path in CUDA.glob("*.cu")} == {*KERNELS, "driver"}  # which has no kernel
    gpus = {gpu for gpu, *_ in listed}
    assert {"sm_90"} <= gpus <= GPUS
    seen = {(gpu, stem) for gpu, name, *_ in listed for stem in KERNELS if f"{stem}_cu_" in name}
    assert seen == {(gpu, stem) for gpu in gpus for stem in KERNELS}
    assert len(listed) == len(gpus) * sum(KERNELS.values())


def test_none_spills(listed):
    for gpu, name, registers, stack, local in listed:
        assert (stack, local) == (0, 0), f"{gpu} {name}"
        assert registers <= (255 if any(one in name for one in ALONE) else TWO_CTAS), f"{gpu} {name}"
