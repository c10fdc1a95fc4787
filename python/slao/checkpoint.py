"""One file that is either the previous state or the next one, whenever the process dies."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slao_kernels.ops.checks import not_finite

FORMAT = 1
_RESTORE = "restore it from a copy, or remove its folder and train again"
TEMPORARY = ".tmp"  # the end of the names of what is not whole yet, which begin with a dot


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk, and rename it over `path`.

    Raises OSError, with what was there before whole, where the disk does not take it.
    """
    from safetensors import SafetensorError

    try:
        _write_atomically(path, write)
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, error) from error


class CannotWrite(OSError):
    """Says so in one line; errno is the cause's, where that has one."""

    def __init__(self, text: str, number: int | None = None) -> None:
        super().__init__(text)
        self.errno = number

    def __reduce__(self) -> Any:  # OSError's own forgets errno; --jobs sends one from process to process
        return CannotWrite, (str(self), self.errno)


def cannot_write(path: Path, error: Exception) -> CannotWrite:
    """`error`, which need be no OSError (safetensors' own is none), with the path; itself where it has one already."""
    if isinstance(error, CannotWrite):
        return error
    reason, number = getattr(error, "strerror", None) or " ".join(str(error).split()), getattr(error, "errno", None)
    # safetensors': "Error while serializing: I/O error: No space left on device (os error 28)"
    if by_rust := re.fullmatch(r"(?:.*: )?(.+) \(os error (\d+)\)", reason):
        reason, number = by_rust[1], int(by_rust[2]) if os.name == "posix" else None
    return CannotWrite(f"cannot write {path}: {reason}; what was there before is whole", number)


def _write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=TEMPORARY, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~umask())  # mkstemp makes files private
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def is_temporary(path: Path) -> bool:
    """Whether `path` is, by its name, what a process left that died while it wrote."""
    return path.name.startswith(".") and path.name.endswith(TEMPORARY)


def remove_temporaries(folder: Path) -> None:
    """Everything `is_temporary` in and below `folder`, which no other process may be writing to."""
    for path in sorted(folder.rglob(f".*{TEMPORARY}")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """`content` as indented JSON, atomically."""
    text = json.dumps(content, indent=1, allow_nan=False)
    write_atomically(path, lambda temporary: temporary.write_text(text + "\n", encoding="utf-8"))


def write_state(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Tensors and JSON-able `meta` into one safetensors file with a checksum over both, atomically.

    Raises ValueError, with nothing written, where a tensor holds a NaN or an infinity, and OSError as
    `write_atomically`.
    """
    from safetensors.torch import save_file

    payload = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if broken := [list(payload)[index] for index in not_finite(list(payload.values()))]:
        raise ValueError(
            f"{path} is not written: NaN or infinite numbers in {', '.join(broken[:8])}; training diverged, lower the "
            "learning rate"
        )
    text = json.dumps({"format": FORMAT, **meta}, sort_keys=True, allow_nan=False)
    header = {"slao": text, "sha256": _digest(payload, text)}

    write_atomically(path, lambda temporary: save_file(payload, temporary, metadata=header))


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_state` wrote, `settled`.

    Raises ValueError when the file is absent, no state, of a newer format, or damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"no saved state at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            # Copies: what safetensors gives is the mapped file itself, at whatever address its header leaves.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}; {_RESTORE}") from error
    if "slao" not in header:
        raise ValueError(f"{path} is not a state that this library wrote")
    if header.get("sha256") != _digest(tensors, header["slao"]):
        raise ValueError(f"{path} is damaged: its checksum does not match; {_RESTORE}")
    meta = json.loads(header["slao"])
    if meta.get("format", 0) > FORMAT:
        raise ValueError(f"{path} has format {meta['format']}, this version reads up to {FORMAT}: update slao_kernels")
    return tensors, meta


def read_head(path: Path) -> dict[str, Any] | None:
    """The `meta` of a state, without its tensors and unchecked; None where there is none to read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return dict(json.loads(file.metadata()["slao"]))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None


def settled(tensor: Tensor) -> Tensor:
    """`tensor` as `read_state` gives it: row after row, from a multiple of 64 bytes on. Itself where it is so already.

    BLAS and LAPACK choose the order of their sums by a matrix's strides, and some by the address that it begins at, so
    that the same numbers give other last bits elsewhere. 64 is what torch's CPU allocator aligns every tensor to.
    """
    if tensor.is_contiguous() and tensor.data_ptr() % 64 == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _digest(tensors: dict[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync_folder(folder: Path) -> None:
    """Make the rename itself durable; Windows neither needs nor allows it."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
