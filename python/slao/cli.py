"""The `slao` command. Bad input ends with one line on standard error and exit code 2, before anything is written."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import cli_merging, stopping
from .failures import explain

# flag -> setting; the value is parsed as YAML, so 3, 0.5, true and [a, b] mean what they say.
FLAGS = {
    "--model": ("model", "folder, hub name, minilm, digits-vit or gemma-3-270m"),
    "--stream": ("stream.name", "stream of tasks"),
    "--stream-path": ("stream.path", "folder of the stream's data"),
    "--objective": ("objective.name", "causal_lm, label_matching or image_matching"),
    "--train-candidates": ("objective.train_candidates", "labels a training row may get: own, running or all"),
    "--eval-candidates": ("objective.eval_candidates", "labels a test row may get: own, seen or all"),
    "--methods": ("methods", "comma-separated, such as seqlora,slao"),
    "--train-rows": ("train_rows", "at most so many training rows a task"),
    "--test-rows": ("test_rows", "at most so many test rows a task"),
    "--train-fraction": ("train_fraction", "this fraction of each task's training rows"),
    "--rank": ("lora.r", "rank of the adapter"),
    "--alpha": ("lora.lora_alpha", "its alpha"),
    "--target-modules": ("lora.target_modules", "comma-separated layer names, or all-linear"),
    "--epochs": ("train.epochs", "epochs a task"),
    "--batch-size": ("train.batch_size", "rows a step"),
    "--learning-rate": ("train.learning_rate", "peak learning rate"),
    "--dtype": (
        "dtype",
        "of the model: auto (the checkpoint's, if this CPU has it; float32 for encoders), float32, bfloat16 or float16",
    ),
    "--device": ("device", "auto, cpu, cuda, ..."),
    "--backend": ("backend", "of the fused layers"),
    "--precision": ("precision", "of the LoRA branch: base or adapter"),
}
_LISTS = ("lora.target_modules",)
_NUMBERS = ("seeds", "orders")


class _Parser(argparse.ArgumentParser):
    """Objects like everything else here: with one line, not with the whole usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def parser() -> argparse.ArgumentParser:
    top = _Parser(prog="slao", description="Continual learning with one LoRA.")
    commands = top.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train methods over a stream of tasks and report")
    source = run.add_mutually_exclusive_group()
    source.add_argument("config", nargs="?", help="YAML file of settings")
    source.add_argument("--preset", help="settings that come with the package, such as demo")
    for flag, (setting, text) in FLAGS.items():
        run.add_argument(flag, dest=setting, help=text, default=None)
    run.add_argument("--seeds", help="comma-separated, such as 0,1")
    run.add_argument("--orders", help="task orders that every seed trains in, such as 0,1 (0: the stream's own)")
    run.add_argument("--jobs", type=int, default=1, metavar="N", help="trainings at a time, in N processes")
    run.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any setting, e.g. train.bf16=true"
    )
    run.add_argument("--no-patch", action="store_true", help="train with PEFT's own layers")
    run.add_argument("--no-shuffle", action="store_true", help="keep the stream's own task order for every seed")
    run.add_argument("--name", help="folder under --runs (default: preset, file or stream name)")
    run.add_argument("--runs", default="runs", help="parent folder of all runs (default: %(default)s)")
    run.add_argument("--dry-run", action="store_true", help="load and check everything, show it, and write nothing")
    again = run.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue an interrupted run of the same name")
    again.add_argument("--overwrite", action="store_true", help="start afresh in its folder")
    report = commands.add_parser("report", help="write the HTML page of a run, or of several side by side")
    report.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN", help="folder with a results.json")
    report.add_argument("--markdown", action="store_true", help="print the table as Markdown instead")
    cosines = commands.add_parser("interference", help="cosines of the task vectors of saved PEFT adapters")
    cosines.add_argument("adapters", nargs="+", metavar="FOLDER", help="as save_pretrained writes it")
    cli_merging.add_commands(commands)
    commands.add_parser("info", help="versions, devices, and the backend each op takes here")
    return top


def settings_from(options: argparse.Namespace) -> dict[str, Any]:
    """The completed settings that the flags of `slao run` ask for. ValueError names what is wrong."""
    from . import settings
    from .places import check_name
    from .reading import parse_yaml

    given = settings.load_preset(options.preset) if options.preset else {}
    given = settings.load_file(Path(options.config)) if options.config else given
    if isinstance(given.get("stream"), str):
        given["stream"] = {"name": given["stream"]}
    changes = {setting: value for setting, _ in FLAGS.values() if (value := getattr(options, setting)) is not None}
    if changes.get("stream.name", _stream_name(given)) != _stream_name(given):
        given["stream"] = {}  # another stream's options would not fit this one
    for pair in options.set:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--set takes KEY=VALUE, such as train.bf16=true; got {pair!r}")
        if key in changes or (key in _NUMBERS and getattr(options, key)):
            raise ValueError(f"{key} is set by a flag and by --set: drop one of them")
        changes[key] = value
    for key, value in changes.items():
        parsed = parse_yaml(value, f"the value {value!r:.100} of {key}")
        if key in _LISTS and isinstance(parsed, str) and parsed != "all-linear":
            parsed = [name.strip() for name in parsed.split(",")]
        if key.startswith("methods.") and "methods" in given:
            given["methods"] = settings.methods_section(given["methods"])
        settings.assign(given, key, parsed)
    for key in _NUMBERS:
        if text := getattr(options, key):
            try:
                given[key] = [int(number) for number in text.split(",")]
            except ValueError:
                raise ValueError(f"--{key} takes whole numbers, such as 0,1; got {text!r}") from None
    if options.no_patch:
        given["patch"] = False
    if options.no_shuffle:
        given["shuffle_tasks"] = False
    completed = settings.complete(given)
    name = completed["name"] if options.name is None else options.name
    completed["name"] = name or options.preset or _default_name(options, completed)
    check_name(completed["name"])
    return completed


def _stream_name(given: dict[str, Any]) -> str:
    stream = given.get("stream")
    return str(stream.get("name", "python_docs")) if isinstance(stream, dict) else "python_docs"


def _default_name(options: argparse.Namespace, completed: dict[str, Any]) -> str:
    return Path(options.config).stem if options.config else str(completed["stream"]["name"])


def _run(options: argparse.Namespace) -> int:
    completed = settings_from(options)
    from slao_kernels import sharding

    from .report import table, write_report
    from .run import Run
    from .workers import quiet

    folder = Path(options.runs) / completed["name"]
    noisy = quiet()  # an objection is one line; what patch skipped is in the report that execute() prints
    try:
        run = Run(completed, folder, resume=options.resume, overwrite=options.overwrite, processes=options.jobs)
    finally:
        noisy()
    if options.dry_run:
        if sharding.is_first():
            print(f"{run.about(rows=True)}\ndry run: nothing was trained or written")
        return 0
    with stopping.resumable(folder):
        results = run.execute()
    if not sharding.is_first():
        return 0
    print("\n" + table(results))
    for title, reason in run.failed.items():
        print(f"failed: {title}: {reason}", file=sys.stderr)
    with stopping.resumable(folder):
        print(f"\nreport: {write_report(folder)}")
    return 1 if run.failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 128 and the signal's number where Ctrl-C or SIGTERM ended it."""
    try:
        with stopping.listening():
            return _command(argv)
    except stopping.Stopped as stop:
        print(f"slao: {stop}", file=sys.stderr)
        return stop.exit_code


def _command(argv: Sequence[str] | None) -> int:
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
    # A run reads local folders first; what it has to fetch it may fetch, but it should not phone home on its own.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        options = parser().parse_args(argv)
        if options.command == "run":
            from . import ranks

            with ranks.joined():
                return _run(options)
        if options.command == "report":
            from .report import load_all, markdown, write_report

            runs = options.run_dirs
            print(markdown(load_all(runs)) if options.markdown else f"report: {write_report(*runs)}")
            return 0
        if options.command == "interference":
            from .folders import interference_table

            print(interference_table(options.adapters))
            return 0
        if hasattr(options, "act"):
            return int(options.act(options))
        from slao_kernels.__main__ import describe

        print(describe())
        return 0
    except BrokenPipeError:  # who read the output has gone
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for what Python still flushes)
        return 1
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        print(
            "slao: " + "\n  ".join(" ".join(each.split()) for each in getattr(error, "lines", [line])), file=sys.stderr
        )
        return 2


if __name__ == "__main__":
    sys.exit(main())
