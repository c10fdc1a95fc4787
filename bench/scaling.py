"""How time grows with tokens, rank, layers and tasks: `python bench/scaling.py [AXIS ...] [--out FOLDER]`.

Per axis a Markdown table of medians in ms, with the exponent e of time ~ size^e by least squares over the larger half
of the sizes (0: time does not grow, 1: proportionally), and what each contestant's time is over ours at the largest.

    tokens, rank   a LoRA layer of 1024 x 1024, forward and backward: ours, PEFT, the frozen layer (dx alone)
    layers         the merge and the re-basing between two tasks, layers of 1024 x 1024, r = 16: our two calls; foreach
                   and a loop of QRs
    tasks          end_task + begin_task, r = 8, two layers: SLAO, and methods that keep a pair a task or a fixed number

In a round everybody is called once at one size; nothing else should run. CPUs: --threads, one unless said.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import contestants
import tables
import torch
from cpuinfo import get_cpu_info
from environment import environment
from peft import LoraConfig
from race import clock
from scrub import device_word
from torch import nn

import slao_kernels
from slao.methods import Method, make_method
from slao_kernels.testing import tiny_model

WIDTH = 1024
Times = dict[str, dict[int, float]]  # contestant -> size -> seconds
SIZES = {"tokens": (64, 256, 1024, 4096, 8192), "rank": (4, 16, 64, 256), "layers": (8, 32, 128, 224)}
TASKS = (2, 5, 10, 20, 50)
METHODS = ("slao", "slao:merge=product", "incslao", "inclora", "opcm")


def raced(calls: dict[str, Callable[[], object]], device: str, rounds: int) -> dict[str, float]:
    """Median seconds of each, called in turn."""
    laps: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds + 1):
        for name, call in calls.items():
            laps[name].append(clock(call, device))
        if index == 0:
            for lap in laps.values():
                lap.clear()  # the warm-up
    return {name: median(lap) for name, lap in laps.items()}


def layer(tokens: int, r: int, device: str, rounds: int) -> dict[str, float]:
    torch.manual_seed(0)
    x = torch.randn(tokens, WIDTH, device=device, requires_grad=True)
    dy = torch.randn(tokens, WIDTH, device=device)
    frozen = nn.Sequential(nn.Linear(WIDTH, WIDTH)).to(device).requires_grad_(False)
    models = {"PEFT": contestants.adapted(contestants.twin(frozen), ["0"], r=r)}
    models["ours"] = contestants.fused(contestants.twin(models["PEFT"]))

    def step(model: nn.Module) -> None:
        model(x).backward(dy)
        x.grad = None

    named = {"ours": models["ours"], "PEFT": models["PEFT"], "frozen": frozen}
    return raced({name: lambda model=model: step(model) for name, model in named.items()}, device, rounds)


def between(layers: int, device: str, rounds: int) -> dict[str, float]:
    torch.manual_seed(0)
    As = [torch.randn(16, WIDTH, device=device) for _ in range(layers)]
    Bs = [torch.randn(WIDTH, 16, device=device) for _ in range(layers)]
    merged, theirs = [B.clone() for B in Bs], [B.clone() for B in Bs]

    def ours() -> None:
        slao_kernels.scaled_merge_(merged, Bs, 0.5)
        slao_kernels.orthogonal_init_(As)

    def loop() -> None:
        torch._foreach_lerp_(theirs, Bs, 0.5)
        for A in As:
            Q, R = torch.linalg.qr(A.T)
            A.copy_((Q * R.diagonal().sign()).T)

    return raced({"ours": ours, "qr loop, _foreach_lerp_": loop}, device, rounds)


def of_tasks(label: str, device: str) -> dict[int, float]:
    """Seconds of end_task and the next begin_task after so many tasks."""
    name, _, given = label.partition(":")
    options: dict[str, Any] = dict(option.split("=") for option in given.split(",") if option)
    model = tiny_model("llama", hidden_size=256, intermediate_size=512, num_hidden_layers=1).to(device)
    slao_kernels.patch(model, LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    method: Method = make_method(name, model, **options)
    found: dict[int, list[float]] = {size: [] for size in TASKS}
    generator = torch.Generator(device).manual_seed(0)
    method.begin_task("1")
    for task in range(1, max(TASKS) + 2):
        with torch.no_grad():
            for pair in method.pairs:
                for part in pair.parameters:
                    part.add_(torch.randn(part.shape, generator=generator, device=device), alpha=0.02)
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        method.end_task()
        method.begin_task(str(task + 1))
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        for size in TASKS:
            if abs(task - size) <= 1:  # its neighbours too: one call may meet another process
                found[size].append(seconds)
    return {size: median(values) for size, values in found.items()}


def measure(axis: str, device: str, rounds: int) -> Times:
    if axis == "tasks":
        return {label: of_tasks(label, device) for label in METHODS}
    at = {
        "tokens": lambda size: layer(size, 16, device, rounds),
        "rank": lambda size: layer(1024, size, device, rounds),
        "layers": lambda size: between(size, device, rounds),
    }[axis]
    points = {size: at(size) for size in SIZES[axis]}
    return {name: {size: of[name] for size, of in points.items()} for name in next(iter(points.values()))}


def exponent(times: dict[int, float]) -> float:
    """e of time ~ size^e, by least squares over the larger half of the sizes (three of five)."""
    points = sorted(times.items())[(len(times) - 1) // 2 :]
    xs, ys = ([math.log(value) for value in side] for side in zip(*points, strict=True))
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def table(axis: str, times: Times) -> str:
    sizes = sorted(next(iter(times.values())))
    first = next(iter(times.values()))[sizes[-1]]
    body = [
        [
            name,
            *(tables.digits(of[size] * 1e3) for size in sizes),
            f"{exponent(of):.2f}",
            tables.digits(of[sizes[-1]] / first),
        ]
        for name, of in times.items()
    ]
    return tables.markdown([f"{axis}, ms", *map(str, sizes), "exponent", f"over {next(iter(times))}"], body)


def draw(found: dict[str, Times], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(found), figsize=(4.2 * len(found), 3.6), squeeze=False, layout="constrained")
    for panel, (axis, times) in zip(panels[0], found.items(), strict=True):
        for name, of in times.items():
            panel.loglog(list(of), [seconds * 1e3 for seconds in of.values()], marker="o", label=name)
        panel.set(xlabel=axis, ylabel="ms, median", title=f"time by {axis}")
        panel.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def keep(stem: Path, on: str, threads: int, about: dict[str, Any], found: dict[str, Times], text: str) -> None:
    """The page, its plot and the seconds of every point, as stem.md, stem.png and stem.json. on: the device."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    versions = {name: about["versions"][name] for name in ("torch", "triton", "peft") if about["versions"][name]}
    stem.with_suffix(".json").write_text(
        json.dumps({"device": on, "threads": threads, "versions": versions, "seconds": found}, indent=1) + "\n", "utf-8"
    )
    told = ", ".join(f"{name} {number}" for name, number in versions.items())
    head = (
        f"# How time grows: {on}, {about['date'][:10]}\n\nWritten by `bench/scaling.py`, whose head says what is timed"
    )
    page = f"{head}; {threads} thread{'s' * (threads > 1)}, {told}.\n\n{text}\n\n![Time by size]({stem.name}.png)\n"
    stem.with_suffix(".md").write_text(page, "utf-8")
    draw(found, stem.with_suffix(".png"))


def main() -> int:
    axes = [*SIZES, "tasks"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("axes", nargs="*", metavar="AXIS", help=", ".join(axes))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="a folder, for <date>-<device>.json (seconds), its .md and its .png")
    options = parser.parse_args()
    if unknown := sorted(set(options.axes) - set(axes)):
        parser.error(f"no such axis: {', '.join(unknown)}; there are {', '.join(axes)}")
    torch.set_num_threads(options.threads)
    about = environment()
    found = {axis: measure(axis, options.device, options.rounds) for axis in options.axes or axes}
    text = "\n\n".join(table(axis, times) for axis, times in found.items())
    print(text)
    if options.out is not None:
        on = about["device"]["name"] if options.device == "cuda" else get_cpu_info()["brand_raw"]
        keep(options.out / f"{about['date'][:10]}-{device_word(on)}", on, options.threads, about, found, text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
