"""The stream out of `pydoc_data`: sizes, disjoint and stratified splits, seeds, and what is refused."""

import sys
from collections import Counter

import pytest

from slao.streams import make_stream
from slao.streams.python_docs import label_texts, own_sentences, python_docs


@pytest.fixture(scope="module")
def stream():
    return python_docs()


def rows_of(task):
    return task.train + task.validation + task.test


def prompts(stream):
    return [row.prompt for task in stream.tasks for row in rows_of(task)]


def test_four_tasks_of_four_distinct_labels(stream):
    assert [task.name for task in stream.tasks] == ["docs_1", "docs_2", "docs_3", "docs_4"]
    assert [len(task.labels) for task in stream.tasks] == [4] * 4
    assert len(stream.labels) == 16
    assert all(label == label.lower() and label.replace(" ", "").isalnum() for label in stream.labels)
    # Few enough in all for a laptop, and never a label with too few to learn or to test on.
    counts = Counter(row.answer for task in stream.tasks for row in rows_of(task))
    assert 1600 <= sum(counts.values()) <= 3500
    assert min(counts.values()) >= 40


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the docstring's counts are those of Python 3.11")
def test_the_counts_of_python_3_11(stream):
    # Patch releases touch a few sentences of the documentation.
    assert len(prompts(stream)) == pytest.approx(1771, abs=20)
    counts = Counter(row.answer for task in stream.tasks for row in rows_of(task))
    assert counts["compound statements"] == pytest.approx(254, abs=5)
    assert counts["function definitions"] == pytest.approx(48, abs=3)


def test_no_sentence_stands_twice(stream):
    assert len(set(prompts(stream))) == len(prompts(stream))


def test_each_label_is_split_60_10_30(stream):
    for task in stream.tasks:
        for label in task.labels:
            train, validation, test = (
                sum(row.answer == label for row in split) for split in (task.train, task.validation, task.test)
            )
            total = train + validation + test
            assert test == round(0.3 * total)
            assert validation == round(0.1 * total)


def test_train_rows_are_not_sorted_by_label(stream):
    first = stream.tasks[0].train[:40]
    assert len({row.answer for row in first}) == 4


def test_same_seed_same_rows_other_seed_other_rows(stream):
    assert python_docs(seed=0) == stream
    other = python_docs(seed=1)
    assert set(other.labels) == set(stream.labels)
    assert [task.labels for task in other.tasks] != [task.labels for task in stream.tasks]
    assert {row for task in other.tasks for row in task.test} != {row for task in stream.tasks for row in task.test}
    assert set(prompts(other)) == set(prompts(stream))


def test_eight_tasks_of_two():
    stream = make_stream("python_docs", tasks=8, labels_per_task=2)
    assert [len(task.labels) for task in stream.tasks] == [2] * 8
    assert len(stream.labels) == 16


def test_a_cap_evens_out_the_labels():
    stream = python_docs(max_rows_per_label=40)
    counts = Counter(row.answer for task in stream.tasks for row in rows_of(task))
    assert set(counts.values()) == {40}
    assert [(len(task.train), len(task.validation), len(task.test)) for task in stream.tasks] == [(96, 16, 48)] * 4


def test_too_few_topics_says_how_many_qualify():
    with pytest.raises(ValueError, match=r"8 tasks of 10 labels need 80 topics, .* only \d+ have 40 sentences"):
        python_docs(tasks=8, labels_per_task=10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": 0}, "tasks must be at least 1, not 0"),
        ({"labels_per_task": 0}, "labels_per_task must be at least 1"),
        ({"max_rows_per_label": 2}, "max_rows_per_label must be at least 3, not 2"),
        ({"min_sentences": 0}, "min_sentences must be at least 3"),
        ({"test_fraction": 0.0}, "test_fraction must be above 0"),
        ({"test_fraction": 0.8, "validation_fraction": 0.2}, "their sum at most 0.9, not 0.8 and 0.2"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        python_docs(**options)


def test_a_part_owns_its_sentences_before_the_whole_that_repeats_them():
    part = ["A b.", "C d.", "E f."]
    whole = [*part, "g: h", "G, H!", "I j.", "K l.", "M n."]
    owned = own_sentences({"whole": whole, "part": part, "tiny": ["K l."]}, 3)
    assert owned == {"part": part, "whole": ["G, H!", "I j.", "K l.", "M n."]}  # "g: h" differs in marks only


def test_what_a_topic_too_small_to_qualify_has_stays_with_the_larger():
    assert own_sentences({"whole": ["A.", "B.", "C."], "part": ["A.", "B."]}, 3) == {"whole": ["A.", "B.", "C."]}


def test_labels_are_titles_made_distinct():
    texts = {"typesseq": 'Sequence Types — "list"\n*****\n', "in-a": "Same\n****", "b": "Same\n****"}
    assert label_texts(texts) == {"typesseq": "sequence types list", "in-a": "same in a", "b": "same b"}
