"""Stream "superni": fifteen tasks of Super-NaturalInstructions in the two orders of SAPT (arXiv 2401.08295), which the
later papers share: three each of dialogue generation, information extraction, question answering, summarisation and
sentiment analysis. Scored by Rouge-L; by exact match the three of sentiment analysis, 363, 875 and 1687.

The instruction is the task's definition, without examples. Wang et al., "Super-NaturalInstructions", EMNLP 2022,
https://github.com/allenai/natural-instructions, Apache-2.0.

Layouts that are read, under `path`, `path`/SuperNI, `path`/CL_Benchmark/SuperNI or `path`/tasks (N is a number):
    task<N>_<name>/{train,test}.json    SAPT's repository, up to 1,000 and 100 rows
    task<N>_<name>/<any>.json           one file of all rows
    task<N>_<name>.json                 the same: natural-instructions, folder tasks
each {"Definition": text or [text], "Instances": [{"input": text, "output": text or [text, ...]}]}. SAPT's dev.json is a
copy of its test.json and is never read. Without a path the rows come from the hub, Muennighoff/natural-instructions,
one file a task, in which each output of a row is a row of its own with the same id.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from slao.streams.base import Row, Splits, Stream, Task, carve_validation
from slao.streams.hub import loader
from slao.streams.jsonl import Part, read_file, read_split

NAMES = (
    "task002_quoref_answer_generation",
    "task073_commonsenseqa_answer_generation",
    "task181_outcome_extraction",
    "task363_sst2_polarity_classification",
    "task511_reddit_tifu_long_text_summarization",
    "task591_sciq_answer_generation",
    "task639_multi_woz_user_utterance_generation",
    "task748_glucose_reverse_cause_event_detection",
    "task875_emotion_classification",
    "task1290_xsum_summarization",
    "task1510_evalution_relation_extraction",
    "task1572_samsum_summary",
    "task1590_diplomacy_text_generation",
    "task1687_sentiment140_classification",
    "task1729_personachat_generate_next",
)
ORDERS: Mapping[str, tuple[int, ...]] = {
    "O1": (1572, 363, 1290, 181, 2, 1510, 639, 1729, 73, 1590, 748, 511, 591, 1687, 875),
    "O2": (748, 73, 1590, 639, 1572, 1687, 591, 363, 1510, 1729, 181, 511, 2, 1290, 875),
}
EXACT_MATCH = (363, 875, 1687)
HUB_ID = "Muennighoff/natural-instructions"


def superni(
    order: str = "O1",
    path: str | Path | None = None,
    rows: int | None = 1000,
    test_rows: int = 100,
    validation_fraction: float = 0.1,
    seed: int = 0,
    load: Callable[..., Any] | None = None,
) -> Stream:
    """The fifteen tasks of order O1 or O2; the same rows for the same arguments, and in both orders.

    path: a folder as above; without it the rows come from the hub.
    rows: training rows of a task at most, drawn from `seed`; None takes all.
    test_rows: rows of a task that comes as one file which are its test, drawn from `seed`; at most a tenth of them.
    validation_fraction: share of the training rows that becomes validation, drawn from `seed`.
    load: stands in for `datasets.load_dataset`, called as load(hub_id, data_files=..., split="train").

    ValueError: an unknown order, a number out of range, tasks that are missing (all are named) or stand there twice,
    a file that is malformed. ImportError: no path and no `datasets`.
    """
    if order not in ORDERS:
        raise ValueError(f"no order {order!r}; those of superni are {', '.join(ORDERS)}")
    for option, value in (("rows", rows), ("test_rows", test_rows)):
        if value is not None and value < 1:
            raise ValueError(f"{option} must be at least 1, not {value}")
    names = {_number(name): name for name in NAMES}
    parts: dict[int, tuple[Part, Part | None]]
    if path is None:
        load = loader(load, ", or give path, a folder with the tasks")
        parts = {number: (_from_hub(names[number], load), None) for number in ORDERS[order]}
    else:
        places = _places(Path(path))
        missing = [names[number] for number in ORDERS[order] if number not in places]
        if missing:
            raise ValueError(f"{path} has no folder or file for {', '.join(missing)}")
        parts = {number: _from_folder(places[number]) for number in ORDERS[order]}
    tasks = (
        _task(names[number], *parts[number], rows, test_rows, validation_fraction, seed) for number in ORDERS[order]
    )
    return Stream(f"superni_{order}", tuple(tasks))


def _task(
    name: str, train: Part, test: Part | None, rows: int | None, test_rows: int, validation_fraction: float, seed: int
) -> Task:
    splits = Splits(train.rows)
    if test is not None:
        splits.test = test.rows
    else:
        _shuffle(splits.train, f"{seed}/{name}/test")
        count = min(test_rows, max(1, len(splits.train) // 10))
        splits.test, splits.train = splits.train[:count], splits.train[count:]
    splits.train, splits.validation = map(list, carve_validation(splits.train, validation_fraction, seed))
    if rows is not None and rows < len(splits.train):
        _shuffle(splits.train, f"{seed}/{name}/train")
        del splits.train[rows:]
    metric = "exact_match" if _number(name) in EXACT_MATCH else "rouge_l"
    return splits.task(name, (), train.instruction.strip(), metric)


def _shuffle(rows: list[Row], seed: str) -> None:
    random.Random(seed).shuffle(rows)


def _number(name: str) -> int:
    """1572 of task1572_samsum_summary; -1 of what is no task's name."""
    found = re.match(r"task0*(\d+)(_|\.|$)", name)
    return int(found[1]) if found else -1


def _places(path: Path) -> dict[int, Path]:
    """Number -> the folder or file of that task."""
    if not path.is_dir():
        raise ValueError(f"no folder {path}; path must be a folder with the tasks")
    places: dict[int, Path] = {}
    for root in (path, path / "SuperNI", path / "CL_Benchmark" / "SuperNI", path / "tasks"):
        for place in sorted(root.iterdir()) if root.is_dir() else ():
            number = _number(place.name)
            if number < 0 or not (place.is_dir() or place.suffix in (".json", ".jsonl")):
                continue
            if number in places:
                raise ValueError(f"{places[number]} and {place} are one task; move one of them away")
            places[number] = place
    return places


def _from_folder(place: Path) -> tuple[Part, Part | None]:
    """(train, test), or (all rows, None)."""
    if not place.is_dir():
        return read_file(place), None
    train, test = read_split(place, "train"), read_split(place, "test")
    if train is not None and test is not None:
        return train, test
    files = sorted(place.glob("*.json"))
    if len(files) != 1 or train is not None or test is not None:
        raise ValueError(f"{place} must hold train.json and test.json, or one file of all rows")
    return read_file(files[0]), None


def _from_hub(name: str, load: Callable[..., Any]) -> Part:
    try:
        dataset = load(HUB_ID, data_files=f"train/{name}_train.jsonl", split="train")
    except FileNotFoundError as error:
        raise ValueError(f"{HUB_ID} has no file of {name}: give path, a folder with the tasks") from error
    part = Part()
    outputs: dict[str, list[str]] = {}
    inputs: dict[str, str] = {}
    for example in dataset:
        missing = {"id", "definition", "inputs", "targets"} - set(example)
        if missing:
            raise ValueError(f"{HUB_ID}, {name}: no column {sorted(missing)[0]!r}, only {sorted(example)}")
        inputs[example["id"]] = example["inputs"]
        outputs.setdefault(example["id"], []).append(example["targets"])
        part.instruction = example["definition"]
    part.rows = [Row(inputs[key], answer, tuple(more)) for key, (answer, *more) in outputs.items()]
    return part
