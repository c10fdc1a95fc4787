"""The merged adapter as a plain PEFT folder: tensors go to the disk one by one, the folder appears when it is whole."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import TEMPORARY, sync_folder, umask

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
DTYPES = {name: dtype for dtype, name in _NAMES.items()}


class TensorFile:
    """safetensors, written in a stream: names, shapes and dtypes first, since the header needs them, then the data.

    tensors: name -> (shape, dtype), in the order in which `write` will be given them.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], note: str) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt", "slao_merge": note}}
        self.where: dict[str, tuple[int, tuple[int, ...], torch.dtype]] = {}
        end = 0
        for name, (shape, dtype) in tensors.items():
            start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
            self.where[name] = start, shape, dtype
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data is to start aligned
        self._start = 8 + len(text)
        self._file = open(path, "w+b")  # noqa: SIM115 (closed by close)
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """The next tensor; rounded to the dtype and brought into the shape that were announced."""
        start, shape, dtype = self.where[name]
        if self._file.tell() != self._start + start:
            raise RuntimeError(f"{name} is written out of its turn")
        self._file.write(_bytes(tensor.detach().to(dtype).reshape(shape)))

    def rescale(self, name: str, factor: float) -> None:
        """Multiply what was written under `name`."""
        start, shape, dtype = self.where[name]
        self._file.seek(self._start + start)
        data = bytearray(self._file.read(torch.Size(shape).numel() * dtype.itemsize))
        tensor = torch.frombuffer(data, dtype=dtype)
        self._file.seek(self._start + start)
        self._file.write(_bytes((tensor.double() * factor).to(dtype)))

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` that becomes `target` if the block ends well, and vanishes if it does not.

    Raises ValueError when `target` exists and is not an empty folder.
    """
    if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists already: choose another -o, or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=TEMPORARY, dir=target.parent))
    try:
        yield scratch
        os.chmod(scratch, 0o777 & ~umask())  # mkdtemp makes folders private
        sync_folder(scratch)
        if target.exists():
            target.rmdir()
        os.replace(scratch, target)
        sync_folder(target.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_config(path: Path, last: Mapping[str, Any], ranks: Mapping[str, int] | None) -> None:
    """adapter_config.json after that of an adapter with the same layers; ranks: of the merged layers, which then have
    scaling 1 (alpha = r, without rsLoRA), or None to keep r and alpha as they are there."""
    config = {**last, "inference_mode": True}
    if ranks is not None:
        # No merged A is drawn at random, and none is orthogonal by construction: loading needs no special start.
        config |= {"use_rslora": False, "init_lora_weights": True, "eva_config": None}
        usual = max(ranks.values())
        other = {f"^{re.escape(name)}": r for name, r in ranks.items() if r != usual}
        config |= {"r": usual, "lora_alpha": usual, "rank_pattern": other, "alpha_pattern": dict(other)}
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(config, indent=2, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())
