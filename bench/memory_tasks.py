"""What a method holds after two tasks and after fifty: `python bench/memory_tasks.py [METHOD ...] [--tasks 50]`.

A method may have options (`inclora:max_pairs=4`), and be full later than after the second task (`--first 6`).

Each method runs in a process of its own on a two-layer Llama of width 512 with a LoRA of r = 64 on q_proj and v_proj
(1 MiB in fp32), two steps of Adam a task, and prints a row of a Markdown table. tensors: the storages of every tensor
that Python can reach (parameters, buffers, what the method keeps, whatever else), once each; between two tasks, and
within one after its last step. peak: the highest resident memory within task two, and how far above it that of any
later task was. Python: what tracemalloc saw grow from the end of task two to that of the last. file: what
`method.save` writes, tensors and header (names and λ of the tasks are in that). begin + end: the median time that both
take together, of three tasks each.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
import tracemalloc
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import LoraConfig

import slao_kernels
from slao.methods import Method, make_method
from slao.methods.base import STATE_FILE
from slao.train import peak_memory_mb, reset_peak_memory
from slao_kernels.testing import tiny_model

METHODS = ("seqlora", "slao", "clora", "inclora")
FIRST = 2  # the first task before which everything is there: SLAO has no merge before the end of task one


def live_bytes() -> int:
    """Bytes of the distinct storages of all tensors that the collector knows."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of modules that look at their own deprecated attributes
        tensors = [found for found in gc.get_objects() if isinstance(found, torch.Tensor)]
    # A parameter that has had its gradient keeps the tensor alive from C++ only.
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def resident_mb() -> float | None:
    """Resident memory in MiB; None where there is no /proc."""
    path = Path("/proc/self/status")
    if not path.exists():
        return None
    return next(int(line.split()[1]) / 2**10 for line in path.read_text().splitlines() if line.startswith("VmRSS:"))


def train(method: Method, task: int, steps: int = 2) -> None:
    """Adam, a fresh one a task as in the papers, on rows that differ from task to task."""
    ids = (torch.arange(16)[None] * (task % 5 + 1) + 7 * task) % 128
    optimizer = torch.optim.Adam([p for p in method.model.parameters() if p.requires_grad], 1e-3)
    for _ in range(steps):
        loss = method.model(input_ids=ids, labels=ids).loss
        penalty = method.penalty()
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        optimizer.zero_grad()


def file_bytes(method: Method) -> dict[str, int]:
    """Of the saved state: the tensors, and the header before them."""
    with tempfile.TemporaryDirectory() as folder:
        method.save(folder)
        content = (Path(folder) / STATE_FILE).read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    return {"file tensors": len(content) - header, "file header": header}


def made(name: str, model: torch.nn.Module) -> Method:
    """`method`, or `method:option=value,...`."""
    method, _, given = name.partition(":")
    options = dict(each.split("=", 1) for each in given.split(",") if each)
    return make_method(method, model, **{key: json.loads(value) for key, value in options.items()})


def measure(name: str, tasks: int, first: int = FIRST) -> dict[str, Any]:
    """The figures of one method in this process. first: after that task; last: after task `tasks`."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = tiny_model("llama", hidden_size=512, num_key_value_heads=4)
    slao_kernels.patch(model, LoraConfig(r=64, target_modules=["q_proj", "v_proj"]))
    method = made(name, model)
    file_bytes(method)  # what is imported for it is no method's growth
    base = live_bytes()
    pair = sum(weight.nbytes for found in method.pairs for weight in (found.A, found.B))
    tracemalloc.start()
    found: dict[int, dict[str, Any]] = {}
    seconds: list[float] = []
    for task in range(1, tasks + 1):
        if task in (first, first + 1):
            reset_peak_memory()
        started = time.perf_counter()
        method.begin_task(f"task {task:03d}")
        between = time.perf_counter() - started
        train(method, task)
        within = live_bytes() if task in (first, tasks) else 0
        started = time.perf_counter()
        method.end_task()
        seconds.append(between + time.perf_counter() - started)
        if task in (first, tasks):
            # The peak first: what is measured and written here is not the method's.
            found[task] = {"peak": peak_memory_mb(), "within": within, "between": live_bytes(), "rss": resident_mb()}
            found[task] |= {"python": tracemalloc.get_traced_memory()[0], **file_bytes(method)}
    return {
        "method": name,
        "tasks": tasks,
        "adapter": pair,
        "before": base,
        "first": found[first] | {"seconds": median(seconds[first - 1 : first + 2])},
        "last": found[tasks] | {"seconds": median(seconds[-3:])},
    }


def in_a_fresh_process(name: str, tasks: int, first: int = FIRST) -> dict[str, Any]:
    """`measure` where nothing else has run."""
    command = [sys.executable, __file__, name, "--tasks", str(tasks), "--first", str(first), "--here"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr.strip()[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def row(figures: dict[str, Any]) -> str:
    """One method as a row of the table, in MiB; growth with its sign."""
    first, last = figures["first"], figures["last"]
    cells = [figures["method"]]
    for key, unit in (("between", 2**20), ("within", 2**20), ("file tensors", 2**20), ("file header", 2**10)):
        cells.append(f"{first[key] / unit:.3f} {(last[key] - first[key]) / unit:+.3f}")
    cells.append(f"{(last['python'] - first['python']) / 2**10:+.1f}")
    cells.append(f"{first['peak']:.1f} {last['peak'] - first['peak']:+.1f}")
    cells.append("–" if first["rss"] is None else f"{first['rss']:.1f} {last['rss'] - first['rss']:+.1f}")
    cells.append(f"{1e3 * first['seconds']:.1f} {1e3 * (last['seconds'] - first['seconds']):+.1f}")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("methods", nargs="*", default=METHODS)
    parser.add_argument("--tasks", type=int, default=50)
    parser.add_argument("--first", type=int, default=FIRST)
    parser.add_argument("--here", action="store_true", help="one method, in this process, as JSON")
    options = parser.parse_args()
    if options.tasks <= options.first:
        parser.error(f"--tasks must be more than {options.first}, with which the last one is compared")
    if options.here:
        print(json.dumps(measure(options.methods[0], options.tasks, options.first)))
        return
    print(f"After task {options.first}, and from there to task {options.tasks}; an adapter is 1 MiB\n")
    columns = "tensors, MiB|within a task|file: tensors, MiB|header, KiB|Python, KiB|peak, MiB|RSS, MiB|begin + end, ms"
    print(f"| method | {' | '.join(columns.split('|'))} |")
    print("|---" * 9 + "|")
    for name in options.methods:
        print(row(in_a_fresh_process(name, options.tasks, options.first)), flush=True)


if __name__ == "__main__":
    main()
