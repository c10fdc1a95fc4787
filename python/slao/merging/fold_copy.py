"""What lies beside the weights of a model: its config, as the fold leaves it, and the files that are copied."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from ..reading import inside
from ..sums import SUMS
from .fold_base import INDEX, Base, sections

# Weights in other formats, which the fold would leave as they were, and pickles, which run what they hold.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".ggml", ".onnx", ".onnx_data",
            ".tflite", ".pkl", ".pickle", ".joblib", ".npz", ".ot", ".mlmodel", ".index.json")  # fmt: skip


def copy_rest(base: Base, target: Path) -> dict[str, str]:
    """Copy what is neither weights nor config.json; returns path -> why it was left out. Hidden files are not looked
    at: they are the hub's and git's."""
    left: dict[str, str] = {}
    for path in _files(base.folder, left):
        name = str(path.relative_to(base.folder))
        if name in ("config.json", INDEX, SUMS) or name in base.files:
            continue
        if path.name.lower().endswith(_WEIGHTS):
            left[name] = "weights that are not folded"
            continue
        try:
            inside(path, base.folder)
        except ValueError:
            left[name] = "a link out of the folder"
            continue
        if not path.is_file():
            left[name] = "no plain file"
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / name)
        sync(target / name)
    return left


def _files(folder: Path, left: dict[str, str]) -> Iterator[Path]:
    root = folder
    for place, folders, files in os.walk(root):
        for name in [each for each in folders if (Path(place) / each).is_symlink()]:
            left[str((Path(place) / name).relative_to(root))] = "a link to a folder"
        folders[:] = sorted(
            each for each in folders if not each.startswith(".") and not (Path(place) / each).is_symlink()
        )
        yield from (Path(place) / name for name in sorted(files) if not name.startswith("."))


def config_of(base: Base, dtype: torch.dtype | None, rows: int | None, untied: bool) -> dict[str, Any]:
    """config.json of the folded model. rows: of the embedding, where an adapter resized it."""
    config = deepcopy(base.config)
    for section in sections(config):
        if dtype is not None:
            for key in ("dtype", "torch_dtype"):
                if key in section or (section is config and key == "dtype" and "torch_dtype" not in section):
                    section[key] = str(dtype).removeprefix("torch.")
        if rows is not None and "vocab_size" in section:
            section["vocab_size"] = rows
        if untied and (section is config or "tie_word_embeddings" in section or "vocab_size" in section):
            section["tie_word_embeddings"] = False
    return config


def index_of(base: Base, places: Mapping[str, str], size: int) -> dict[str, Any] | None:
    """The index of the folded shards, in the order of the base's; None where there is one file."""
    if base.index is None:
        return None
    added = {key: name for key, name in places.items() if key not in base.index["weight_map"]}
    metadata = dict(base.index.get("metadata") or {})
    if size != base.size or "total_size" in metadata:
        metadata["total_size"] = size
    metadata.pop("total_parameters", None)  # as transformers counts them, tied ones and all, which nothing reads
    return {**base.index, "metadata": metadata, "weight_map": {**base.index["weight_map"], **added}}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sync(path)


def sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
