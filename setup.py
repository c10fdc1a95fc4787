"""The native extension: plain C++ through ninja, no torch headers, optional.

SLAO_KERNELS_BUILD: unset or "auto" builds when it can and warns when it cannot; "cpu" fails when it cannot; "0" skips.
CXX (or CC) chooses the compiler. Everything else about the package stands in pyproject.toml.
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
KERNELS = ("scaled_merge", "orthogonal_init", "fold")
COMMON = ["-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# Every kernel once per instruction set; isa.h chooses at run time. GCC 12 warns about its own AVX-512 header.
ISAS = {"base": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISAS["avx512"] = ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma", "-mf16c"]
    ISAS["avx512"] += ["-mprefer-vector-width=512", "-Wno-maybe-uninitialized"]
    # lora_linear has no code for the base set, and one more where the processor multiplies bf16.
    LORA_ISAS = {"avx2": ISAS["avx2"], "avx512": ISAS["avx512"], "avx512bf16": [*ISAS["avx512"], "-mavx512bf16"]}
else:
    LORA_ISAS = {}


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


class BuildNative(build_ext):
    """Writes a ninja file and runs it."""

    def build_extension(self, ext: Extension) -> None:
        mode = os.environ.get("SLAO_KERNELS_BUILD", "auto")
        if mode not in ("auto", "cpu", "0"):
            raise SystemExit(f"SLAO_KERNELS_BUILD={mode!r}: choose auto, cpu or 0")
        if mode == "0":
            return
        try:
            self._build(Path(self.get_ext_fullpath(ext.name)).resolve())
        except (RuntimeError, subprocess.CalledProcessError, OSError) as error:
            if mode == "cpu":
                raise SystemExit(f"slao_kernels: the native extension could not be built: {error}") from error
            print(
                f"WARNING: slao_kernels: the native extension could not be built ({error}); "
                "the package works without it, on torch's own operations",
                file=sys.stderr,
            )

    def _build(self, target: Path) -> None:
        import ninja
        import pybind11

        cxx = compiler()
        if cxx is None or not accepts(cxx):
            raise RuntimeError(f"no working C++ compiler ({cxx or 'c++, g++ and clang++ not found'})")
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
        lines += ["rule link", "  command = $cxx -shared $in -o $out $flags", f"cxx = {cxx}"]
        objects = []

        def compile_one(source: Path, name: str, flags: list[str]) -> None:
            objects.append(name)
            lines.append(f"build {name}: cc {str(source).replace(' ', '$ ')}")
            lines.append(f"  flags = {' '.join([*COMMON, *openmp, *flags])}")

        compile_one(ROOT / "csrc" / "bindings.cpp", "bindings.o", include)
        for isa, flags in ISAS.items():
            for stem in KERNELS:
                compile_one(ROOT / "csrc" / "cpu" / f"{stem}.cpp", f"{stem}.{isa}.o", [f"-DSLAO_ISA={isa}", *flags])
        for isa, flags in LORA_ISAS.items():
            source = ROOT / "csrc" / "cpu" / "lora_linear.cpp"
            compile_one(source, f"lora_linear.{isa}.o", [f"-DSLAO_ISA={isa}", *flags])
        link = [*openmp, *(["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-Wl,--strip-all"])]
        lines += [
            f"build {str(target).replace(' ', '$ ')}: link {' '.join(objects)}",
            f"  flags = {' '.join(link)}",
            "",
        ]
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder)], check=True)


setup(
    # Optional: an editable install otherwise insists on the file that was not built.
    ext_modules=[Extension("slao_kernels._C", [], optional=True)],
    cmdclass={"build_ext": BuildNative},
)
