"""The one table of shapes and dtypes, one draw of inputs, and the ops beside their fp64 formulas.

An op takes its tensors by name and returns y (..., N), several outputs side by side. Whatever is asserted of one op is
asserted of all: `run` gives y and the gradient of every name, `check` compares with `exact`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from places import INTERPRETED
from torch import Tensor

import slao_kernels
from slao_kernels import dispatch
from slao_kernels.ops import dora as dora_op
from slao_kernels.ops.dora import reference as dora_reference
from slao_kernels.ops.lora_linear import autograd, reference
from slao_kernels.testing import TOLERANCE, error_ratio

Tensors = dict[str, Tensor]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
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
NAMES = ("x", "weight", "bias", "A", "B")
SCALING = 0.7
WIDE = {"A", "B", "own", "core", "core_delta", "magnitude"}  # of the adapters' dtype

# Where the ops run: a backend and a device. Under the interpreter Triton's alone (test_interpreted.py).


def _place(backend: str, device: str = "cpu") -> Any:
    missing = None if device == "cuda" else dispatch.why_not("lora_linear", backend, device)
    marks = [pytest.mark.gpu] if device == "cuda" else [pytest.mark.skipif(missing is not None, reason=str(missing))]
    return pytest.param((backend, device), marks=marks, id=f"{backend}-{device}")


CPU_PLACES = [_place("triton")] if INTERPRETED else [_place("native"), _place("eager"), _place("reference")]
PLACES = CPU_PLACES if INTERPRETED else [*CPU_PLACES, _place("eager", "cuda"), _place("triton", "cuda")]
# The reference is plain PyTorch: it saves what torch saves, rounds as often as torch does and differentiates twice.
NODES = [place for place in PLACES if place.values[0][0] != "reference"]


def draws(dtype: torch.dtype, seed: int = 0) -> Callable[..., Tensor]:
    """Normal numbers rounded to the dtype."""
    g = torch.Generator().manual_seed(seed)

    def draw(*size: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(size, generator=g, dtype=torch.float64) * scale).to(dtype)

    return draw


def make(
    shape: tuple[int, ...],
    k: int,
    n: int,
    r: int,
    dtype: torch.dtype,
    adapter: torch.dtype | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> Tensors:
    """What any op reads, of the size that training has: unit tokens, unit base output, a delta of a third of it."""
    draw, own = draws(dtype, seed), adapter or dtype
    found = {
        "x": draw(*shape, k),
        "weight": draw(n, k, scale=k**-0.5),
        "bias": draw(n),
        "A": draw(r, k, scale=k**-0.5, dtype=own),
        "B": draw(n, r, scale=r**-0.5 / 3, dtype=own),
        "core": draw(r, r, scale=r**-0.5, dtype=own),
        "core_delta": draw(r, r, scale=r**-0.5, dtype=own),
        "dy": draw(*shape, n),
        "y": draw(*shape, n),
        "own": draw(n, scale=1 / 3, dtype=own),
        "magnitude": (1 + draw(n, scale=0.2, dtype=torch.float64)).to(own),
    }
    return {name: value.to(device) for name, value in found.items()}


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """Equal values in other strides; NaN in the gaps."""
    if layout == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "every other":
        return torch.stack([tensor, torch.full_like(tensor, torch.nan)], -1)[..., 0]
    if layout == "columns":
        return torch.cat([tensor, torch.full_like(tensor, torch.nan)], -1)[..., : tensor.shape[-1]]
    return tensor[:1].expand(tensor.shape) if layout == "expanded" and len(tensor) else tensor


def lora_add(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    precision: str = "base",
    backend: str = "auto",
    dropout: float = 0.0,
    in_place: bool = False,
    s: float = SCALING,
) -> Tensor:
    """The node that adds a branch to what a called base returned, as layers.py calls it."""
    call = autograd.call_for(x, (None, None, A, B), s, precision, backend, dropout, y.dtype)
    return autograd.add(call)(call, y, x, A, B, in_place)


def lora_dora(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    magnitude: Tensor,
    A: Tensor,
    B: Tensor,
    precision: str = "base",
    backend: str = "auto",
    s: float = SCALING,
) -> Tensor:
    call = autograd.call_for(x, (weight, bias, A, B), s, precision, backend)
    return dora_op.run(call, x, weight, bias, magnitude, A, B)


class Op(NamedTuple):
    """names: what can have a gradient. ours(t, **options) and exact(t): y from tensors by name.

    slack: how many roundings as large as lora_linear's it has, times its tolerance.
    """

    names: tuple[str, ...]
    ours: Callable[..., Tensor]
    exact: Callable[[Tensors], Tensor]
    slack: float = 1.0


def _linear(*more: str, bias: bool = True) -> Op:
    names = (*(name for name in NAMES if bias or name != "bias"), *more)

    def ours(t: Tensors, **options: Any) -> Tensor:
        cores = {name: t[name] for name in more}
        return slao_kernels.lora_linear(
            t["x"], t["weight"], t["bias"] if bias else None, t["A"], t["B"], SCALING, **cores, **options
        )

    def exact(t: Tensors) -> Tensor:
        cores = t["core"] if "core" in more else None, t["core_delta"] if "core_delta" in more else None
        dropped = t["x"] * t["mask"] if "mask" in t else None
        base = t["x"], dropped, t["weight"], t["bias"] if bias else None
        return reference.lora_linear(*base, t["A"], t["B"], SCALING, *cores)

    # With a core one product more in the chain (B R, R A), rounded once more.
    return Op(names, ours, exact, 1.5 if more else 1.0)


def _add(in_place: bool = False, bias: bool = False) -> Op:
    def whole(t: Tensors) -> Tensor:
        return torch.cat([t["B"], t["own"][:, None]], 1) if bias else t["B"]

    def ours(t: Tensors, **options: Any) -> Tensor:
        # Not y itself: a leaf that wants a gradient may not be overwritten.
        y = t["y"] * 1 if in_place else t["y"]
        return lora_add(y, t["x"], t["A"], whole(t), in_place=in_place, **options)

    def exact(t: Tensors) -> Tensor:
        return reference.lora_add(t["y"], t["x"] * t.get("mask", 1), t["A"], whole(t), SCALING)

    return Op(("y", "x", "A", "B", *(["own"] if bias else [])), ours, exact)


def _dora(bias: bool = True) -> Op:
    names = ("x", "weight", *(["bias"] if bias else []), "magnitude", "A", "B")

    def ours(t: Tensors, **options: Any) -> Tensor:
        return lora_dora(t["x"], t["weight"], t["bias"] if bias else None, t["magnitude"], t["A"], t["B"], **options)

    def exact(t: Tensors) -> Tensor:
        part = t["x"], t["weight"], t["bias"] if bias else None, t["magnitude"], t["A"], t["B"]
        return dora_reference.dora(*part, SCALING)

    # One rounding more: of z, or of c dy.
    return Op(names, ours, exact, 1.5)


OPS = {
    "linear": _linear(),
    "linear, no bias": _linear(bias=False),
    "core and delta": _linear("core", "core_delta"),
    "delta alone": _linear("core_delta"),
    "core alone": _linear("core"),
    "add": _add(),
    "add in place": _add(in_place=True),
    "add with a bias": _add(bias=True),
    "add a bias in place": _add(in_place=True, bias=True),
    "DoRA": _dora(),
    "DoRA, no bias": _dora(bias=False),
}
MAIN = ("linear", "core and delta", "add in place", "add with a bias", "DoRA")  # one of each code path
DROPPING = ("linear", "core and delta", "add", "add with a bias")


def run(function: Callable[[Tensors], Tensor], inputs: Tensors, names: tuple[str, ...]) -> Tensors:
    """y ("out") and the gradient of every tensor in `names`, 0 where the output does not reach it."""
    leaves = {**inputs, **{name: inputs[name].detach().clone().requires_grad_() for name in names}}
    y = function(leaves)
    reached = y.requires_grad  # not by a core alone
    grads = (
        torch.autograd.grad(y, [leaves[n] for n in names], inputs["dy"].to(y.dtype), allow_unused=True)
        if reached
        else names
    )
    found = {n: g if isinstance(g, Tensor) else torch.zeros_like(inputs[n]) for n, g in zip(names, grads, strict=True)}
    return {"out": y.detach(), **found}


def ours(op: str, inputs: Tensors, names: tuple[str, ...] | None = None, **options: Any) -> Tensors:
    return run(lambda t: OPS[op].ours(t, **options), inputs, names or OPS[op].names)


def exact(op: str, inputs: Tensors, names: tuple[str, ...] | None = None) -> Tensors:
    """In fp64; with a "mask" among the inputs (0, or 1 over the rate of what is kept) x is dropped by it."""
    return run(OPS[op].exact, {name: value.detach().double() for name, value in inputs.items()}, names or OPS[op].names)


def compare(found: Tensors, expected: Tensors, tolerance: float) -> None:
    for name, value in expected.items():
        ratio = error_ratio(found[name], value)
        assert ratio <= tolerance, f"{name}: error ratio {ratio:.2e} > {tolerance:.0e}"


def check(op: str, found: Tensors, expected: Tensors, inputs: Tensors, precision: str = "base") -> None:
    """Every result in its tensor's dtype, and as exact as the base's; precision="adapter": the adapters' as their own.

    Not so DoRA's magnitude: its gradient is a sum over z, which the base's dtype has rounded.
    """
    base = inputs["x"].dtype
    for name, value in expected.items():
        dtype = base if name == "out" else inputs[name].dtype
        assert found[name].dtype == dtype, name
        wide = precision == "adapter" and name in WIDE - {"magnitude"}
        tolerance = OPS[op].slack * TOLERANCE[min(dtype, torch.float32, key=lambda d: d.itemsize) if wide else base]
        ratio = error_ratio(found[name], value)
        assert ratio <= tolerance, f"{name}: error ratio {ratio:.2e} > {tolerance:.1e}"


def equal(found: Tensors, expected: Tensors) -> None:
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
