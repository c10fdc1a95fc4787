"""Forward and every gradient are no further from fp64 than PEFT's own lora.Linear is, in RMS, on the same inputs.

precision="base": against PEFT in the same dtype (adapters in the base's, or autocast), at deltas of the size that
training makes; where PEFT computes a branch of fp32 adapters in fp32, y and dx alone are no worse. "adapter":
against PEFT's fp32 branch at any size of delta, every result.

"No worse" is up to chance. Two RMS of n independent errors of one distribution differ by a factor whose logarithm has
the standard deviation 1 / √n (normal errors; 2 / √n at a kurtosis of 9). Five of them are allowed, which is much for
one token at rank 1; so the mean over all shapes and ranks, with n in the hundreds or thousands, is held to the same
rule. A single shape may also be worse while its error is below 1.8e-7, three half units of fp32: MKL adds up one row
in a tree, 0.8e-7 at K = 64, the compiled core in one run, 1.6e-7 (at K = 301 it is MKL that errs more).
`python bench/accuracy_lora_linear.py` prints the figures.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

from slao_kernels import dispatch
from slao_kernels.ops.lora_linear import wide


def _sibling(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"slao_kernels_tests_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


against_peft = _sibling("against_peft")

# (M, K, N) and how many draws: few values need more of them.
SHAPES = {(1, 64, 48): 4, (7, 33, 17): 4, (130, 96, 80): 1, (130, 301, 279): 1}
RANKS = (1, 8, 12, 16, 64, 256)
# Triton's interpreter takes seconds for a large one.
FEW_SHAPES = {(1, 64, 48): 2, (7, 33, 17): 2, (130, 96, 80): 1}
FEW_RANKS = (1, 12, 64)

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Setting:
    precision: str
    base: torch.dtype
    adapter: torch.dtype
    autocast: torch.dtype | None = None

    def __str__(self) -> str:
        names = [str(dtype).removeprefix("torch.") for dtype in (self.base, self.adapter)]
        return f"{self.precision}: {names[1]} on {names[0]}" + (", autocast" if self.autocast else "")


WIDE = [Setting("adapter", bf16, fp32), Setting("adapter", fp16, fp32)]
SAME_DTYPE = [Setting("base", dtype, dtype) for dtype in (bf16, fp16, fp32)]
SAME_DTYPE += [Setting("base", bf16, fp32, bf16), Setting("base", fp32, fp32, bf16)]
NARROWED = [Setting("base", bf16, fp32), Setting("base", fp16, fp32)]

NATIVE = dispatch.why_not("lora_linear", "native", "cpu")
TRITON = dispatch.why_not("lora_linear", "triton", "cpu")
WITH_TRITON = "test_with_triton_interpreted runs it in a process of its own"
NATIVES = pytest.param("native", "cpu", marks=pytest.mark.skipif(NATIVE is not None, reason=str(NATIVE)))
TRITONS = pytest.param("triton", "cpu", marks=pytest.mark.skipif(TRITON is not None, reason=f"{TRITON}; {WITH_TRITON}"))
ON_GPU = [pytest.param(name, "cuda", marks=pytest.mark.gpu) for name in ("eager", "triton")]
WHERE = [("reference", "cpu"), ("eager", "cpu"), NATIVES, TRITONS, *ON_GPU]


def slack(independent: int) -> float:
    return math.exp(5 / math.sqrt(independent))


EVERYWHERE = "all shapes and ranks"
FEW_ROUNDINGS = 3 * 2.0**-24


def check(setting: Setting, delta: float, backend: str, device: str, results: tuple[str, ...] | None = None) -> None:
    interpreted = backend == "triton" and device == "cpu"
    cells = {}
    for shape, seeds in (FEW_SHAPES if interpreted else SHAPES).items():
        for r in FEW_RANKS if interpreted else RANKS:
            case = against_peft.Case(*shape, r, setting.base, setting.adapter, delta, setting.autocast)
            cells[f"{shape}, r = {r}"] = against_peft.measure(case, seeds, backend, setting.precision, device)
    cells[EVERYWHERE] = against_peft.pooled(list(cells.values()))
    worse = []
    for where, errors in cells.items():
        for name, tally in errors.items():
            if results is not None and name not in results:
                continue
            exempt = where != EVERYWHERE and math.sqrt(tally.ours) <= FEW_ROUNDINGS
            if tally.ratio > slack(tally.independent) and not exempt:
                worse.append(f"{name} at {where}: {tally.ratio:.3f} times PEFT's {math.sqrt(tally.peft):.2e}")
    assert not worse, "\n".join(worse)


@pytest.mark.parametrize("delta", [0.01, 1 / 3, 10], ids="{:.2g}".format)
@pytest.mark.parametrize(("backend", "device"), WHERE)
@pytest.mark.parametrize("setting", WIDE, ids=str)
def test_adapter_precision_at_any_size(setting, backend, device, delta):
    check(setting, delta, backend, device)


@pytest.mark.parametrize("delta", [0.01, 1 / 3], ids="{:.2g}".format)
@pytest.mark.parametrize(("backend", "device"), WHERE)
@pytest.mark.parametrize("setting", SAME_DTYPE, ids=str)
def test_base_precision_in_the_same_dtype(setting, backend, device, delta):
    check(setting, delta, backend, device)


@pytest.mark.parametrize("delta", [0.01, 1 / 3], ids="{:.2g}".format)
@pytest.mark.parametrize(("backend", "device"), WHERE[1:])
@pytest.mark.parametrize("setting", NARROWED, ids=str)
def test_base_precision_against_an_fp32_branch(setting, backend, device, delta):
    """y and dx gain more by one rounding less than they lose by narrow adapters. Not so for dA and dB, which are 16-bit
    products, nor for "reference", which rounds as often as PEFT does (its y and dx: 1.14 and 1.07 times PEFT's)."""
    check(setting, delta, backend, device, ("y", "dx"))


@pytest.mark.parametrize("setting", WIDE, ids=str)
def test_hilo_products_at_any_size(setting, monkeypatch):
    """The way that CUDA takes, with a GEMM that rounds once where CUDA's gives fp32: the split's own loss."""
    monkeypatch.setattr(wide, "adds_split", wide.splits)
    monkeypatch.setattr(wide, "has_fp32_products", wide.splits)
    monkeypatch.setattr(wide, "_mm", lambda left, right: (left.double() @ right.double()).float())
    for delta in (0.01, 1 / 3, 10):
        check(setting, delta, "eager", "cpu")


@pytest.mark.skipif(NATIVE is not None, reason=str(NATIVE))
def test_the_compiled_outer_product_at_any_size(monkeypatch):
    """Which larger layers than these take: bf16 terms, products and sums by the core, fp32 out."""
    from slao_kernels.ops.lora_linear import native

    monkeypatch.setattr(native, "_SPLIT_FROM", 1)
    for delta in (0.01, 1 / 3, 10):
        check(WIDE[0], delta, "native", "cpu")


def test_the_rule_can_fail():
    """A branch of 16-bit adapters at ten times the base is no fp32 branch; PEFT itself passes anywhere."""
    with pytest.raises(AssertionError, match=r"y at all shapes and ranks: 2\.\d+ times PEFT's"):
        check(Setting("base", bf16, fp32), 10, "eager", "cpu", ("y",))
    with pytest.raises(AssertionError, match=r"dA at all shapes and ranks: \d{4,}\.\d+ times PEFT's"):
        check(Setting("base", bf16, fp32), 1 / 3, "eager", "cpu", ("dA",))


if TRITON is not None:

    @pytest.mark.slow
    def test_with_triton_interpreted():
        pytest.importorskip("triton", reason="triton is not installed")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-k",
            "triton-cpu",
            str(Path(__file__)),
        ]
        env = os.environ | {"TRITON_INTERPRET": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=590, cwd=Path(__file__).parent)
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
        (passed,) = re.findall(r"(\d+) passed", done.stdout)
        assert int(passed) == 20, done.stdout[-2000:]
