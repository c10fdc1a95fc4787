"""One of the processes."""

from __future__ import annotations

import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch import distributed as dist

from .cases import CASES
from .zero import MORE


def main(rank: int, ranks: int, folder: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    # What a launcher sets, for accelerate and DeepSpeed.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "DS_ACCELERATOR": "cpu"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    # A file instead of a port: nothing can clash. A hang is an error after a minute.
    dist.init_process_group("gloo", f"file://{folder / 'store'}", timedelta(seconds=60), world_size=ranks, rank=rank)
    for case in cases:
        try:
            found = {**CASES, **MORE}[case](rank, ranks, folder)
        except Exception:
            found = {"error": traceback.format_exc()}
        torch.save(found, folder / f"{case}.{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
