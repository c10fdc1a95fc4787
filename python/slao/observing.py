"""The batches that a Trainer's method observes: all rows of its data set, without a trace in how it trains on them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from slao_kernels import sharding


def batches(loader: Any, size: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Batches of `size` rows of a DataLoader's data set in its order, collated as it does, on `device`.

    On several ranks each gets batches of its own. Rows and collator may draw random numbers: the generators of Python,
    NumPy and torch's CPU are afterwards as before. Raises ValueError for a data set without a length.
    """
    rows, collate = loader.dataset, loader.collate_fn
    if isinstance(rows, IterableDataset) or not hasattr(rows, "__len__"):
        raise ValueError(
            f"the method observes a task's rows before and after training, and {type(rows).__name__} can be read only "
            "once: use a data set with a length, or call observe, begin_task and end_task by hand"
        )
    starts = range(0, len(rows), size)
    for start in starts[sharding.rank() :: sharding.ranks()]:
        with _same_generators():
            batch = collate([rows[i] for i in range(start, min(start + size, len(rows)))])
        yield {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}


@contextmanager
def _same_generators() -> Iterator[None]:
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 (what collators draw from)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])
