"""`slao run`: every variant and method on every seed and order over the same data, into one results.json and report."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from slao_kernels import sharding

from . import checkpoint, places, preview, ranks, sums
from .identity import AnotherRun, Identity, differences, flat, identity
from .prepare import Prepared, check_settings
from .reading import read_json
from .result import Result
from .sweep import Job, jobs, variants
from .workers import Outcome, finished, in_processes, similarity_of, so_far, train_job

Say = Callable[[str], None]
IDENTITY = "identity.json"
_NOT_THE_MODELS = ("train", "train_rows", "train_fraction", "test_rows")


class Run:
    """One `slao run` in `folder`; `settings` are those of `settings.complete`.

    Everything that can be wrong with settings, data and model is checked in the constructor, before a file is
    written. `resume`: continue in a folder that an interrupted run with the same settings left; `overwrite`: empty it.
    processes: how many trainings run at a time, each in a process of its own where it is more than one.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        folder: Path,
        *,
        resume: bool = False,
        overwrite: bool = False,
        processes: int = 1,
        say: Say = print,
    ) -> None:
        self.settings, self.folder, self.processes = settings, folder, processes
        self.say = say if sharding.is_first() else ranks.silent
        if processes < 1:
            raise ValueError(f"the number of processes must be at least 1, not {processes}")
        if processes > 1 and sharding.ranks() > 1:
            raise ValueError("a launcher's processes train each task together: run without --jobs under torchrun")
        self._resume, self._overwrite = resume, overwrite and not resume
        self.notes: list[str] = []
        # What settings and folder alone say comes before data and model are loaded, which takes minutes.
        self.identity: Identity = {"settings": flat(settings)}
        sharding.on_first(self._check_free)
        sharding.on_first(self._check_folder)
        sharding.on_first(self._check_same_run)
        self.variants = variants(settings)
        self.jobs = list(jobs(settings))
        names = [job.folder for job in self.jobs]
        if clash := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two methods or variants would both be called {clash!r}: give them other names")
        for name in names:
            places.check_label(name)
        for variant in self.variants:
            check_settings(variant.settings)
        self.prepared = [Prepared(variant.settings) for variant in self.variants]
        # A first model of every kind: methods and objective raise here what they object to in it.
        self._ready: dict[Job, Any] = {}
        first, *others = settings["methods"]
        tried: set[str] = set()
        for index, prepared in enumerate(self.prepared):
            # How long and on how many rows it trains is nothing that they could object to.
            own = {key: value for key, value in prepared.settings.items() if key not in _NOT_THE_MODELS}
            if (key := json.dumps(own, sort_keys=True)) in tried:
                continue
            tried.add(key)
            job = next(job for job in self.jobs if job.variant == index and job.method == first)
            built = prepared.build(job.method, job.seed, job.order, others)
            self.notes += [note for note in built[2].notes if note not in self.notes]
            if index == 0:
                self._ready[job] = built
                pairs = built[1].pairs
        self.report = self.prepared[0].report
        self.failed: dict[str, str] = {}
        self._finished: dict[Job, Result] = {}
        self.identity = identity(settings, self.variants, self.prepared, pairs)
        sharding.on_first(self._check_same_run)

    def _check_free(self) -> None:
        """That no other process works in it."""
        places.check_folder(self.folder)
        places.check_free(self.folder)

    def _check_folder(self) -> None:
        """That it can be written into, and holds nothing, or a run that is to be continued or emptied."""
        places.check_folder(self.folder)
        occupied = _occupied(self.folder)
        if occupied and not (self._resume or self._overwrite):
            raise ValueError(
                f"{self.folder} is not empty: pass --resume to continue it, or --overwrite to start afresh"
            )
        known = (self.folder / "settings.json").is_file()
        if occupied and self._overwrite and not known:
            raise ValueError(f"{self.folder} is no run's folder, so it is not emptied: choose another --name or --runs")
        if occupied and self._resume and not known:
            raise ValueError(f"{self.folder} holds no settings.json, so there is no run to resume; choose another name")

    def _check_same_run(self) -> None:
        path = self.folder / IDENTITY
        if not self._resume or not _occupied(self.folder):
            return
        try:
            if path.is_file():
                before = sums.unsealed(read_json(path), path, always=True)
            else:
                before = {"settings": flat(read_json(self.folder / "settings.json"))}
            other, versions = differences(before, self.identity)
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{self.folder}: its record is damaged ({error}); --overwrite starts afresh") from None
        if other:
            raise AnotherRun([f"{self.folder} holds another run; choose another --name, or --overwrite it:", *other])
        notes = [f"another version, results may differ in their last bits: {line}" for line in versions]
        self.notes += [note for note in notes if note not in self.notes]

    def about(self, rows: bool = False) -> str:
        """What it will do; rows: and the first row of each task as the model sees it. Before `execute`."""
        job, built = next(iter(self._ready.items()))
        prepared = self.prepared[job.variant]
        told = [preview.block(prepared, job, built, self.jobs, self.folder), *self.notes]
        if rows:
            told.append(preview.first_rows(prepared.ordered(job.seed, job.order), built[2]))
        return "\n".join(told)

    def execute(self) -> dict[str, Any]:
        """Train everything that is not trained yet; returns what results.json holds.

        A training that ends with a ValueError (it diverged) does not stop the others: it is reported, and left out
        of the results. ValueError when there is no result at all, or another process is at work in the folder.
        """
        with places.locked(self.folder) if sharding.is_first() else nullcontext():
            return self._execute()

    def _execute(self) -> dict[str, Any]:
        sharding.on_first(self._prepare_folder)
        self.say(self.about())
        results = self._finished
        for number, (job, outcome) in enumerate(self._outcomes(), start=1):
            where = f"[{number}/{len(self.jobs)}] " if len(self.jobs) > 1 else ""
            if isinstance(outcome, ValueError):
                self.failed[job.title] = str(outcome)
                self.say(f"{where}{job.title} failed: {outcome}")
                continue
            results[job] = outcome
            summary = {key: value for key, value in outcome.summary().items() if value is not None}
            scores = ", ".join(f"{key.replace('_', ' ')} {value:.3f}" for key, value in summary.items())
            self.say(f"{where}{job.title}: {scores}")
        if not results:
            raise ValueError(next(iter(self.failed.values())))
        content = self._results(results)
        sharding.on_first(lambda: self._write(content))
        return content

    def _write(self, content: dict[str, Any]) -> None:
        checkpoint.write_json(self.folder / "results.json", sums.sealed(content))

    def _write_so_far(self) -> None:
        """results.json after a task: what is finished, and what there is of the rest."""
        others = (job for job in self.jobs if job not in self._finished and job.title not in self.failed)
        begun = {job: result for job in others if (result := so_far(job, self.folder)) is not None}
        if results := self._finished | begun:
            self._write(self._results(results))

    def _prepare_folder(self) -> None:
        self._check_folder()  # again: another process may have been here until now
        self._check_same_run()
        checkpoint.remove_temporaries(self.folder)
        if self._overwrite:
            # Settings go last, and nothing goes in part: a process that dies here leaves a run's folder.
            for path in sorted(self.folder.iterdir(), key=lambda path: path.name != "state"):
                if path.name not in ("settings.json", places.LOCK):
                    os.replace(path, self.folder / f".{path.name}{checkpoint.TEMPORARY}")
            checkpoint.remove_temporaries(self.folder)
        if not (self.folder / IDENTITY).is_file():
            checkpoint.write_json(self.folder / IDENTITY, sums.sealed(self.identity))
        checkpoint.write_json(self.folder / "settings.json", self.settings)

    def _outcomes(self) -> Iterator[tuple[Job, Outcome]]:
        missing = []
        for job in self.jobs:
            if (result := sharding.on_first(partial(finished, job, self.folder))) is not None:
                yield job, result
            else:
                missing.append(job)
        if self.processes > 1:
            self._ready.clear()
            yield from in_processes(self.variants, missing, self.folder, self.processes, self._write_so_far)
        else:
            keep = partial(sharding.on_first, self._write_so_far)
            for job in missing:
                ready = self._ready.pop(job, None)
                yield job, train_job(self.prepared[job.variant], job, self.folder, ready, keep, self.say)

    def _results(self, results: dict[Job, Result]) -> dict[str, Any]:
        from slao_kernels.environment import versions

        grouped: dict[str, list[Job]] = {}
        for job in (job for job in self.jobs if job in results):
            grouped.setdefault(job.label, []).append(job)
        order = {job.label: (job.variant, list(self.settings["methods"]).index(job.method)) for job in results}
        methods, throughput = {}, {}
        for label in sorted(grouped, key=order.__getitem__):
            own = grouped[label]
            runs = [results[job] for job in own]
            summaries = [run.summary() for run in runs]
            methods[label] = {
                "seeds": [job.seed for job in own],
                "orders": [job.order for job in own],
                "tasks": [run.tasks for run in runs],
                "matrix": [run.whole_matrix() for run in runs],
                "zero_shot": [run.zero_shot for run in runs],
                **{key: [summary[key] for summary in summaries] for key in summaries[0]},
                "lambdas": [[_layers_mean(lam) for lam in run.lambdas] for run in runs],
                "losses": [run.losses for run in runs],
                "tokens_per_second": [run.tokens_per_second for run in runs],
                "train_seconds": [run.train_seconds for run in runs],
                "score_seconds": [run.score_seconds for run in runs],
                "merge_seconds": [run.merge_seconds for run in runs],
                "peak_memory_mb": [run.peak_memory_mb for run in runs],
                "state_mb": [run.state_mb for run in runs],
            }
            whole = all(run.finished for run in runs)
            if whole and all(run.cross_entropy for run in runs):
                methods[label]["cross_entropy"] = [run.cross_entropy for run in runs]
            if self.settings["similarity"] and whole:
                methods[label]["similarity"] = [similarity_of(job, self.folder) for job in own]
            options = self.settings["methods"][own[0].method]
            if options.get("method", own[0].method) != "slao" or not whole:  # no running average, or part of one
                del methods[label]["lambdas"]
            throughput[label] = {
                "tokens_per_second": fmean(run.tokens_per_second for run in runs),
                "seconds_per_task": fmean(run.train_seconds / _tasks(run) for run in runs),
                "score_seconds_per_task": fmean(run.score_seconds / _tasks(run) for run in runs),
                "merge_seconds_per_task": fmean(run.merge_seconds / _tasks(run) for run in runs),
                "peak_memory_mb": max(run.peak_memory_mb for run in runs),
            }
        first = self.prepared[0]
        return {
            "stream": first.stream.name,
            "model": self.settings["model"],
            "metric": first.stream.metric,
            "methods": methods,
            "throughput": throughput,
            "failed": self.failed,
            "unfinished": {
                job.title: [
                    len(results[job].matrix) if job in results else 0,
                    len(self.prepared[job.variant].stream.tasks),
                ]
                for job in self.jobs
                if job.title not in self.failed and not (job in results and results[job].finished)
            },
            "patch": self.report,
            "settings": {**self.settings, "objective": {"name": first.objective_name, **first.objective_options}},
            "processes": self.processes,
            "threads": max(1, torch.get_num_threads() // self.processes),
            "versions": versions(),
        }


def _occupied(folder: Path) -> bool:
    """Whether there is more in it than what a run left that died before its settings were written."""
    ours = (places.LOCK, IDENTITY)
    return folder.exists() and not all(checkpoint.is_temporary(p) or p.name in ours for p in folder.iterdir())


def _tasks(run: Result) -> int:
    """How many it has trained."""
    return len(run.matrix) or 1


def _layers_mean(lam: float | list[float]) -> float:
    return fmean(lam) if isinstance(lam, list) else lam
