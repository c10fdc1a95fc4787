"""Value and every gradient are no further from fp64 than those of PEFT's own layer, in RMS, on the same inputs.

precision="base": against PEFT in the same dtype (adapters in the base's, or autocast), at deltas of the size that
training makes; where PEFT computes a branch of fp32 adapters in fp32, y and dx alone are no worse. "adapter":
against PEFT's fp32 branch at any size of delta, every result. against_peft.py says what is left to chance;
`python bench/accuracy_lora_linear.py` prints the figures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import against_peft
import pytest
import torch
from oracle import INTERPRETED, NODES, PLACES

from slao_kernels.ops.lora_linear import precise

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

# DoRA's base product, scaled, and the branch that joins it are each rounded: three roundings to PEFT's two.
# The magnitude's gradient reads that product.
DORA_WIDE = {"y": math.sqrt(3 / 2), "dmagnitude": math.sqrt(3 / 2)}


def grid(settings: list[Setting], deltas: tuple[float, ...], places: list, kinds: tuple[str, ...]) -> list:
    """All of it on nodes, the largest delta in the reference; not exhaustive: that on nodes, in bf16 for each kind."""
    found = []
    for setting, delta, place, kind in product(settings, deltas, places, kinds):
        if delta != deltas[-1] and place not in NODES:
            continue
        few = delta == deltas[-1] and place in NODES and (kind == "linear" or setting.base == bf16)
        marks = [*place.marks, *([] if few else [pytest.mark.exhaustive])]
        name = f"{setting}-{delta:.2g}-{place.id}-{kind}"
        found.append(pytest.param(setting, delta, place.values[0], kind, marks=marks, id=name))
    return found


def check(
    setting: Setting,
    delta: float,
    place: tuple[str, str],
    kind: str = "linear",
    allowed: dict[str, float] | None = None,
) -> None:
    cells = {}
    for shape, seeds in (FEW_SHAPES if INTERPRETED else SHAPES).items():
        for r in FEW_RANKS if INTERPRETED else RANKS:
            case = against_peft.Case(*shape, r, setting.base, setting.adapter, delta, setting.autocast, kind=kind)
            cells[f"{shape}, r = {r}"] = against_peft.measure(case, seeds, place[0], setting.precision, place[1])
    against_peft.check_no_further(cells, allowed)


ARGUMENTS = ("setting", "delta", "place", "kind")


@pytest.mark.parametrize(ARGUMENTS, grid(WIDE, (0.01, 1 / 3, 10), PLACES, against_peft.KINDS))
def test_adapter_precision_at_any_size(setting, place, delta, kind):
    check(setting, delta, place, kind, DORA_WIDE if kind == "DoRA" else None)


@pytest.mark.parametrize(ARGUMENTS, grid(SAME_DTYPE, (0.01, 1 / 3), PLACES, against_peft.KINDS))
def test_base_precision_in_the_same_dtype(setting, place, delta, kind):
    # The reference, too, rounds DoRA's branch by itself.
    check(setting, delta, place, kind, DORA_WIDE if (kind, place[0]) == ("DoRA", "reference") else None)


@pytest.mark.parametrize(ARGUMENTS, grid(NARROWED, (0.01, 1 / 3), NODES, ("linear",)))
def test_base_precision_against_an_fp32_branch(setting, place, delta, kind):
    """y and dx gain more by one rounding less than they lose by narrow adapters. Not so for dA and dB, which are 16-bit
    products, nor for "reference" and a called base, which round as often as PEFT does (y and dx: 1.14 and 1.07 times
    PEFT's)."""
    check(setting, delta, place, kind, {"dA": math.inf, "dB": math.inf})


@pytest.mark.parametrize("kind", ["linear", pytest.param("DoRA", marks=pytest.mark.exhaustive)])
@pytest.mark.skipif(INTERPRETED, reason="torch's products alone")
@pytest.mark.parametrize("setting", WIDE, ids=str)
def test_hilo_products_at_any_size(setting, kind, monkeypatch):
    """The way that CUDA takes, with a GEMM that rounds once where CUDA's gives fp32: the split's own loss."""
    monkeypatch.setattr(precise, "adds_split", precise.splits)
    monkeypatch.setattr(precise, "has_fp32_products", precise.splits)
    monkeypatch.setattr(precise, "_mm", lambda left, right: (left.double() @ right.double()).float())
    for delta in (0.01, 1 / 3, 10):
        check(setting, delta, ("eager", "cpu"), kind, DORA_WIDE if kind == "DoRA" else None)


@pytest.mark.parametrize("place", [place for place in NODES if place.id == "native-cpu"])
def test_the_compiled_outer_product_at_any_size(place, monkeypatch):
    """Which larger layers than these take: bf16 terms, products and sums by the core, fp32 out."""
    from slao_kernels.ops.lora_linear import cpu

    monkeypatch.setattr(cpu, "_SPLIT_FROM", 1)
    for delta in (0.01, 1 / 3, 10):
        check(WIDE[0], delta, place)


@pytest.mark.skipif(INTERPRETED, reason="once is enough")
def test_the_rule_can_fail():
    """A branch of 16-bit adapters at ten times the base is no fp32 branch; PEFT itself passes anywhere."""
    with pytest.raises(AssertionError, match=r"y at all shapes and ranks: 2\.\d+ times PEFT's"):
        check(Setting("base", bf16, fp32), 10, ("eager", "cpu"))
    with pytest.raises(AssertionError, match=r"dA at all shapes and ranks: \d{4,}\.\d+ times PEFT's"):
        check(Setting("base", bf16, fp32), 1 / 3, ("eager", "cpu"))
