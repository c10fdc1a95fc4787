"""Several adapters of one model, layer by layer: read, checked and stacked for `interference` and `weighted_merge`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import LoraPair, find_pairs, lora_layers, plain_name
from ..inventory import added, beside, why_not_now
from . import checks, gram

# What one adapter may be given as; see `read`.
Adapter = str | tuple[Sequence[Tensor], Sequence[Tensor], float | Sequence[float]] | Sequence[Any]

# Bytes of the fp64 copies that are held at once. On a CPU they are to stay in its cache, whatever the number of layers:
# eight layers of 4096 at a time took 1.5 times as long as one (three adapters, r = 16). A GPU wants large batches.
_CPU_BYTES, _GPU_BYTES = 4 << 20, 256 << 20
_GRAM_BYTES = 16 << 20  # of one factor's r×r products


@dataclass(frozen=True)
class Layer:
    """One layer of T adapters, of ranks that may differ. As: T of (r, n). Bs: T of (m, r). scalings: T numbers."""

    name: str
    As: list[Tensor]
    Bs: list[Tensor]
    scalings: list[float]

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(A.shape[0] for A in self.As)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the deltas B A."""
        return self.Bs[0].shape[0], self.As[0].shape[1]


def read(problems: checks.Problems, adapters: Sequence[Adapter], model: nn.Module | None) -> list[Layer]:
    """The layers of `adapters`; what is wrong with any of them goes into `problems`.

    An adapter is (As, Bs, scalings), lists over the layers and one number or one a layer; or a sequence over the layers
    of (A, B), (A, B, scaling) or LoraPair; or a name: then all are, and are looked up in `model`, whose layers are
    taken in order, with what a method has added to them. A layer that an adapter of `model` leaves out has rank 0. Of a
    mixture's experts each is a layer, `<layer>[<expert>]`.
    Raises ValueError when `model` has no adapter of that name.
    """
    if model is not None or any(isinstance(adapter, str) for adapter in adapters):
        return _of_model(problems, adapters, model)
    before = len(problems.found)
    columns = []
    for t, adapter in enumerate(adapters):
        try:
            columns.append(_columns(adapter))
        except ValueError as error:
            problems.add(f"adapters[{t}]", str(error))
    if len(problems.found) > before or not columns:
        return []
    counts = [len(column) for column in columns]
    if len(set(counts)) > 1:
        problems.add("adapters", f"have different numbers of layers: {', '.join(map(str, counts))}")
        return []
    layers = [
        Layer(f"layers[{index}]", [A for A, _, _ in parts], [B for _, B, _ in parts], [s for _, _, s in parts])
        for index, parts in enumerate(zip(*columns, strict=True))
    ]
    _check(problems, layers)
    return layers


def _of_model(problems: checks.Problems, adapters: Sequence[Adapter], model: nn.Module | None) -> list[Layer]:
    names = [adapter for adapter in adapters if isinstance(adapter, str)]
    if model is None or len(names) < len(adapters):
        problems.add("adapters", "names need model=, and with model= all adapters are names")
        return []
    before = len(problems.found)
    found: list[dict[str, list[tuple[str, tuple[Tensor, Tensor, float]]]]] = []
    for adapter in names:
        pairs, left_out = find_pairs(model, adapter)
        reasons = {pair.name: why_not_now(pair.layer, adapter, "read") for pair in pairs}
        for layer, why in (left_out | reasons).items():
            if why is not None:
                problems.add(f"adapter {adapter!r}, {layer}", why)
        for part in beside(model, adapter):
            if part.kind != "other":
                problems.add(f"adapter {adapter!r}, {part.name}", "trains beside A and B, which alone are compared")
        if len(problems.found) == before:
            found.append({pair.name: _named(pair, *added(pair, adapter)) for pair in pairs})
    if len(problems.found) > before:
        return []
    layers = []
    for name, _ in lora_layers(model):
        own = [pairs.get(plain_name(name)) for pairs in found]
        for index, (label, (A, B, _)) in enumerate(next((named for named in own if named), [])):
            empty = A[:0], B[:, :0], 1.0
            As, Bs, scalings = zip(*(named[index][1] if named else empty for named in own), strict=True)
            layers.append(Layer(label, list(As), list(Bs), list(scalings)))
    _check(problems, layers)
    return layers


def _named(pair: LoraPair, A: Tensor, B: Tensor) -> list[tuple[str, tuple[Tensor, Tensor, float]]]:
    """(its name, (A, B, scaling)) of the layer, or of each of its experts."""
    both = zip(pair.split("A", A), pair.split("B", B), strict=True)
    return [(name, (*two, pair.scaling)) for name, two in zip(pair.names, both, strict=True)]


def _columns(adapter: Any) -> list[tuple[Any, Any, float]]:
    """One adapter as (A, B, scaling) per layer; ValueError says what else it is."""
    if not isinstance(adapter, tuple | list):
        raise ValueError(f"is a {type(adapter).__name__}, expected (As, Bs, scalings) or a list of (A, B)")
    if len(adapter) != 3 or _is_pair(adapter[2]):
        if not all(_is_pair(item) for item in adapter):
            raise ValueError("is neither (As, Bs, scalings) nor a list of (A, B)")
        parts = [part for item in adapter for part in _parts(item)]
        factors = _numbers([scaling for _, _, scaling in parts], "has a scaling that is not a number")
        return [(A, B, factor) for (A, B, _), factor in zip(parts, factors, strict=True)]
    As, Bs, scalings = adapter
    if not isinstance(As, tuple | list) or not isinstance(Bs, tuple | list):
        raise ValueError("is neither (As, Bs, scalings) nor a list of (A, B)")
    one_each = scalings if isinstance(scalings, tuple | list) else [scalings] * len(As)
    factors = _numbers(one_each, "has scalings that are neither a number nor one a layer")
    if not len(As) == len(Bs) == len(factors):
        raise ValueError(f"lengths differ: As {len(As)}, Bs {len(Bs)}, scalings {len(factors)}")
    return list(zip(As, Bs, factors, strict=True))


def _parts(item: Any) -> list[Any]:
    """(A, B, scaling) of a layer, or of each of its experts."""
    if isinstance(item, LoraPair):
        return [one for _, one in _named(item, item.A, item.B)]
    return [(*item, 1.0)[:3]]


def _numbers(values: Sequence[Any], otherwise: str) -> list[float]:
    try:
        return [float(value) for value in values]
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of several numbers
        raise ValueError(otherwise) from None


def _is_pair(item: Any) -> bool:
    """Whether it is one layer's A and B; three scalings are none, nor are the As of two layers."""
    return isinstance(item, LoraPair) or (
        isinstance(item, tuple | list) and len(item) in (2, 3) and isinstance(item[0], Tensor) and item[0].dim() > 0
    )


def _check(problems: checks.Problems, layers: list[Layer]) -> None:
    tensors = [tensor for layer in layers for tensor in (*layer.As, *layer.Bs)]
    device = next((tensor.device for tensor in tensors if isinstance(tensor, Tensor)), None)
    for layer in layers:
        shape = None  # the first adapter's, if that is in order
        for t, (A, B, scaling) in enumerate(zip(layer.As, layer.Bs, layer.scalings, strict=True)):
            where = f"adapters[{t}], {layer.name}"
            if not math.isfinite(scaling):
                problems.add(where, f"has the scaling {scaling}, expected a finite number")
            fine = checks.tensor(problems, f"{where}.A", A, device)
            if not (checks.tensor(problems, f"{where}.B", B, device) and fine):
                continue
            if not (A.dim() == B.dim() == 2 and A.shape[0] == B.shape[1]):
                problems.add(where, f"A {tuple(A.shape)} and B {tuple(B.shape)} are not (r, n) and (m, r)")
                continue
            shape = shape or (B.shape[0], A.shape[1])
            if shape != (B.shape[0], A.shape[1]):
                problems.add(where, f"B A is {(B.shape[0], A.shape[1])}, the first adapter's {shape}")


def finite(problems: checks.Problems, layers: list[Layer]) -> None:
    """That no A and no B holds a NaN or an infinity; waits for the device."""
    named = [
        (f"adapters[{t}], {layer.name}.{factor}", tensor)
        for layer in layers
        for factor, tensors in (("A", layer.As), ("B", layer.Bs))
        for t, tensor in enumerate(tensors)
    ]
    for index in checks.not_finite([tensor for _, tensor in named]):
        problems.add(named[index][0], "has NaN or infinite entries; the training that made it diverged")


def stacks(layers: Sequence[Layer]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """(indices of layers of one shape and the same ranks, their A (L, R, n), their B (L, m, R)) in fp64, R = Σ r.

    Each layer's matrices stand below, or beside, one another. A few layers at a time.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, layer in enumerate(layers):
        groups.setdefault((layer.shape, layer.ranks), []).append(index)
    for ((m, n), ranks), members in groups.items():
        R = sum(ranks)
        limit = _GPU_BYTES if layers[members[0]].As[0].is_cuda else _CPU_BYTES
        step = max(1, limit // (8 * max(1, (m + n) * R)))
        for start in range(0, len(members), step):
            chosen = members[start : start + step]
            # One `cat` for all: on a GPU a launch for a hundred tensors, and mixed dtypes meet in the widest.
            A = torch.cat([A.detach() for i in chosen for A in layers[i].As]).double().view(len(chosen), R, n)
            B = torch.cat([B.detach() for i in chosen for B in layers[i].Bs], dim=1).double()
            yield chosen, A, B.view(m, len(chosen), R).transpose(0, 1)


def grams(layers: Sequence[Layer]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """(indices of layers of the same ranks, A Aᵀ and Bᵀ B of the stacked factors, (L, R, R) fp64 each) by the compiled
    core (`gram.has`). As many layers at a time as fill some memory."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, layer in enumerate(layers):
        groups.setdefault(layer.ranks, []).append(index)
    for ranks, members in groups.items():
        step = max(1, _GRAM_BYTES // (8 * max(1, sum(ranks)) ** 2))
        for start in range(0, len(members), step):
            chosen = members[start : start + step]
            left = gram.grams([[A.detach() for A in layers[i].As] for i in chosen])
            right = gram.grams([[B.detach().T for B in layers[i].Bs] for i in chosen])
            yield chosen, left, right
