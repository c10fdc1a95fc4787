"""Adapters folded into their base, files in, files out: one stored tensor in memory at a time, and no model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slao_kernels.ops import checks

from ..folders import Source
from . import beside as parts
from . import fold_copy
from .fold_apply import Change, changed
from .fold_base import INDEX, Base
from .fold_changes import changes_of
from .fold_skeleton import Piece, Skeleton
from .fold_tied import settle
from .output import TensorFile
from .source import check

# Fields of a LoraConfig under which a layer is more than A and B, and which a fold treats.
MORE = ("use_dora", "lora_bias", "target_parameters")
OF_RESULT = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


Sum = tuple[list[Source], list[float], Callable[[str], Tensor]]


@dataclass(frozen=True)
class _Step:
    """One tensor that is written. shape: then; of the base it is `piece.stored`."""

    piece: Piece
    change: Change | None
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def plain(self) -> bool:
        return self.change is None and self.dtype == self.piece.stored.dtype

    @property
    def size(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass
class Plan:
    """All that a fold will write, checked. files: name -> key -> step, in the order of writing. untied: the head that
    gets a tensor of its own. rows: of a resized embedding."""

    base: Base
    changes: dict[str, Change]
    files: dict[str, dict[str, _Step]] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    untied: str | None = None
    rows: int | None = None

    @property
    def size(self) -> int:
        return sum(step.size for steps in self.files.values() for step in steps.values())


@dataclass(frozen=True)
class Folded:
    """What `fold_model` wrote. left: of the base's folder what was not copied, and why. lost: the part of the merge
    (norms) that its rank left out, None where nothing was cut. verified: where a prompt was given (`Verified`)."""

    folder: Path
    method: str
    made: Plan
    left: dict[str, str]
    lost: float | None
    verified: Any

    def __str__(self) -> str:
        made = self.made
        lines = [f"{self.folder}: {len(made.changes)} weights changed by {self.method}, {made.size / 1e9:.2f} GB"]
        if self.lost is not None:
            lines[0] += f"; cut to a rank, which leaves out {self.lost:.2%} of the merge (norms)"
        if made.untied is not None:
            lines.append(f"untied: {made.untied} is written apart, and tie_word_embeddings is false")
        if made.rows is not None:
            lines.append(f"resized: vocab_size is {made.rows}")
        if self.left:
            lines.append("not copied: " + ", ".join(f"{name} ({why})" for name, why in self.left.items()))
        if self.verified is not None:
            lines.append(str(self.verified))
        return "\n".join(lines)


def dtype_of(name: str | None) -> torch.dtype | None:
    if name is not None and name not in OF_RESULT:
        raise ValueError(f"unknown dtype {name!r}; choose one of {', '.join(OF_RESULT)}")
    return None if name is None else OF_RESULT[name]


def single(folder: str | Path) -> Sum:
    """One adapter, of all kinds that a fold treats."""
    source = Source(folder, beside=True, more=MORE)
    if source.config.get("layer_replication"):
        raise ValueError(f"{folder} has layer_replication: its layers are more than the base's, and no fold has them")
    return [source], [1.0], source.part


def summed(folders: Sequence[str | Path], weights: Sequence[float], beside: str | None) -> Sum:
    """Σ weight · adapter; several may have no more than A and B, and what `beside` treats."""
    if len(folders) == 1:
        if beside is not None:
            raise ValueError(f"beside={beside!r} is about several adapters; one is folded as it is: leave it out")
        sources, _, part = single(folders[0])
        return sources, list(weights), part
    sources = [Source(folder, beside is not None) for folder in folders]
    check(sources, False, False, "svd")
    parts.announced(sources, beside, weights)
    shares = parts.shares(weights)
    return sources, list(weights), lambda key: parts.merged(sources, key, beside, shares)


def plan(
    base: Base,
    sources: Sequence[Source],
    weights: Sequence[float],
    part: Callable[[str], Tensor],
    dtype: torch.dtype | None = None,
    untie: bool = False,
) -> Plan:
    """What Σ weight · adapter makes of the base. part: reads what the last adapter has beside A and B.

    Raises ValueError, with the reason, for what cannot be folded.
    """
    skeleton = Skeleton(base)
    changes = changes_of(sources, weights, skeleton, part)
    made = Plan(base, changes, dtype=dtype, untied=settle(changes, sources, skeleton, untie))
    pieces = {piece.stored.key: (name, piece) for name, found in skeleton.pieces.items() for piece in found}
    for file, tensors in base.files.items():
        made.files[file] = {}
        for stored in tensors:
            name, piece = pieces.get(stored.key, ("", Piece(stored)))
            made.files[file][stored.key] = _step(piece, changes.get(name), dtype)
            if made.untied and name == skeleton.tied[made.untied] and made.untied not in skeleton.pieces:
                key = skeleton.stored_name(made.untied, stored.key)
                made.files[file][key] = _step(piece, changes.get(made.untied), dtype)
    lost = sorted(changes.keys() - skeleton.pieces.keys() - skeleton.tied.keys())
    assert not lost, lost  # changes_of has asked for each
    made.rows = _resized(made, skeleton)
    return made


def _step(piece: Piece, change: Change | None, dtype: torch.dtype | None) -> _Step:
    own = piece.stored.dtype
    rounded = dtype if dtype is not None and own in OF_RESULT.values() else own
    shape = piece.stored.shape
    if change is not None and change.shape is not None and piece.whole and piece.index is None:
        shape = change.shape
    return _Step(piece, change, shape, rounded)


def _resized(made: Plan, skeleton: Skeleton) -> int | None:
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


def write(made: Plan, target: Path, note: Mapping[str, Any], progress: bool = False) -> dict[str, str]:
    """The folded model into the folder `target`; returns what of the base's folder was not copied, and why."""
    from tqdm.auto import tqdm

    _check_room(made, target)
    base, text = made.base, json.dumps(dict(note))
    # disable=None: no bar where nobody watches (a pipe, a log file).
    bar = tqdm(total=made.size, desc="fold", unit="B", unit_scale=True, leave=False, disable=None if progress else True)
    with bar, torch.no_grad():
        for name, steps in made.files.items():
            announced = {key: (step.shape, step.dtype) for key, step in steps.items()}
            file = TensorFile(target / name, announced, {"format": "pt", **base.metadata[name], "slao_fold": text})
            try:
                for key, step in steps.items():
                    _write(file, key, step, base)
                    bar.update(step.size)
            finally:
                file.close()
    places = {key: name for name, steps in made.files.items() for key in steps}
    index = fold_copy.index_of(base, places, made.size)
    if index is not None:
        fold_copy.write_json(target / INDEX, index)
    config = fold_copy.config_of(base, made.dtype, made.rows, made.untied is not None)
    fold_copy.write_json(target / "config.json", config)
    return fold_copy.copy_rest(base, target)


def _write(file: TensorFile, key: str, step: _Step, base: Base) -> None:
    stored = step.piece.stored
    if step.plain:
        file.write_bytes(key, base.blocks(stored))
        return
    weight = base.read(stored)
    if step.change is not None:
        weight = changed(weight, step.change, step.piece, step.dtype)
    rounded = weight.to(step.dtype)
    if rounded.is_floating_point() and checks.not_finite([rounded]):
        own = "" if step.change is None else ", or of the base itself"
        raise ValueError(
            f"{key} has infinite or NaN entries in {str(step.dtype).removeprefix('torch.')}, of the fold{own}: choose "
            "a wider --dtype, or look at the adapter. Nothing was written."
        )
    file.write(key, rounded)


def _check_room(made: Plan, target: Path) -> None:
    free = shutil.disk_usage(target).free
    if made.size > free:
        raise ValueError(
            f"the folded model takes {made.size / 1e9:.1f} GB, and {target.parent} has {free / 1e9:.1f} GB left: "
            "choose another -o"
        )
