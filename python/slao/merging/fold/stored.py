"""What the base's files hold of each of the model's parameters: one tensor, or several that transformers joins."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..skeleton import Skeleton
from ..weights import Stored
from .base import Base


@dataclass(frozen=True)
class Piece:
    """A stored tensor as a part of a parameter. index: along a first dimension that the file does not have (experts
    that it stores apart). dim, start: of the stored tensor, where it is one of several side by side along its `dim`."""

    stored: Stored
    index: int | None = None
    dim: int = 0
    start: int = 0
    whole: bool = True


class StoredModel(Skeleton):
    """The skeleton of `base`, and what its files hold.

    pieces: of each parameter; absent where it is not stored. odd: parameters that are stored in a way that no delta can
    be cut for -> how. shared: name of one that is not stored itself -> the stored one that it is tied to.
    """

    def __init__(self, base: Base) -> None:
        super().__init__(base.folder)
        self._base = base
        self.pieces: dict[str, list[Piece]] = {}
        self.odd: dict[str, str] = {}
        self._find()
        self.shared: dict[str, str] = {}
        for group in self.groups:
            stored = [name for name in group if name in self.pieces]
            self.shared |= {name: stored[0] for name in group if stored and name not in stored}

    def key_for(self, name: str, like: str) -> str:
        """What the parameter `name` has to be called in a file, where its neighbour is called `like`."""
        for candidate in (name, name.removeprefix(f"{self.prefix}."), f"{self.prefix}.{name}"):
            if candidate not in self._base.tensors and self.renamed(candidate) == (name, None):
                return candidate
        raise ValueError(f"{name} cannot be written beside {like}: transformers has no name for it in this checkpoint")

    def _find(self) -> None:
        from transformers.core_model_loading import dot_natural_key

        parts: dict[str, dict[str, list[Stored]]] = {}
        for key in sorted(self._base.tensors, key=dot_natural_key):
            name, pattern = self.renamed(key)
            stored = self._base.tensors[key]
            if pattern is None:
                if name in self.shapes:
                    self.pieces.setdefault(name, []).append(Piece(stored))
            else:
                parts.setdefault(name, {}).setdefault(pattern, []).append(stored)
        for name, found in parts.items():
            converters = (each for each in self.converters if set(found) <= set(each.source_patterns))
            if (converter := next(converters, None)) is None:
                self.odd[name] = "several steps"
                continue
            kinds = [(type(step).__name__, getattr(step, "dim", None)) for step in converter.operations]
            ordered = [found[pattern] for pattern in converter.source_patterns if pattern in found]
            if len(converter.target_patterns) > 1 or kinds not in _TAKEN or len(ordered) < len(found):
                self.odd[name] = ", ".join(kind for kind, _ in kinds)
            else:
                self.pieces[name] = _side_by_side(ordered, kinds)


# What transformers does with the tensors of a file to make one parameter of them. A concatenation counts the dimensions
# of the stacked tensor.
_STACKED, _BESIDE, _BELOW = ("MergeModulelist", 0), ("Concatenate", 1), ("Concatenate", 0)
_TAKEN = ([_STACKED], [_STACKED, _BESIDE], [_STACKED, ("Concatenate", 2)], [_BELOW], [_BESIDE])


def _side_by_side(parts: list[list[Stored]], kinds: list[tuple[str, Any]]) -> list[Piece]:
    stacked, joined = kinds[0] == _STACKED, kinds[-1][0] == "Concatenate"
    dim = kinds[-1][1] - stacked if joined else 0
    pieces, start = [], 0
    for tensors in parts:
        for index, stored in enumerate(tensors):
            pieces.append(Piece(stored, index if stacked else None, dim, start, not joined))
        start += tensors[0].shape[dim] if joined else 0
    return pieces


def missing(names: Iterable[str], folder: Path) -> ValueError:
    """The error for names of an adapter that no weight of the base has."""
    first, *others = names
    more = f" and {len(others)} more" if others else ""
    return ValueError(
        f"{folder} was trained on another model, or with a head that these files lack: the base has no weight for "
        f"{first}{more}"
    )
