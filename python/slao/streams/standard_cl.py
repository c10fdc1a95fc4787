"""Streams "standard_cl" (also named "hub") and "long_sequence": the classification benchmarks in their published
orders, from a folder or from the hub.

Standard CL: four text classification data sets of Zhang et al., "Character-level Convolutional Networks for Text
Classification", NeurIPS 2015, in orders O1 to O3. The long sequence adds Yelp, IMDB and tasks of GLUE and SuperGLUE:
fifteen tasks, orders O4 to O6 (Razdaibiedina et al., "Progressive Prompts", ICLR 2023; O-LoRA, arXiv 2310.14152).

Folders that are read, `path` being the folder CL_Benchmark or the one that holds it:
    O-LoRA   CL_Benchmark/<group>/<task>/{train,test,labels}.json, lists of {"sentence", "label"}
    SAPT     CL_Benchmark/Long_Sequence/<task>/{train,test,labels}.json, {"Instances": [{"input", "output"}]}
and the same as JSON lines or one level higher (see the stream "jsonl"). Whatever the source, instruction and labels
are those of `sources.py`. dev.json is a copy of test.json in both, so it is never read: validation comes out of the
training rows, before those are drawn; the test file gives test rows only. MNLI's file has test rows labelled "-",
on which the annotators did not agree; they are left out. SAPT's QQP says yes and no for True and False.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from slao.streams.base import Row, Splits, Stream, Task
from slao.streams.hub import HubPart, loader
from slao.streams.jsonl import read_labels, read_split, task_folders
from slao.streams.sources import SOURCES

ORDERS: Mapping[str, tuple[str, ...]] = {
    name: tuple(tasks.split())
    for name, tasks in {
        "O1": "dbpedia amazon yahoo agnews",
        "O2": "dbpedia amazon agnews yahoo",
        "O3": "yahoo amazon agnews dbpedia",
        "O4": "MNLI CB WiC COPA QQP BoolQA RTE IMDB yelp amazon SST-2 dbpedia agnews MultiRC yahoo",
        "O5": "MultiRC BoolQA WiC MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yelp amazon yahoo",
        "O6": "yelp amazon MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yahoo MultiRC BoolQA WiC",
    }.items()
}
UNDECIDED = "-"  # SNLI's and MNLI's mark of a pair without a label
SPELLINGS = {"QQP": {"yes": "True", "no": "False"}}


def standard_cl(
    order: str = "O1",
    path: str | Path | None = None,
    rows: int | None = 1000,
    validation_per_label: int = 500,
    test_per_label: int | None = 500,
    seed: int = 0,
    load: Callable[..., Any] | None = None,
) -> Stream:
    """The four tasks of order O1, O2 or O3; the same rows for the same arguments, and in every order of the tasks.

    path: a folder as above; without it the rows come from the hub.
    rows: training rows of a task, drawn at random after validation is set aside; None takes all.
    validation_per_label: rows of each label that move from train to validation, at most a tenth of the label's.
    test_per_label: rows of each label kept for the test, or all where there are fewer; None takes all.
    load: stands in for `datasets.load_dataset`, called as load(hub_id, split=...) or load(hub_id, config, split=...);
    say one that pins a revision or reads a mirror.

    ValueError: an unknown order, a number out of range, folders that are missing (all are named), a column that the
    data set lacks, or a label outside the published ones. ImportError: no path and no `datasets`.
    """
    return _stream(
        "standard_cl", ("O1", "O2", "O3"), order, path, rows, validation_per_label, test_per_label, seed, load
    )


def long_sequence(
    order: str = "O4",
    path: str | Path | None = None,
    rows: int | None = 1000,
    validation_per_label: int = 500,
    test_per_label: int | None = 500,
    seed: int = 0,
    load: Callable[..., Any] | None = None,
) -> Stream:
    """The fifteen tasks of order O4, O5 or O6; options and errors as for `standard_cl`."""
    return _stream(
        "long_sequence", ("O4", "O5", "O6"), order, path, rows, validation_per_label, test_per_label, seed, load
    )


def _stream(
    name: str,
    orders: tuple[str, ...],
    order: str,
    path: str | Path | None,
    rows: int | None,
    validation_per_label: int,
    test_per_label: int | None,
    seed: int,
    load: Callable[..., Any] | None,
) -> Stream:
    if order not in orders:
        raise ValueError(f"no order {order!r}; those of {name} are {', '.join(orders)}")
    for option, value, least in (
        ("rows", rows, 1),
        ("validation_per_label", validation_per_label, 0),
        ("test_per_label", test_per_label, 1),
    ):
        if value is not None and value < least:
            raise ValueError(f"{option} must be at least {least}, not {value}")
    if path is None:
        load = loader(load, ", or give path, a folder with the tasks")
        parts = {task: _from_hub(task, load) for task in ORDERS[order]}
    else:
        folders = _folders(Path(path), ORDERS[order])
        parts = {task: _from_folder(task, folder) for task, folder in folders.items()}
    tasks = (_draw(task, *parts[task], rows, validation_per_label, test_per_label, seed) for task in ORDERS[order])
    return Stream(f"{name}_{order}", tuple(tasks))


class Part(Protocol):
    """Rows of a split, of which the labels are known before the texts are read."""

    labels: list[str]

    def rows(self, places: Sequence[int]) -> Iterable[Row]: ...


def _draw(
    name: str,
    train: Part,
    test: Part,
    rows: int | None,
    validation_per_label: int,
    test_per_label: int | None,
    seed: int,
) -> Task:
    rest: list[int] = []
    validation: list[int] = []
    for label, places in _places(train.labels).items():
        random.Random(f"{seed}/{name}/validation/{label}").shuffle(places)
        held = min(validation_per_label, len(places) // 10)
        validation += places[:held]
        rest += places[held:]
    random.Random(f"{seed}/{name}/train").shuffle(rest)

    kept: list[int] = []
    for label, places in _places(test.labels).items():
        random.Random(f"{seed}/{name}/test/{label}").shuffle(places)
        kept += places[:test_per_label]

    splits = Splits(list(train.rows(rest[:rows])), list(train.rows(sorted(validation))), list(test.rows(sorted(kept))))
    return splits.task(name, SOURCES[name].labels, SOURCES[name].instruction)


def _places(labels: Sequence[str]) -> dict[str, list[int]]:
    """Label -> the places of its rows, in an order that does not hang on the rows'."""
    places: dict[str, list[int]] = {label: [] for label in sorted(set(labels))}
    for place, label in enumerate(labels):
        places[label].append(place)
    return places


def _from_hub(name: str, load: Callable[..., Any]) -> tuple[Part, Part]:
    source = SOURCES[name]
    return HubPart(source, "train", load), HubPart(source, source.test, load)


class _FolderPart:
    def __init__(self, name: str, rows: Iterable[Row]) -> None:
        spelt = SPELLINGS.get(name, {})
        self._rows = [replace(row, answer=spelt.get(row.answer, row.answer)) for row in rows if row.answer != UNDECIDED]
        self.labels = [row.answer for row in self._rows]

    def rows(self, places: Sequence[int]) -> Iterable[Row]:
        return [self._rows[place] for place in places]


def _from_folder(name: str, folder: Path) -> tuple[Part, Part]:
    listed = read_labels(folder)
    if listed is not None and set(listed) != set(SOURCES[name].labels):
        raise ValueError(
            f"{folder / 'labels.json'} lists {listed}, but the labels of {name} are {list(SOURCES[name].labels)}: "
            'take the published file, or the stream "jsonl" for a task of your own'
        )
    train, test = read_split(folder, "train"), read_split(folder, "test")
    if train is None or test is None:
        raise ValueError(f"{folder} has no test.json; every task needs one")
    return _FolderPart(name, train.rows), _FolderPart(name, test.rows)


def _plain(name: str) -> str:
    """O-LoRA's and SAPT's spellings of one name: SST-2 and sst2, BoolQA and boolq."""
    name = name.lower().replace("-", "").replace("_", "")
    return "boolqa" if name == "boolq" else name


def _folders(path: Path, names: Sequence[str]) -> dict[str, Path]:
    root = path / "CL_Benchmark" if (path / "CL_Benchmark").is_dir() else path
    found: dict[str, Path] = {}
    for folder in task_folders(root).values():
        other = found.setdefault(_plain(folder.name), folder)
        if other != folder:
            raise ValueError(f"{other} and {folder} are two folders of one task; rename one")
    missing = [name for name in names if _plain(name) not in found]
    if missing:
        raise ValueError(f"{root} has no folder for {', '.join(missing)}; it has {', '.join(sorted(found))}")
    return {name: found[_plain(name)] for name in names}
