"""Stream "hub": the Standard CL benchmark in its published orders O1 to O3, through Hugging Face `datasets`.

Four text classification data sets of Zhang et al., "Character-level Convolutional Networks for Text
Classification", NeurIPS 2015: DBpedia (14 classes), Amazon reviews (5), Yahoo answers (10), AG news (4). Instruction
lines and label texts are those of O-LoRA (arXiv 2310.14152) and its data files, which the later papers share. The
sizes are those of its long stream: 1,000 training rows a task drawn at random, and 500 rows of each class for
validation and for test. Validation comes out of the training split, before the training rows are drawn; the test
split gives test rows only.

The whole sets are large (Yahoo 1.4 M and Amazon 3 M training rows): their label column is read, and of the texts
only the rows that are drawn.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slao.streams.base import Row, Splits, Stream, Task

ORDERS: Mapping[str, tuple[str, ...]] = {
    "O1": ("dbpedia", "amazon", "yahoo", "agnews"),
    "O2": ("dbpedia", "amazon", "agnews", "yahoo"),
    "O3": ("yahoo", "amazon", "agnews", "dbpedia"),
}
TOPIC = "What is the topic of the following paragraph? Choose one from the option."
SENTIMENT = "What is the sentiment of the following paragraph? Choose one from the option."


@dataclass(frozen=True)
class Source:
    """Where one task's rows stand on the hub.

    text: the columns that make the prompt, joined by newlines. labels: the text of each value of the column
    `label`, of which the first is `first_label`.
    """

    hub_id: str
    text: tuple[str, ...]
    label: str
    labels: tuple[str, ...]
    instruction: str
    first_label: int = 0


SOURCES: Mapping[str, Source] = {
    "dbpedia": Source(
        "fancyzhx/dbpedia_14",
        ("title", "content"),
        "label",
        (
            "Company", "Educational Institution", "Artist", "Athlete", "Office Holder", "Mean of Transportation",
            "Building", "Natural Place", "Village", "Animal", "Plant", "Album", "Film", "Written Work",
        ),
        TOPIC,
    ),
    "amazon": Source(
        # The five-star version, as the papers use; "amazon_polarity" has two classes. Stars count from 1.
        "yassiracharki/Amazon_Reviews_for_Sentiment_Analysis_fine_grained_5_classes",
        ("review_title", "review_text"),
        "class_index",
        ("very negative", "negative", "neutral", "positive", "very positive"),
        SENTIMENT,
        first_label=1,
    ),
    "yahoo": Source(
        "community-datasets/yahoo_answers_topics",
        ("question_title", "question_content", "best_answer"),
        "topic",
        (
            "Society & Culture", "Science & Mathematics", "Health", "Education & Reference",
            "Computers & Internet", "Sports", "Business & Finance", "Entertainment & Music",
            "Family & Relationships", "Politics & Government",
        ),
        TOPIC,
    ),
    "agnews": Source(
        "fancyzhx/ag_news", ("text",), "label", ("World", "Sports", "Business", "Science or Technology"), TOPIC
    ),
}  # fmt: skip


def standard_cl(
    order: str = "O1",
    rows: int | None = 1000,
    validation_per_label: int = 500,
    test_per_label: int | None = 500,
    seed: int = 0,
    load: Callable[..., Any] | None = None,
) -> Stream:
    """The four tasks of `order`; the same rows for the same arguments, and in every order of the tasks.

    rows: training rows of a task, drawn at random after validation is set aside; None takes all.
    validation_per_label: rows of each label that move from train to validation, at most half of the label's.
    test_per_label: rows of each label kept for the test, or all where there are fewer; None takes all.
    load: stands in for `datasets.load_dataset`, called as load(hub_id, split="train" | "test"); say one that pins
    a revision or reads a mirror.

    ValueError: an unknown order, a number out of range, a column that the data set lacks, or a label value
    outside the published ones. ImportError: `datasets` is not installed.
    """
    if order not in ORDERS:
        raise ValueError(f"no order {order!r}; the published ones are {', '.join(ORDERS)}")
    for name, value, least in (
        ("rows", rows, 1),
        ("validation_per_label", validation_per_label, 0),
        ("test_per_label", test_per_label, 1),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}")
    load = loader(load)
    tasks = (
        _task(name, SOURCES[name], load, rows, validation_per_label, test_per_label, seed) for name in ORDERS[order]
    )
    return Stream(f"hub_{order}", tuple(tasks))


def loader(load: Callable[..., Any] | None, otherwise: str = "") -> Callable[..., Any]:
    """`load`, or `datasets.load_dataset` where it is None; ImportError says what to install, or `otherwise`."""
    if load is not None:
        return load
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f'data sets from the hub need `datasets`: pip install "slao_kernels[hub]"{otherwise}'
        ) from error
    return load_dataset


def _task(
    name: str,
    source: Source,
    load: Callable[..., Any],
    rows: int | None,
    validation_per_label: int,
    test_per_label: int | None,
    seed: int,
) -> Task:
    train = load(source.hub_id, split="train")
    rest: list[int] = []
    validation: list[int] = []
    for label, places in _places(train, source).items():
        random.Random(f"{seed}/{name}/validation/{label}").shuffle(places)
        held = min(validation_per_label, len(places) // 2)
        validation += places[:held]
        rest += places[held:]
    random.Random(f"{seed}/{name}/train").shuffle(rest)

    test = load(source.hub_id, split="test")
    kept: list[int] = []
    for label, places in _places(test, source).items():
        random.Random(f"{seed}/{name}/test/{label}").shuffle(places)
        kept += places[:test_per_label]

    splits = Splits(
        list(_rows(train, source, rest[:rows])),
        list(_rows(train, source, sorted(validation))),
        list(_rows(test, source, sorted(kept))),
    )
    return splits.task(name, source.labels, source.instruction)


def _places(dataset: Any, source: Source) -> dict[int, list[int]]:
    """Label value -> the places of its rows; reads the label column only."""
    missing = {*source.text, source.label} - set(dataset.column_names)
    if missing:
        raise ValueError(
            f"{source.hub_id} has no column {sorted(missing)[0]!r}, only {dataset.column_names}; "
            "its layout has changed: give load a function that returns the published columns"
        )
    allowed = range(source.first_label, source.first_label + len(source.labels))
    places: dict[int, list[int]] = {value: [] for value in allowed}
    for place, value in enumerate(dataset[source.label][:]):
        if value not in places:
            raise ValueError(
                f"{source.hub_id}, row {place}: label {value!r} is not in {allowed.start}..{allowed.stop - 1}"
            )
        places[value].append(place)
    return places


def _rows(dataset: Any, source: Source, places: Sequence[int]) -> Iterable[Row]:
    for example in dataset.select(places):
        parts = (str(example[column] or "").strip() for column in source.text)
        text = "\n".join(part for part in parts if part)
        yield Row(text, source.labels[example[source.label] - source.first_label])
