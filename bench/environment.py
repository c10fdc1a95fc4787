"""What a figure means nothing without: versions, device, clocks, commit, date. What cannot be had here is None."""

from __future__ import annotations

import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "numpy", "pytest-benchmark", "axolotl", "unsloth")
ASKED = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit")
ASKED += ("temperature.gpu", "persistence_mode", "utilization.gpu")


def environment(commit: str | None = None) -> dict[str, Any]:
    """commit: where there is no git, the commit that this is."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or git("rev-parse", "HEAD"),
        "changed since": None if (changed := git("status", "--porcelain")) is None else bool(changed),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "device": device(),
        "as found": card(),
    }


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def device() -> dict[str, Any] | None:
    """The first GPU as torch sees it."""
    import torch

    if not torch.cuda.is_available():
        return None
    seen = torch.cuda.get_device_properties(0)
    return {
        "name": seen.name,
        "count": torch.cuda.device_count(),
        "capability": f"{seen.major}.{seen.minor}",
        "multiprocessors": seen.multi_processor_count,
        "memory": seen.total_memory,
        "CUDA": torch.version.cuda,
        "ROCm": torch.version.hip,
    }


def card() -> dict[str, str] | None:
    """Driver, clocks and the like of the first GPU, as nvidia-smi gives them now. Reads only."""
    answer = said("nvidia-smi", "--id=0", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader")
    return None if answer is None else dict(zip(ASKED, (cell.strip() for cell in answer.split(",")), strict=False))


def git(*command: str) -> str | None:
    return said("git", "-C", str(ROOT), *command)


def said(*command: str) -> str | None:
    """What a command prints; None if there is no such command, or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
