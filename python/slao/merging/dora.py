"""DoRA in a merge: its part of a layer is no product of thin factors, so it is taken as the exact change of the base's
own weight, W' − W with W' = m (W + s B A) / ‖W + s B A‖ (arXiv 2402.09353, equation 5)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor

from slao_kernels.inventory import is_beside, is_embedding
from slao_kernels.ops.checks import Problems

from ..folders import MAGNITUDES, PREFIX, Source
from . import dense
from .cuts import Limit
from .product import Cut
from .skeleton import Skeleton
from .weights import Weights, keys_of

FIELD = "use_dora"


class Exact:
    """The base of `sources`, of which some are DoRA adapters.

    base: a model's folder, or its one safetensors file. The magnitudes leave the sources' `parts`.
    Raises ValueError that names every layer that the base does not have in that shape, or not as a linear one, and
    every key that is no part of the adapter; and where no source is a DoRA.
    """

    def __init__(self, sources: Sequence[Source], base: str | Path) -> None:
        if not any(source.config.get(FIELD) for source in sources):
            raise ValueError("base= is for DoRA, and no adapter is one: leave it out")
        self._weights = Weights(base)
        self._skeleton = Skeleton(self._weights.folder)
        self._keys = keys_of(self._skeleton, self._weights)
        self._sources = list(sources)
        self._magnitudes = [_taken(source) for source in sources]
        problems = Problems("merge")
        for source, magnitudes in zip(sources, self._magnitudes, strict=True):
            for name, layer in source.layers.items() if source.config.get(FIELD) else ():
                why = self._why_not(name, (layer.shapes[1][0], layer.shapes[0][1]), layer.keys[0])
                if why is None and name not in magnitudes:
                    why = "has no lora_magnitude_vector, though the config says use_dora"
                if why is not None:
                    problems.add(str(source.folder), f"{name} {why}")
        problems.raise_if_any()

    def _why_not(self, name: str, shape: tuple[int, int], key: str) -> str | None:
        weight = self._skeleton.weight_of(name)
        if weight not in self._keys:
            return f"finds no weight in {self._weights.path}: the adapter belongs to another model"
        transposed = self._skeleton.linear(weight)
        if transposed is None or not key.endswith("lora_A.weight"):
            return "is no linear layer with a weight of its own, and DoRA is merged of those alone"
        own = self._skeleton.shapes[weight]
        if (own[::-1] if transposed else own) != shape:
            return f"is {shape}, in {self._weights.path} {own}: the adapter belongs to another model"
        return None

    def needed(self, name: str) -> bool:
        """Whether an adapter's part of this layer is more than B A."""
        return any(name in magnitudes for magnitudes in self._magnitudes)

    def cut(self, name: str, weights: Sequence[float], rank: int) -> Cut:
        """Σ weight (W' − W) of the layer, cut to the rank; `lost` is of what A and B then hold."""
        delta = self.delta(name, weights)
        A, B = dense.cut(delta, Limit(rank))
        return Cut(A, B, dense.residual(delta, A, B) ** 2, dense.norm(delta) ** 2)

    def delta(self, name: str, weights: Sequence[float]) -> Tensor:
        """(m, n): Σ weight (W' − W), in fp64 a few rows at a time, kept in fp32 (fp64 where W, A or B is)."""
        own = self._skeleton.weight_of(name)
        weight = self._weights.finite(self._keys[own])
        weight = weight.T if self._skeleton.linear(own) else weight
        having = [index for index, source in enumerate(self._sources) if name in source.layers]
        factors = {index: self._sources[index].read(name) for index in having}
        wide = any(t.dtype == torch.float64 for t in (weight, *(each for pair in factors.values() for each in pair)))
        delta = weight.new_empty(weight.shape, dtype=torch.float64 if wide else torch.float32)
        magnitudes = {index: self._magnitude(index, name) for index in having}
        step = dense.rows(delta)
        for start in range(0, len(delta), step):
            part = slice(start, start + step)
            W, total = weight[part].double(), torch.zeros((), dtype=torch.float64)
            for index, (A, B) in factors.items():
                change = self._sources[index].layers[name].scaling * (B[part].double() @ A.double())
                if (magnitude := magnitudes[index]) is not None:
                    whole = W + change
                    change = whole * (magnitude[part] / whole.norm(dim=1))[:, None] - W
                total = total + weights[index] * change
            delta[part] = total
        return delta

    def said(self, layers: Collection[str]) -> list[str]:
        """A line for the merge's output."""
        count = sum(map(self.needed, layers))
        return [f"{count} of {len(layers)} layers are DoRA's in some adapter: the exact change of {self._weights.path}"]

    def _magnitude(self, index: int, name: str) -> Tensor | None:
        key = self._magnitudes[index].get(name)
        return None if key is None else self._sources[index].part(key).flatten().double()


def _taken(source: Source) -> dict[str, str]:
    """Layer -> key of its magnitudes."""
    found = {}
    for key in list(source.parts):
        end = next((end for end in MAGNITUDES if key.endswith(end)), None)
        if end is not None and source.config.get(FIELD):
            found[key.removeprefix(PREFIX).removesuffix(end)] = key
        elif not is_beside(key, source.config) and not is_embedding(key):
            raise ValueError(f"{source.path} holds more than A and B, which are merged: {key}")
    for key in found.values():
        source.parts.pop(key)
    return found
