"""How far PEFT's own lora.Linear and ours are from fp64 on the same inputs: for the accuracy test and its table."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import layer as lora
from torch import Tensor, nn

import slao_kernels
from slao_kernels.ops.lora_linear import reference
from slao_kernels.testing import error_ratio

Tensors = dict[str, Tensor]
LEAVES = ("x", "weight", "bias", "A", "B")  # what can have a gradient, in lora_linear's order


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
        }

    def independent(self, name: str) -> int:
        """How many errors of a result can be taken for independent; those of t and g are shared by all of dB and dA."""
        m, k, n, r = self.m, self.k, self.n, self.r
        counts = {"y": m * n, "dx": m * k, "dweight": n * min(m, k), "dbias": n}
        return (counts | {"dA": r * min(m, k), "dB": r * min(m, n)})[name]


def _leaves(inputs: Tensors) -> Tensors:
    return {name: inputs[name].detach().clone().requires_grad_() for name in LEAVES}


def _results(y: Tensor, wanted: Iterable[Tensor], dy: Tensor) -> Tensors:
    grads = torch.autograd.grad(y, list(wanted), dy.to(y.dtype))
    return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(LEAVES, grads, strict=True)}}


def _autocast(case: Case, device: str) -> torch.autocast:
    return torch.autocast(device, dtype=case.autocast, enabled=case.autocast is not None)


def exact(case: Case, inputs: Tensors) -> Tensors:
    x, weight, bias, A, B = leaves = _leaves({name: value.double() for name, value in inputs.items()}).values()
    return _results(reference.lora_linear(x, None, weight, bias, A, B, case.scaling), leaves, inputs["dy"])


def ours(case: Case, inputs: Tensors, backend: str, precision: str) -> Tensors:
    x, weight, bias, A, B = leaves = _leaves(inputs).values()
    with _autocast(case, x.device.type):
        y = slao_kernels.lora_linear(x, weight, bias, A, B, case.scaling, precision=precision, backend=backend)
    return _results(y, leaves, inputs["dy"])


def peft(case: Case, inputs: Tensors) -> Tensors:
    """The layer that `get_peft_model` makes, unpatched, with these weights."""
    model = nn.Sequential(nn.Linear(case.k, case.n, device="meta"))
    config = LoraConfig(r=case.r, lora_alpha=round(case.scaling * case.r), target_modules=["0"])
    (layer,) = (module for module in get_peft_model(model, config).modules() if type(module) is lora.Linear)
    base, A, B = layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]
    x = inputs["x"].detach().clone().requires_grad_()
    for module, place, name in (
        (base, "weight", "weight"),
        (base, "bias", "bias"),
        (A, "weight", "A"),
        (B, "weight", "B"),
    ):
        setattr(module, place, nn.Parameter(inputs[name].clone()))
    assert layer.scaling["default"] == case.scaling
    with _autocast(case, x.device.type):
        y = layer(x)
    return _results(y, (x, base.weight, base.bias, A.weight, B.weight), inputs["dy"])


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
        right, theirs, mine = exact(drawn, inputs), peft(drawn, inputs), ours(drawn, inputs, backend, precision)
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
