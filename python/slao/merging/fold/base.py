"""The base that adapters are folded into: its safetensors files, read tensor by tensor at their place in the file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...reading import inside, parse_json, read_json
from ..output import DTYPES

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_BLOCK = 16 << 20  # bytes of an unchanged tensor that are held at once
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


class Base:
    """A folder with a model as transformers saves it. files: name -> its tensors in the order of their bytes.

    Raises ValueError when the folder has no weights in safetensors, when they are quantised, or when a file is cut.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"{folder} is no folder: download the base first, and name the folder that it lies in")
        if not (self.folder / "config.json").exists():
            raise ValueError(f"{self.folder} holds no model: there is no config.json")
        self.config: dict[str, Any] = read_json(inside(self.folder / "config.json", self.folder))
        if not isinstance(self.config, dict):
            raise ValueError(f"{self.folder / 'config.json'} does not describe a model")
        if any(section.get("quantization_config") for section in sections(self.config)):
            raise ValueError(
                f"{self.folder} is quantised (quantization_config in its config.json), and a delta cannot be added to "
                "such weights: fold into the checkpoint that was quantised, or load it, call model.dequantize(), and "
                "fold into what save_pretrained writes"
            )
        self._held = torch.empty(0, dtype=torch.uint8)
        self.index: dict[str, Any] | None = None
        self.metadata: dict[str, dict[str, str]] = {}
        self.files = {name: self._header(name) for name in self._names()}
        self.tensors = {stored.key: stored for tensors in self.files.values() for stored in tensors}
        self._check_index()

    @property
    def size(self) -> int:
        return sum(stored.size for stored in self.tensors.values())

    def read(self, stored: Stored) -> Tensor:
        """A copy in memory, which may be written into; the next call of this or of `blocks` overwrites it."""
        data = self._memory(stored.size)
        with open(self.folder / stored.file, "rb", buffering=0) as file:
            file.seek(stored.start)
            _fill(file, memoryview(data.numpy()), self.folder / stored.file)
        return data.view(stored.dtype).view(stored.shape)

    def blocks(self, stored: Stored) -> Iterator[memoryview]:
        """Its bytes, a block at a time; each is overwritten by the next one."""
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
        if (self.folder / SINGLE).exists():
            return [SINGLE]
        if not (self.folder / INDEX).exists():
            raise ValueError(
                f"{self.folder} has no {SINGLE} and no {INDEX}; load the model and save it anew (save_pretrained "
                "writes safetensors)"
            )
        path = self.folder / INDEX
        self.index = read_json(inside(path, self.folder))
        places = self.index.get("weight_map") if isinstance(self.index, dict) else None
        if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
            raise ValueError(f"{path} has no weight_map from tensors to files")
        for name in (names := sorted(set(places.values()))):
            if Path(name).name != name or not (self.folder / name).exists():
                raise ValueError(f"{path} names the file {name!r}, which is not in its folder; download it again")
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
                    "quantised, fold into the checkpoint that it was made of"
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
