"""One layer's inputs, its fp64 result and ours, by oracle.py, for test_lora_linear_gpu.py."""

from __future__ import annotations

from typing import Any

import oracle as ops
from oracle import SHAPES, Tensors, compare

__all__ = ["SHAPES", "compare", "make", "oracle", "ours"]


def make(*shape: Any, **options: Any) -> Tensors:
    made = ops.make(*shape, **options)
    made["dy"] = made["dy"][..., : len(made["weight"])].contiguous()
    return {name: made[name] for name in ("x", "weight", "bias", "A", "B", "core", "core_delta", "dy")}


def _named(names: tuple[str, ...], found: Tensors) -> Tensors:
    return {"y": found["out"], **{name: found[name] for name in names}}


def _op(names: tuple[str, ...]) -> str:
    return "core and delta" if "core" in names else "linear"


def oracle(inputs: Tensors, names: tuple[str, ...]) -> Tensors:
    return _named(names, ops.exact(_op(names), inputs, names))


def ours(inputs: Tensors, names: tuple[str, ...], **options: Any) -> Tensors:
    return _named(names, ops.ours(_op(names), inputs, names, **options))
