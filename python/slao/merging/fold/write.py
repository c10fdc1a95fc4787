"""The folded model's folder: its weights, file by file, its config, and what is copied from the base's folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...reading import inside
from ...sums import SUMS
from ..output import TensorFile
from ..weights import INDEX, sections
from .arithmetic import changed
from .base import Base
from .plan import Plan, Step

# Weights in other formats, which the fold would leave as they were, and pickles, which run what they hold.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".ggml", ".onnx", ".onnx_data",
            ".tflite", ".pkl", ".pickle", ".joblib", ".npz", ".ot", ".mlmodel", ".index.json")  # fmt: skip
_BLOCK = 1 << 20  # entries that are looked through for NaN at once: what a cache holds


def write_model(
    made: Plan, target: Path, note: Mapping[str, Any], sums: dict[str, str], progress: bool = False
) -> dict[str, str]:
    """The folded model into the folder `target`; returns what of the base's folder was not copied, and why. `sums` gets
    the checksums of the weights' files.

    Raises ValueError for a result that is not finite, and before all else where the disk has no room.
    """
    from tqdm.auto import tqdm

    _check_room(made, target)
    base, text = made.base, json.dumps(dict(note))
    # disable=None: no bar where nobody watches (a pipe, a log file).
    bar = tqdm(total=made.size, desc="fold", unit="B", unit_scale=True, leave=False, disable=None if progress else True)
    # A file's way to the disk takes as long as the making of the next one.
    with bar, torch.no_grad(), ThreadPoolExecutor(1) as background:
        closed = {}
        for name, steps in made.files.items():
            announced = {key: (step.shape, step.dtype) for key, step in steps.items()}
            file = TensorFile(target / name, announced, {"format": "pt", **base.metadata[name], "slao_fold": text})
            try:
                for key, step in steps.items():
                    _write(file, key, step, base)
                    bar.update(step.size)
            finally:
                closed[name] = background.submit(file.close)
        sums |= {name: digest for name, told in closed.items() if (digest := told.result()) is not None}
    index = _index(made)
    if index is not None:
        _write_json(target / INDEX, index)
    _write_json(target / "config.json", _config(made))
    return _copy_rest(base, target)


def _write(file: TensorFile, key: str, step: Step, base: Base) -> None:
    stored = step.piece.stored
    if step.plain:
        file.write_bytes(key, base.blocks(stored.key))
        return
    weight = base.read(stored.key)
    if step.change is not None:
        weight = changed(weight, step.change, step.piece, step.dtype)
    rounded = weight.to(step.dtype)
    if rounded.is_floating_point() and not _finite(rounded):
        own = "" if step.change is None else ", of the fold or of the base itself"
        raise ValueError(
            f"{key} has infinite or NaN entries in {str(step.dtype).removeprefix('torch.')}{own}: choose a wider "
            "--dtype, or look at the adapter. Nothing was written."
        )
    file.write(key, rounded)


def _finite(tensor: Tensor) -> bool:
    blocks = tensor.flatten().split(_BLOCK) if tensor.numel() else ()
    return all(bool(end.isfinite()) for block in blocks for end in torch.aminmax(block))


def _check_room(made: Plan, target: Path) -> None:
    free = shutil.disk_usage(target).free
    if made.size > free:
        raise ValueError(
            f"the folded model takes {made.size / 1e9:.1f} GB, and {target.parent} has {free / 1e9:.1f} GB left: "
            "choose another -o"
        )


def _index(made: Plan) -> dict[str, Any] | None:
    """The index of the shards, in the order of the base's; None where there is one file."""
    index = made.base.index
    if index is None:
        return None
    places = {key: name for name, steps in made.files.items() for key in steps}
    added = {key: name for key, name in places.items() if key not in index["weight_map"]}
    metadata = dict(index.get("metadata") or {})
    if made.size != made.base.size or "total_size" in metadata:
        metadata["total_size"] = made.size
    metadata.pop("total_parameters", None)  # as transformers counts them, tied ones and all, which nothing reads
    return {**index, "metadata": metadata, "weight_map": {**index["weight_map"], **added}}


def _config(made: Plan) -> dict[str, Any]:
    """config.json of the folded model."""
    config = deepcopy(made.base.config)
    for section in sections(config):
        if made.dtype is not None:
            for key in ("dtype", "torch_dtype"):
                if key in section or (section is config and key == "dtype" and "torch_dtype" not in section):
                    section[key] = str(made.dtype).removeprefix("torch.")
        if made.rows is not None and "vocab_size" in section:
            section["vocab_size"] = made.rows
        if made.untied and (section is config or "tie_word_embeddings" in section or "vocab_size" in section):
            section["tie_word_embeddings"] = False
    return config


def _copy_rest(base: Base, target: Path) -> dict[str, str]:
    """Copy what is neither weights nor config.json; returns path -> why it was left out. Hidden files are not looked
    at: they are the hub's and git's."""
    left: dict[str, str] = {}
    for path in _files(base.folder, left):
        name = str(path.relative_to(base.folder))
        if name in ("config.json", SUMS) or name in base.files or (name == INDEX and base.index is not None):
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
        _sync(target / name)
    return left


def _files(folder: Path, left: dict[str, str]) -> Iterator[Path]:
    """All files in and below the folder that are not hidden; `left` takes the links to folders."""
    for place, folders, files in os.walk(folder):
        linked = {name for name in folders if (Path(place) / name).is_symlink()}
        left |= {str((Path(place) / name).relative_to(folder)): "a link to a folder" for name in sorted(linked)}
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in linked)
        yield from (Path(place) / name for name in sorted(files) if not name.startswith("."))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
