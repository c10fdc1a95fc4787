"""The jobs of a run, one after another here or several at a time in processes of their own."""

from __future__ import annotations

import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from slao_kernels import sharding

from . import stopping, sums
from .checkpoint import read_state
from .methods.base import STATE_FILE
from .prepare import Prepared
from .similarity import Similarity
from .sweep import Job, Variant
from .train import Result, train

Outcome = Result | ValueError


def train_job(prepared: Prepared, job: Job, folder: Path, ready: Any = None) -> Outcome:
    """Train one job and export its adapter into `folder`; what ends its training (it diverged) is returned.

    ready: the (model, method, objective) of `Prepared.build`, where they are at hand.
    """
    from .progress import RunProgress

    model, method, objective = ready or prepared.build(job.method, job.seed, job.order)
    stream = prepared.ordered(job.seed, job.order)
    progress = RunProgress(job.title, ["joint"] if method.together else [task.name for task in stream.tasks])
    try:
        result = train(
            model,
            method,
            stream,
            objective,
            prepared.config_of(job.method),
            seed=job.seed,
            state_dir=folder / "state" / job.folder,
            callbacks=[progress],
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


def similarity_of(job: Job, folder: Path) -> dict[str, Any]:
    """The table of what the finished job recorded (setting `similarity`)."""
    place = folder / "state" / job.folder
    return Similarity.read(place, read_state(place / STATE_FILE)[1]["extra"].get("similarity")).table()


def in_processes(variants: list[Variant], jobs: list[Job], folder: Path, count: int) -> Iterator[tuple[Job, Outcome]]:
    """Train `jobs` in `count` processes, each with its share of the cores; yields them as they end."""
    context = multiprocessing.get_context("spawn")  # a forked torch hangs in its thread pool
    threads = max(1, torch.get_num_threads() // count)
    stop = context.Event()
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_begin, initargs=(threads, stop))
    try:
        running: dict[Future[str], Job] = {
            pool.submit(_work, json.dumps(variants[job.variant].settings), job, str(folder)): job for job in jobs
        }
        for future in as_completed(running):
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


def _begin(threads: int, stop: Any) -> None:
    stopping.obey(stop)
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
