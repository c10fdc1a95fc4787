"""`slao run` and `slao report`: trainings over a stream of tasks, and what came of them."""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from .. import stopping
from . import output

RUN = """
  slao run --preset demo
  slao run --stream clinc150 --stream-path DIR --methods seqlora,slao
  slao run settings.yaml --set train.bf16=true --jobs 2
  slao run settings.yaml --resume
"""
REPORT = """
  slao report runs/demo
  slao report runs/demo --markdown
  slao report runs/before runs/after
"""
DATA, ADAPTER, STEPS = "Model and data", "Adapter", "Training"
_LISTS = ("lora.target_modules",)
_NUMBERS = ("seeds", "orders")


class Setting(str):
    """What marks an option as the setting of that name; its value is read as YAML, so 3, 0.5, true and [a, b] mean what
    they say."""


def _in(panel: str, text: str, *names: str) -> Any:
    """An option in a panel of the help."""
    return typer.Option(*names, help=text, rich_help_panel=panel)


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Setting -> value of the options of `run` that are settings and were given."""
    hints = inspect.get_annotations(run, eval_str=True)  # not get_type_hints, which wraps a default None before 3.11
    keys = {name: str(each) for name in options for each in get_args(hints[name])[1:] if isinstance(each, Setting)}
    return {key: options[name] for name, key in keys.items() if options[name] is not None}


def run(
    context: typer.Context,
    config: Annotated[str | None, typer.Argument(metavar="CONFIG", help="YAML file of settings")] = None,
    preset: Annotated[str | None, typer.Option(help="settings that come with the package, such as demo")] = None,
    model: Annotated[
        str | None, Setting("model"), _in(DATA, "folder, hub name, minilm, digits-vit or gemma-3-270m")
    ] = None,
    stream: Annotated[str | None, Setting("stream.name"), _in(DATA, "stream of tasks")] = None,
    stream_path: Annotated[str | None, Setting("stream.path"), _in(DATA, "folder of the stream's data")] = None,
    objective: Annotated[
        str | None, Setting("objective.name"), _in(DATA, "causal_lm, label_matching or image_matching")
    ] = None,
    train_candidates: Annotated[
        str | None,
        Setting("objective.train_candidates"),
        _in(DATA, "labels a training row may get: own, running or all"),
    ] = None,
    eval_candidates: Annotated[
        str | None, Setting("objective.eval_candidates"), _in(DATA, "labels a test row may get: own, seen or all")
    ] = None,
    train_rows: Annotated[str | None, Setting("train_rows"), _in(DATA, "at most so many training rows a task")] = None,
    test_rows: Annotated[str | None, Setting("test_rows"), _in(DATA, "at most so many test rows a task")] = None,
    train_fraction: Annotated[
        str | None, Setting("train_fraction"), _in(DATA, "this fraction of each task's training rows")
    ] = None,
    dtype: Annotated[
        str | None,
        Setting("dtype"),
        _in(
            DATA,
            "of the model: auto (the checkpoint's, if this CPU has it; float32 for encoders), float32, bfloat16 or "
            "float16",
        ),
    ] = None,
    device: Annotated[str | None, Setting("device"), _in(DATA, "auto, cpu, cuda, ...")] = None,
    methods: Annotated[str | None, Setting("methods"), _in(ADAPTER, "comma-separated, such as seqlora,slao")] = None,
    rank: Annotated[str | None, Setting("lora.r"), _in(ADAPTER, "rank of the adapter")] = None,
    alpha: Annotated[str | None, Setting("lora.lora_alpha"), _in(ADAPTER, "its alpha")] = None,
    target_modules: Annotated[
        str | None, Setting("lora.target_modules"), _in(ADAPTER, "comma-separated layer names, or all-linear")
    ] = None,
    no_patch: Annotated[bool, _in(ADAPTER, "train with PEFT's own layers", "--no-patch")] = False,
    backend: Annotated[str | None, Setting("backend"), _in(ADAPTER, "of the fused layers")] = None,
    precision: Annotated[str | None, Setting("precision"), _in(ADAPTER, "of the LoRA branch: base or adapter")] = None,
    epochs: Annotated[str | None, Setting("train.epochs"), _in(STEPS, "epochs a task")] = None,
    batch_size: Annotated[str | None, Setting("train.batch_size"), _in(STEPS, "rows a step")] = None,
    learning_rate: Annotated[str | None, Setting("train.learning_rate"), _in(STEPS, "peak learning rate")] = None,
    seeds: Annotated[str | None, _in(STEPS, "comma-separated, such as 0,1")] = None,
    orders: Annotated[
        str | None, _in(STEPS, "task orders that every seed trains in, such as 0,1 (0: the stream's own)")
    ] = None,
    no_shuffle: Annotated[bool, _in(STEPS, "keep the stream's own task order for every seed", "--no-shuffle")] = False,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="any setting, e.g. train.bf16=true; again for more"),
    ] = None,
    name: Annotated[str | None, typer.Option(help="folder under --runs (default: preset, file or stream name)")] = None,
    runs: Annotated[str, typer.Option(help="parent folder of all runs")] = "runs",
    jobs: Annotated[int, typer.Option(metavar="N", help="trainings at a time, in N processes")] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="load and check everything, show it, and write nothing")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="continue an interrupted run of the same name")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="start afresh in its folder")] = False,
    json: output.Json = False,
) -> int:
    """Train methods over a stream of tasks and report.

    Settings come from a YAML file or a preset; options and --set change them.
    All is written below RUNS/NAME, task by task, and the same command with
    --resume goes on after an interruption.

    With --json: folder, results, adapters and report (paths); methods (name:
    "runs", the seeds or "seed/order", and for each of AA, inc_acc, BWT,
    forgetting, FWT, zero_shot, CE_rise, tokens_per_second, train_seconds,
    score_seconds, merge_seconds, seconds_per_task, peak_memory_mb a number a
    run, for MOPD and AOPD a number a seed, null where there is none; state_mb:
    kept after the first and the last task); unfinished (training: tasks done,
    of how many); failed (training: why).

    With --json and --dry-run: folder, settings, trainings, notes, about (lines).
    """
    from .. import ranks

    for one, other, both in (
        ("--resume", "--overwrite", resume and overwrite),
        ("CONFIG", "--preset", config is not None and preset is not None),
    ):
        if both:
            raise ValueError(f"{one} and {other} exclude each other: drop one of them (see slao run --help)")
    with ranks.joined():
        return _run(context.params)


def _run(options: Mapping[str, Any]) -> int:
    completed = settings_from(options)
    from slao_kernels import sharding

    from ..report import finding_of, write_report
    from ..run import Run
    from ..workers import quiet

    folder, as_json = Path(options["runs"]) / completed["name"], options["json"]
    noisy = quiet()  # an objection is one line; what patch skipped is in the report that execute() prints
    with output.aside(as_json):
        try:
            again = {"resume": options["resume"], "overwrite": options["overwrite"]}
            training = Run(completed, folder, **again, processes=options["jobs"])
        finally:
            noisy()
        if options["dry_run"]:
            about = training.about(rows=True)
        else:
            with stopping.resumable(folder):
                results = training.execute()
    if not sharding.is_first():
        return 0
    if options["dry_run"]:
        if as_json:
            told = {"trainings": [job.title for job in training.jobs], "notes": training.notes}
            output.document({"folder": folder, "settings": completed, **told, "about": about.splitlines()})
        else:
            print(f"{about}\ndry run: nothing was trained, nothing written to {folder}")
        return 0
    if not as_json:
        print()
        _print_results(results)
    for title, reason in training.failed.items():
        print(f"failed: {title}: {reason}", file=sys.stderr)
    with stopping.resumable(folder):
        page = write_report(folder)
    if as_json:
        paths = {"folder": folder, "results": folder / "results.json", "adapters": folder / "adapters"}
        output.document({**paths, **_fields(page, results)})
    else:
        print(f"\n{textwrap.fill(finding_of(results), 80)}\nadapters: {folder / 'adapters'}\nreport: {page}")
    return 1 if training.failed else 0


def settings_from(options: Mapping[str, Any]) -> dict[str, Any]:
    """The completed settings that the options of `slao run` ask for. ValueError names what is wrong."""
    from .. import settings
    from ..places import check_name
    from ..reading import parse_yaml

    preset, config = options["preset"], options["config"]
    given = settings.load_preset(preset) if preset else {}
    given = settings.load_file(Path(config)) if config else given
    if isinstance(given.get("stream"), str):
        given["stream"] = {"name": given["stream"]}
    changes = _given(options)
    if changes.get("stream.name", _stream_name(given)) != _stream_name(given):
        given["stream"] = {}  # another stream's options would not fit this one
    for pair in options["assignments"] or ():
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--set takes KEY=VALUE, such as train.bf16=true; got {pair!r}")
        if key in changes or (key in _NUMBERS and options[key]):
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
        if text := options[key]:
            try:
                given[key] = [int(number) for number in text.split(",")]
            except ValueError:
                raise ValueError(f"--{key} takes whole numbers, such as 0,1; got {text!r}") from None
    if options["no_patch"]:
        given["patch"] = False
    if options["no_shuffle"]:
        given["shuffle_tasks"] = False
    completed = settings.complete(given)
    name = completed["name"] if options["name"] is None else options["name"]
    completed["name"] = name or preset or (Path(config).stem if config else str(completed["stream"]["name"]))
    check_name(completed["name"])
    return completed


def _stream_name(given: dict[str, Any]) -> str:
    stream = given.get("stream")
    return str(stream.get("name", "python_docs")) if isinstance(stream, dict) else "python_docs"


def report(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="FOLDER", help="of a run, finished or not, or of several")],
    markdown: Annotated[bool, typer.Option("--markdown", help="print the table as Markdown instead")] = False,
    json: output.Json = False,
) -> None:
    """Write the HTML page of a run, or of several side by side, from results.json.

    With --json: results (a path a run), report, methods, unfinished and failed,
    as of slao run.
    """
    from .. import report as reports

    if markdown and json:
        raise ValueError("--markdown and --json exclude each other: drop one of them (see slao report --help)")
    if markdown:
        print(reports.markdown(reports.load_all(run_dirs)))
        return
    page = reports.write_report(*run_dirs)
    if json:
        found = [folder / "results.json" for folder in run_dirs]
        output.document({"results": found, **_fields(page, reports.load_all(run_dirs))})
    else:
        print(f"report: {page}")


def _fields(page: Path, results: Mapping[str, Any]) -> dict[str, Any]:
    from ..report import numbers

    rest = {key: results.get(key) or {} for key in ("unfinished", "failed")}
    return {"report": page, "methods": numbers(results), **rest}


def _print_results(results: Mapping[str, Any]) -> None:
    from ..report import about, parse, per_method, table

    if (console := output.terminal()) is None:
        print(table(results))
        return
    output.print_lines(console, [*about(results), ""])
    found = per_method(parse(results))
    output.print_table(console, found.header, found.rows)
