"""Arguments for test_fuzz_ops.py: tensors of every kind, fit and unfit, and what of their memory was written."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

fp64 = torch.float64
FLOATS = [torch.float32, torch.float32, torch.bfloat16, torch.float16, fp64]
OTHERS = [torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2]
LAYOUTS = ["dense", "dense", "transposed", "every other", "columns", "parameter", "subclass"]
# What may be handed over instead of a tensor that fits. Some of it an op may take (NaN, a tensor twice, an expanded
# source): then its result has to be right.
ODD = [
    "shape", "dim", "dtype", "meta", "object", "twice", "view", "expanded", "nan", "inf", "sparse", "csr", "negative",
    "inference", "nonleaf", "quantized", "zero",
]  # fmt: skip
OBJECTS = [None, "text", 1.5, 3, True, [], [[1.0]], {}, object(), b"x", 1j]
NUMBERS = [math.nan, math.inf, -math.inf, -0.1, 1.5, 10**400, "x", "0.5", None, 1j, [], torch.ones(2), torch.ones(1)]
BYTES = 200  # enough for what a call draws; beyond them the first of every choice is taken


class Sub(Tensor):
    """A subclass with memory of its own."""


class Call:
    """The tensors of one call as bytes choose them. hypothesis draws the bytes at once: a tenth of the time of a draw
    for each choice, and it still finds a smaller example, because a zero is the plainest choice."""

    def __init__(self, chosen: bytes) -> None:
        self._chosen = iter(chosen)
        self._random = torch.Generator()
        self.tensors: list[Tensor] = []
        self.odd = 0  # how many arguments are not what the op's documentation asks for
        # A quarter of the calls has no odd argument: those must be answered.
        self._left = self.pick([0, 1, 1, 2])

    def size(self, least: int = 1, most: int = 6) -> int:
        return least + next(self._chosen, 0) % (most - least + 1)

    def pick(self, values: list[Any]) -> Any:
        return values[next(self._chosen, 0) % len(values)]

    def oddly(self, one_in: int = 5) -> bool:
        if not self._left or self.size(1, one_in) < one_in:
            return False
        self._left -= 1
        self.odd += 1
        return True

    def tensor(self, *shape: int, dtype: torch.dtype | None = None) -> Any:
        dtype = dtype or self.pick(FLOATS)
        made = self._odd(shape, dtype) if self.oddly() else self._fit(shape, dtype)
        if isinstance(made, Tensor):
            self.tensors.append(made)
        return made

    def number(self, fit: list[Any]) -> Any:
        return self.pick(NUMBERS) if self.oddly(8) else self.pick(fit)

    def numbers(self, fit: list[Any], count: int) -> Any:
        """One, or one each."""
        if self.pick([True, False]):
            return self.number(fit)
        if self.oddly(8):
            count += self.pick([-1, 1]) if count else 1
        return [self.number(fit) for _ in range(count)]

    def items(self, items: list[Any]) -> Any:
        """A list argument: as it is, or another kind of sequence, or none."""
        if self.oddly(12):
            other = self.pick([None, "ab", 3, items[:-1], [*items, *items[:1]], torch.ones(2, 3), torch.ones(())])
            self.tensors += [other] if isinstance(other, Tensor) else []
            return other
        return self.pick([items, tuple(items)])

    def normal(self, *shape: int) -> Tensor:
        """fp64, standard normal."""
        return torch.randn(shape, dtype=fp64, generator=self._random.manual_seed(self.size(0, 255)))

    def _fit(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        layout, value = self.pick(LAYOUTS), self.normal(*shape).to(dtype)
        if layout == "transposed" and len(shape) > 1:
            return value.transpose(0, -1).contiguous().transpose(0, -1)
        if layout == "every other":
            return torch.stack([value, value + 1], -1)[..., 0]
        if layout == "columns" and shape:
            return torch.cat([value, value], -1)[..., : shape[-1]]
        if layout == "parameter":
            return nn.Parameter(value)
        return value.as_subclass(Sub) if layout == "subclass" else value

    def _odd(self, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
        kind, value = self.pick(ODD), self.normal(*shape).to(dtype)
        if kind == "object":
            return self.pick(OBJECTS)
        if kind == "shape":
            return self.normal(*(self.size(0, 3) for _ in shape)).to(dtype)
        if kind == "dim":
            return self.normal(*(self.size(0, 2) for _ in range(self.size(0, 4)))).to(dtype)
        if kind == "dtype":
            return value.to(self.pick(OTHERS))
        if kind == "meta":
            return value.to("meta")
        if kind in ("twice", "view") and self.tensors:
            other = self.pick(self.tensors)
            whole = kind == "twice" or not strided(other) or not other.dim() or not len(other)
            return other if whole else other.detach()[len(other) // 2 :]
        if kind == "expanded" and shape and shape[0]:
            return value[:1].expand(shape)
        if kind in ("nan", "inf") and value.numel():
            value.view(-1)[self.size(0, 255) % value.numel()] = float(kind)
        if kind == "sparse":
            return value.to_sparse()
        if kind == "csr" and len(shape) == 2:
            return value.to_sparse_csr()
        if kind == "negative":  # a bit of the tensor says that its memory holds the negative
            return torch._neg_view(value)
        if kind == "inference":
            with torch.inference_mode():
                return value.clone()
        if kind == "nonleaf":
            return value.requires_grad_() * 2
        if kind == "quantized":
            return torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8)
        return torch.zeros(shape, dtype=dtype) if kind == "zero" else value


def strided(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.device.type != "meta"


def is_real(item: Any) -> bool:
    """Whether it is a tensor that has numbers to compute with."""
    return isinstance(item, Tensor) and strided(item) and item.dtype in FLOATS


def listed(items: Any) -> list[Any]:
    """What an op that takes a list sees in `items`; nothing where that is no list at all."""
    try:
        return list(items)
    except TypeError:
        return []


def factors(values: Any, count: int) -> list[float]:
    """One number for all, or one each."""
    return [float(values)] * count if isinstance(values, int | float) else [float(value) for value in values]


def wide(tensor: Tensor) -> Tensor:
    """A copy in fp64."""
    return tensor.detach().as_subclass(Tensor).double().clone()


def memory(tensors: list[Tensor]) -> dict[int, tuple[torch.UntypedStorage, Tensor]]:
    """By address the storages and a copy of all their bytes, what lies beside the tensors included."""
    found = {}
    for tensor in tensors:
        for own in _parts(tensor.detach()):
            storage = own.untyped_storage()
            found[storage.data_ptr()] = storage, _bytes(storage).clone()
    return found


def _parts(tensor: Tensor) -> list[Tensor]:
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout is torch.sparse_csr:
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    return [tensor] if strided(tensor) else []


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.tensor([], dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))


def unchanged(before: dict[int, tuple[torch.UntypedStorage, Tensor]]) -> bool:
    return all(torch.equal(_bytes(storage), data) for storage, data in before.values())
