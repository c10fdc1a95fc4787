"""`slao run` in several processes, as torchrun starts them: all train each task together, the first one writes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from slao_kernels import sharding


@contextmanager
def joined() -> Iterator[None]:
    """Within the block the processes of a launcher (torchrun, accelerate launch) are one group, each on its own GPU
    where there are GPUs; the others than the first log errors only. Nothing happens in a process that was not launched
    so, or that is in a group already."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "LOCAL_RANK" not in os.environ or sharding.ranks() > 1:
        yield
        return
    import torch
    from torch import distributed as dist

    local = int(os.environ["LOCAL_RANK"])
    if local < torch.cuda.device_count():
        torch.cuda.set_device(local)
    dist.init_process_group("cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo")
    if not sharding.is_first():
        logging.getLogger().setLevel(logging.ERROR)
    yield
    dist.destroy_process_group()  # not after an error: the launcher ends the others, which may wait for this one


def silent(*values: object) -> None:
    """What the others print with."""
