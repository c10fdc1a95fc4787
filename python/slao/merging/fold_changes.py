"""From an adapter's keys to the base's parameters: each has to find one, of its own shape, or nothing is folded."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..folders import Layer, Source, scaling
from .fold_apply import Change, Low, Part
from .fold_skeleton import Skeleton, missing

_PREFIX = "base_model.model."
# The end of a key -> what it is of the module before it.
_ENDS = {
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_B.bias": "plus",
    ".token_adapter.trainable_tokens_delta": "rows",
}


@dataclass(frozen=True)
class _Entry:
    """One thing of an adapter's file. name: of the module, or for a `value` of the parameter, as the adapter has it.
    depth: how many of PEFT's wrappers of parameters lie around it."""

    kind: str  # low, magnitude, plus, rows, value
    name: str
    key: str
    depth: int = 0
    layer: Layer | None = None


def changes_of(
    sources: Sequence[Source], weights: Sequence[float], skeleton: Skeleton, part: Callable[[str], Tensor]
) -> dict[str, Change]:
    """Parameter -> what becomes of it by the sum of the adapters, each times its weight. part: reads what stands beside
    A and B, by the last adapter's keys.

    Raises ValueError that names the keys that find no parameter, or one of another shape or kind.
    """
    changes: dict[str, Change] = {}
    for source, weight in zip(sources, weights, strict=True):
        entries = _entries(source)
        name_of = _naming(source, entries, skeleton)
        wrapped = _wrapped(source, entries, name_of, skeleton)
        for entry in entries:
            if entry.kind == "low":
                assert entry.layer is not None
                _add_low(changes, source, entry, entry.layer, weight, wrapped, name_of, skeleton)
            elif source is sources[-1]:
                _add_part(changes, source, entry, name_of(entry.name), skeleton, partial(part, entry.key))
    for name, change in changes.items():
        if name in skeleton.odd:
            raise ValueError(
                f"the base stores {name} in parts that transformers joins by {skeleton.odd[name]}, which is "
                "not done here: load the base, save it by save_pretrained(folder, save_original_format=False), and "
                "fold into that"
            )
        stored = skeleton.pieces.get(name) or skeleton.pieces.get(skeleton.tied.get(name, ""))
        if not stored:
            raise missing([name], sources[-1].folder)
        for piece in stored:
            if piece.whole and piece.index is None and piece.stored.shape != skeleton.shapes[name]:
                raise ValueError(
                    f"{piece.stored.key} is {piece.stored.shape} in the base's file, and {skeleton.shapes[name]} by "
                    "its config.json: they belong to different models"
                )
            if not piece.stored.dtype.is_floating_point or piece.stored.dtype.itemsize == 1:
                raise ValueError(
                    f"the base stores {piece.stored.key} as {str(piece.stored.dtype).removeprefix('torch.')}: it is "
                    "quantised, and a delta cannot be added to it; fold into the checkpoint that was quantised"
                )
            if change.magnitude is not None and not piece.whole and (piece.dim == 0) == change.transposed:
                raise ValueError(f"the base stores the rows of {name} in parts, whose norm DoRA needs as one")
    return changes


def _entries(source: Source) -> list[_Entry]:
    found = []
    for layer in source.layers.values():
        name = layer.name
        while name.endswith(".base_layer"):
            name = name.removesuffix(".base_layer")
        found.append(_Entry("low", name, layer.keys[0], (len(layer.name) - len(name)) // len(".base_layer"), layer))
    for key in source.parts:
        name = key.removeprefix(_PREFIX)
        end = next((end for end in _ENDS if name.endswith(end)), "")
        name = re.sub(r"\.(base_layer|modules_to_save)(?=\.|$)", "", name.removesuffix(end))
        found.append(_Entry(_ENDS.get(end, "value"), name, key))
    return found


def _naming(source: Source, entries: Sequence[_Entry], skeleton: Skeleton) -> Callable[[str], str]:
    """How the adapter's names become the model's: the first way by which all find a parameter."""
    prefix = skeleton.prefix

    def renamed(name: str) -> str:
        return skeleton.renamed(f"{name}.weight")[0].removesuffix(".weight")

    ways: list[Callable[[str], str]] = [lambda name: name]
    if prefix:
        ways += [lambda name: f"{prefix}.{name}", lambda name: name.removeprefix(f"{prefix}.")]
    ways.append(renamed)
    lost: list[list[str]] = []
    for way in ways:
        lost.append([entry.key for entry in entries if not _finds(way(entry.name), entry, skeleton)])
        if not lost[-1]:
            return way
    raise missing(sorted(lost, key=len)[0], source.folder)


def _finds(name: str, entry: _Entry, skeleton: Skeleton) -> bool:
    if entry.kind == "value":
        return name in skeleton.shapes
    module = skeleton.module(name)
    if entry.kind == "plus":
        return module is not None
    return module is not None and any(True for _ in module.named_parameters(recurse=False))


def _wrapped(
    source: Source, entries: Sequence[_Entry], name_of: Callable[[str], str], skeleton: Skeleton
) -> dict[tuple[str, int], str]:
    """(module, depth) -> the parameter of target_parameters, which PEFT wraps one in another in the module's order."""
    targets = source.config.get("target_parameters") or []
    found: dict[tuple[str, int], str] = {}
    for name in dict.fromkeys(name_of(entry.name) for entry in entries if entry.kind == "low"):
        module = skeleton.module(name)
        assert module is not None
        own = [f"{name}.{each}" for each, _ in module.named_parameters(recurse=False)]
        own = [each for each in own if any(each == target or each.endswith(f".{target}") for target in targets)]
        found |= {(name, len(own) - 1 - index): each for index, each in enumerate(own)}
    return found


def _add_low(
    changes: dict[str, Change],
    source: Source,
    entry: _Entry,
    layer: Layer,
    weight: float,
    wrapped: dict[tuple[str, int], str],
    name_of: Callable[[str], str],
    skeleton: Skeleton,
) -> None:
    module_name = name_of(entry.name)
    parameter = wrapped.get((module_name, entry.depth))
    (rows_a, *inner), (outer, *_) = layer.shapes
    if parameter is not None:
        shape = skeleton.shapes[parameter]
        experts = shape[0] if len(shape) == 3 else 1
        if rows_a % experts:
            raise ValueError(f"{source.folder}: A of {layer.name} has {rows_a} rows, for {experts} experts")
        transposed = len(shape) == 3 and _stored_in_out(shape[-2:], outer, inner[0], skeleton.module(module_name))
        factor = scaling(source.config, parameter, rows_a // experts)
        want = tuple(reversed(shape[-2:])) if transposed else shape[-2:]
        fits = want == (outer, *inner)
        new = Change(transposed=transposed, experts=experts if len(shape) == 3 else 0)
    else:
        parameter = f"{module_name}.weight"
        if entry.depth or parameter not in skeleton.shapes:
            raise missing([entry.key], source.folder)
        shape, factor = skeleton.shapes[parameter], layer.scaling
        new = Change(transposed=_layout(source, entry, skeleton.module(module_name)))
        want = tuple(reversed(shape)) if new.transposed else shape
        fits = want == (outer, *inner)
    change = changes.setdefault(parameter, new)
    if not fits and change.value is None and not _resized(source, parameter, want, (outer, *inner)):
        raise ValueError(
            f"{source.folder}: B A of {layer.name} is {(outer, *inner)}, and {parameter} of the base {want}: the "
            "adapter was trained on another model"
        )
    change.low.append(Low(source, layer.name, weight * factor))


def _resized(source: Source, parameter: str, want: Sequence[int], found: Sequence[int]) -> bool:
    """Whether the file has the parameter itself too, with as many rows (of an embedding: A's columns)."""
    shapes = [shape for key, (shape, _) in source.parts.items()
              if key.replace(".base_layer", "").endswith(f".{parameter}")]  # fmt: skip
    return any(tuple(shape) in (tuple(found), tuple(reversed(found))) for shape in shapes) and len(want) == len(found)


def _layout(source: Source, entry: _Entry, module: nn.Module | None) -> bool:
    """Whether a layer's weight is stored as (in, out). ValueError for one that PEFT's LoRA of that name is not for."""
    from transformers.pytorch_utils import Conv1D

    embedding = entry.key.endswith("lora_embedding_A")
    convolution = isinstance(module, nn.modules.conv._ConvNd)
    known = isinstance(module, nn.Embedding) if embedding else isinstance(module, nn.Linear | Conv1D) or convolution
    if not known or (isinstance(module, nn.modules.conv._ConvNd) and module.groups != 1):
        grouped = " with groups" if convolution else ""
        raise ValueError(f"{source.folder}: {entry.key} is for a {type(module).__name__}{grouped}, which is not folded")
    return embedding or isinstance(module, Conv1D)


def _stored_in_out(shape: Sequence[int], out: int, into: int, module: Any) -> bool:
    """Whether experts are (E, in, out). Where both sides are equally long, the module says it as it says it to PEFT."""
    if shape[0] == shape[1]:
        return bool(getattr(module, "is_transposed", False))
    return tuple(shape) == (into, out)


def _add_part(
    changes: dict[str, Change], source: Source, entry: _Entry, name: str, skeleton: Skeleton, part: Part
) -> None:
    shape, dtype = source.parts[entry.key]
    if dtype not in ("F64", "F32", "BF16", "F16") and entry.kind != "value":
        raise ValueError(f"{source.folder}: {entry.key} is stored as {dtype}, expected F64, F32, BF16 or F16")
    if entry.kind == "value":
        own = skeleton.shapes[name]
        if shape != own and not (name in skeleton.embeddings() and len(shape) == 2 and shape[1] == own[1]):
            raise ValueError(f"{source.folder}: {entry.key} is {shape}, and {name} of the base {own}")
        change = changes.setdefault(name, Change())
        change.value, change.shape = part, shape
        return
    parameter = f"{name}.bias" if entry.kind == "plus" else f"{name}.weight"
    if parameter not in skeleton.shapes:
        hint = ": lora_bias needs a layer that has a bias" if entry.kind == "plus" else ""
        raise ValueError(f"{source.folder}: {entry.key} is for {parameter}, which the base does not have{hint}")
    own = skeleton.shapes[parameter]
    if entry.kind == "rows":
        indices = _indices(source, name)
        if len(shape) != 2 or shape != (len(indices), own[-1]) or min(indices) < 0 or max(indices) >= own[0]:
            raise ValueError(
                f"{source.folder}: {entry.key} is {shape} for the tokens {indices[:3]} to {indices[-1:]}, and "
                f"{parameter} of the base {own}"
            )
        changes.setdefault(parameter, Change()).rows = part, tuple(indices)
        return
    if entry.kind == "magnitude":
        found = changes.get(parameter)
        if found is None or not found.low:
            raise ValueError(f"{source.folder}: {entry.key} belongs to no A and B")
        outs = own[1] if found.transposed else own[0]
        if torch.Size(shape).numel() != outs:
            raise ValueError(f"{source.folder}: {entry.key} is {shape}, and {parameter} has {outs} outputs")
        found.magnitude = part
        return
    if shape != own:
        raise ValueError(f"{source.folder}: {entry.key} is {shape}, and {parameter} of the base {own}")
    factor = source.layers[entry.name].scaling
    changes.setdefault(parameter, Change()).plus.append((part, factor))


def _indices(source: Source, module: str) -> list[int]:
    """The tokens of a module, as the config lists them: for the input embedding alone, or by name."""
    given = source.config.get("trainable_token_indices") or {}
    if isinstance(given, list):
        return given
    found = next((each for name, each in given.items() if module == name or module.endswith(f".{name}")), None)
    if not found:
        raise ValueError(f"{source.folder}: trainable_token_indices has no tokens of {module}")
    return list(found)
