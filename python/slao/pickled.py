"""adapter_model.bin, as older PEFT wrote it: a pickle, of which nothing but tensors is taken."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# torch's dtypes by safetensors' names; another one goes by its own.
_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_NAMES |= {torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"}
_NAMES |= {torch.bool: "BOOL"}


class PickledFile:
    """The tensors of a file of torch.save, with the few methods of safetensors' safe_open that `Source` uses.

    Unpickled by torch's restricted reader (weights_only), which calls no code of the file's; mapped, where the file is
    of a format that can be.
    Raises ValueError for what that reader refuses, and for a file that holds anything but tensors by name.
    """

    def __init__(self, path: Path) -> None:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
        except (PermissionError, FileNotFoundError):
            raise
        except Exception as error:  # of many kinds, by what the file is; EINVAL for one that is cut
            said = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"{path} is no pickle of tensors alone, and nothing else is unpickled, since that may run code: save "
                f"the adapter with safe_serialization=True, or get its safetensors ({said:.100})"
            ) from None
        odd = [name for name, value in found.items() if not _fine(name, value)] if isinstance(found, dict) else [""]
        if odd:
            what = "no tensors by name" if odd == [""] else f"{odd[0]!r}, which is no dense tensor"
            raise ValueError(f"{path} holds {what}: save the adapter with safe_serialization=True")
        self._tensors: dict[str, Tensor] = found

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_tensor(self, name: str) -> Tensor:
        return self._tensors[name].detach()

    def get_slice(self, name: str) -> _Slice:
        return _Slice(self._tensors[name])


class _Slice:
    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        return _NAMES.get(self._tensor.dtype, str(self._tensor.dtype))


def _fine(name: object, value: Any) -> bool:
    return (
        isinstance(name, str)
        and type(value) in (Tensor, nn.Parameter)
        and (value.layout, value.device.type) == (torch.strided, "cpu")
    )
