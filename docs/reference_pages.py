"""Writes the two pages of the reference that are made from the running program: `python docs/reference_pages.py`.

reference/commands.md is what `slao COMMAND --help` prints, reference/settings.md the settings of `slao run` with their
types and defaults. Both are committed, so that building the site needs no torch; tests/docs/test_reference.py says when
they are no longer what the program says.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import os
import re
import typing
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("reference")
COMMANDS = ("run", "report", "interference", "merge", "fold", "compress", "extract", "doctor")
_EXAMPLES = {
    "run": "slao run --preset demo",
    "report": "slao report runs/demo",
    "interference": "slao interference adapters/a adapters/b",
    "merge": "slao merge a/ b/ c/ -o out/ --method slao",
    "fold": "slao fold base/ a/ -o out/",
    "compress": "slao compress adapter/ -o out/ --keep 0.99",
    "extract": "slao extract tuned/ base/ -o out/ --rank 64",
    "doctor": "slao doctor",
}
# What a setting means, with its flag of `slao run`.
_MEANING = {
    "name": "folder of the run under `--runs`; by default the preset's, file's or stream's name (`--name`)",
    "model": "folder, hub name, `minilm`, `digits-vit` or `gemma-3-270m` (`--model`)",
    "stream": "see [Streams](#streams) (`--stream`, `--stream-path`)",
    "shuffle_tasks": "each seed has a task order of its own; false (`--no-shuffle`) keeps the stream's",
    "train_rows": "at most so many training rows a task (`--train-rows`)",
    "train_fraction": "this fraction of each task's training rows (`--train-fraction`)",
    "test_rows": "at most so many test rows a task (`--test-rows`)",
    "objective": "see [Objectives](#objectives) (`--objective`)",
    "methods": "names, or a mapping of labels to options: see [Methods](#methods) (`--methods seqlora,slao`)",
    "seeds": "of data order and initialisation; every method trains on each (`--seeds 0,1`)",
    "orders": "task orders apart from the seeds, 0 being the stream's own; MOPD and AOPD need two (`--orders 0,1`)",
    "sweep": "settings to vary, as `key: [values]`; everything is trained with each",
    "similarity": "draw how alike the A, and the B, of different tasks are, layer by layer",
    "lora": "these four, and whatever else `peft.LoraConfig` takes",
    "lora.r": "rank of the adapter (`--rank`)",
    "lora.lora_alpha": "its alpha (`--alpha`)",
    "lora.lora_dropout": "dropout before A",
    "lora.target_modules": "names of layers, or `all-linear` (`--target-modules`)",
    "patch": "fuse the LoRA layers; false (`--no-patch`) keeps PEFT's own",
    "backend": "of the fused layers (`--backend`)",
    "precision": "of the LoRA branch: `base` or `adapter` (`--precision`)",
    "dtype": "of the model: `auto` (the checkpoint's, if this CPU has it; float32 for encoders), `float32`, `bfloat16` "
    "or `float16` (`--dtype`)",
    "device": "`auto`, `cpu`, `cuda`, ... (`--device`)",
    "train": "see [train](#train) (`--epochs`, `--batch-size`, `--learning-rate`)",
}


# Of `train`, where TrainConfig's docstring leaves it to transformers.
_TRAIN = {
    "epochs": "passes over a task's rows (`--epochs`)",
    "eval_batch_size": "rows scored at a time",
    "learning_rate": "at its peak (`--learning-rate`)",
    "lr_scheduler": "transformers' name: `linear`, `constant`, `cosine`, ...",
    "weight_decay": "of the optimizer",
    "gradient_accumulation": "batches a step",
    "gradient_checkpointing": "recompute activations in the backward pass, for less memory",
    "bf16": "autocast",
    "report_to": "transformers' name of a tracker: `none`, `tensorboard`, `wandb`, ...",
}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, page in pages().items():
        (FOLDER / name).write_text(page, encoding="utf-8")


def pages() -> dict[str, str]:
    return {"commands.md": commands(), "settings.md": settings()}


def help_of(command: str) -> str:
    """What `slao COMMAND --help` prints, in plain text of a fixed width."""
    from slao.cli import main as slao

    printed = io.StringIO()
    with _plain_terminal(), contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        slao([command, "--help"])
    return "\n".join(line.rstrip() for line in printed.getvalue().strip().splitlines())


@contextlib.contextmanager
def _plain_terminal() -> Iterator[None]:
    fixed = {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    before = {key: os.environ.get(key) for key in fixed}
    os.environ.update(fixed)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value


def commands() -> str:
    lines = [
        "# Commands",
        "",
        "What `slao COMMAND --help` prints (this page is written by `docs/reference_pages.py`). Bad input ends with "
        "one line on standard error and exit code 2, before anything is written; Ctrl-C and SIGTERM with 130 and 143. "
        "[The command line](../recipes/command_line.md) shows them at work, [Settings](settings.md) what `--set` "
        "takes.",
    ]
    for command in COMMANDS:
        lines += ["", f"## slao {command}", "", "```bash", _EXAMPLES[command], "```", ""]
        lines += ["```text", help_of(command), "```"]
    return "\n".join(lines) + "\n"


def settings() -> str:
    from slao.methods import METHODS
    from slao.objectives import OBJECTIVES
    from slao.settings import DEFAULTS, presets
    from slao.streams import STREAMS
    from slao.train import TrainConfig

    lines = [
        "# Settings of slao run",
        "",
        "Every setting with its type and default (this page is written by `docs/reference_pages.py` from the code). A "
        "YAML file holds them as below, a preset is such a file, `--set KEY=VALUE` changes one "
        "(`--set train.bf16=true`), and the flags of [slao run](commands.md#slao-run) are short forms. What is "
        "unknown, or of another type, is refused with the names that there are.",
        "",
        "```yaml",
        "model: minilm",
        "stream: {name: python_docs}",
        "methods: {seqlora: {}, slao: {}, average: {method: slao, schedule: inverse}}",
        "seeds: [0, 1]",
        "lora: {r: 8, lora_alpha: 16, target_modules: all-linear}",
        "train: {epochs: 2, learning_rate: 1.0e-3, bf16: true}",
        "```",
        "",
        f"Presets: {', '.join(f'`{name}`' for name in presets())}.",
        "",
        "## Top level",
        "",
        "| setting | default | meaning |",
        "| --- | --- | --- |",
    ]
    for key, value in DEFAULTS.items():
        inner = value if key == "lora" else {}
        lines.append(f"| `{key}` | {'' if inner else _value(value)} | {_MEANING[key]} |")
        lines += [f"| `{key}.{part}` | {_value(of)} | {_MEANING[f'{key}.{part}']} |" for part, of in inner.items()]
    lines += ["", "## train", "", _said(TrainConfig)[0], "", *_options(TrainConfig)]
    methods = (
        "`methods.LABEL.OPTION`; a label may be any name where `method` says the kind. Each may also have its own "
        "`learning_rate`, `replay_rows`, `replay_fraction` and `replay_from`. [Methods](methods.md) says what they do."
    )
    lines += ["", "## Methods", "", methods, ""]
    lines += ["| method | options |", "| --- | --- |"]
    for name, kind in METHODS.items():
        lines.append(f"| `{name}` | {_inline(kind, ('model', 'adapter'))} |")
    lines += ["", "## Objectives", "", "| objective.name | options |", "| --- | --- |"]
    auto = "`causal_lm` for a causal language model, `label_matching` for an encoder, `image_matching` for images"
    lines.append(f"| `auto` | {auto} |")
    for name, objective in OBJECTIVES.items():
        lines.append(f"| `{name}` | {_inline(objective, ('model', 'tokenizer', 'stream'))} |")
    lines += ["", "## Streams", "", "| stream.name | options |", "| --- | --- |"]
    for name, stream in STREAMS.items():
        if name != "hub":
            lines.append(f"| `{name}` | {_inline(stream, ('load',))} |")
    return "\n".join(lines) + "\n"


def _said(kind: Any) -> tuple[str, dict[str, str]]:
    """A docstring's first paragraph, and what it says of each field (`name, name: what they are.`)."""
    first, rest = inspect.cleandoc(kind.__doc__).split("\n\n", 1)
    parts = re.split(r"(?:^|(?<=[.] ))(\w+(?:, \w+)*): ", " ".join(rest.split()))
    return first, {name: text.strip().rstrip(".") for names, text in zip(parts[1::2], parts[2::2], strict=True)
                   for name in names.split(", ")}  # fmt: skip


def _options(kind: Any) -> list[str]:
    said = _TRAIN | _said(kind)[1]
    lines = ["| setting | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, hint, default in _parameters(kind, ()):
        lines.append(f"| `train.{name}` | {hint} | {_value(default)} | {said[name]} |")
    return lines


def _inline(kind: Callable[..., Any], without: tuple[str, ...]) -> str:
    found = [
        f"`{name}` {hint}" + ("" if default is inspect.Parameter.empty else f" = {_value(default)}")
        for name, hint, default in _parameters(kind, without)
    ]
    return "; ".join(found) or "none"


def _parameters(kind: Callable[..., Any], without: tuple[str, ...]) -> Iterator[tuple[str, str, Any]]:
    source = kind.__init__ if inspect.isclass(kind) and not is_dataclass(kind) else kind  # type: ignore[misc]
    hints = typing.get_type_hints(source)
    for name, parameter in inspect.signature(kind).parameters.items():
        if name in without:
            continue
        default = parameter.default
        if type(default).__name__ == "_HAS_DEFAULT_FACTORY_CLASS":
            default = {}
        yield name, _type(hints[name]), default


def _type(hint: Any) -> str:
    words = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null", Path: "text"}
    parts = typing.get_args(hint) if typing.get_origin(hint) not in (list, dict) else ()
    origin = typing.get_origin(hint)
    if hint in words:
        return words[hint]
    if origin is dict:
        return "section"
    if origin is list or getattr(origin, "__name__", "") == "Sequence":
        return "list"
    shown = [_type(part) for part in parts if getattr(typing.get_origin(part), "__name__", "") != "Callable"]
    return " or ".join(dict.fromkeys(shown)) or str(hint)


def _value(value: Any) -> str:
    return f"`{json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)}`"


if __name__ == "__main__":
    main()
