"""An adapted linear layer, and q, k and v of one x, against the bare frozen layer, PEFT and a plain autograd node.

The frozen layer is the floor of what training through a layer costs: forward, and backward to x. Columns: "PEFT" and
"ours" have fp32 adapters, as PEFT makes them; ", base dtype" marks adapters in the dtype of the frozen weight.
"ours" on fp32 adapters computes its branch in the base's dtype (patch's default), PEFT in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contestants import ALPHA, RANK, MmAddmm, adapted, assert_ran_fused, fused, lora_modules
from race import interleave, record
from torch import Tensor, nn

from slao_kernels.testing import TOLERANCE, error_ratio

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Size:
    """M tokens through N × K. A lap times `iterations` calls: one alone is too short for the clock where M is small."""

    tokens: int
    width: int
    rounds: int
    iterations: int


# Sizes of a decoder's projection (and of one on a GPU), of MiniLM in training, and of a batch of two short sentences.
SIZES = {
    "2048x4096x4096": Size(2048, 4096, 5, 1),
    "1024x384x384": Size(1024, 384, 51, 4),
    "32x384x384": Size(32, 384, 101, 20),
    "8192x4096x4096": Size(8192, 4096, 15, 2),
}


class Projections(nn.Module):
    """Frozen linear layers that read one x: the first of q, k and v, or all three."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        for name, weight in zip(("q_proj", "k_proj", "v_proj"), weights, strict=False):
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            layer.weight = nn.Parameter(weight, requires_grad=False)  # every contestant reads the same memory
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.children()]


@dataclass
class Contestant:
    """`forward` gives the outputs, `wanted` are the tensors whose gradients the backward pass computes."""

    forward: Callable[[], list[Tensor] | tuple[Tensor, ...]]
    wanted: list[Tensor]
    model: nn.Module | None = None

    def both(self, dys: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(tuple(self.forward()), self.wanted, dys)


def contestants(x: Tensor, weights: list[Tensor], compiled: bool) -> dict[str, Contestant]:
    def of_modules(prepare: Callable[[nn.Module], Any], base_dtype: bool) -> Contestant:
        model = Projections(weights)
        model = prepare(adapted(model, [name for name, _ in model.named_children()], base_dtype))
        layers = lora_modules(model)
        wanted = [x] + [part["default"].weight for layer in layers for part in (layer.lora_A, layer.lora_B)]
        if prepare is torch.compile:
            return Contestant(lambda: model(x), wanted, model)
        with torch.no_grad():
            model(x)  # as evaluation before training; whatever is learned from a first call is learned here
        return Contestant(lambda: [layer(x) for layer in layers], wanted, model)

    def as_is(model: nn.Module) -> nn.Module:
        return model

    found = {"frozen": Contestant(lambda: [F.linear(x, W) for W in weights], [x])}
    adapter_dtypes = {"": False} if x.dtype == torch.float32 else {"": False, ", base dtype": True}
    if compiled:
        torch.compiler.reset()  # Dynamo gives up on a function after eight models
    for suffix, base_dtype in adapter_dtypes.items():
        found[f"PEFT{suffix}"] = of_modules(as_is, base_dtype)
        if compiled:
            found[f"PEFT{suffix}, compiled"] = of_modules(torch.compile, base_dtype)
    pairs = [part.detach().to(x.dtype).requires_grad_() for part in found["PEFT"].wanted[1:]]
    layers = zip(weights, pairs[::2], pairs[1::2], strict=True)
    flat = [part for layer in layers for part in layer]
    found["mm+addmm_"] = Contestant(lambda: MmAddmm.apply(x, ALPHA / RANK, *flat), [x, *pairs])
    return found | {f"ours{suffix}": of_modules(fused, base_dtype) for suffix, base_dtype in adapter_dtypes.items()}


def agree(found: dict[str, Contestant], dys: list[Tensor]) -> None:
    """A fast wrong answer is no benchmark: outputs and all gradients against PEFT's."""
    peft = found["PEFT"]
    expected = [*peft.forward(), *peft.both(dys)]
    for name, contestant in found.items():
        if name not in ("PEFT", "frozen"):
            error = max(map(error_ratio, [*contestant.forward(), *contestant.both(dys)], expected))
            assert error <= TOLERANCE[dys[0].dtype], f"{name} does not compute what PEFT does: off by {error:.1e}"
        if name.startswith("ours") and contestant.model is not None:
            assert_ran_fused(contestant.model)


def run(
    size: Size, projections: int, dtype: str, backward: bool, benchmark: Any, device: str, options: pytest.Config
) -> None:
    torch.manual_seed(0)
    x = torch.randn(size.tokens, size.width).to(device, DTYPES[dtype]).requires_grad_()
    shape = size.width, size.width
    weights = [(torch.randn(shape) / size.width**0.5).to(device, DTYPES[dtype]) for _ in range(projections)]
    dys = [torch.randn(size.tokens, size.width).to(device, DTYPES[dtype]) for _ in weights]
    found = contestants(x, weights, options.getoption("--compile"))
    agree(found, dys)
    calls: dict[str, Callable[[], object]] = {}
    for name, contestant in found.items():
        calls[name] = partial(contestant.both, dys) if backward else contestant.forward
    best_of = options.getoption("--best-of")
    races = interleave(benchmark, calls, device, size.rounds, size.iterations, best_of)
    record(benchmark, races, "frozen", device)


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("size", list(SIZES))
def test_layer(
    size: str, dtype: str, direction: str, benchmark: Any, device: str, request: pytest.FixtureRequest
) -> None:
    if size == "8192x4096x4096" and device == "cpu":
        pytest.skip("a GPU's size: minutes on a CPU")
    run(SIZES[size], 1, dtype, direction != "forward", benchmark, device, request.config)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("size", ["2048x4096x4096"])
def test_qkv(size: str, dtype: str, benchmark: Any, device: str, request: pytest.FixtureRequest) -> None:
    """Forward and backward of three layers that share x."""
    run(SIZES[size], 3, dtype, True, benchmark, device, request.config)
