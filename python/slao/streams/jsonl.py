"""Stream "jsonl": your own tasks, a folder for each.

    path/<task>/train.jsonl, test.jsonl, and if there are any validation.jsonl (or dev, val), labels.json,
                instruction.txt

A file is JSON lines (`.jsonl`) or one JSON list (`.json`); where both stand there the `.jsonl` is read. A row is one
of these, all of a task alike; other keys are ignored:

    {"messages": [{"role", "content"}, ...]}   a conversation, which ends with the assistant's turn
    {"prompt", "answer"}                       both as they are, nothing around or between them
    {"text", "label"}, {"sentence", "label"}, {"input", "output"}   a text for the objective's template

Task folders may also lie one level deeper. So the published 15-task suite of O-LoRA
(https://github.com/cmnfriend/O-LoRA, folder CL_Benchmark: `<group>/<task>/{train,dev,test,labels}.json`) is read
as it is, and so are SuperNI files, {"Definition": [...], "Instances": [{"input", "output"}]}: the first definition
becomes the instruction, and where an output is a list its first entry the answer and the others its references.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slao.reading import check_text, parse_json, read_json, read_text
from slao.streams.base import Row, Splits, Stream, Task, carve_validation

_AS_IT_IS = ("prompt", "answer")
_KEYS = (_AS_IT_IS, ("text", "label"), ("sentence", "label"), ("input", "output"))
_SUFFIXES = (".jsonl", ".json")
_VALIDATION = ("validation", "dev", "val")


def jsonl(
    path: str | Path,
    order: Sequence[str] | None = None,
    validation_fraction: float = 0.1,
    seed: int = 0,
    metric: str = "accuracy",
) -> Stream:
    """The tasks under `path`, in `order`.

    order: names of the tasks to take (a task is named as its folder); by default all of them, sorted.
    validation_fraction: share of train that becomes validation, drawn from `seed`, in tasks without a validation file
    or with one that repeats the test file (as O-LoRA's do). The test file is required and only ever becomes the test
    split.
    metric: what every task is scored by, one of `slao.streams.base.METRICS`.

    The labels of a task come from labels.json (a list of texts); without it, from the "label"s of its training
    file, sorted; a task whose rows have no labels is free-form. The instruction is the text of instruction.txt.

    ValueError: names the folder, file or line that is absent, empty or malformed, or a label out of the set.
    """
    root = Path(path)
    folders = task_folders(root)
    names = sorted(folders) if order is None else list(order)
    for name in names:
        if name not in folders:
            raise ValueError(f"order names the task {name!r}, but {root} holds {sorted(folders)}")
    return Stream(
        root.resolve().name, tuple(_task(name, folders[name], validation_fraction, seed, metric) for name in names)
    )


def task_folders(root: Path) -> dict[str, Path]:
    """Task name -> folder, for each folder one or two levels down that holds a training file."""
    if not root.is_dir():
        raise ValueError(f"no folder {root}; path must be a folder with a sub-folder for each task")
    folders: dict[str, Path] = {}
    for pattern in ("*/train.json*", "*/*/train.json*"):
        for folder in sorted({file.parent for file in root.glob(pattern) if file.suffix in _SUFFIXES}):
            if folder.name in folders:
                raise ValueError(f"{folders[folder.name]} and {folder} are two tasks of one name; rename one folder")
            folders[folder.name] = folder
    if not folders:
        raise ValueError(f"no task in {root}: no sub-folder holds train.jsonl or train.json")
    return folders


def _task(name: str, folder: Path, validation_fraction: float, seed: int, metric: str) -> Task:
    train, test, validation = (read_split(folder, *stems) for stems in (("train",), ("test",), _VALIDATION))
    if train is None or test is None:
        raise ValueError(f"{folder} has no test.jsonl or test.json; every task needs one")
    labels = _label_set(folder, train)
    if validation is None or validation.rows == test.rows:
        train.rows, held = map(list, carve_validation(train.rows, validation_fraction, seed))
        validation = Part(held)
    instruction_file = folder / "instruction.txt"
    instruction = train.instruction
    if instruction_file.exists():
        instruction = read_text(instruction_file).strip()
    return Splits(train.rows, validation.rows, test.rows).task(name, labels, instruction, metric)


@dataclass
class Part:
    """One file's rows, whether they came as labels, and the definition that it carries."""

    rows: list[Row] = field(default_factory=list)
    labelled: bool = False
    instruction: str = ""


def _label_set(folder: Path, train: Part) -> list[str]:
    labels = read_labels(folder)
    if labels is not None:
        return labels
    # Only from the training file: a label that appears in the test file alone is then an error, not a class.
    return sorted({row.answer for row in train.rows}) if train.labelled else []


def read_labels(folder: Path) -> list[str] | None:
    """The list in labels.json; None where there is no such file."""
    file = folder / "labels.json"
    if not file.exists():
        return None
    labels = read_json(file)
    if not isinstance(labels, list) or not labels or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"{file}: must be a JSON list of label texts")
    for label in labels:
        check_label(label, str(file))
    return labels


def read_split(folder: Path, *stems: str) -> Part | None:
    """The rows of the first file of these names that stands in `folder`; None where there is none."""
    files = (folder / f"{stem}{suffix}" for stem in stems for suffix in _SUFFIXES)
    file = next((file for file in files if file.exists()), None)
    return None if file is None else read_file(file)


def read_file(file: Path) -> Part:
    part = Part()
    for where, item in _items(file, part):
        row, labelled = _row(item, where)
        part.rows.append(row)
        part.labelled |= labelled
    if not part.rows:
        raise ValueError(f"{file} holds no rows; add some or remove the file")
    return part


def _items(file: Path, part: Part) -> Iterator[tuple[str, Any]]:
    """(place for messages, object) of each row of a file; sets the part's instruction from a definition."""
    text = read_text(file)
    if file.suffix == ".jsonl":
        # Not splitlines(): JSON allows U+2028 and its like inside a string.
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield f"{file}, line {number}", parse_json(line, str(file), number)
        return
    if not text.strip():
        return
    content = parse_json(text, str(file))
    if isinstance(content, dict) and isinstance(content.get("Instances"), list):
        definition = content.get("Definition", "")
        definition = definition[0] if isinstance(definition, list) and definition else definition
        part.instruction = definition if isinstance(definition, str) else ""
        content = content["Instances"]
    if not isinstance(content, list):
        raise ValueError(f'{file}: must be a JSON list of rows, or an object with "Instances"')
    for number, item in enumerate(content, start=1):
        yield f"{file}, row {number}", item


def _row(item: Any, where: str) -> tuple[Row, bool]:
    """The row, and whether its answer is a label."""
    if not isinstance(item, dict):
        raise ValueError(f"{where}: a row must be an object, not {json.dumps(item)[:60]}")
    if "messages" in item:
        return _conversation(item["messages"], where), False
    keys = next((keys for keys in _KEYS if all(key in item for key in keys)), None)
    if keys is None:
        raise ValueError(
            f'{where}: a row needs "prompt" and "answer", or "text" and "label", or "messages"; this one has '
            f"{sorted(item)}"
        )
    prompt, answer = (item[key] for key in keys)
    answers = answer if keys == ("input", "output") and isinstance(answer, list) and answer else [answer]
    for key, value in ((keys[0], prompt), *((keys[1], each) for each in answers)):
        if not isinstance(value, str):
            raise ValueError(f"{where}: {key!r} must be a text, not {json.dumps(value)[:60]}")
    if labelled := keys[1] == "label":
        check_label(answers[0], where)
    verbatim = keys == _AS_IT_IS
    if verbatim and not answer.strip():
        raise ValueError(
            f"{where}: the answer is empty, so there is nothing to learn; give it a text, or remove the row"
        )
    return _made(where, prompt=prompt, answer=answers[0], references=tuple(answers[1:]), verbatim=verbatim), labelled


def _made(where: str, **values: Any) -> Row:
    try:
        return Row(**values, where=where)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _conversation(messages: Any, where: str) -> Row:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'{where}: "messages" must be a list of {{"role", "content"}}, not {_shown(messages)}')
    turns = []
    for number, message in enumerate(messages, start=1):
        for key in ("role", "content"):
            value = message.get(key) if isinstance(message, dict) else None
            if not isinstance(value, str):
                raise ValueError(f"{where}, message {number}: {key!r} must be a text; the message is {_shown(message)}")
        turns.append((message["role"], message["content"]))
        if turns[-1][0] == "assistant" and not turns[-1][1].strip():
            raise ValueError(
                f"{where}, message {number}: the assistant says nothing, so there is nothing to learn; give it a text, "
                "or remove the row"
            )
    if turns[-1][0] != "assistant":
        raise ValueError(
            f"{where}: the last message is the {turns[-1][0]}'s, so it has no answer; end with the assistant's, or "
            "remove the row"
        )
    return _made(where, prompt="", answer=turns[-1][1], messages=tuple(turns))


def _shown(value: Any) -> str:
    return json.dumps(value)[:60]


def check_label(label: str, where: str) -> None:
    """ValueError for a label that says nothing, or that no tokenizer takes."""
    if not label.strip():
        raise ValueError(f"{where}: the label is empty; give it a text, or remove it")
    check_text(label, f"{where}: the label")
