"""Arguments for test_fuzz_ops.py: tensors of every kind, fit and unfit, and what of their memory was written."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

fp32, fp64 = torch.float32, torch.float64
FLOATS = [fp32, fp32, torch.bfloat16, torch.float16, fp64]
OTHERS = [torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2]
LAYOUTS = ["dense", "dense", "transposed", "every other", "columns", "parameter", "subclass"]
# What may be handed over instead of a tensor that fits. Some of it an op may take (NaN, a tensor twice, an expanded
# source): then its result has to be right.
ODD = [
    "shape", "dim", "dtype", "meta", "object", "twice", "view", "expanded", "nan", "inf", "sparse", "negative",
    "inference", "nonleaf", "quantized", "zero",
]  # fmt: skip
OBJECTS = [None, "text", 1.5, 3, True, [], [[1.0]], {}, object(), b"x", 1j]
NUMBERS = [math.nan, math.inf, -math.inf, -0.1, 1.5, 10**400, "x", "0.5", None, 1j, [], torch.ones(2), torch.ones(1)]


class Sub(Tensor):
    """A subclass with memory of its own."""


class Call:
    """The tensors of one call as they are drawn, and the bytes of their memory."""

    def __init__(self, draw: Callable[[Any], Any]) -> None:
        self.draw = draw
        self.tensors: list[Tensor] = []
        self.odd = 0  # how many arguments are not what the op's documentation asks for
        # Two thirds of the calls have an odd argument: those with none must be answered.
        self.left = draw(st.sampled_from([0, 1, 1, 2]))

    def pick(self, values: list[Any]) -> Any:
        return self.draw(st.sampled_from(values))

    def size(self, least: int = 1, most: int = 6) -> int:
        return self.draw(st.integers(least, most))

    def oddly(self, one_in: int = 4) -> bool:
        if not self.left or self.draw(st.integers(1, one_in)) > 1:
            return False
        self.left -= 1
        self.odd += 1
        return True

    def tensor(self, *shape: int, dtype: torch.dtype | None = None) -> Any:
        made = self._odd(shape) if self.oddly() else self._fit(shape, dtype or self.pick(FLOATS))
        if isinstance(made, Tensor):
            self.tensors.append(made)
        return made

    def number(self, fit: list[Any]) -> Any:
        return self.pick(NUMBERS) if self.oddly(8) else self.pick(fit)

    def numbers(self, fit: list[Any], count: int) -> Any:
        """One, or one each."""
        if self.draw(st.booleans()):
            return self.number(fit)
        if self.oddly(8):
            count += self.pick([-1, 1]) if count else 1
        return [self.number(fit) for _ in range(count)]

    def items(self, items: list[Any]) -> Any:
        """A list argument: as it is, or another kind of sequence, or none."""
        if self.oddly(12):
            return self.pick([None, "ab", 3, items[:-1], [*items, *items[:1]], torch.ones(2, 3), torch.ones(())])
        return tuple(items) if self.draw(st.booleans()) else items

    def _fit(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        layout = self.pick(LAYOUTS)
        torch.manual_seed(self.size(0, 999))
        value = torch.randn(shape, dtype=fp64).to(dtype)
        if layout == "transposed" and len(shape) > 1:
            return value.transpose(0, -1).contiguous().transpose(0, -1)
        if layout == "every other":
            return torch.stack([value, value + 1], -1)[..., 0]
        if layout == "columns" and shape:
            return torch.cat([value, value], -1)[..., : shape[-1]]
        if layout == "parameter":
            return nn.Parameter(value)
        return value.as_subclass(Sub) if layout == "subclass" else value

    def _odd(self, shape: tuple[int, ...]) -> Any:
        kind, dtype = self.pick(ODD), self.pick(FLOATS)
        value = torch.randn(shape).to(dtype)
        if kind == "object":
            return self.pick(OBJECTS)
        if kind == "shape":
            return torch.randn([self.size(0, 3) for _ in shape])
        if kind == "dim":
            return torch.randn([self.size(0, 2) for _ in range(self.size(0, 4))])
        if kind == "dtype":
            return torch.zeros(shape).to(self.pick(OTHERS))
        if kind == "meta":
            return value.to("meta")
        if kind in ("twice", "view") and self.tensors:
            other = self.pick(self.tensors)
            return other if kind == "twice" or not other.dim() or not len(other) else other[len(other) // 2 :]
        if kind == "expanded" and shape and shape[0]:
            return value[:1].expand(shape)
        if kind in ("nan", "inf") and value.numel():
            value.view(-1)[self.size(0, value.numel() - 1)] = float(kind)
        if kind == "sparse":
            return value.to_sparse()
        if kind == "negative":  # a bit of the tensor says that its memory holds the negative
            return torch.randn(shape, dtype=torch.complex64).conj().imag
        if kind == "inference":
            with torch.inference_mode():
                return torch.randn(shape)
        if kind == "nonleaf":
            return value.requires_grad_() * 2
        if kind == "quantized":
            return torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8)
        return torch.zeros(shape) if kind == "zero" else value


def strided(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.device.type != "meta"


def memory(tensors: list[Tensor]) -> list[tuple[torch.UntypedStorage, Tensor]]:
    """The storages and a copy of all their bytes, what lies beside the tensors included."""
    found = {}
    for tensor in tensors:
        own = tensor.detach().coalesce().values() if tensor.layout is torch.sparse_coo else tensor
        if strided(own):
            storage = own.untyped_storage()
            found[storage.data_ptr()] = storage, _bytes(storage).clone()
    return list(found.values())


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.tensor([], dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))


def unchanged(before: list[tuple[torch.UntypedStorage, Tensor]]) -> bool:
    return all(torch.equal(_bytes(storage), data) for storage, data in before)


def wide(tensor: Tensor) -> Tensor:
    """A copy in fp64."""
    return tensor.detach().as_subclass(Tensor).double().clone()
