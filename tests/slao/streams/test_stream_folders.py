"""Standard CL and the long sequence from folders of O-LoRA's and SAPT's layouts, with rows made here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from slao.streams import Row, make_stream
from slao.streams.sources import SOURCES
from slao.streams.standard_cl import ORDERS, long_sequence, standard_cl

GROUPS = {"SC": "yelp amazon SST-2 IMDB", "TC": "dbpedia yahoo agnews", "NLI": "MNLI CB RTE"}
PER_LABEL = {"train": 20, "dev": 3, "test": 3}


def group(name: str) -> str:
    return next((group for group, names in GROUPS.items() if name in names.split()), name)


def text(name: str, split: str, label: str, i: int) -> str:
    return f"{'test' if split == 'dev' else split} {name} {label} {i}"


def put(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def olora(tmp_path_factory) -> Path:
    """All fifteen tasks as in O-LoRA's repository; dev.json repeats test.json there."""
    root = tmp_path_factory.mktemp("olora")
    for name, source in SOURCES.items():
        folder = root / "CL_Benchmark" / group(name) / name
        put(folder / "labels.json", source.labels[::-1])
        for split, count in PER_LABEL.items():
            rows = [
                {"sentence": text(name, split, label, i), "label": label}
                for label in source.labels
                for i in range(count)
            ]
            if name == "MNLI" and split != "train":
                rows.append({"sentence": "undecided", "label": "-"})
            put(folder / f"{split}.json", rows)
    return root


@pytest.fixture(scope="module")
def sapt(tmp_path_factory) -> Path:
    """The same rows as in SAPT's: lower-case names, SuperNI's form, and yes and no in QQP."""
    root = tmp_path_factory.mktemp("sapt")
    for name, source in SOURCES.items():
        folder = root / "CL_Benchmark" / "Long_Sequence" / name.lower().replace("-", "").replace("boolqa", "boolq")
        put(folder / "labels.json", source.labels)
        for split, count in PER_LABEL.items():
            rows = [
                {"input": text(name, split, label, i), "output": label} for label in source.labels for i in range(count)
            ]
            if name == "QQP":
                rows = [row | {"output": {"True": "yes", "False": "no"}[row["output"]]} for row in rows]
            put(folder / f"{split}.json", {"Definition": ["Another wording."], "Instances": rows})
    put(root / "CL_Benchmark" / "SuperNI" / "task002_x" / "train.json", {"Instances": []})
    return root


def test_orders_are_the_published_ones():
    assert {name: " ".join(tasks) for name, tasks in ORDERS.items()} == {
        "O1": "dbpedia amazon yahoo agnews",
        "O2": "dbpedia amazon agnews yahoo",
        "O3": "yahoo amazon agnews dbpedia",
        "O4": "MNLI CB WiC COPA QQP BoolQA RTE IMDB yelp amazon SST-2 dbpedia agnews MultiRC yahoo",
        "O5": "MultiRC BoolQA WiC MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yelp amazon yahoo",
        "O6": "yelp amazon MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yahoo MultiRC BoolQA WiC",
    }
    assert all(set(ORDERS[order]) == set(SOURCES) for order in ("O4", "O5", "O6"))


@pytest.mark.parametrize("layout", ["olora", "sapt"])
@pytest.mark.parametrize(("name", "order"), [("standard_cl", "O3"), ("long_sequence", "O4"), ("long_sequence", "O5")])
def test_both_layouts(request, layout, name, order):
    root = request.getfixturevalue(layout)
    stream = make_stream(name, order=order, path=root, rows=30)
    assert stream.name == f"{name}_{order}"
    assert tuple(task.name for task in stream.tasks) == ORDERS[order]
    for task in stream.tasks:
        source, labels = SOURCES[task.name], len(task.labels)
        assert (task.labels, task.instruction) == (source.labels, source.instruction)
        assert (len(task.train), len(task.validation), len(task.test)) == (min(30, 18 * labels), 2 * labels, 3 * labels)
        for split in ("train", "validation", "test"):
            for row in getattr(task, split):
                start = "test" if split == "test" else "train"
                assert row.prompt.startswith(f"{start} {task.name} {row.answer} ")
        assert not {row.prompt for row in task.train} & {row.prompt for row in task.validation}


def test_the_layouts_give_the_same_stream(olora, sapt):
    assert long_sequence("O4", olora) == long_sequence("O4", sapt / "CL_Benchmark")
    assert long_sequence("O4", olora).tasks[0] == next(t for t in long_sequence("O6", olora).tasks if t.name == "MNLI")
    assert standard_cl("O1", olora, seed=1) != standard_cl("O1", olora, seed=0)


def test_the_dev_file_and_undecided_rows_are_not_read(olora):
    task = next(task for task in long_sequence(path=olora, rows=None).tasks if task.name == "MNLI")
    assert len(task.test) == 9
    assert "undecided" not in {row.prompt for row in task.test}
    assert {row.prompt.split()[0] for row in task.validation} == {"train"}


def test_prompts_do_not_name_the_task():
    assert len({source.instruction for source in SOURCES.values()}) == 8
    for name, source in SOURCES.items():
        wording = " ".join([source.instruction, *source.text]).lower()
        assert name.lower() not in wording.split()
        assert source.instruction == "" or source.instruction.endswith("Choose one from the option.")


@pytest.fixture
def copy(olora, tmp_path) -> Path:
    shutil.copytree(olora / "CL_Benchmark", tmp_path / "cl")
    return tmp_path / "cl"


def test_all_missing_folders_are_named(copy):
    for name in ("SC/amazon", "TC/agnews"):
        shutil.rmtree(copy / name)
    with pytest.raises(ValueError, match=r"cl has no folder for amazon, agnews; it has boolqa, cb, copa, "):
        standard_cl("O1", copy)
    with pytest.raises(ValueError, match="no folder .*/nowhere; path must be a folder"):
        standard_cl("O1", copy / "nowhere")


def test_two_folders_of_one_task(copy):
    shutil.copytree(copy / "SC" / "SST-2", copy / "SC" / "sst2")
    with pytest.raises(ValueError, match=r"SST-2 and .*sst2 are two folders of one task; rename one"):
        long_sequence("O4", copy)


def test_a_missing_test_file(copy):
    (copy / "TC" / "yahoo" / "test.json").unlink()
    with pytest.raises(ValueError, match=r"yahoo has no test.json; every task needs one"):
        standard_cl("O1", copy)


def test_labels_that_are_not_the_published_ones(copy):
    put(copy / "SC" / "amazon" / "labels.json", ["good", "bad"])
    with pytest.raises(ValueError, match=r"amazon/labels.json lists \['good', 'bad'\], but the labels of amazon are"):
        standard_cl("O1", copy)


def test_a_row_with_an_unknown_label_or_none(copy):
    file = copy / "TC" / "agnews" / "test.json"
    rows = json.loads(file.read_text())
    put(file, [*rows, {"sentence": "x", "label": "Weather"}])
    with pytest.raises(ValueError, match="task 'agnews', test: label 'Weather' is not among its labels"):
        standard_cl("O1", copy)
    put(file, [*rows, {"sentence": "x"}])
    with pytest.raises(ValueError, match=rf'agnews/test.json, row {len(rows) + 1}: a row needs "prompt" and "answer"'):
        standard_cl("O1", copy)


def test_a_dev_file_that_repeats_the_test_file_is_no_validation(olora, tmp_path):
    """The stream "jsonl" on O-LoRA's files: validation comes out of train, not out of the test rows."""
    task = make_stream("jsonl", path=olora / "CL_Benchmark", order=["CB"]).tasks[0]
    assert (len(task.train), len(task.validation), len(task.test)) == (54, 6, 9)
    assert {row.prompt.split()[0] for row in task.validation} == {"train"}
    shutil.copytree(olora / "CL_Benchmark" / "NLI" / "CB", tmp_path / "CB")
    put(tmp_path / "CB" / "dev.json", [{"sentence": "own", "label": "neutral"}])
    task = make_stream("jsonl", path=tmp_path).tasks[0]
    assert task.validation == (Row("own", "neutral"),)
