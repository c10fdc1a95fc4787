"""The native extension: plain C++, and CUDA where there is nvcc, through ninja; no torch headers, optional.

SLAO_KERNELS_BUILD: unset or "auto" builds what it can and warns when it can build nothing; "cpu" fails when it cannot;
"cuda" needs nvcc too (12.1 or later; from CUDA_HOME or PATH); "0" skips. CXX (or CC) chooses the compiler. Neither
needs a GPU. Everything else about the package stands in pyproject.toml.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
GPU_KERNELS = ("scaled_merge", "orthogonal_init", "fold")
CPU_KERNELS = (*GPU_KERNELS, "gram", "exact_fold")
COMMON = ["-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# Every kernel once per instruction set; isa.h chooses at run time. GCC 12 warns about its own AVX-512 header.
ISAS = {"base": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISAS["avx512"] = ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma", "-mf16c"]
    ISAS["avx512"] += ["-mprefer-vector-width=512", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
    # lora_linear has code where the processor multiplies bf16, and the compiler has flags for that (GCC 10, GCC 11).
    LORA_ISAS = {"avx512bf16": [*ISAS["avx512"], "-mavx512bf16"]}
    LORA_ISAS["amx"] = [*LORA_ISAS["avx512bf16"], "-mamx-tile", "-mamx-bf16"]
else:
    LORA_ISAS = {}
# Machine code for these, as far as nvcc knows them, and PTX of the newest for what comes after.
GPUS = ("80", "90", "100")
NVCC = ["-std=c++17", "-O3", "-DNDEBUG", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
# What the kernels need of a toolkit: parameters of 32,764 bytes.
PROBE = """#include <cuda_runtime.h>
struct Table { char bytes[32764]; };
__global__ void probe(const __grid_constant__ Table table) { if (table.bytes[threadIdx.x]) __trap(); }
int launch(const Table& table) { cudaLaunchConfig_t to{}; return cudaLaunchKernelEx(&to, probe, table); }
"""


def compiler() -> str | None:
    """The C++ compiler that CXX or CC names, or the system's."""
    if os.environ.get("CXX"):
        return os.environ["CXX"]
    if os.environ.get("CC"):
        return {"gcc": "g++", "clang": "clang++", "cc": "c++"}.get(os.environ["CC"], os.environ["CC"])
    return next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)


def accepts(cxx: str, *flags: str) -> bool:
    """Whether the compiler builds an empty shared library with these flags."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "empty.cpp"
        source.write_text("int slao_probe() { return 0; }\n")
        command = [*cxx.split(), "-shared", "-fPIC", *flags, str(source), "-o", str(source.with_suffix(".so"))]
        try:
            return subprocess.run(command, capture_output=True).returncode == 0
        except OSError:
            return False


class Cuda:
    """nvcc and its flags. RuntimeError with the reason when there is none that works."""

    def __init__(self, cxx: str) -> None:
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        found = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")
        if found is None:
            raise RuntimeError(f"no nvcc in {home}/bin" if home else "no nvcc on PATH, and CUDA_HOME is not set")
        self.nvcc = found
        # nvcc links, because it knows where its runtime lies: static, so that one binary works beside any torch.
        self.link = ["-shared", "-cudart=static"]
        listed = self._run("--list-gpu-arch").split()
        known = [gpu for gpu in GPUS if f"compute_{gpu}" in listed]
        if not known:
            raise RuntimeError(f"{found} knows none of sm_{', sm_'.join(GPUS)}")
        self.flags = list(NVCC) + ([f"-ccbin={cxx}"] if len(cxx.split()) == 1 else [])
        for gpu in known:
            ptx = f",compute_{gpu}" if gpu == known[-1] else ""
            self.flags.append(f"-gencode=arch=compute_{gpu},code=[sm_{gpu}{ptx}]")
        with tempfile.TemporaryDirectory() as scratch:
            source = Path(scratch) / "probe.cu"
            source.write_text(PROBE)
            self._run(*self.flags, *self.link, str(source), "-o", str(source.with_suffix(".so")))

    def _run(self, *arguments: str) -> str:
        done = subprocess.run([self.nvcc, *arguments], capture_output=True, text=True)
        if done.returncode:
            lines = (done.stdout + done.stderr).strip().splitlines()
            raise RuntimeError(f"{self.nvcc} fails: {lines[0] if lines else done.returncode}")
        return done.stdout


class BuildNative(build_ext):
    """Writes a ninja file and runs it."""

    def build_extension(self, ext: Extension) -> None:
        mode = os.environ.get("SLAO_KERNELS_BUILD", "auto")
        if mode not in ("auto", "cpu", "cuda", "0"):
            raise SystemExit(f"SLAO_KERNELS_BUILD={mode!r}: choose auto, cpu, cuda or 0")
        if mode == "0":
            return
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            cxx = compiler()
            if cxx is None or not accepts(cxx):
                raise RuntimeError(f"no working C++ compiler ({cxx or 'c++, g++ and clang++ not found'})")
            if mode == "cpu" or not self._build_with_cuda(target, cxx, needed=mode == "cuda"):
                self._build(target, cxx, None)
        except (RuntimeError, subprocess.CalledProcessError, OSError) as error:
            if mode != "auto":
                raise SystemExit(f"slao_kernels: the native extension could not be built: {error}") from error
            print(
                f"WARNING: slao_kernels: the native extension could not be built ({error}); "
                "the package works without it, on torch's own operations",
                file=sys.stderr,
            )

    def _build_with_cuda(self, target: Path, cxx: str, needed: bool) -> bool:
        try:
            self._build(target, cxx, Cuda(cxx))
        except (RuntimeError, subprocess.CalledProcessError, OSError) as error:
            if needed:
                raise
            print(f"slao_kernels: built for the CPU only: {error}")
            return False
        return True

    def _build(self, target: Path, cxx: str, cuda: Cuda | None) -> None:
        import ninja
        import pybind11

        openmp = ["-fopenmp"] if accepts(cxx, "-fopenmp") else []
        include = ["-I" + pybind11.get_include(), "-I" + sysconfig.get_paths()["include"]]
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            "rule cc",
            "  command = $cxx $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
        lines.append(f"cxx = {cxx}")
        objects = []

        def compile_one(source: Path, name: str, flags: list[str]) -> None:
            objects.append(name)
            lines.append(f"build {name}: cc {str(source).replace(' ', '$ ')}")
            lines.append(f"  flags = {' '.join([*COMMON, *openmp, *flags])}")

        lora_isas = {isa: flags for isa, flags in LORA_ISAS.items() if accepts(cxx, *flags)}
        known = [f"-DSLAO_HAS_{isa.upper()}" for isa in lora_isas]
        compile_one(ROOT / "csrc" / "bindings.cpp", "bindings.o", include + known + (["-DSLAO_CUDA"] if cuda else []))
        compile_one(ROOT / "csrc" / "cpu" / "memory.cpp", "memory.o", [])
        for isa, flags in ISAS.items():
            for stem in CPU_KERNELS:
                compile_one(ROOT / "csrc" / "cpu" / f"{stem}.cpp", f"{stem}.{isa}.o", [f"-DSLAO_ISA={isa}", *flags])
        for isa, flags in lora_isas.items():
            source = ROOT / "csrc" / "cpu" / "lora_linear.cpp"
            compile_one(source, f"lora_linear.{isa}.o", [f"-DSLAO_ISA={isa}", *flags])
        if cuda:
            lines += [
                "rule nvcc",
                f"  command = {cuda.nvcc} {' '.join(cuda.flags)} -MMD -MF $out.d -c $in -o $out",
            ]
            lines += ["  depfile = $out.d", "  deps = gcc"]
            for stem in (*GPU_KERNELS, "driver"):
                objects.append(f"{stem}.cuda.o")
                source = str(ROOT / "csrc" / "cuda" / f"{stem}.cu").replace(" ", "$ ")
                lines.append(f"build {objects[-1]}: nvcc {source}")
        if cuda:
            linker = " ".join([cuda.nvcc, *cuda.flags, *cuda.link, "-Xlinker=--strip-all"])
            linker += " -Xcompiler=-fopenmp" if openmp else ""
        else:
            strip = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-Wl,--strip-all"]
            linker = " ".join(["$cxx", "-shared", *openmp, *strip])
        lines += ["rule link", f"  command = {linker} $in -o $out"]
        lines += [f"build {str(target).replace(' ', '$ ')}: link {' '.join(objects)}", ""]
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder)], check=True)


setup(
    # Optional: an editable install otherwise insists on the file that was not built.
    ext_modules=[Extension("slao_kernels._C", [], optional=True)],
    cmdclass={"build_ext": BuildNative},
)
