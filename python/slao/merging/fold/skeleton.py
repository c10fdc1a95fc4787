"""Which weights the base's files hold, by the model's own names: from the model on the meta device, without weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .base import Base, Stored


@dataclass(frozen=True)
class Piece:
    """A stored tensor as a part of a parameter. index: along a first dimension that the file does not have (experts
    that it stores apart). dim, start: of the stored tensor, where it is one of several side by side along its `dim`."""

    stored: Stored
    index: int | None = None
    dim: int = 0
    start: int = 0
    whole: bool = True


class Skeleton:
    """shapes: of the parameters and buffers that a checkpoint holds, by the model's names. pieces: what the files hold
    of each; absent where a parameter is not stored. groups: the names of parameters that are one, the owner first.
    tied: name of one that is not stored itself -> the stored one of its group.

    Raises ValueError where transformers does not have the architecture.
    """

    def __init__(self, base: Base) -> None:
        self._base = base
        self.model = _on_meta(base)
        state = self.model.state_dict()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        self.pieces: dict[str, list[Piece]] = {}
        self.odd: dict[str, str] = {}  # what is stored in a way that no delta can be cut for
        self._find(state)
        ties: dict[str, list[str]] = {}
        for name, owner in (getattr(self.model, "all_tied_weights_keys", None) or {}).items():
            ties.setdefault(owner, [owner]).append(name)
        self.groups = list(ties.values())
        self.tied: dict[str, str] = {}
        for group in self.groups:
            stored = [name for name in group if name in self.pieces]
            self.tied |= {name: stored[0] for name in group if stored and name not in stored}

    @property
    def prefix(self) -> str:
        return str(getattr(self.model, "base_model_prefix", "") or "")

    def module(self, name: str) -> nn.Module | None:
        try:
            return self.model.get_submodule(name)
        except AttributeError:
            return None

    def embeddings(self) -> tuple[str | None, str | None]:
        """The names of the weights of the input embedding and of the head that tells tokens apart."""
        found: list[str | None] = []
        for get in (self.model.get_input_embeddings, self.model.get_output_embeddings):
            try:
                module = get()
            except (NotImplementedError, AttributeError):
                module = None
            names = (name for name, each in self.model.named_modules() if each is module and module is not None)
            name = next(names, None)
            found.append(f"{name}.weight" if name is not None and f"{name}.weight" in self.shapes else None)
        return found[0], found[1]

    def renamed(self, key: str) -> tuple[str, str | None]:
        """The model's name of what a file has under `key`, and the pattern of the converter that takes it in."""
        from transformers.core_model_loading import rename_source_key

        name, pattern = rename_source_key(key, self._renamings, self._converters, self.prefix, self._state)
        return str(name), pattern

    def stored_name(self, name: str, like: str) -> str:
        """What the parameter `name` has to be called in a file, where its neighbour is called `like`."""
        for candidate in (name, name.removeprefix(f"{self.prefix}."), f"{self.prefix}.{name}"):
            if candidate not in self._base.tensors and self.renamed(candidate) == (name, None):
                return candidate
        raise ValueError(f"{name} cannot be written beside {like}: transformers has no name for it in this checkpoint")

    def _find(self, state: dict[str, Any]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key

        transforms = get_model_conversion_mapping(self.model)
        self._state = state
        self._renamings: Any = [each for each in transforms if isinstance(each, WeightRenaming)]
        self._converters: Any = [each for each in transforms if isinstance(each, WeightConverter)]
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
            converters = (each for each in self._converters if set(found) <= set(each.source_patterns))
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


def _on_meta(base: Base) -> nn.Module:
    import transformers as hf

    names = base.config.get("architectures") or []
    try:
        config = hf.AutoConfig.from_pretrained(base.folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise ValueError(
            f"transformers {hf.__version__} cannot read {base.folder / 'config.json'}, whose names an adapter's have "
            f"to be compared with (a newer release may; code of the model's own is not run): {_first(error)}"
        ) from error
    kind: Any = getattr(hf, str(names[0]), None) if names else None
    if names and (kind is None or not hasattr(kind, "from_pretrained")):
        raise ValueError(
            f"transformers {hf.__version__} has no {names[0]}, which {base.folder} is; update transformers"
        )
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: nn.Module = kind(config) if names else hf.AutoModel.from_config(config)
    return model


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def missing(names: Iterable[str], folder: Path) -> ValueError:
    """The error for names of an adapter that no weight of the base has."""
    listed = list(names)
    more = f" and {len(listed) - 4} more" if len(listed) > 4 else ""
    return ValueError(
        f"{folder}: the base has no weight for {', '.join(listed[:4])}{more}: was the adapter trained on another "
        "model, or with a head that these files lack?"
    )
