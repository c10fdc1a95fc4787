"""What an exact fold keeps: all that it takes to give W its bits back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Layer(NamedTuple):
    """One weight as a backend walks it: W (N, K) += scaling B (N, r) A (r, K)."""

    W: Tensor
    A: Tensor
    B: Tensor
    scaling: float


@dataclass
class Folded:
    """One weight of a fold. flipped: whether Wᵀ was walked. sum: of the bits that the fold wrote (`bits_sum`)."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    flipped: bool
    A: Tensor
    B: Tensor
    scaling: float
    sum: int = 0

    def layer(self, W: Tensor) -> Layer:
        if self.flipped:
            return Layer(W.t(), self.B.t(), self.A.t(), self.scaling)
        return Layer(W, self.A, self.B, self.scaling)


class Kept:
    """The state of one exact fold: `fold_(..., keep=kept)` fills it, `unfold_(weights, kept)` empties it.

    It holds for every weight a stream (what rounding lost, under two bits a weight up to a delta as large as W),
    copies of A and B, which may train on meanwhile: r (N + K) numbers, and a checksum of what the fold wrote. Streams
    belong to the backend that wrote them: of the compiled core to an instruction set, of Triton to a version. Not meant
    for the disk.
    """

    def __init__(self) -> None:
        self.backend = ""
        self.mark = ""  # what else the backend's arithmetic depends on
        self.folded: list[Folded] = []
        self.streams: list[Streams] = []

    def __bool__(self) -> bool:
        """Whether it holds a fold."""
        return bool(self.folded)

    @property
    def stream_bytes(self) -> int:
        """Bytes of the streams."""
        return sum(streams.nbytes for streams in self.streams)

    @property
    def nbytes(self) -> int:
        """Bytes of everything: streams, and the copies of A and B."""
        return self.stream_bytes + sum(one.A.nbytes + one.B.nbytes for one in self.folded)

    @property
    def bits_per_weight(self) -> float:
        """Bits of the streams a weight; 0 where there are none."""
        weights = sum(one.shape.numel() for one in self.folded)
        return 8 * self.stream_bytes / weights if weights else 0.0

    def clear(self) -> None:
        self.__init__()  # type: ignore[misc]

    def __repr__(self) -> str:
        if not self:
            return "Kept(nothing)"
        return f"Kept({len(self.folded)} weights, {self.bits_per_weight:.2f} bits a weight, {self.nbytes} bytes)"


@dataclass
class Streams:
    """A backend's streams of some of a fold's weights. owners: which; parts: as the backend has them."""

    owners: list[int]
    parts: Any = field(repr=False)
    nbytes: int = 0


_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_of(W: Tensor) -> Tensor:
    """W's bits as signed integers of its size, the same memory."""
    return W.view(_WORDS[W.element_size()])


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


_STEP, _FIRST, _SECOND, _SPREAD = map(
    _signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD1342543DE82EF95)
)


def _shifted(x: Tensor, places: int) -> Tensor:
    """x >> places, zeros coming in."""
    return (x >> places) & ((1 << (64 - places)) - 1)


def _mixed(i: Tensor) -> Tensor:
    """SplitMix64 (Steele, Lea and Flood 2014) at i."""
    i = (i + 1) * _STEP
    i = (i ^ _shifted(i, 30)) * _FIRST
    i = (i ^ _shifted(i, 27)) * _SECOND
    return i ^ _shifted(i, 31)


def bits_sum(bits: Tensor, first: int = 0) -> int:
    """Σ_i ρ_i Σ_j h(μ h(b_ij ^ κ_j)) mod 2^64, h(x) = x ^ (x >> 32), for rows `first`, `first` + 1, ... of a matrix.

    bits: (rows, columns) of `bits_of`. κ and the odd ρ are hashes of place. One changed element always changes the sum
    (every step is a bijection of it); two that change places, or any others, do but for one case in 2^40 or fewer.
    """
    rows, cols = bits.shape
    keys = _mixed(torch.arange(cols, device=bits.device))
    factors = _mixed(torch.arange(first, first + rows, device=bits.device) + (1 << 32)) | 1
    size = 8 * bits.element_size()
    words = bits.long() if size == 64 else bits.long() & ((1 << size) - 1)
    x = words ^ keys
    x = (x ^ _shifted(x, 32)) * _SPREAD
    return int(((x ^ _shifted(x, 32)).sum(1) * factors).sum()) & ((1 << 64) - 1)
