"""`slao run`: every method on every seed over the same data and steps, into one results.json and report."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import nn

from slao_kernels import sharding

from . import checkpoint, ranks
from .methods import Method, make_method
from .models import default_objective, load_model, load_tokenizer, model_path
from .objectives import make_objective
from .settings import train_config
from .streams import Stream, make_stream
from .train import Result, seed_everything, train

Say = Callable[[str], None]


class Run:
    """One `slao run` in `folder`; `settings` are those of `settings.complete`.

    Everything that can be wrong with settings, data and model is checked in the constructor, before a file is
    written. `resume`: continue in a folder that an interrupted run with the same settings left; `overwrite`: empty it.
    """

    def __init__(
        self, settings: dict[str, Any], folder: Path, *, resume: bool = False, overwrite: bool = False, say: Say = print
    ) -> None:
        self.settings, self.folder, self.say = settings, folder, say if sharding.is_first() else ranks.silent
        self.config = train_config(settings)
        from .trainer import training_arguments

        training_arguments(self.config)  # raises what transformers objects to
        occupied = sharding.on_first(lambda: folder.exists() and any(folder.iterdir()))
        if occupied and not (resume or overwrite):
            raise ValueError(f"{folder} is not empty: pass --resume to continue it, or --overwrite to start afresh")
        if overwrite and occupied and not (folder / "settings.json").is_file():
            raise ValueError(f"{folder} is no run's folder, so it is not emptied: choose another --name or --runs")
        if resume and occupied:
            self._check_same_run()
        self.stream = self._stream()
        self.path = model_path(settings["model"])
        options = dict(settings["objective"])
        name = options.pop("name", "auto")
        self.objective_name = default_objective(self.path) if name == "auto" else name
        self.objective_options = options
        self.tokenizer = load_tokenizer(self.path)
        self.report: str = ""
        # The first model that is needed anyway: methods and objective raise here what they object to in it.
        first = next(iter(settings["methods"]))
        self._ready: dict[tuple[str, int], tuple[nn.Module, Method, Any]] = {}
        others = list(settings["methods"])[1:]
        self._ready[first, settings["seeds"][0]] = self._build(first, settings["seeds"][0], others)
        self._overwrite = overwrite and not resume

    def _stream(self) -> Stream:
        options = dict(self.settings["stream"])
        stream = make_stream(options.pop("name"), **options)
        return stream.limited(self.settings["train_rows"], self.settings["train_fraction"])

    def _check_same_run(self) -> None:
        path = self.folder / "settings.json"
        if not path.is_file():
            raise ValueError(f"{self.folder} holds no settings.json, so there is no run to resume; choose another name")
        import json

        before = json.loads(path.read_text(encoding="utf-8"))
        differing = [key for key in self.settings if before.get(key) != self.settings[key]]
        if differing:
            raise ValueError(
                f"{self.folder} has other settings ({', '.join(differing)}): choose another --name or --overwrite"
            )

    def _ordered(self, seed: int) -> Stream:
        return self.stream.shuffled(seed) if self.settings["shuffle_tasks"] else self.stream

    def _method(self, label: str, model: nn.Module) -> Method:
        options = dict(self.settings["methods"][label])
        return make_method(options.pop("method", label), model, **options)

    def _build(self, label: str, seed: int, others: Sequence[str] = ()) -> tuple[nn.Module, Method, Any]:
        """A fresh model with its adapter, the method and the objective; the model is the same for all of a seed.

        others: labels of methods that are tried on the model first, for what they object to in it.
        """
        from peft import LoraConfig

        from slao_kernels import extension, patch, unpatch

        seed_everything(seed)  # the adapter's first A is drawn here
        model = load_model(self.path, self.objective_name, self.settings["dtype"], self.settings["device"])
        try:
            config = LoraConfig(**self.settings["lora"])
        except TypeError as error:
            raise ValueError(f"lora: {error}") from error
        report = patch(model, config, backend=self.settings["backend"], precision=self.settings["precision"])
        if not self.settings["patch"]:
            unpatch(model)
            self.report = "fused layers are off (--no-patch)"
        else:
            self.report = str(report)
        for other in others:
            for pair in self._method(other, model).pairs:
                extension.retract(pair.layer)  # the next one finds the layers as they were
        method = self._method(label, model)  # before the objective runs the model: it may have to refuse it
        objective = make_objective(
            self.objective_name, model, self.tokenizer, self._ordered(seed), **self.objective_options
        )
        return model, method, objective

    def execute(self) -> dict[str, Any]:
        """Train everything; returns what results.json holds."""
        sharding.on_first(self._prepare_folder)
        self.say(self.report)
        results: dict[str, list[Result]] = {label: [] for label in self.settings["methods"]}
        for seed in self.settings["seeds"]:
            for label in self.settings["methods"]:
                result = self._one(label, seed)
                results[label].append(result)
                scores = ", ".join(f"{key} {_number(value)}" for key, value in result.summary().items())
                self.say(f"{label} seed {seed}: {scores}")
        content = self._results(results)
        sharding.on_first(lambda: checkpoint.write_json(self.folder / "results.json", content))
        return content

    def _prepare_folder(self) -> None:
        if self._overwrite and self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(self.folder / "settings.json", self.settings)

    def _one(self, label: str, seed: int) -> Result:
        from .progress import RunProgress

        stream = self._ordered(seed)
        ready = self._ready.pop((label, seed)) if (label, seed) in self._ready else self._build(label, seed)
        model, method, objective = ready
        names = ["joint"] if method.together else [task.name for task in stream.tasks]
        progress = RunProgress(f"{label} seed {seed}", names)
        try:
            state = self.folder / "state" / f"{label}-{seed}"
            result = train(
                model, method, stream, objective, self.config, seed=seed, state_dir=state, callbacks=[progress]
            )
        finally:
            progress.close()
        method.save_pretrained(self.folder / "adapters" / f"{label}-{seed}")
        return result

    def _results(self, results: dict[str, list[Result]]) -> dict[str, Any]:
        from slao_kernels.__main__ import versions

        methods, throughput = {}, {}
        for label, runs in results.items():
            summaries = [run.summary() for run in runs]
            methods[label] = {
                "seeds": list(self.settings["seeds"]),
                "tasks": [run.tasks for run in runs],
                "matrix": [run.matrix for run in runs],
                "zero_shot": [run.zero_shot for run in runs],
                **{key: [summary[key] for summary in summaries] for key in summaries[0]},
                "lambdas": [[_layers_mean(lam) for lam in run.lambdas] for run in runs],
                "losses": [run.losses for run in runs],
                "tokens_per_second": [run.tokens_per_second for run in runs],
                "train_seconds": [run.train_seconds for run in runs],
                "merge_seconds": [run.merge_seconds for run in runs],
                "peak_memory_mb": [run.peak_memory_mb for run in runs],
            }
            if self.settings["methods"][label].get("method", label) != "slao":  # no running average
                del methods[label]["lambdas"]
            throughput[label] = {
                "tokens_per_second": fmean(run.tokens_per_second for run in runs),
                "seconds_per_task": fmean(run.train_seconds / len(run.tasks) for run in runs),
                "merge_seconds_per_task": fmean(run.merge_seconds / len(run.tasks) for run in runs),
                "peak_memory_mb": max(run.peak_memory_mb for run in runs),
            }
        return {
            "stream": self.stream.name,
            "model": self.settings["model"],
            "metric": "accuracy",
            "methods": methods,
            "throughput": throughput,
            "patch": self.report,
            "settings": {**self.settings, "objective": {"name": self.objective_name, **self.objective_options}},
            "versions": versions(),
        }


def _layers_mean(lam: float | list[float]) -> float:
    return fmean(lam) if isinstance(lam, list) else lam


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
