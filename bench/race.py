"""Timing against peers: every round runs each contestant once, so that the machine's moods fall on all alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

import torch

# On a GPU a lap is so many calls or so many seconds, whichever comes first: the queue has to fill, as in training.
GPU_CALLS, GPU_SECONDS = 20, 0.02

# Whose calls `race` replays from a graph too: ours, and the floors.
IN_GRAPHS = ("ours", "triton", "copy floor", "in-place read+write")

Check = Callable[[str, bool, str], None]

# Of any race: rounds at most (--rounds; a single one only shows that all works), and seconds on a CPU (--seconds), in
# which a race has FEWEST rounds whatever they take.
at_most: int | None = None
seconds = 1.0
FEWEST = 3


def clock(function: Callable[[], object], device: str, calls: int = 1) -> float:
    """Seconds of so many calls, the device's work included; on a GPU by its own events, host time between them too."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    started = time.perf_counter()
    for _ in range(calls):
        function()
    return time.perf_counter() - started


def a_lap(function: Callable[[], object], device: str) -> int:
    """How many calls of `function` a lap has: on a GPU enough to hide the first one's way to the device."""
    if device != "cuda":
        return 1
    return max(1, min(GPU_CALLS, math.ceil(GPU_SECONDS / clock(function, device))))


def capped(rounds: int, one: float, device: str) -> int:
    """So many of `rounds` as there may be, of about `one` seconds each."""
    if device != "cuda":
        rounds = min(rounds, max(FEWEST, int(seconds / one)))
    return rounds if at_most is None else min(rounds, at_most)


def graphed(function: Callable[[], object]) -> Callable[[], None]:
    """`function` captured in a CUDA graph; a call replays it: the device's work without the launches' host time.

    Its inputs must stay where they are, and it must not wait for the device. Raises RuntimeError if it does.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def in_graphs(
    calls: dict[str, Callable[[], object]], names: Iterable[str], device: str
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """(those of `names` captured, as "NAME, graph"; who is left out, and why)."""
    if device != "cuda":
        return {}, {"graphs": "a CPU has none"}
    found: dict[str, Callable[[], object]] = {}
    left_out: dict[str, str] = {}
    for name in names:
        if name in calls:
            try:
                found[f"{name}, graph"] = graphed(calls[name])
            except RuntimeError as problem:
                left_out[f"{name}, graph"] = first_line(problem)
    return found, left_out


def first_line(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}".splitlines()[0]


def checker(benchmark: Any, device: str) -> Check:
    """check(contestant, fine, what): a fast wrong answer is no benchmark, so on a CPU one is an error.

    A GPU is lent for minutes: there what is wrong is written beside the figures, and the race goes on without a
    verdict. Reports leave such a bench out.
    """

    def check(name: str, fine: bool, what: str) -> None:
        if not fine:
            assert device == "cuda", f"{name} {what}"
            benchmark.extra_info.setdefault("wrong", {})[name] = what

    return check


def race(
    benchmark: Any, ours: Callable[[], object], peers: dict[str, Callable[[], object]], device: str, rounds: int = 9
) -> dict[str, float]:
    """Run `ours` under pytest-benchmark with every peer before each round; returns peer median / our median.

    On a GPU also ours and the floor replayed from CUDA graphs: without the host's time, which alone may be longer.
    A peer that raises there is left out; if it is of ours, it is wrong.
    The ratios, of graphs to that of ours, and the median milliseconds of all go into the benchmark's extra_info.
    """
    check, raised = checker(benchmark, device), {}
    started = time.perf_counter()
    ours()
    for name, peer in peers.items():
        try:
            peer()
        except Exception as problem:
            if device != "cuda":
                raise
            raised[name] = first_line(problem)
            check(name, name not in IN_GRAPHS, raised[name])
    peers = {name: peer for name, peer in peers.items() if name not in raised}
    rounds = capped(rounds, time.perf_counter() - started, device)
    graphs, without = in_graphs({"ours": ours, **peers}, IN_GRAPHS, device)
    peers |= graphs
    times: dict[str, list[float]] = {name: [] for name in peers}
    mine: list[float] = []
    counts = {name: a_lap(peer, device) for name, peer in (peers | {"ours": ours}).items()}

    def lap(name: str, function: Callable[[], object]) -> float:
        return clock(function, device, counts[name]) / counts[name]

    def run_peers() -> None:
        for name, peer in peers.items():
            times[name].append(lap(name, peer))

    benchmark.pedantic(lambda: mine.append(lap("ours", ours)), setup=run_peers, rounds=rounds, iterations=1)
    medians = {"ours": median(mine)} | {name: median(values) for name, values in times.items()}
    ratios = {}
    for name in peers:
        against = "ours, graph" if name in graphs and "ours, graph" in graphs else "ours"
        if name != against:
            ratios[f"{name} / {against}"] = medians[name] / medians[against]
    info = benchmark.extra_info
    info |= {"ours_ms": medians["ours"] * 1e3, **{f"{name} ms": medians[name] * 1e3 for name in peers}}
    info |= ratios | machine(device) | {"left out": info.get("left out", {}) | raised | without}
    return {name: medians[name] / medians["ours"] for name in peers}


def triton_too(
    op: str, device: str, call: Callable[[str], object]
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """(a contestant that is `call` with the backend "triton", why it is left out): where "auto" takes another on a GPU.

    call: takes the backend's name. On a CPU Triton only interprets, which is no contest.
    """
    from slao_kernels import dispatch

    reason = dispatch.why_not(op, "triton", device) if device == "cuda" else "Triton only interprets on a CPU"
    if reason is not None:
        return {}, {"triton": reason}
    name = dispatch.choose(op, device)
    if name == "triton":
        return {}, {"triton": "it is ours here"}
    return {"triton": lambda: call("triton")}, {}


def machine(device: str) -> dict[str, Any]:
    """What a figure means nothing without."""
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {"device": name, "threads": torch.get_num_threads()}


Medians = dict[str, float]  # contestant -> seconds a call


def interleave(
    benchmark: Any,
    contestants: dict[str, Callable[[], object]],
    device: str,
    rounds: int,
    iterations: int = 1,
    best_of: int = 1,
) -> list[Medians]:
    """Run `best_of` whole races, one after another; "ours" is the contestant that pytest-benchmark sees.

    iterations: calls timed together, where one is too short for the clock; pytest-benchmark's own table shows all of
    them as one. The others start each round with another of them, so that none always finds the same one's cache.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    others = [name for name in contestants if name != "ours"]

    def lap(name: str) -> None:
        times[name].append(clock(contestants[name], device, iterations) / iterations)

    def run_others() -> None:
        for name in others:
            lap(name)
        others.append(others.pop(0))

    for name in contestants:
        lap(name)  # warm-up
    if device == "cuda":
        for name in contestants:
            lap(name)  # by now everything is compiled
        fastest = min(laps[-1] for laps in times.values())
        iterations = max(iterations, min(GPU_CALLS, math.ceil(GPU_SECONDS / fastest)))
    one = iterations * best_of * sum(laps[-1] for laps in times.values())
    rounds = capped(rounds, one, device)
    for laps in times.values():
        laps.clear()
    benchmark.pedantic(lambda: lap("ours"), setup=run_others, rounds=rounds * best_of, iterations=1)
    return [
        {name: median(laps[start : start + rounds]) for name, laps in times.items()}
        for start in range(0, rounds * best_of, rounds)
    ]


def best(races: list[Medians], figure: Callable[[Medians], float]) -> float:
    """The lowest value that a race gave. Both sides of a ratio come from one race."""
    return min(figure(race) for race in races)


def record(benchmark: Any, races: list[Medians], floor: str, device: str) -> None:
    """Put milliseconds and the ratio to the contestant `floor` of each contestant's best race into extra_info."""
    info = benchmark.extra_info
    for name in races[0]:
        # The floor itself has the ratio 1 in all of them.
        chosen = min(races, key=lambda race: (race[name] / race[floor], race[name]))
        info[f"{name} ms"] = chosen[name] * 1e3
        if name != floor:
            info[f"{name} / {floor}"] = chosen[name] / chosen[floor]
    info |= {"ours_ms": info["ours ms"], **machine(device)}
    info["races"] = [{name: seconds * 1e3 for name, seconds in race.items()} for race in races]
