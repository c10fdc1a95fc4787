"""A model's weights in safetensors, one file or shards with an index, read a tensor at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from slao_kernels.ops import checks

from ..models import check_folder
from ..reading import read_json

_INDEX = "model.safetensors.index.json"


class Weights:
    """path: a model's folder, or its one safetensors file. stored: name -> (shape, dtype by safetensors' name).

    Raises ValueError for what is no such thing: no file, a pickle, an index that its shards do not agree with, a file
    that is cut off.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.folder = self.path if self.path.is_dir() else self.path.parent
        self._files: dict[str, Path] = {}
        self.stored: dict[str, tuple[tuple[int, ...], str]] = {}
        if not self.path.exists():
            raise ValueError(f"there is no model folder and no safetensors file at {path}")
        check_folder(self.folder)
        index = self.folder / _INDEX
        if self.path.is_dir() and index.is_file():
            parts: dict[str, str] = read_json(index)["weight_map"]
            for name in sorted(set(parts.values())):
                self._list(self.folder / name)
            wrong = sorted(key for key in parts.keys() | self._files.keys() if not self._lies(key, parts.get(key)))
            if wrong:
                raise ValueError(f"{index} and its files do not agree on {len(wrong)} tensors, such as {wrong[0]}")
        else:
            self._list(self.path / "model.safetensors" if self.path.is_dir() else self.path)

    def _lies(self, key: str, part: str | None) -> bool:
        return key in self._files and self._files[key].name == part

    def _list(self, file: Path) -> None:
        if not file.is_file():
            raise ValueError(f"{self.path} lacks {file.name}: the weights have to be safetensors (save_pretrained)")
        with _opened(file) as content:
            for key in content.keys():  # noqa: SIM118 (no dict)
                piece = content.get_slice(key)
                self.stored[key] = tuple(piece.get_shape()), piece.get_dtype()
                self._files[key] = file

    def read(self, key: str) -> Tensor:
        """The tensor. Not to be written into. ValueError for NaN and infinity."""
        with _opened(self._files[key]) as content:  # anew: what was read of a mapped file stays in memory until then
            tensor: Tensor = content.get_tensor(key)
        if tensor.is_floating_point() and checks.not_finite([tensor]):
            raise ValueError(f"{self.path}: {key} has NaN or infinite entries")
        return tensor


def _opened(file: Path) -> Any:
    from safetensors import safe_open

    try:
        return safe_open(file, framework="pt")
    except Exception as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
