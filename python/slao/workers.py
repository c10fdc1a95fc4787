"""The jobs of a run, one after another here or several at a time in processes of their own."""

from __future__ import annotations

import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from slao_kernels import sharding

from . import stopping, sums
from .checkpoint import read_head, read_state
from .methods.base import STATE_FILE
from .prepare import Prepared
from .result import Result
from .similarity import Similarity
from .sweep import Job, Variant
from .train import train

Outcome = Result | ValueError
_LOOK_EVERY = 1.0  # seconds; a task takes many


def train_job(
    prepared: Prepared,
    job: Job,
    folder: Path,
    ready: Any = None,
    keep: Callable[[], object] | None = None,
    say: Callable[[str], object] = print,
) -> Outcome:
    """Train one job and export its adapter into `folder`; what ends its training (it diverged) is returned.

    ready: the (model, method, objective) of `Prepared.build`, where they are at hand. keep: is called after each task,
    when that is saved. say: what a line is printed with.
    """
    from .progress import RunProgress, Work

    model, method, objective = ready or prepared.build(job.method, job.seed, job.order)
    stream = prepared.ordered(job.seed, job.order)
    config = prepared.config_of(job.method)
    progress = RunProgress(job.title, Work.of(stream, config, method.together), say)

    def after(index: int, result: Result) -> None:
        progress.on_task(index, result)
        if keep is not None:
            keep()

    try:
        result = train(
            model,
            method,
            stream,
            objective,
            config,
            seed=job.seed,
            state_dir=folder / "state" / job.folder,
            callbacks=[progress],
            on_start=progress.on_start,
            on_score=progress.on_score,
            on_task=after,
            similarity=Similarity() if prepared.settings["similarity"] else None,
        )
    except ValueError as error:
        return error
    finally:
        progress.close()
    exported = folder / "adapters" / job.folder
    method.save_pretrained(exported)
    sharding.on_first(lambda: sums.write_sums(exported))
    return result


def finished(job: Job, folder: Path) -> Result | None:
    """The result of a job that an earlier call trained to its end and exported, else None: of one that is trained, but
    whose adapter is not whole, too. ValueError where what was saved is damaged."""
    place = folder / "state" / job.folder
    if not (place / STATE_FILE).is_file():
        return None
    extra: dict[str, Any] = read_state(place / STATE_FILE)[1]["extra"]
    if extra.get("similarity") is not None:
        Similarity.read(place, extra["similarity"])
    result = Result(**extra["result"])
    return result if result.finished and sums.is_whole(folder / "adapters" / job.folder) else None


def so_far(job: Job, folder: Path) -> Result | None:
    """The result of a job, finished or not, as its last task left it: read from the head of its state alone."""
    path = folder / "state" / job.folder / STATE_FILE
    head = None if not path.is_file() else read_head(path)
    return None if head is None else Result(**head["extra"]["result"])


def similarity_of(job: Job, folder: Path) -> dict[str, Any]:
    """The table of what the finished job recorded (setting `similarity`)."""
    place = folder / "state" / job.folder
    return Similarity.read(place, read_state(place / STATE_FILE)[1]["extra"].get("similarity")).table()


def in_processes(
    variants: list[Variant], jobs: list[Job], folder: Path, count: int, keep: Callable[[], object]
) -> Iterator[tuple[Job, Outcome]]:
    """Train `jobs` in `count` processes, each with its share of the cores; yields them as they end.

    keep: is called when one of them has saved a task.
    """
    context = multiprocessing.get_context("spawn")  # a forked torch hangs in its thread pool
    threads = max(1, torch.get_num_threads() // count)
    stop = context.Event()
    pool = ProcessPoolExecutor(
        count, mp_context=context, initializer=_begin, initargs=(threads, stop, sys.stdout is sys.stderr)
    )
    try:
        running: dict[Future[str], Job] = {
            pool.submit(_work, json.dumps(variants[job.variant].settings), job, str(folder)): job for job in jobs
        }
        for future in _ended(running, folder, keep):
            job = running[future]
            try:
                content = json.loads(future.result())
            except BrokenProcessPool:
                raise ValueError(
                    f"a training process died, perhaps for lack of memory, while {job.title} or another one ran: "
                    "run again with --resume and fewer --jobs"
                ) from None
            yield job, Result(**content) if "tasks" in content else ValueError(content["error"])
    except BaseException:
        stop.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _ended(running: dict[Future[str], Job], folder: Path, keep: Callable[[], object]) -> Iterator[Future[str]]:
    """Each as it ends. Meanwhile their states are looked at: a pipe could block, half written by one that dies."""
    waiting, seen = set(running), _saved_at(running.values(), folder)
    while waiting:
        done, waiting = wait(waiting, timeout=_LOOK_EVERY, return_when=FIRST_COMPLETED)
        yield from done
        now = _saved_at(running.values(), folder)
        if now != seen and waiting:
            keep()
        seen = now


def _saved_at(jobs: Iterable[Job], folder: Path) -> dict[str, int]:
    paths = {job.folder: folder / "state" / job.folder / STATE_FILE for job in jobs}
    return {name: path.stat().st_mtime_ns for name, path in paths.items() if path.is_file()}


def _begin(threads: int, stop: Any, aside: bool) -> None:
    """aside: what is printed goes to standard error, as it does in the process that started this one."""
    stopping.obey(stop)
    if aside:
        sys.stdout = sys.stderr
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TQDM_DISABLE"] = "1"  # the lines of several processes would overwrite each other
    torch.set_num_threads(threads)
    quiet()


def _end_with_parent() -> None:
    """A killed run must not go on in its children: who resumes it would meet them in its folder."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


_prepared: dict[str, Prepared] = {}


def _work(settings: str, job: Job, folder: str) -> str:
    """JSON of the result, or of what ended it. The last settings' data stay loaded: the next job often has the same."""
    if settings not in _prepared:
        _prepared.clear()
        _prepared[settings] = Prepared(json.loads(settings))
    try:
        outcome = train_job(_prepared[settings], job, Path(folder))
    except stopping.Stopped as stop:
        os._exit(stop.exit_code)
    return json.dumps({"error": str(outcome)} if isinstance(outcome, ValueError) else vars(outcome))


def quiet() -> Callable[[], None]:
    """Errors only, from transformers and the kernels; returns what takes that back."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # one bar per run is enough; loading takes a second
    loggers = [logging.getLogger(name) for name in ("transformers", "slao_kernels")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)

    def again() -> None:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

    return again
