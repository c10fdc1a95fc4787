"""Checksums of rows and texts, by which data is known again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from .streams import ImageRow, Task


def of_task(task: Task) -> Iterator[tuple[str, str]]:
    """(part of it, its checksum): the rows of each split, and the labels with all that they are scored by."""
    for split in ("train", "validation", "test"):
        yield f"{split} rows", of_texts(_texts(getattr(task, split)))
    yield "labels", of_texts((*task.labels, task.instruction, task.metric))


def _texts(rows: Sequence[Any]) -> Iterator[str | bytes]:
    for row in rows:
        yield from (row.prompt, row.answer, str(len(row.references)), *row.references)
        if row.kind != "text":
            yield from (row.kind, *(part for turn in row.messages for part in turn))
        if isinstance(row, ImageRow):
            yield from (str(row.shape), row.pixels)


def of_texts(texts: Iterable[str | bytes]) -> str:
    """The checksum of texts in their order."""
    digest = hashlib.sha256()
    for text in texts:
        data = text if isinstance(text, bytes) else text.encode()
        digest.update(f"{len(data)}|".encode())
        digest.update(data)
    return digest.hexdigest()[:16]
