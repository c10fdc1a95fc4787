"""Adapters for interference and weighted_merge: drawn ones, those of a model, and what neither takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from oracle import DTYPES
from torch import Tensor, nn

from slao_kernels.testing import tiny_model

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
on_every_device = pytest.mark.parametrize("device", DEVICES)
in_every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

Adapter = tuple[list[Tensor], list[Tensor], list[float]]


def adapter(
    shapes: list[tuple[int, int]], rank: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Adapter:
    """One of that rank on layers (m, n), with a scaling each; A is wider than B, so that neither passes for the other.

    B's columns are of falling size: singular values that are told apart, so that the truncated SVD is unique.
    """
    g = torch.Generator().manual_seed(seed)
    falling = 0.9 ** torch.arange(rank)
    As = [torch.randn(rank, n, generator=g).to(device, dtype) for _, n in shapes]
    Bs = [(0.1 * torch.randn(m, rank, generator=g) * falling).to(device, dtype) for m, _ in shapes]
    return As, Bs, [0.5 + index for index in range(len(shapes))]


def unchanged(adapters: list[Adapter]) -> Callable[[], bool]:
    """Whether they are what they were at this call."""
    tensors = [tensor for As, Bs, _ in adapters for tensor in As + Bs]
    before = [tensor.clone() for tensor in tensors]
    return lambda: all(torch.equal(one, other) for one, other in zip(before, tensors, strict=True))


def model_with(kind: str = "llama", **adapters: dict[str, Any]) -> nn.Module:
    """A tiny model with these LoRA adapters, each a LoraConfig's arguments, all of their weights random."""
    (first, *more), model = adapters, tiny_model(kind)
    model = peft.get_peft_model(model, peft.LoraConfig(**adapters[first]), first)
    for name in more:
        model.add_adapter(name, peft.LoraConfig(**adapters[name]))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    return model


ONE, OTHER = (torch.ones(2, 6), torch.ones(5, 2)), (torch.ones(2, 7), torch.ones(5, 2))
# What both refuse: (adapters, what is said).
BAD = {
    "shape": ([[ONE], [OTHER]], r"adapters\[1\], layers\[0\]: B A is \(5, 7\), the first adapter's \(5, 6\)"),
    "rank": ([[(torch.ones(3, 6), ONE[1])]], r"A \(3, 6\) and B \(5, 2\) are not \(r, n\) and \(m, r\)"),
    "dtype": ([[(ONE[0].int(), ONE[1])]], r"layers\[0\].A: is torch.int32, expected fp64, fp32, bf16 or fp16"),
    "meta": ([[ONE], [(ONE[0].to("meta"), ONE[1])]], r"adapters\[1\], layers\[0\].A: is on the meta device"),
    "layers": ([[ONE, ONE], [ONE]], "adapters: have different numbers of layers: 2, 1"),
    "lengths": ([([ONE[0]], [ONE[1]] * 2, 1.0)], r"adapters\[0\]: lengths differ: As 1, Bs 2, scalings 1"),
    "scaling": ([([ONE[0]], [ONE[1]], float("nan"))], "has the scaling nan, expected a finite number"),
    "no scaling": ([([ONE[0]], [ONE[1]], None)], "scalings that are neither a number nor one a layer"),
    "no number": ([[(*ONE, "x")]], r"adapters\[0\]: has a scaling that is not a number"),
    "kind": ([ONE[0]], r"adapters\[0\]: is a Tensor, expected \(As, Bs, scalings\) or a list of \(A, B\)"),
    "items": ([[ONE[0], ONE[1]]], r"adapters\[0\]: is neither \(As, Bs, scalings\) nor a list of \(A, B\)"),
    "names": (["a", "b"], "names need model="),
    "several": ([[ONE] * 2, [OTHER, ONE], [ONE, OTHER]], r"adapters\[1\], layers\[0\].*; adapters\[2\], layers\[1\]"),
}
