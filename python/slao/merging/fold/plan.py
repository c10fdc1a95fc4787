"""All that a fold will write, checked before anything is written: each tensor of each file, and what becomes of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ...folders import Source
from .. import beside as parts
from ..source import check
from ..weights import plain
from .arithmetic import Change
from .base import Base
from .changes import add_changes
from .stored import Piece, StoredModel, missing
from .ties import settle

# Fields of a LoraConfig under which a layer is more than A and B, and which a fold treats.
_MORE = ("use_dora", "lora_bias", "target_parameters")


@dataclass(frozen=True)
class Sum:
    """What is folded: Σ weight · adapter. part: reads what stands beside A and B, by the keys of the last adapter."""

    sources: Sequence[Source]
    weights: Sequence[float]
    part: Callable[[str], Tensor]


@dataclass(frozen=True)
class Step:
    """One tensor that is written. shape and dtype: as it is then; `piece.stored` has those of the base."""

    piece: Piece
    change: Change | None
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def plain(self) -> bool:
        """Whether it is a copy."""
        return self.change is None and self.dtype == self.piece.stored.dtype

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass
class Plan:
    """files: name -> key -> step, in the order of writing. changes: by the model's names of its parameters. rounded:
    the dtypes of those that are no copies. dtype: of all floating weights, None where each keeps its own. untied: the
    head that is written apart from the embedding. rows: of a resized embedding. others: bases that the adapters name,
    which have another name than this one."""

    base: Base
    changes: dict[str, Change]
    files: dict[str, dict[str, Step]] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    untied: str | None = None
    rows: int | None = None
    others: list[str] = field(default_factory=list)
    rounded: dict[str, torch.dtype] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return sum(step.size for steps in self.files.values() for step in steps.values())


def single(folder: str | Path, weight: float = 1.0) -> Sum:
    """One adapter, of all kinds that a fold treats."""
    source = Source(folder, beside=True, more=_MORE)
    return Sum([source], [weight], source.part)


def summed(folders: Sequence[str | Path], weights: Sequence[float], beside: str | None) -> Sum:
    """Several may have no more than A and B, and what `beside` treats."""
    if len(folders) == 1:
        if beside is not None:
            raise ValueError(f"beside={beside!r} is about several adapters; one is folded as it is: leave it out")
        return single(folders[0], weights[0])
    sources = [Source(folder, beside is not None) for folder in folders]
    check(sources, False, False, "svd")
    parts.announced(sources, beside, weights)
    shares = parts.shares(weights)
    return Sum(sources, weights, lambda key: parts.merged(sources, key, beside, shares))


def plan_of(base: Base, what: Sum, dtype: torch.dtype | None = None, untie: bool = False) -> Plan:
    """What becomes of the base. Raises ValueError, with the reason, for what cannot be folded."""
    last = what.sources[-1]
    for source in what.sources:
        if source.config.get("layer_replication"):
            raise ValueError(
                f"{source.folder} has layer_replication: it belongs to a model that has the base's layers several "
                "times, and no fold into the base has them"
            )
    skeleton = StoredModel(base)
    made = Plan(base, {}, dtype=dtype)
    for source, weight in zip(what.sources, what.weights, strict=True):
        add_changes(made.changes, source, weight, skeleton, what.part if source is last else None)
    made.untied = settle(made.changes, last, skeleton, untie)
    for name, change in made.changes.items():
        _check_stored(name, change, skeleton, last.folder)
    apart = {skeleton.shared[name]: name for name in skeleton.embeddings() if made.untied and name in skeleton.shared}
    pieces = {piece.stored.key: (name, piece) for name, found in skeleton.pieces.items() for piece in found}
    for file, tensors in base.files.items():
        steps = made.files[file] = {}
        for stored in tensors:
            name, piece = pieces.get(stored.key, ("", Piece(stored)))
            steps[stored.key] = _step(piece, made.changes.get(name), dtype)
            if not steps[stored.key].plain:
                made.rounded[name] = steps[stored.key].dtype
            if name in apart:
                key = skeleton.key_for(apart[name], stored.key)
                steps[key] = _step(piece, made.changes.get(apart[name]), dtype)
                if not steps[key].plain:
                    made.rounded[apart[name]] = steps[key].dtype
    together = {name: owner for name, owner in skeleton.shared.items() if owner in made.rounded and owner not in apart}
    made.rounded |= {name: made.rounded[owner] for name, owner in together.items()}
    made.rows = _resized(made, skeleton)
    made.others = _others(base.folder, what.sources)
    return made


def _others(base: Path, sources: Sequence[Source]) -> list[str]:
    folder = base.resolve()
    names = {folder.name.lower(), folder.parent.parent.name.rpartition("--")[2].lower()}  # of the hub's cache
    named = dict.fromkeys(str(source.config.get("base_model_name_or_path") or "") for source in sources)
    return [each for each in named if each and Path(each).name.lower() not in names]


def _step(piece: Piece, change: Change | None, dtype: torch.dtype | None) -> Step:
    own = piece.stored.dtype
    rounded = dtype if dtype is not None and plain(own) else own
    shape = piece.stored.shape
    if change is not None and change.shape is not None and piece.whole and piece.index is None:
        shape = change.shape
    return Step(piece, change, shape, rounded)


def _check_stored(name: str, change: Change, skeleton: StoredModel, folder: Path) -> None:
    """That the base's files hold the parameter in a way that `change` can be made of it."""
    if name in skeleton.odd:
        raise ValueError(
            f"the base stores {name} in parts that transformers joins by {skeleton.odd[name]}, which is not done "
            "here: load the base, save it by save_pretrained(folder, save_original_format=False), and fold into that"
        )
    found = skeleton.pieces.get(name) or skeleton.pieces.get(skeleton.shared.get(name, ""))
    if not found:
        raise missing([name], folder)
    for piece in found:
        stored = piece.stored
        if piece.whole and piece.index is None and stored.shape != skeleton.shapes[name]:
            raise ValueError(
                f"{stored.key} is {stored.shape} in the base's file, and {skeleton.shapes[name]} by its config.json: "
                "they belong to different models"
            )
        if not plain(stored.dtype):
            raise ValueError(
                f"the base stores {stored.key} as {str(stored.dtype).removeprefix('torch.')}: it is quantised, and a "
                "delta cannot be added to it; fold into the checkpoint that was quantised"
            )
        if change.magnitude is not None and not piece.whole and (piece.dim == 0) == change.transposed:
            raise ValueError(f"the base stores the rows of {name} in parts, whose norm DoRA needs as one")


def _resized(made: Plan, skeleton: StoredModel) -> int | None:
    """The rows of the embedding where they are not the base's."""
    entry, head = skeleton.embeddings()
    rows = {}
    for name in (entry, head):
        if name is not None:
            change = made.changes.get(name)
            shape = skeleton.shapes[name] if change is None or change.shape is None else change.shape
            rows[name] = shape[0]
    before = {name: skeleton.shapes[name][0] for name in rows}
    if rows == before:
        return None
    bias = f"{head.removesuffix('.weight')}.bias" if head else ""
    if len(set(rows.values())) > 1 or (bias in skeleton.shapes and skeleton.shapes[bias][0] != rows.get(str(head))):
        raise ValueError(
            f"the adapter resizes the embedding, and the base would have {rows} rows: save the adapter with "
            "save_embedding_layers=True, so that it holds the embedding and the head"
        )
    return next(iter(rows.values()))
