"""One layer's inputs, its fp64 result and ours, for the bodies that a GPU runs (test_lora_linear_gpu.py)."""

from __future__ import annotations

import torch
from torch import Tensor

import slao_kernels
from slao_kernels.ops.lora_linear import reference
from slao_kernels.testing import error_ratio

# (leading sizes of x, K, N, r)
SHAPES = [
    ((1,), 64, 48, 8),
    ((7,), 33, 17, 1),
    ((2, 5), 40, 24, 12),
    ((3, 1, 4), 16, 64, 16),
    ((130,), 96, 80, 64),
    ((20,), 300, 280, 256),
    ((0,), 24, 40, 8),
    ((2, 0), 24, 40, 4),
    ((), 32, 24, 4),
]


def make(shape: tuple[int, ...], k: int, n: int, r: int, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Rounded inputs of the size that training has: unit tokens, unit base output, a delta of a third of it."""
    g = torch.Generator().manual_seed(seed)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=g, dtype=torch.float64) * scale).to(dtype)

    return {
        "x": draw(*shape, k),
        "weight": draw(n, k, scale=k**-0.5),
        "bias": draw(n),
        "A": draw(r, k, scale=k**-0.5),
        "B": draw(n, r, scale=r**-0.5 / 3),
        "core": draw(r, r, scale=r**-0.5),
        "core_delta": draw(r, r, scale=r**-0.5),
        "dy": draw(*shape, n),
    }


def run(function, inputs: dict[str, Tensor], names: tuple[str, ...], **options) -> dict[str, Tensor]:
    """y and the gradient of every tensor in `names`; a tensor that the output does not reach has gradient 0."""
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in names}
    y = function(leaves, **options)
    grads = torch.autograd.grad(y, list(leaves.values()), inputs["dy"].to(y.dtype), allow_unused=True)
    found = {name: torch.zeros_like(inputs[name]) if g is None else g for name, g in zip(leaves, grads, strict=True)}
    return {"y": y.detach(), **found}


def oracle(inputs: dict[str, Tensor], names: tuple[str, ...], s: float = 0.7) -> dict[str, Tensor]:
    wide = {name: value.double() for name, value in inputs.items()}

    def function(t: dict[str, Tensor]) -> Tensor:
        return reference.lora_linear(
            t["x"], None, t["weight"], t.get("bias"), t["A"], t["B"], s, t.get("core"), t.get("core_delta")
        )

    return run(function, wide, names)


def ours(inputs: dict[str, Tensor], names: tuple[str, ...], s: float = 0.7, **options) -> dict[str, Tensor]:
    def function(t: dict[str, Tensor]) -> Tensor:
        return slao_kernels.lora_linear(
            t["x"],
            t["weight"],
            t.get("bias"),
            t["A"],
            t["B"],
            s,
            core=t.get("core"),
            core_delta=t.get("core_delta"),
            **options,
        )

    return run(function, inputs, names)


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, value in expected.items():
        ratio = error_ratio(found[name], value)
        assert ratio <= tolerance, f"{name}: error ratio {ratio:.2e} > {tolerance:.0e}"
