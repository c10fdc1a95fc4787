"""Standard CL and the long sequence from small in-memory data sets with the columns of the published ones."""

import sys
from collections import Counter

import pytest
import torch

from slao.objectives import CausalLM
from slao.streams import make_stream
from slao.streams.sources import SOURCES
from slao.streams.standard_cl import ORDERS, long_sequence, standard_cl


def load(hub_id, config=None, *, split):
    """A data set of 20 train or 6 test rows a label; the text names its split, its label value and its number."""
    datasets = pytest.importorskip("datasets")
    source = next(source for source in SOURCES.values() if (source.hub_id, source.config) == (hub_id, config))
    assert split in ("train", source.test)
    count, split = (20, "train") if split == "train" else (6, "test")
    values = [source.first_label + value for value in range(len(source.labels)) for _ in range(count)]
    columns = {
        column: [f"{split} {column} {value} {i} " for i, value in enumerate(values)] for column in source.columns
    }
    return datasets.Dataset.from_dict({**columns, source.label: values, "unused": values})


def small(**options):
    defaults = {"rows": 20, "validation_per_label": 2, "test_per_label": 3, "load": load}
    return standard_cl(**{**defaults, **options})


@pytest.mark.parametrize("order", ["O1", "O2", "O3"])
@pytest.mark.parametrize("name", ["hub", "standard_cl"])
def test_sizes_labels_and_order(name, order):
    stream = make_stream(name, order=order, rows=20, validation_per_label=2, test_per_label=3, load=load)
    assert tuple(task.name for task in stream.tasks) == ORDERS[order]
    sizes = {
        task.name: (len(task.labels), len(task.train), len(task.validation), len(task.test)) for task in stream.tasks
    }
    assert sizes == {
        "dbpedia": (14, 20, 28, 42),
        "amazon": (5, 20, 10, 15),
        "yahoo": (10, 20, 20, 30),
        "agnews": (4, 20, 8, 12),
    }
    for task in stream.tasks:
        assert set(Counter(row.answer for row in task.validation).values()) == {2}
        assert set(Counter(row.answer for row in task.test).values()) == {3}


def test_the_long_sequence():
    """Every column of every source, in the papers' wording; GLUE and SuperGLUE are tested on validation rows."""
    stream = make_stream("long_sequence", order="O6", rows=20, load=load)
    assert (stream.name, stream.metric) == ("long_sequence_O6", "accuracy")
    assert tuple(task.name for task in stream.tasks) == ORDERS["O6"]
    found = {task.name: task for task in stream.tasks}
    for name, task in found.items():
        per_label = len(SOURCES[name].labels)
        assert (len(task.train), len(task.validation), len(task.test)) == (20, 2 * per_label, 6 * per_label)
        assert all(row.prompt.count("train") == 0 for row in task.test)
    assert found["RTE"].test[0].prompt == "sentence 1: test sentence1 0 0\nsentence 2: test sentence2 0 0"
    assert found["RTE"].test[-1].answer == "contradiction"
    assert found["COPA"].instruction == ""
    first = next(row for row in found["COPA"].test if row.answer == "B")
    assert first.prompt == (
        'Which sentence is the test question 1 6 of "test premise 1 6"? Choose one between A and B.\n'
        "A: test choice1 1 6\nB: test choice2 1 6"
    )
    assert found["WiC"].test[0].prompt.startswith("word: test word 0 0\ntest sentence1 0 0")
    assert (found["SST-2"].test[0].answer, found["SST-2"].test[-1].answer) == ("Bad", "Good")


@pytest.mark.parametrize(("make", "order"), [(standard_cl, "O1"), (long_sequence, "O4")])
def test_tasks_are_read_and_scored_by_a_decoder(tiny, make, order):
    """Each row as the papers have it, and the label that transformers' own logits, row by row, find most likely."""
    stream = make(order=order, rows=4, validation_per_label=0, test_per_label=1, load=load)
    model, tokenizer = tiny.base("llama", seed=1), tiny.characters()
    objective = CausalLM(model, tokenizer, stream, max_length=1500)
    for task in stream.tasks:
        start = f"<bos>{task.instruction}\n" if task.instruction else "<bos>"
        start += f"Option: {', '.join(task.labels)}\n"
        for row, features in zip(task.train, objective.features(task, task.train), strict=True):
            assert tiny.told(features, tokenizer) == f"{start}{row.prompt}\nAnswer:[[ {row.answer}<eos>]]"
        rows, hits = task.test[:2], 0
        for row in rows:
            scores = {}
            for label in task.labels:
                ids = tokenizer(f"{start.removeprefix('<bos>')}{row.prompt}\nAnswer: {label}<eos>")["input_ids"]
                with torch.no_grad():
                    steps = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)[:-1]
                chosen = steps[torch.arange(len(ids) - 1), ids[1:]]
                scores[label] = chosen[-len(label) - 2 :].sum().item()
            hits += max(scores, key=scores.__getitem__) == row.answer
        assert objective.score(model, task, rows, 8) == hits / len(rows)


def test_the_orders_hold_the_same_rows():
    one, three = small(order="O1"), small(order="O3")
    assert {task.name: task for task in one.tasks} == {task.name: task for task in three.tasks}


def test_answers_are_those_of_the_label_column():
    for task in small(rows=None).tasks:
        source = SOURCES[task.name]
        assert task.labels == source.labels
        for row in task.train + task.validation + task.test:
            value = int(row.prompt.split()[2])  # "<split> <column> <value> <number>"
            assert row.answer == source.labels[value - source.first_label]


def test_test_rows_come_from_test_only_and_splits_are_disjoint():
    for task in small(rows=None, test_per_label=None).tasks:
        assert all(row.prompt.startswith("test") for row in task.test)
        assert all(row.prompt.startswith("train") for row in task.train + task.validation)
        rows = task.train + task.validation + task.test
        assert len({row.prompt for row in rows}) == len(rows) == 26 * len(task.labels)


def test_validation_takes_a_tenth_of_a_label_at_most():
    for task in small(rows=None, validation_per_label=500).tasks:
        assert (len(task.validation), len(task.train)) == (2 * len(task.labels), 18 * len(task.labels))


def test_columns_are_joined_and_empty_ones_left_out():
    def with_gaps(hub_id, *, split):
        source = load(hub_id, split=split)
        column = "question_content"
        return source.map(lambda row: {column: None}) if column in source.column_names else source

    yahoo = next(task for task in small(load=with_gaps).tasks if task.name == "yahoo")
    parts = yahoo.test[0].prompt.split("\n")
    assert [part.split()[1] for part in parts] == ["question_title", "best_answer"]


def test_instructions_do_not_name_the_task():
    for task in small().tasks:
        assert task.instruction.endswith("Choose one from the option.")
        assert not any(name in task.instruction.lower() for name in SOURCES)


def test_seeds():
    assert small(seed=0) == small(seed=0)
    assert small(seed=0) != small(seed=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "O4"}, "no order 'O4'; those of standard_cl are O1, O2, O3"),
        ({"rows": 0}, "rows must be at least 1, not 0"),
        ({"validation_per_label": -1}, "validation_per_label must be at least 0"),
        ({"test_per_label": 0}, "test_per_label must be at least 1"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_the_long_sequence_has_orders_of_its_own():
    with pytest.raises(ValueError, match="no order 'O1'; those of long_sequence are O4, O5, O6"):
        long_sequence(order="O1", load=load)


def test_a_changed_layout_is_named():
    def renamed(hub_id, *, split):
        return load(hub_id, split=split).rename_column("content", "body")

    with pytest.raises(ValueError, match=r"fancyzhx/dbpedia_14 has no column 'content', only \['title', 'body'"):
        small(load=renamed)


def test_a_label_out_of_range_is_named():
    def from_zero(hub_id, *, split):
        return load(hub_id, split=split).map(lambda row: {"label": row["label"] - 1})

    with pytest.raises(ValueError, match=r"fancyzhx/dbpedia_14, row 0: label -1 is not in 0..13"):
        small(load=from_zero)


def test_without_datasets_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "slao_kernels\[hub\]"'):
        standard_cl()
