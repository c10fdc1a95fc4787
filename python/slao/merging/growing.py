"""safetensors of tensors whose number and shapes are known only once they are written."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .output import NAMES, as_bytes

_ENTRY = 160  # bytes of a header's entry beside the name: dtype, eight sizes, two offsets


class GrowingFile:
    """A safetensors file that tensors are appended to. Its header comes first in the file and is known last: room is
    left for it, which `close` fills.

    names: all that may be written; each once, in any order, or not at all.
    """

    def __init__(self, path: Path, names: Sequence[str], note: str) -> None:
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt", "slao_merge": note}}
        room = len(json.dumps(self._header)) + sum(len(json.dumps(name)) + _ENTRY for name in names)
        self._room = room + -room % 8  # the data is to start aligned
        self._end = 0
        self._file = open(path, "w+b")  # noqa: SIM115 (closed by close)
        self._file.seek(8 + self._room)

    @property
    def names(self) -> set[str]:
        """What was written."""
        return self._header.keys() - {"__metadata__"}

    def write(self, name: str, tensor: Tensor) -> None:
        tensor = tensor.detach()
        start, self._end = self._end, self._end + tensor.nbytes
        offsets = [start, self._end]
        self._header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        self._file.write(as_bytes(tensor))

    def close(self) -> None:
        text = json.dumps(self._header, separators=(",", ":")).encode()
        if len(text) > self._room:
            raise RuntimeError(f"the header has {len(text)} bytes, more than the {self._room} left for it")
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + text.ljust(self._room))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
