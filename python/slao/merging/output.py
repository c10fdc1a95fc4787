"""The merged adapter as a plain PEFT folder: tensors go to the disk one by one, the folder appears when it is whole."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import TEMPORARY, sync_folder, umask
from ..sums import write_sums

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_MINE = ".merge-"  # in the names of what is not whole yet, which others than a merge have no business with

NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
NAMES |= {torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"}
NAMES |= {torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
_CHOICE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def dtype_of(name: str) -> torch.dtype:
    """What people may ask for, by name."""
    if name not in _CHOICE:
        raise ValueError(f"unknown dtype {name!r}; choose one of {', '.join(_CHOICE)}")
    return _CHOICE[name]


class TensorFile:
    """safetensors, written in a stream: names, shapes and dtypes first, since the header needs them, then the data.

    tensors: name -> (shape, dtype), in the order in which `write` will be given them. note: how they were merged, or
    the whole metadata.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], note: str | Mapping[str, str]
    ) -> None:
        metadata = {"format": "pt", "slao_merge": note} if isinstance(note, str) else dict(note)
        header: dict[str, Any] = {"__metadata__": metadata}
        self.where: dict[str, tuple[int, tuple[int, ...], torch.dtype]] = {}
        end = 0
        for name, (shape, dtype) in tensors.items():
            start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
            self.where[name] = start, shape, dtype
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data is to start aligned
        self._start = 8 + len(text)
        self._file = open(path, "w+b")  # noqa: SIM115 (closed by close)
        self._digest: Any = hashlib.sha256()
        self._hashing = ThreadPoolExecutor(1)
        self._append(memoryview(len(text).to_bytes(8, "little") + text))

    def write(self, name: str, tensor: Tensor) -> None:
        """The next tensor; rounded to the dtype and brought into the shape that were announced."""
        _, shape, dtype = self.where[name]
        self.write_bytes(name, [as_bytes(tensor.detach().to(dtype).reshape(shape))])

    def write_bytes(self, name: str, blocks: Iterable[memoryview]) -> None:
        """The next tensor, as it lies in memory, block after block."""
        if self._file.tell() != self._start + self.where[name][0]:
            raise RuntimeError(f"{name} is written out of its turn")
        for block in blocks:
            self._append(block)

    def _append(self, block: memoryview) -> None:
        # Beside the writing, which waits for the disk: a checksum over a large file costs as much again.
        hashed = None if self._digest is None else self._hashing.submit(self._digest.update, block)
        self._file.write(block)
        if hashed is not None:
            hashed.result()

    def rescale(self, name: str, factor: float) -> None:
        """Multiply what was written under `name`."""
        start, shape, dtype = self.where[name]
        self._file.seek(self._start + start)
        data = bytearray(self._file.read(torch.Size(shape).numel() * dtype.itemsize))
        tensor = torch.frombuffer(data, dtype=dtype)
        self._file.seek(self._start + start)
        self._file.write(as_bytes((tensor.double() * factor).to(dtype)))
        self._file.seek(0, os.SEEK_END)
        self._digest = None

    def close(self) -> str | None:
        """Returns the file's SHA-256, None where `rescale` has changed what was written."""
        self._hashing.shutdown()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return None if self._digest is None else str(self._digest.hexdigest())


def as_bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


@contextmanager
def whole_folder(target: Path, known: Mapping[str, str] | None = None) -> Iterator[Path]:
    """A folder beside `target` that becomes `target` if the block ends well, and vanishes if it does not; so do those
    that killed processes left for the same `target`. known: checksums of its files, which the block may fill.

    Raises ValueError when `target` exists and is not an empty folder.
    """
    if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists already: choose another -o, or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_left(target)
    scratch, lock = _locked_folder(target)
    try:
        yield scratch
        write_sums(scratch, known)
        os.chmod(scratch, 0o777 & ~umask())  # mkdtemp makes folders private
        sync_folder(scratch)
        if target.exists():
            target.rmdir()
        os.replace(scratch, target)
        sync_folder(target.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _locked_folder(target: Path) -> tuple[Path, int | None]:
    """A new folder for what becomes `target`, and the lock on it that says that this process lives."""
    while True:
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}{_MINE}", suffix=TEMPORARY, dir=target.parent))
        try:
            lock = _lock(scratch)
        except OSError:
            return scratch, None
        if lock is not None and scratch.is_dir():  # else another process has just taken it for a dead one's
            return scratch, lock


def _remove_left(target: Path) -> None:
    """What merges into `target` left that were killed; one that still runs holds its lock."""
    pattern = re.escape(f".{target.name}{_MINE}") + r"[a-z0-9_]{8}" + re.escape(TEMPORARY)  # as tempfile has it
    for left in sorted(target.parent.iterdir()):
        if re.fullmatch(pattern, left.name) and left.is_dir() and not left.is_symlink():
            with suppress(OSError):
                if (lock := _lock(left)) is not None:
                    shutil.rmtree(left, ignore_errors=True)
                    os.close(lock)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock until it is closed; None where another process has it, or removed the
    folder. OSError where there are no such locks: on Windows, on some network disks."""
    if fcntl is None:
        raise OSError("no locks here")
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return handle


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
