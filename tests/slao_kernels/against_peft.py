"""How far PEFT's own layers and the same layers patched are from fp64 on the same inputs, and whether ours are worse.

"No worse" is up to chance. Two RMS of n independent errors of one distribution differ by a factor whose logarithm has
the standard deviation 1 / √n (normal errors; 2 / √n at a kurtosis of 9). Five of them are allowed, which is much for
one token at rank 1; so the mean over all shapes and ranks, with n in the hundreds or thousands, is held to the same
rule. A single shape may also be worse while its error is below 1.8e-7, three half units of fp32: MKL adds up one row
in a tree, 0.8e-7 at K = 64, the compiled core in one run, 1.6e-7 (at K = 301 it is MKL that errs more).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import layer as lora
from torch import Tensor, nn

import slao_kernels
from slao_kernels.ops.dora import reference as dora_reference
from slao_kernels.ops.lora_linear import reference
from slao_kernels.testing import error_ratio

Tensors = dict[str, Tensor]
KINDS = ("linear", "called", "DoRA")  # one node; a base layer that is called, and the branch added; DoRA
LEAVES = ("x", "weight", "bias", "A", "B", "magnitude")  # what can have a gradient


class Called(nn.Linear):
    """A base layer of an unknown class: it is called as it is."""


@dataclass(frozen=True)
class Case:
    """M tokens, (N, K) weight, rank r; `delta`: RMS of scaling · x Aᵀ Bᵀ over that of x Wᵀ."""

    m: int
    k: int
    n: int
    r: int
    base: torch.dtype
    adapter: torch.dtype
    delta: float
    autocast: torch.dtype | None = None
    seed: int = 0
    scaling: float = 2.0
    kind: str = "linear"

    def inputs(self, device: str = "cpu") -> Tensors:
        """Rounded to their dtypes; an fp32 adapter has all its 24 bits, as an optimizer leaves it."""
        g = torch.Generator().manual_seed(self.seed)

        def draw(*size: int, scale: float = 1.0, dtype: torch.dtype = self.base) -> Tensor:
            return (torch.randn(size, generator=g, dtype=torch.float64) * scale).to(dtype).to(device)

        return {
            "x": draw(self.m, self.k),
            "weight": draw(self.n, self.k, scale=self.k**-0.5),
            "bias": draw(self.n, scale=0.1),
            "A": draw(self.r, self.k, scale=self.k**-0.5, dtype=self.adapter),
            "B": draw(self.n, self.r, scale=self.delta * self.r**-0.5 / self.scaling, dtype=self.adapter),
            "dy": draw(self.m, self.n),
            "magnitude": (1 + 0.2 * draw(self.n, dtype=torch.float64)).to(self.adapter),
        }

    def independent(self, name: str) -> int:
        """How many errors of a result can be taken for independent; those of t and g are shared by all of dB and dA."""
        m, k, n, r = self.m, self.k, self.n, self.r
        counts = {"y": m * n, "dx": m * k, "dweight": n * min(m, k), "dbias": n, "dmagnitude": n}
        return (counts | {"dA": r * min(m, k), "dB": r * min(m, n)})[name]


def _results(case: Case, y: Tensor, leaves: Iterable[Tensor], dy: Tensor) -> Tensors:
    names = LEAVES if case.kind == "DoRA" else LEAVES[:-1]
    grads = torch.autograd.grad(y, list(leaves)[: len(names)], dy.to(y.dtype))
    return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(names, grads, strict=True)}}


def exact(case: Case, inputs: Tensors) -> Tensors:
    x, weight, bias, A, B, m = leaves = [inputs[name].double().requires_grad_() for name in LEAVES]
    if case.kind == "DoRA":
        y = dora_reference.dora(x, weight, bias, m, A, B, case.scaling)
    else:
        y = reference.lora_linear(x, None, weight, bias, A, B, case.scaling)
    return _results(case, y, leaves, inputs["dy"])


def of_a_layer(case: Case, inputs: Tensors, **options: str) -> Tensors:
    """Of the layer that `get_peft_model` makes, with these weights; patched with `options` if there are any."""
    base_class = Called if case.kind == "called" else nn.Linear
    model = nn.Sequential(base_class(case.k, case.n, device="meta"))
    alpha = round(case.scaling * case.r)
    config = LoraConfig(r=case.r, lora_alpha=alpha, target_modules=["0"], use_dora=case.kind == "DoRA")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DoRA takes the norm of what is on the meta device
        model = get_peft_model(model, config)
    (layer,) = (module for module in model.modules() if type(module) is lora.Linear)
    base, A, B = layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]
    places = [(base, "weight", "weight"), (base, "bias", "bias"), (A, "weight", "A"), (B, "weight", "B")]
    if case.kind == "DoRA":
        places.append((layer.lora_magnitude_vector["default"], "weight", "magnitude"))
    for module, place, name in places:
        setattr(module, place, nn.Parameter(inputs[name].clone()))
    assert layer.scaling["default"] == case.scaling
    if options:
        slao_kernels.patch(model, strict=True, **options)
    x = inputs["x"].detach().clone().requires_grad_()
    with torch.autocast(x.device.type, dtype=case.autocast, enabled=case.autocast is not None):
        y = layer(x)
    assert not options or not layer.slao_options.fallbacks
    return _results(case, y, [x, *(getattr(module, place) for module, place, _ in places)], inputs["dy"])


@dataclass
class Tally:
    """Squared error ratios of one result, PEFT's and ours, and how many independent errors are behind them."""

    peft: float = 0.0
    ours: float = 0.0
    independent: int = 0

    @property
    def ratio(self) -> float:
        """Our RMS error over PEFT's; 1 where both are exact."""
        return math.sqrt(self.ours / self.peft) if self.peft else 1.0 + self.ours


Errors = dict[str, Tally]  # by the name of the result


def measure(case: Case, seeds: int, backend: str, precision: str, device: str = "cpu") -> Errors:
    """The mean squared error ratios over `seeds` draws of `case`."""
    found: Errors = {}
    for seed in range(seeds):
        drawn = replace(case, seed=seed)
        inputs = drawn.inputs(device)
        right, theirs = exact(drawn, inputs), of_a_layer(drawn, inputs)
        mine = of_a_layer(drawn, inputs, backend=backend, precision=precision)
        for name, value in right.items():
            assert mine[name].dtype == theirs[name].dtype, name
            tally = found.setdefault(name, Tally())
            tally.peft += error_ratio(theirs[name], value) ** 2 / seeds
            tally.ours += error_ratio(mine[name], value) ** 2 / seeds
            tally.independent += drawn.independent(name)
    return found


def pooled(cells: list[Errors]) -> Errors:
    """The mean over cells, each of the same weight; `independent` such that the variance of the mean is right."""
    count = len(cells)
    return {
        name: Tally(
            sum(cell[name].peft for cell in cells) / count,
            sum(cell[name].ours for cell in cells) / count,
            round(count**2 / sum(1 / cell[name].independent for cell in cells)),
        )
        for name in cells[0]
    }


EVERYWHERE = "all shapes and ranks"
FEW_ROUNDINGS = 3 * 2.0**-24


def slack(independent: int) -> float:
    return math.exp(5 / math.sqrt(independent))


def check_no_further(cells: dict[str, Errors], allowed: dict[str, float] | None = None) -> None:
    """Of each cell and of their mean, every result errs no more than PEFT's; allowed: how many times as much it may."""
    cells = {**cells, EVERYWHERE: pooled(list(cells.values()))}
    worse = []
    for where, errors in cells.items():
        for name, tally in errors.items():
            exempt = where != EVERYWHERE and math.sqrt(tally.ours) <= FEW_ROUNDINGS
            if tally.ratio > (allowed or {}).get(name, 1.0) * slack(tally.independent) and not exempt:
                worse.append(f"{name} at {where}: {tally.ratio:.3f} times PEFT's {math.sqrt(tally.peft):.2e}")
    assert not worse, "\n".join(worse)
