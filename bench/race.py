"""Timing against peers: every round runs each contestant once, so that the machine's moods fall on all alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch


def clock(function: Callable[[], object], device: str) -> float:
    """Seconds of one call, the device's work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def race(
    benchmark: Any, ours: Callable[[], object], peers: dict[str, Callable[[], object]], device: str, rounds: int = 9
) -> dict[str, float]:
    """Run `ours` under pytest-benchmark with every peer before each round; returns peer median / our median.

    The ratios, and the median milliseconds of all, go into the benchmark's extra_info (and so into its JSON).
    """
    times: dict[str, list[float]] = {name: [] for name in peers}
    mine: list[float] = []

    def run_peers() -> None:
        for name, peer in peers.items():
            times[name].append(clock(peer, device))

    for function in (ours, *peers.values()):
        function()
    benchmark.pedantic(lambda: mine.append(clock(ours, device)), setup=run_peers, rounds=rounds, iterations=1)
    us = median(mine)
    ratios = {name: median(values) / us for name, values in times.items()}
    benchmark.extra_info |= {
        "ours_ms": us * 1e3,
        **{f"{name} ms": median(values) * 1e3 for name, values in times.items()},
        **{f"{name} / ours": ratio for name, ratio in ratios.items()},
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
    }
    return ratios
