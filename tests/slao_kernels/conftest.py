"""Fixtures of the tests of `slao_kernels`: places.py, one thread for tiny models, the log, the emulated GPU kernels."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # the modules beside this one

import places
from accelerator import _wait_for_the_accelerator  # noqa: F401  (a fixture of every test)


@pytest.fixture(
    params=[
        pytest.param(place, marks=[pytest.mark.gpu] if place.on_gpu else [], id=f"{place.device}-{place.backend}")
        for place in places.PLACES
    ]
)
def place(request: pytest.FixtureRequest) -> Any:
    """A device and a backend of lora_linear; see tests/slao_kernels/places.py."""
    from slao_kernels import dispatch

    missing = dispatch.why_not("lora_linear", request.param.backend, request.param.device)
    if missing is not None:
        pytest.skip(missing)
    return request.param


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Nothing tiny is large enough for two threads: on a busy machine the second one only makes the first wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def told(caplog) -> Callable[[], list[str]]:
    """What slao_kernels has logged in this test, as if no reason had been logged before."""
    from slao_kernels import exact_merge, layers

    layers._logged.clear()
    exact_merge._said.clear()
    caplog.set_level(logging.WARNING, logger="slao_kernels")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "slao_kernels"]


# --- csrc/cuda on the CPU --------------------------------------------------------------------------------------------

_ROOT = Path(__file__).resolve().parents[2]
_FLAGS = "-std=c++17 -O1 -fPIC -fvisibility=hidden -fno-strict-aliasing -U_FORTIFY_SOURCE"
_FLAGS += " -Wall -Wextra -Wno-sign-compare -Wno-unknown-pragmas -Wno-psabi"


def _compiler() -> str | None:
    return os.environ.get("CXX") or next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The GPU kernels as a module that runs on the CPU, built from csrc/cuda and tests/csrc once for all processes."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the emulator's fibers are written for Linux")
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is not installed: the emulated kernels need it")
    cxx = _compiler()
    if cxx is None:
        pytest.skip("no C++ compiler for the emulated kernels")
    import fcntl

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "emulated"
    folder.mkdir(exist_ok=True)
    library = folder / "slao_cuda_emulated.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _build(cxx.split(), pybind11.get_include(), folder, library)
    spec = importlib.util.spec_from_file_location("slao_cuda_emulated", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _build(cxx: list[str], pybind11: str, folder: Path, library: Path) -> None:
    (folder / "empty.cpp").write_text("int probe() { return 0; }\n")
    checked = ["-fsanitize=undefined", "-fno-sanitize-recover=all"]  # misaligned vectors among the rest
    probe = [*cxx, "-shared", "-fPIC", *checked, str(folder / "empty.cpp"), "-o", str(folder / "empty.so")]
    if subprocess.run(probe, capture_output=True).returncode:
        checked = []
    include = [f"-I{_ROOT / 'tests' / 'csrc'}", f"-I{pybind11}", f"-I{sysconfig.get_paths()['include']}"]
    kernels = sorted((_ROOT / "csrc" / "cuda").glob("*.cu"))
    assert len(kernels) == 4
    sources = [*kernels, _ROOT / "tests" / "csrc" / "emulated.cpp"]
    objects = [str(folder / f"{source.stem}.o") for source in sources]
    compile_it = [*cxx, *_FLAGS.split(), *checked, *include]
    commands = [
        [*compile_it, "-x", "c++", "-c", str(source), "-o", to] for source, to in zip(sources, objects, strict=True)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda command: _run(*command), commands))
    _run(*cxx, "-shared", *checked, *objects, "-o", str(library))
