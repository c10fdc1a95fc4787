"""A model's weights in safetensors, one file or shards with an index, read a tensor at a time from their place."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slao_kernels.ops import checks

from ..reading import inside, parse_json, read_json
from .output import DTYPES
from .skeleton import Skeleton

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_BLOCK = 16 << 20  # bytes that `blocks` reads at once
_LONGEST_HEADER = 100 << 20  # as safetensors has it


@dataclass(frozen=True)
class Stored:
    """A tensor in a file. start: of its bytes in the file."""

    key: str
    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Weights:
    """path: a model's folder, or its one safetensors file. files: name -> its tensors in the order of their bytes.
    tensors: by key. index, metadata: what the index and the files say beside the tensors.

    Raises ValueError for what is no such thing: no file, a pickle, an index that its shards do not agree with, a file
    that is cut off, or one that a link leads out of the folder for.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise ValueError(f"there is no model folder and no safetensors file at {path}: download the model first")
        self.folder = self.path if self.path.is_dir() else self.path.parent
        self.index: dict[str, Any] | None = None
        self.metadata: dict[str, dict[str, str]] = {}
        self._held = torch.empty(0, dtype=torch.uint8)
        self.files = {name: self._header(name) for name in self._names()}
        self.tensors = {stored.key: stored for tensors in self.files.values() for stored in tensors}
        self._check_index()

    @property
    def size(self) -> int:
        """Of all tensors, in bytes."""
        return sum(stored.size for stored in self.tensors.values())

    def read(self, key: str) -> Tensor:
        """A copy in memory, which may be written into; the next call of this or of `blocks` overwrites it."""
        stored = self.tensors[key]
        data = self._memory(stored.size)
        with open(self.folder / stored.file, "rb", buffering=0) as file:
            file.seek(stored.start)
            _fill(file, memoryview(data.numpy()), self.folder / stored.file)
        return data.view(stored.dtype).view(stored.shape)

    def finite(self, key: str) -> Tensor:
        """The same. ValueError for NaN and infinity."""
        tensor = self.read(key)
        if tensor.is_floating_point() and checks.not_finite([tensor]):
            raise ValueError(f"{self.path}: {key} has NaN or infinite entries")
        return tensor

    def blocks(self, key: str) -> Iterator[memoryview]:
        """Its bytes, a block at a time; each is overwritten by the next one."""
        stored = self.tensors[key]
        block = memoryview(self._memory(min(_BLOCK, stored.size)).numpy())
        with open(self.folder / stored.file, "rb", buffering=0) as file:
            file.seek(stored.start)
            for start in range(0, stored.size, _BLOCK):
                part = block[: stored.size - start]
                _fill(file, part, self.folder / stored.file)
                yield part

    def _memory(self, size: int) -> Tensor:
        """The same bytes again: new ones cost as much as the reading, for each tensor."""
        if len(self._held) < size:
            self._held = torch.empty(size, dtype=torch.uint8)
        return self._held[:size]

    def _names(self) -> list[str]:
        """The weights' files, as transformers finds them: one file before an index."""
        if self.path != self.folder:
            return [self.path.name]
        if (self.folder / SINGLE).exists():
            return [SINGLE]
        if not (self.folder / INDEX).exists():
            pickles = sorted(path.name for path in self.folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
            there = f", but a pickle ({pickles[0]}), which may run any code when it is read" if pickles else ""
            raise ValueError(
                f"{self.folder} has no {SINGLE} and no {INDEX}{there}; load the model and save it anew "
                "(save_pretrained writes safetensors)"
            )
        path = self.folder / INDEX
        index = read_json(inside(path, self.folder))
        places = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
            raise ValueError(f"{path} has no weight_map from tensors to files")
        for name in (names := sorted(set(places.values()))):
            if Path(name).name != name or not (self.folder / name).is_file():
                raise ValueError(f"{path} names the file {name!r}, which is not in its folder; download it again")
        self.index = index
        return names

    def _header(self, name: str) -> list[Stored]:
        path = inside(self.folder / name, self.folder)
        length = path.stat().st_size
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            text = file.read(size) if 8 + size <= length and size <= _LONGEST_HEADER else b""
        try:
            header: dict[str, Any] = parse_json(text.decode(), str(path))
            metadata = dict(header.pop("__metadata__", None) or {})
            entries = {key: _entry(**entry) for key, entry in header.items()}
        except (ValueError, TypeError, AttributeError):
            raise ValueError(f"{path} is no safetensors file, or cut short; download it again") from None
        self.metadata[name] = {key: value for key, value in metadata.items() if isinstance(value, str)}
        found, end = [], 0
        for key, (start, stop, shape, dtype) in sorted(entries.items(), key=lambda entry: entry[1]):
            if dtype not in DTYPES:
                raise ValueError(
                    f"{path}: {key} is stored as {dtype}, expected one of {', '.join(DTYPES)}; if the model is "
                    "quantised, take the checkpoint that it was made of"
                )
            stored = Stored(key, name, shape, DTYPES[dtype], 8 + size + start)
            if start != end or stop - start != stored.size:
                raise ValueError(f"{path} is damaged: {key} lies at {start} to {stop}; download it again")
            found.append(stored)
            end = stop
        if 8 + size + end != length:
            raise ValueError(f"{path} is cut short or damaged: {length} bytes, {8 + size + end} expected; get it again")
        return found

    def _check_index(self) -> None:
        if sum(map(len, self.files.values())) != len(self.tensors):
            raise ValueError(f"{self.folder}: a tensor stands in two of its files")
        places = self.index["weight_map"] if self.index is not None else {}
        for key in places.keys() - self.tensors.keys():
            raise ValueError(f"{self.folder / INDEX} names {key}, which is in no file; download the model again")


def keys_of(skeleton: Skeleton, weights: Weights) -> dict[str, str]:
    """The model's name of a parameter or buffer -> its key in the checkpoint. A tied one has the key of the one that is
    stored; one that is joined of several tensors is not among them.

    Raises ValueError that names parameters that are absent, have another shape, or are no floating-point numbers; and
    for a quantised model.
    """
    if (how := scheme(skeleton.model.config.to_dict())) is not None:
        raise ValueError(
            f"{weights.folder} is quantised ({how}), and the difference of such weights is mostly rounding: take the "
            "model that it was quantised from, or dequantise it and save that"
        )
    keys: dict[str, str] = {}
    joined: set[str] = set()
    for key in weights.tensors:
        name, pattern = skeleton.renamed(key)
        if name in skeleton.shapes and pattern is not None:
            joined.add(name)
        elif name in skeleton.shapes:
            keys[name] = key
    for name in skeleton.shapes:
        partner = next((other for other in skeleton.tied(name) if other in keys), None)
        if name not in keys and partner is not None:
            keys[name] = keys[partner]
    absent = [name for name in skeleton.parameters if name not in keys and name not in joined]
    if absent:
        raise ValueError(
            f"{weights.path} lacks {len(absent)} weights of its model, such as {absent[0]}: the checkpoint is not "
            "whole, or has other names than transformers' (load it, and save it with save_pretrained)"
        )
    for name in skeleton.parameters:
        if name not in keys:
            continue
        stored = weights.tensors[keys[name]]
        if not plain(stored.dtype):
            dtype = str(stored.dtype).removeprefix("torch.")
            raise ValueError(f"{weights.path}: {name} is stored as {dtype}: it is quantised, and has no plain weights")
        if stored.shape != skeleton.shapes[name]:
            raise ValueError(f"{weights.path}: {name} is {stored.shape}, its config says {skeleton.shapes[name]}")
    return keys


def plain(dtype: torch.dtype) -> bool:
    """Whether weights of this dtype are numbers to add to: floating-point, of 16 bits or more."""
    return dtype.is_floating_point and dtype.itemsize > 1


def scheme(config: dict[str, Any]) -> str | None:
    """How the model of a config.json is quantised, in it or in one of its parts; None where it is not."""
    for section in sections(config):
        given = section.get("quantization_config")
        if given:
            return str(given.get("quant_method", "quantization_config") if isinstance(given, dict) else given)
    return None


def sections(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The config and those within it, of the text model of a multimodal one and its like."""
    return [config, *(value for key, value in config.items() if key.endswith("_config") and isinstance(value, dict))]


def _entry(dtype: str, shape: list[int], data_offsets: list[int]) -> tuple[int, int, tuple[int, ...], str]:
    """start, stop, shape and dtype of an entry of a header. ValueError or TypeError for what is none."""
    start, stop = data_offsets
    if not isinstance(dtype, str) or any(type(number) is not int or number < 0 for number in (start, stop, *shape)):
        raise ValueError(dtype)
    return start, stop, tuple(shape), dtype


def _fill(file: Any, view: memoryview, path: Path) -> None:
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise ValueError(f"{path} became shorter while it was read")
        done += count
