"""Which layers have turned out to receive the same x: what a watched layer knows of its group, and how that is learned.

groups.py says what a group is for, and when it may be switched on and off.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

_TRIES = 2  # a layer that was alone in so many of its runs is not watched any longer
_lock = threading.Lock()
# grad mode, autocast's dtype, the innermost saved-tensor hook, the stream
Key = tuple[bool, torch.dtype | None, Any, int]


class Parts(NamedTuple):
    """What one layer computes with. stored is its base's parameter: weight (N, K), or a Conv1D's transposed."""

    stored: Tensor
    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    scaling: float
    code: int = 0  # see plain.py

    def version(self) -> int:
        """Grows with every write to one of them. Raises RuntimeError for inference tensors, which have none."""
        count = self.stored._version + self.A._version + self.B._version
        return count if self.bias is None else count + self.bias._version


class _Token:
    """Lives as long as the autograd nodes that it is tied to."""

    __slots__ = ("__weakref__",)


class Place:
    """What a watched layer knows of its group. A copied or unpickled layer starts with an empty one."""

    __slots__ = ("group", "index", "token", "tries", "written")

    def __init__(self) -> None:
        self.group: Group | None = None
        self.index = self.tries = 0
        self.token: weakref.ref[_Token] | None = None
        self.written: tuple[weakref.ref[Tensor], weakref.ref[Tensor], int] | None = None

    def __reduce__(self) -> tuple[type[Place], tuple[()]]:
        return Place, ()

    def hold(self, ys: list[Tensor], parts: Parts) -> None:
        """Their node was made under saved-tensor hooks: this forward may be recomputed as long as it lives."""
        node = next((y.grad_fn for y in ys if y.grad_fn is not None), None)
        if node is None:
            return
        token = None if self.token is None else self.token()
        if token is None:
            token = _Token()
            self.token = weakref.ref(token)
        node.metadata["slao_kernels"] = token
        self.written = weakref.ref(parts.A), weakref.ref(parts.B), parts.A._version + parts.B._version

    def is_over(self) -> bool:
        """Whether nothing that was held can be recomputed any more."""
        if self.token is None or self.written is None or self.token() is None:
            return True
        A, B = self.written[0](), self.written[1]()
        return A is not None and B is not None and A._version + B._version != self.written[2]


class Group:
    """Layers of one x, the leader first. `on` is what its calls do, `ended` whether they should stop doing it."""

    def __init__(self, layers: list[Any], places: list[Place]) -> None:
        self.layers = [weakref.ref(layer) for layer in layers]
        self.places = places
        self.on = self.ended = False

    def is_on(self) -> bool:
        """Asked by the leader's calls alone: a forward and its recompute get the same answer."""
        if self.on is self.ended:
            self._switch()
        return self.on

    def end(self) -> None:
        self.ended = True
        self._switch()

    def _switch(self) -> None:
        if torch._C._current_graph_task_id() != -1 or not all(place.is_over() for place in self.places):
            return
        self.on = not self.ended
        if self.ended:
            for layer, place in zip(self.layers, self.places, strict=True):
                stop_watching(layer(), place)


class Run:
    """Layers of one patched model called one after another with the same x, while they are being watched."""

    def __init__(self, layer: Any, place: Place, x: Tensor, version: int, key: Key) -> None:
        self.layers, self.places = [weakref.ref(layer)], [place]
        self.options = layer.slao_options
        # Kept until the next call, so by hash: a hook may own much.
        self.x, self.version, self.key = weakref.ref(x), version, hash(key)

    def joins(self, layer: Any, place: Place, x: Tensor, version: int, key: Key) -> bool:
        options = layer.slao_options
        if self.x() is not x or self.version != version or self.key != hash(key) or place in self.places:
            return False
        if options.fallbacks is not self.options.fallbacks or options.backend != self.options.backend:
            return False  # of another model, or patched for something else
        self.layers.append(weakref.ref(layer))
        self.places.append(place)
        return True

    def finish(self) -> None:
        with _lock:
            watched = [
                (found, place)
                for layer, place in zip(self.layers, self.places, strict=True)
                if place.group is None and is_watched(found := layer(), place)
            ]
            if len(watched) > 1:
                of = Group([layer for layer, _ in watched], [place for _, place in watched])
                for i, (_, place) in enumerate(watched):
                    place.group, place.index = of, i
            for layer, place in watched if len(watched) == 1 else ():
                place.tries += 1
                if place.tries >= _TRIES:
                    stop_watching(layer, place)


def is_watched(layer: Any, place: Place) -> bool:
    """Not so: gone, unpatched, patched anew, or watched no longer."""
    options = None if layer is None else layer.__dict__.get("slao_options")
    return options is not None and options.place is place


def stop_watching(layer: Any, place: Place) -> None:
    if is_watched(layer, place):
        layer.slao_options.place = None
