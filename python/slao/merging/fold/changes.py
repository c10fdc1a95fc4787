"""From an adapter's keys to the base's parameters: each has to find one, of its own shape, or nothing is folded."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...folders import MAGNITUDES, PREFIX, Layer, Source, scaling
from ..skeleton import Skeleton
from .arithmetic import Change, Low, Part
from .stored import missing

# The end of a key -> what it is of the module before it.
_ENDS = {
    **dict.fromkeys(MAGNITUDES, "magnitude"),
    ".lora_B.bias": "plus",
    ".token_adapter.trainable_tokens_delta": "rows",
}
# PEFT's wrappers in a key. The original of what modules_to_save trains is the base's own, and saved beside it with the
# embedding layers alone.
_WRAPPERS = re.compile(r"\.(base_layer|modules_to_save|token_adapter|original_module)(?=\.|$)")
_ORIGINAL = re.compile(r"\.original_module(\.|$)")


@dataclass(frozen=True)
class _Entry:
    """One thing of an adapter's file. name: of the module, or for a `value` of the parameter, as the adapter has it.
    depth: how many of PEFT's wrappers of parameters lie around it."""

    kind: str  # low, magnitude, plus, rows, value
    name: str
    key: str
    depth: int = 0
    layer: Layer | None = None


def add_changes(
    changes: dict[str, Change],
    source: Source,
    weight: float,
    skeleton: Skeleton,
    part: Callable[[str], Tensor] | None,
) -> None:
    """Add to `changes` (parameter -> what becomes of it) what the adapter times `weight` does. part: reads what stands
    beside A and B; None where that is another adapter's.

    Raises ValueError that names the keys that find no parameter, or one of another shape or kind.
    """
    adapter = _Adapter(source, skeleton)
    for entry in adapter.entries:
        if entry.layer is not None:
            adapter.add_low(changes, entry, entry.layer, weight)
    for entry in adapter.entries:
        if entry.layer is None and part is not None:
            adapter.add_part(changes, entry, partial(part, entry.key), weight)


class _Adapter:
    """An adapter's entries, each with the base's name of it."""

    def __init__(self, source: Source, skeleton: Skeleton) -> None:
        self.source, self.skeleton = source, skeleton
        self.entries = _entries(source)
        self.name_of = self._naming()
        self._wrapped = self._wrapped_parameters()

    def add_low(self, changes: dict[str, Change], entry: _Entry, layer: Layer, weight: float) -> None:
        source, skeleton = self.source, self.skeleton
        module_name = self.name_of(entry.name)
        parameter = self._wrapped.get((module_name, entry.depth))
        (rows_a, *inner), (outer, *_) = layer.shapes
        if parameter is not None:
            shape = skeleton.shapes[parameter]
            experts = shape[0] if len(shape) == 3 else 1
            if rows_a % experts:
                raise ValueError(f"{source.folder}: A of {layer.name} has {rows_a} rows, for {experts} experts")
            transposed = len(shape) == 3 and _stored_in_out(
                shape[-2:], outer, inner[0], skeleton.modules.get(module_name)
            )
            factor = scaling(source.config, parameter, rows_a // experts)
            new = Change(transposed=transposed, experts=experts if len(shape) == 3 else 0)
            shape = shape[-2:]
        else:
            parameter = f"{module_name}.weight"
            if entry.depth or parameter not in skeleton.shapes:
                raise missing([entry.key], source.folder)
            shape, factor = skeleton.shapes[parameter], layer.scaling
            new = Change(transposed=_layout(source, entry, skeleton.modules.get(module_name)))
        want = tuple(reversed(shape)) if new.transposed else shape
        if want != (outer, *inner) and not self._resized(parameter, want, (outer, *inner)):
            raise ValueError(
                f"{source.folder}: B A of {layer.name} is {(outer, *inner)}, and {parameter} of the base {want}: the "
                "adapter was trained on another model"
            )
        changes.setdefault(parameter, new).low.append(Low(source, layer.name, weight * factor))

    def add_part(self, changes: dict[str, Change], entry: _Entry, part: Part, weight: float) -> None:
        source, skeleton, name = self.source, self.skeleton, self.name_of(entry.name)
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
            change = changes.setdefault(parameter, Change())
            change.rows = part, self._tokens(entry, name, change.shape or own)
        elif entry.kind == "magnitude":
            found = changes.get(parameter)
            if found is None or not found.low:
                raise ValueError(f"{source.folder}: {entry.key} belongs to no A and B")
            outs = own[1] if found.transposed else own[0]
            if torch.Size(shape).numel() != outs:
                raise ValueError(f"{source.folder}: {entry.key} is {shape}, and {parameter} has {outs} outputs")
            found.magnitude = part
        elif shape != own or entry.name not in source.layers:
            raise ValueError(f"{source.folder}: {entry.key} is {shape}, and {parameter} of the base {own}")
        else:
            factor = weight * source.layers[entry.name].scaling
            changes.setdefault(parameter, Change()).plus.append((part, factor))

    def _naming(self) -> Callable[[str], str]:
        """How the adapter's names become the model's: the first way by which all find a parameter."""
        skeleton, prefix = self.skeleton, self.skeleton.prefix

        def renamed(name: str) -> str:
            return skeleton.renamed(f"{name}.weight")[0].removesuffix(".weight")

        ways: list[Callable[[str], str]] = [lambda name: name]
        if prefix:
            ways += [lambda name: f"{prefix}.{name}", lambda name: name.removeprefix(f"{prefix}.")]
        ways.append(renamed)
        lost: list[list[str]] = []
        for way in ways:
            lost.append([entry.key for entry in self.entries if not self._finds(way(entry.name), entry)])
            if not lost[-1]:
                return way
        raise missing(sorted(lost, key=len)[0], self.source.folder)

    def _finds(self, name: str, entry: _Entry) -> bool:
        if entry.kind == "value":
            return name in self.skeleton.shapes
        module = self.skeleton.modules.get(name)
        if entry.kind == "plus":
            return module is not None
        return module is not None and any(True for _ in module.named_parameters(recurse=False))

    def _wrapped_parameters(self) -> dict[tuple[str, int], str]:
        """(module, depth) -> the parameter of target_parameters, which PEFT wraps one in another in the module's
        order."""
        targets = self.source.config.get("target_parameters") or []
        found: dict[tuple[str, int], str] = {}
        for name in dict.fromkeys(self.name_of(entry.name) for entry in self.entries if entry.layer is not None):
            module = self.skeleton.modules.get(name)
            assert module is not None
            own = [f"{name}.{each}" for each, _ in module.named_parameters(recurse=False)]
            own = [each for each in own if any(each == target or each.endswith(f".{target}") for target in targets)]
            found |= {(name, len(own) - 1 - index): each for index, each in enumerate(own)}
        return found

    def _resized(self, parameter: str, want: Sequence[int], found: Sequence[int]) -> bool:
        """Whether the file has the parameter itself too, with as many rows (of an embedding: A's columns)."""
        shapes = [self.source.parts[entry.key][0] for entry in self.entries
                  if entry.kind == "value" and self.name_of(entry.name) == parameter]  # fmt: skip
        return len(want) == len(found) and any(shape in (tuple(found), tuple(reversed(found))) for shape in shapes)

    def _tokens(self, entry: _Entry, module: str, own: Sequence[int]) -> tuple[int, ...]:
        """The rows that are replaced, as the config lists them: of the input embedding alone, or by name. own: the
        shape of what they are in."""
        given = self.source.config.get("trainable_token_indices") or {}
        if not isinstance(given, list):
            listed = (tokens for name, tokens in given.items() if module == name or module.endswith(f".{name}"))
            given = next(listed, None)
        if not given:
            raise ValueError(f"{self.source.folder}: trainable_token_indices has no tokens of {module}")
        shape = self.source.parts[entry.key][0]
        if len(shape) != 2 or shape != (len(given), own[-1]) or min(given) < 0 or max(given) >= own[0]:
            raise ValueError(
                f"{self.source.folder}: {entry.key} is {shape} for the tokens {given[:3]} to {given[-1:]}, and "
                f"{module}.weight of the base {tuple(own)}; if the vocabulary was resized, save the adapter with "
                "save_embedding_layers=True"
            )
        return tuple(given)


def _entries(source: Source) -> list[_Entry]:
    found = []
    for layer in source.layers.values():
        name = layer.name
        while name.endswith(".base_layer"):
            name = name.removesuffix(".base_layer")
        found.append(_Entry("low", name, layer.keys[0], (len(layer.name) - len(name)) // len(".base_layer"), layer))
    values: dict[str, _Entry] = {}
    for key in source.parts:
        name = key.removeprefix(PREFIX)
        end = next((end for end in _ENDS if name.endswith(end)), "")
        entry = _Entry(_ENDS.get(end, "value"), _WRAPPERS.sub("", name.removesuffix(end)), key)
        if entry.kind != "value":
            found.append(entry)
        elif entry.name not in values or not _ORIGINAL.search(key):
            values[entry.name] = entry
    return [*values.values(), *found]


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
