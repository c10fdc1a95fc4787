"""Where a test runs, and what differs there: graphs, streams, memory. On a CPU each of them has its plain counterpart.

A test that takes the fixture `place` is one body for a GPU and a CPU: what it asserts is known to hold before it first
meets a GPU. Under TRITON_INTERPRET=1 the only place is the CPU with Triton's kernels interpreted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Place:
    device: str
    backend: str

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def compiler(self) -> str:
        """torch.compile's backend: on a CPU only what comes before the code is generated."""
        return "inductor" if self.on_gpu else "aot_eager"

    def captured(self, step: Callable[[], Any]) -> Callable[[], Any]:
        """`step` as a CUDA graph: each call replays it, and returns the tensors that the capture returned.

        On a CPU `step` itself. It runs three times before, on a side stream, as torch asks for.
        """
        side = self.side_stream()
        with side:
            for _ in range(3):
                step()
        if not self.on_gpu:
            return step
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = step()

        def replay() -> Any:
            graph.replay()
            return result

        return replay

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        """A stream of its own, ordered after what was queued before and before what is queued afterwards."""
        if not self.on_gpu:
            yield
            return
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            yield
        current.wait_stream(side)

    def busy(self) -> None:
        """Keep the current stream occupied for some milliseconds: what does not wait for it shows."""
        if self.on_gpu:
            torch.cuda._sleep(10_000_000)

    @contextmanager
    def no_waiting(self) -> Iterator[None]:
        """Within, whatever makes the host wait for the GPU raises."""
        if not self.on_gpu:
            yield
            return
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def autocast(self, enabled: bool) -> AbstractContextManager[Any]:
        return torch.autocast(self.device, torch.bfloat16) if enabled else nullcontext()

    def memory(self, call: Callable[[], Any]) -> tuple[int, int, Any]:
        """(bytes at the peak, bytes left at the end, both beyond what was there before; what `call` returned)."""
        if not self.on_gpu:
            return _memory_of_the_host(call)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before, result


def _memory_of_the_host(call: Callable[[], Any]) -> tuple[int, int, Any]:
    """By the events of torch's own profiler: every allocation and release of a tensor's storage."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events
    peak = now = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak, now, result


GPUS = [Place("cuda", "eager"), Place("cuda", "triton")]
PLACES = [Place("cpu", "triton")] if INTERPRETED else [Place("cpu", "eager"), *GPUS]
