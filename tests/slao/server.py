"""Runs `slao` commands in forks of one process that has imported everything, and strikes each at a chosen event.

A process of its own takes ten seconds and more to import what a fork has at once. A script: one JSON array a line on
stdin, of jobs that run at the same time (see `start`), one of their answers on stdout.

An event is a moment at which a process may die or a disk may fill: before and after every fsync and rename, every step,
every beginning and end of a task, every save, export and figure. They are counted, so that "the 17th" is the same
moment in every run.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import resource
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn


class Events:
    """Counts events; `strike` is called at number `at`, from 1."""

    def __init__(self, at: int | None, strike: Callable[[str], None]) -> None:
        self.seen: list[str] = []
        self.at, self.strike = at, strike

    def note(self, name: str) -> None:
        self.seen.append(name)
        if len(self.seen) == self.at:
            self.strike(name)

    def around(self, owner: Any, attribute: str, name: str, after: bool = True) -> None:
        """Note the event before, and after, each call of `owner.attribute`."""
        inner = getattr(owner, attribute)

        def noted(*args: Any, **kwargs: Any) -> Any:
            path = str(args[0]) if args else ""
            if path.startswith("/proc/") or (name == "mkdir" and os.path.isdir(path)):  # takes no room on a disk
                return inner(*args, **kwargs)
            self.note(f"{name} before")
            result = inner(*args, **kwargs)
            if after:
                self.note(f"{name} after")
            return result

        setattr(owner, attribute, noted)

    def install(self) -> None:
        import pathlib

        import matplotlib.figure
        import transformers

        from slao import report
        from slao.methods.base import Method

        self.around(os, "fsync", "fsync", after=False)
        self.around(os, "replace", "replace")
        self.around(os, "mkdir", "mkdir", after=False)
        self.around(pathlib.Path, "write_text", "write", after=False)
        self.around(pathlib.Path, "write_bytes", "write", after=False)
        self.around(transformers.Trainer, "training_step", "step")
        for name in ("begin_task", "end_task", "save", "save_pretrained"):
            self.around(Method, name, name)
        self.around(matplotlib.figure.Figure, "savefig", "figure")
        self.around(report, "page", "page")


def start(job: dict[str, Any]) -> int:
    """Fork, run the job in the child; the child's number.

    argv: of `slao`; or of the Python module `module`. environment: variables to set. folder: where its output goes. at,
    how: the event, and "kill", "full" (OSError: no space left), or signals by their names, as in "SIGINT+SIGINT".
    after: kill so many seconds after the start instead. fsize: of the largest file, in bytes. modes: obey file modes
    even as root. threads: of torch."""
    child = os.fork()
    if child == 0:
        _child(job)
    return child


def end(job: dict[str, Any], child: int, started: float) -> dict[str, Any]:
    """Wait for it; the answer."""
    if "after" in job:
        time.sleep(job["after"])  # the moment is meant to be any
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    read = {name: _read(os.path.join(job["folder"], name)) for name in ("out", "err")}
    events = json.loads(_read(os.path.join(job["folder"], "events")) or "[]")
    return {"code": code, "events": events, "seconds": time.monotonic() - started, **read}


def _read(path: str) -> str:
    if not os.path.exists(path):
        return ""
    with open(path, encoding="utf-8") as file:
        return file.read()


def _child(job: dict[str, Any]) -> NoReturn:
    code = 70
    try:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(os.path.join(job["folder"], name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        path = os.path.join(job["folder"], "events")
        if os.path.exists(path):
            os.unlink(path)
        if job.get("modes"):
            obey_modes()
        os.environ.update(job.get("environment", {}))
        import torch

        torch.set_num_threads(job.get("threads", 1))
        if "module" in job:
            sys.argv = [job["module"], *map(str, job["argv"])]
            runpy.run_module(job["module"], run_name="__main__")
            code = 0
        else:
            code = _slao(job, path)
    except BaseException:  # what the shell would see as well
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _slao(job: dict[str, Any], path: str) -> int:
    """The command, struck as the job has it; its exit code, and into `path` its events."""
    from slao.cli import main

    how = job.get("how", "kill")

    def strike(name: str) -> None:
        if how == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for one in how.split("+"):
            os.kill(os.getpid(), signal.SIGKILL if one == "kill" else getattr(signal, one))

    events = Events(job.get("at"), strike)
    events.install()
    if "fsize" in job:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["fsize"], resource.RLIM_INFINITY))
    code = main(job["argv"])
    if "fsize" in job:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    seen = list(events.seen)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(seen, file)
    return code


def obey_modes() -> None:
    """Drop the capabilities by which root writes into read-only folders."""
    if os.getuid() != 0:
        return
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread
    data = (ctypes.c_uint32 * 6)()  # twice effective, permitted, inheritable
    if libc.capget(header, data) != 0:
        raise OSError(ctypes.get_errno(), "capget")
    for index in (0, 1):
        data[index] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    if libc.capset(header, data) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def serve() -> None:
    import coarse
    import matplotlib
    import peft  # noqa: F401
    import torch
    import transformers

    matplotlib.use("Agg")
    transformers.BertModel  # noqa: B018 (loads it)
    transformers.Trainer  # noqa: B018
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    from slao import cli, report, run, trainer, workers  # noqa: F401
    from slao.merging import merge_adapters  # noqa: F401

    coarse.figures()
    gc.collect()
    gc.freeze()  # Trainer runs the collector once a task, over all that was imported

    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run_checked(json.loads(line))), file=answers, flush=True)


def run_checked(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    try:
        started = time.monotonic()
        children = [start(job) for job in jobs]
        return [end(job, child, started) for job, child in zip(jobs, children, strict=True)]
    except Exception:  # the test prints it; without an answer it would wait
        return [{"code": 71, "events": [], "seconds": 0.0, "out": "", "err": traceback.format_exc()}] * len(jobs)


if __name__ == "__main__":
    serve()
