"""CLINC150: the real files where they are, small ones of the same form, and rows handed in as from the hub."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from slao.streams import make_stream
from slao.streams.clinc150 import DOMAINS, clinc150

FOLDER = Path(__file__).parents[3] / "../shared/data/clinc150"
real = pytest.mark.skipif(
    not (FOLDER / "data_full.json").is_file(), reason="the CLINC150 files are not in ../shared/data/clinc150"
)


@real
def test_the_real_data_has_the_published_sizes():
    stream = clinc150(FOLDER)
    assert [task.name for task in stream.tasks] == list(DOMAINS)
    assert len(stream.labels) == 150
    for task in stream.tasks:
        assert (len(task.labels), len(task.train), len(task.validation), len(task.test)) == (15, 1500, 300, 450)
        assert set(Counter(row.answer for row in task.train).values()) == {100}
        assert set(Counter(row.answer for row in task.test).values()) == {30}
    train, test = ({row.prompt for task in stream.tasks for row in getattr(task, part)} for part in ("train", "test"))
    assert len(train & test) == 2  # as published


@real
def test_a_fraction_is_drawn_per_intent_from_the_seed():
    stream = clinc150(FOLDER, fraction=0.1)
    assert all(set(Counter(row.answer for row in task.train).values()) == {10} for task in stream.tasks)
    assert all((len(task.validation), len(task.test)) == (300, 450) for task in stream.tasks)
    assert clinc150(FOLDER, fraction=0.1) == stream
    assert clinc150(FOLDER, fraction=0.1, seed=1) != stream


@real
def test_the_table_in_the_code_is_the_one_of_the_data_set():
    table = json.loads((FOLDER / "domains.json").read_text())
    assert {domain: intents.split() for domain, intents in DOMAINS.items()} == table
    assert list(table) == list(DOMAINS)


def test_the_table_has_150_intents():
    intents = [intent for intents in DOMAINS.values() for intent in intents.split()]
    assert [len(intents.split()) for intents in DOMAINS.values()] == [15] * 10
    assert len(set(intents)) == 150


def small():
    data = {
        "train": [[f"say {intent} {i}", intent] for intent in ("pay_bill", "pto_used") for i in range(4)],
        "val": [["may i pay", "pay_bill"], ["days off so far", "pto_used"]],
        "test": [["pay it", "pay_bill"], ["how many days", "pto_used"]],
        "oos_train": [["what is the sky", "oos"]],
    }
    return data, {"banking": ["pay_bill"], "work": ["pto_used"]}


def write(folder, data, domains):
    (folder / "data_full.json").write_text(data if isinstance(data, str) else json.dumps(data))
    (folder / "domains.json").write_text(json.dumps(domains))
    return folder


def test_a_folder_becomes_a_task_a_domain(tmp_path):
    stream = make_stream("clinc150", path=write(tmp_path, *small()))
    assert [(task.name, task.labels) for task in stream.tasks] == [("banking", ("pay bill",)), ("work", ("pto used",))]
    assert [row.prompt for row in stream.tasks[0].train] == [f"say pay_bill {i}" for i in range(4)]
    assert [row.prompt for row in stream.tasks[1].validation] == ["days off so far"]
    assert {row.answer for row in stream.tasks[1].test} == {"pto used"}
    assert all("oos" not in row.answer for task in stream.tasks for row in task.train)


def test_a_fraction_leaves_one_row_at_least(tmp_path):
    stream = clinc150(write(tmp_path, *small()), fraction=0.01)
    assert [len(task.train) for task in stream.tasks] == [1, 1]


def test_an_absent_folder_or_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no .*nowhere.data_full.json; path must be a folder with data_full.json and"):
        clinc150(tmp_path / "nowhere")
    write(tmp_path, *small())
    (tmp_path / "domains.json").unlink()
    with pytest.raises(ValueError, match=r"no .*domains.json"):
        clinc150(tmp_path)


def test_malformed_files_are_named(tmp_path):
    data, domains = small()
    with pytest.raises(ValueError, match=r"data_full.json, line 1: not JSON"):
        clinc150(write(tmp_path, "{", domains))
    with pytest.raises(ValueError, match=r"data_full.json: 'val' must be a list of \[text, intent\]"):
        clinc150(write(tmp_path, {"train": data["train"]}, domains))
    with pytest.raises(ValueError, match=r"domains.json: must map each domain"):
        clinc150(write(tmp_path, data, {"banking": "pay_bill"}))
    with pytest.raises(ValueError, match=r"train: intent 'pto_used' of 'say pto_used 0' is in no domain"):
        clinc150(write(tmp_path, data, {"banking": ["pay_bill"]}))


@pytest.mark.parametrize("fraction", [0.0, 1.1])
def test_a_fraction_out_of_range(tmp_path, fraction):
    with pytest.raises(ValueError, match="fraction must lie in"):
        clinc150(tmp_path, fraction=fraction)


def test_rows_of_the_hub_without_those_out_of_scope():
    datasets = pytest.importorskip("datasets")
    intents = ["oos", *(intent for intents in DOMAINS.values() for intent in intents.split())]
    features = datasets.Features({"text": datasets.Value("string"), "intent": datasets.ClassLabel(names=intents)})
    asked = []

    def load(hub_id, config, *, split):
        asked.append((hub_id, config, split))
        rows = {"text": [f"{split} {intent}" for intent in intents], "intent": list(range(len(intents)))}
        return datasets.Dataset.from_dict(rows, features=features)

    stream = clinc150(load=load)
    assert asked == [("clinc/clinc_oos", "plus", split) for split in ("train", "validation", "test")]
    assert [len(task.train) for task in stream.tasks] == [15] * 10
    assert stream.tasks[0].test[0].prompt == "test freeze_account"
    assert stream.tasks[0].test[0].answer == "freeze account"


def test_without_datasets_the_error_says_what_to_install_or_give(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "slao_kernels\[hub\]", or give path'):
        clinc150()
