"""Stream "python_docs": sentences of the Python reference, labelled by the help topic that they stand in.

Real English prose that every CPython carries (`pydoc_data.topics`, the text behind `help()`), so the stream needs
no network and no download. The text, and with it the rows, differ a little from one Python version to the next.

On Python 3.11: 79 topics hold 2,890 sentences, repeats included; 18 topics own 40 sentences or more (3.10: 17,
3.12 and 3.13: 19). The default 4 tasks of 4 labels use the 16 largest, 1,771 sentences: 254 in "compound
statements" down to 48 in "function definitions"; 60 % train, 10 % validation, 30 % test of each label. No more than
13 topics own 60 sentences.

Some topics repeat others ("compound" holds all of "try", "specialnames" all of "customization"). A sentence belongs
to the smallest qualifying topic that has it, so no sentence has two labels.
"""

from __future__ import annotations

import platform
import random
import re
from collections.abc import Mapping

from slao.streams.base import Row, Splits, Stream
from slao.streams.prose import sentences

INSTRUCTION = "What is the topic of the following sentence? Choose one from the options."


def python_docs(
    tasks: int = 4,
    labels_per_task: int = 4,
    seed: int = 0,
    test_fraction: float = 0.3,
    validation_fraction: float = 0.1,
    max_rows_per_label: int | None = None,
    min_sentences: int = 40,
) -> Stream:
    """The stream of `tasks` x `labels_per_task` topics; the same rows for the same arguments on the same Python.

    seed: which topics share a task, their order, the split of each label's sentences, and the row order.
    test_fraction, validation_fraction: shares of each label's sentences; the rest is train.
    max_rows_per_label: keep at most so many sentences of a label, over all three splits; evens out the labels.
    min_sentences: a topic with fewer sentences of its own does not qualify. Of those that qualify the largest
    are taken (ties by name).

    ValueError: too few topics qualify, or an option is out of range. ImportError: this Python has no pydoc_data.
    """
    _check(tasks, labels_per_task, test_fraction, validation_fraction, max_rows_per_label, min_sentences)
    texts = help_topics()
    owned = own_sentences({name: sentences(text) for name, text in texts.items()}, min_sentences)
    wanted = tasks * labels_per_task
    if len(owned) < wanted:
        raise ValueError(
            f"{tasks} tasks of {labels_per_task} labels need {wanted} topics, but on Python "
            f"{platform.python_version()} only {len(owned)} have {min_sentences} sentences; "
            "ask for fewer tasks or labels, or lower min_sentences"
        )
    largest = sorted(owned, key=lambda name: (-len(owned[name]), name))[:wanted]
    topics = sorted(largest)
    random.Random(seed).shuffle(topics)
    labels = label_texts({name: texts[name] for name in topics})

    built = []
    for number in range(tasks):
        splits = Splits()
        members = topics[number * labels_per_task : (number + 1) * labels_per_task]
        for name in members:
            rows = [Row(sentence, labels[name]) for sentence in owned[name]]
            random.Random(f"{seed}/{name}").shuffle(rows)
            rows = rows[:max_rows_per_label]
            test = max(1, round(test_fraction * len(rows)))
            held = test + round(validation_fraction * len(rows))
            splits.test += rows[:test]
            splits.validation += rows[test:held]
            splits.train += rows[held:]
        for part in (splits.train, splits.validation, splits.test):
            random.Random(f"{seed}/{number}").shuffle(part)
        built.append(splits.task(f"docs_{number + 1}", (labels[name] for name in members), INSTRUCTION))
    return Stream("python_docs", tuple(built))


def own_sentences(found: Mapping[str, list[str]], min_sentences: int) -> dict[str, list[str]]:
    """Topic -> the sentences that it owns, for the topics that own at least `min_sentences`.

    Topics take their sentences from the smallest to the largest, so a part comes before the whole that repeats it;
    a topic that is left with too few takes none, and they stay for a larger one. Sentences that differ in case or
    punctuation only count as one.
    """
    taken: set[str] = set()
    owned: dict[str, list[str]] = {}
    for name in sorted(found, key=lambda name: (len(found[name]), name)):
        fresh = {key: sentence for sentence in found[name] if (key := _key(sentence)) not in taken}
        if len(fresh) >= min_sentences:
            owned[name] = list(fresh.values())
            taken.update(fresh)
    return owned


def label_texts(texts: Mapping[str, str]) -> dict[str, str]:
    """Topic name -> its title as a label: lower case, words only; the name is added where two titles are equal."""
    titles = {name: _words(text.lstrip().partition("\n")[0]) or _words(name) for name, text in texts.items()}
    repeated = {title for title in titles.values() if list(titles.values()).count(title) > 1}
    return {name: f"{title} {_words(name)}" if title in repeated else title for name, title in titles.items()}


def help_topics() -> Mapping[str, str]:
    """Name -> text of the help topics that Python carries."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ImportError(
            "this Python was installed without pydoc_data, the text of its help topics; "
            "install the full standard library or choose another stream"
        ) from error
    return topics


def _words(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def _key(sentence: str) -> str:
    return " ".join(re.findall(r"\w+", sentence.casefold()))


def _check(
    tasks: int,
    labels_per_task: int,
    test_fraction: float,
    validation_fraction: float,
    max_rows_per_label: int | None,
    min_sentences: int,
) -> None:
    for name, value, least in (
        ("tasks", tasks, 1),
        ("labels_per_task", labels_per_task, 1),
        ("min_sentences", min_sentences, 3),
        ("max_rows_per_label", max_rows_per_label, 3),  # one for each split
    ):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}")
    if not (test_fraction > 0 and validation_fraction >= 0 and test_fraction + validation_fraction <= 0.9):
        raise ValueError(
            "test_fraction must be above 0, validation_fraction at least 0, and their sum at most 0.9, "
            f"not {test_fraction} and {validation_fraction}"
        )
