"""SuperNI from files of the published layouts, with rows made here, and trained on for a few steps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from slao import SLAO
from slao.objectives import CausalLM
from slao.streams import Row, Stream, make_stream
from slao.streams.superni import HUB_ID, NAMES, ORDERS, superni
from slao.train import TrainConfig, train

O1 = "1572 363 1290 181 002 1510 639 1729 073 1590 748 511 591 1687 875"
O2 = "748 073 1590 639 1572 1687 591 363 1510 1729 181 511 002 1290 875"


def content(name: str, split: str, count: int) -> dict[str, object]:
    """A task file; the last row has three outputs, and two tasks have plain texts, as the published files do."""
    plain = name.startswith(("task363", "task639"))
    rows = [
        {"id": f"{name}-{i}", "input": f"{split} {i}", "output": f"a {i}" if plain else [f"a {i}"]}
        for i in range(count)
    ]
    if not plain:
        rows[-1]["output"] = ["one", "two", "three"]
    definition = " Say a word.\n"
    return {"Definition": definition if plain else [definition, "Another."], "Positive Examples": [], "Instances": rows}


def put(file: Path, value: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


@pytest.fixture
def split_files(tmp_path) -> Path:
    """SAPT's layout."""
    for name in NAMES:
        for split, count in (("train", 30), ("test", 5), ("dev", 5)):
            put(tmp_path / "CL_Benchmark" / "SuperNI" / name / f"{split}.json", content(name, split, count))
    return tmp_path


@pytest.fixture
def single_files(tmp_path) -> Path:
    """natural-instructions' layout, among other tasks."""
    for name in (*NAMES, "task001_quoref_question_generation"):
        put(tmp_path / "tasks" / f"{name}.json", content(name, "row", 50))
    put(tmp_path / "tasks" / "README.md", "")
    return tmp_path


def numbers(stream: Stream) -> str:
    return " ".join(task.name.removeprefix("task").partition("_")[0] for task in stream.tasks)


def by_name(stream: Stream) -> dict[str, object]:
    return {task.name: task for task in stream.tasks}


def sizes(stream: Stream) -> set[tuple[int, int, int]]:
    return {(len(task.train), len(task.validation), len(task.test)) for task in stream.tasks}


def test_orders_metrics_and_instructions(split_files):
    one, two = superni("O1", split_files), superni("O2", split_files)
    assert (numbers(one), numbers(two)) == (O1, O2)
    assert by_name(one) == by_name(two)
    exact = {task.name.partition("_")[0] for task in one.tasks if task.metric == "exact_match"}
    assert exact == {"task363", "task1687", "task875"}
    assert one.metric == "rouge_l, exact_match"
    assert {(task.instruction, task.labels) for task in one.tasks} == {("Say a word.", ())}
    assert set(ORDERS) == {"O1", "O2"}


@pytest.mark.parametrize("below", ["", "CL_Benchmark", "CL_Benchmark/SuperNI"])
def test_train_and_test_files(split_files, below):
    stream = make_stream("superni", path=split_files / below)
    assert sizes(stream) == {(27, 3, 5)}
    for task in stream.tasks:
        assert {row.prompt.split()[0] for row in task.train + task.validation} == {"train"}
        assert {row.prompt for row in task.test} == {f"test {i}" for i in range(5)}
        assert len({row.prompt for row in task.train + task.validation}) == 30
    assert by_name(stream)["task181_outcome_extraction"].test[-1] == Row("test 4", "one", ("two", "three"))
    assert by_name(stream)["task363_sst2_polarity_classification"].test[-1] == Row("test 4", "a 4")


def test_one_file_a_task(single_files, tmp_path):
    stream = superni(path=single_files)
    assert sizes(stream) == {(41, 4, 5)}
    for task in stream.tasks:
        assert {row.prompt for row in task.train + task.validation + task.test} == {f"row {i}" for i in range(50)}
    assert superni(path=single_files, seed=0) == stream != superni(path=single_files, seed=1)
    assert sizes(superni(path=single_files, test_rows=2, rows=10)) == {(10, 4, 2)}
    assert sizes(superni(path=single_files, validation_fraction=0, rows=None)) == {(45, 0, 5)}
    for name in NAMES:  # a folder around each file
        put(tmp_path / "around" / name / "all.json", content(name, "row", 50))
    assert superni(path=tmp_path / "around") == stream


def test_from_the_hub():
    """Outputs of one row come as rows of the same id."""
    asked = []

    def load(hub_id, *, data_files, split):
        asked.append((hub_id, data_files, split))
        rows = [
            {"id": str(i // 2), "definition": "Say.", "inputs": f"row {i // 2}", "targets": f"a {i}"} for i in range(40)
        ]
        return rows

    stream = superni("O2", load=load)
    assert asked[0] == (HUB_ID, "train/task748_glucose_reverse_cause_event_detection_train.jsonl", "train")
    assert len(asked) == 15
    assert sizes(stream) == {(17, 1, 2)}
    rows = {row.prompt: row for row in stream.tasks[0].train + stream.tasks[0].validation + stream.tasks[0].test}
    assert rows["row 7"] == Row("row 7", "a 14", ("a 15",))
    assert stream.tasks[0].instruction == "Say."


def test_a_task_that_the_hub_lacks():
    def load(hub_id, *, data_files, split):
        raise FileNotFoundError(data_files)

    with pytest.raises(ValueError, match="has no file of task1572_samsum_summary: give path, a folder with the tasks"):
        superni(load=load)
    with pytest.raises(
        ValueError, match=r"task1572_samsum_summary: no column 'targets', only \['definition', 'id', 'inputs"
    ):
        superni(load=lambda *_, **__: [{"id": "1", "definition": "", "inputs": ""}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "O3"}, "no order 'O3'; those of superni are O1, O2"),
        ({"rows": 0}, "rows must be at least 1, not 0"),
        ({"test_rows": 0}, "test_rows must be at least 1, not 0"),
        ({"validation_fraction": 1}, r"the validation fraction must lie in \[0, 1\), not 1"),
    ],
)
def test_options_out_of_range(split_files, options, message):
    with pytest.raises(ValueError, match=message):
        superni(path=split_files, **options)


def test_missing_double_and_malformed_tasks(single_files):
    tasks = single_files / "tasks"
    for number in ("363_sst2_polarity_classification", "591_sciq_answer_generation"):
        (tasks / f"task{number}.json").unlink()
    message = "has no folder or file for task363_sst2_polarity_classification, task591_sciq_answer_generation$"
    with pytest.raises(ValueError, match=message):
        superni(path=single_files)
    with pytest.raises(ValueError, match="no folder .*/nowhere; path must be"):
        superni(path=single_files / "nowhere")
    put(tasks / "task0073_other.json", {})
    with pytest.raises(ValueError, match=r"task0073_other.json and .*task073_.*.json are one task; move one"):
        superni(path=single_files)


def test_a_folder_without_a_test_file_and_a_row_without_output(split_files):
    folder = split_files / "CL_Benchmark" / "SuperNI" / NAMES[0]
    put(folder / "test.json", {"Instances": [{"input": "x", "output": []}]})
    with pytest.raises(ValueError, match=r"test.json, row 1: 'output' must be a text, not \[\]"):
        superni(path=split_files)
    (folder / "test.json").unlink()
    with pytest.raises(ValueError, match=r"task002_\w+ must hold train.json and test.json, or one file of all rows"):
        superni(path=split_files)


def test_two_tasks_are_learned_and_scored(tiny, tmp_path):
    """SLAO on the first two tasks, one of each metric: from files to scores that are known in advance."""
    pytest.importorskip("rouge_score", reason="the package rouge-score is missing")
    pairs = [("red", ["cat", "dog"]), ("blue sky", ["dog bird"]), ("a green", ["one two three"]), ("sea", ["four"])] * 3
    for name in NAMES:
        rows = [{"input": text, "output": output} for text, output in pairs]
        # One row is asked for half of what the model learns, one for another reference of it.
        asked = [{"input": "blue sky", "output": ["dog"]}, {"input": "red", "output": ["bird", "cat"]}]
        for split, instances in (("train", rows), ("test", asked)):
            put(tmp_path / name / f"{split}.json", {"Definition": ["choose the word"], "Instances": instances})
    stream = superni(path=tmp_path, validation_fraction=0)
    stream = replace(stream, tasks=stream.tasks[:2])
    model = tiny.adapted("llama", r=8)
    objective = CausalLM(model, tiny.tokenizer(), stream, max_new_tokens=6)
    config = TrainConfig(max_steps=80, batch_size=4, learning_rate=2e-2, lr_scheduler="constant")
    result = train(model, SLAO(model), stream, objective, config)
    assert [task.metric for task in stream.tasks] == ["rouge_l", "exact_match"]
    # Rouge-L of "dog bird" for "dog": 1 of 2 and 1 of 1.
    assert result.matrix[0] == pytest.approx([(2 / 3 + 1) / 2, 1 / 2])
    assert all(0 <= score <= 1 for row in (result.zero_shot, *result.matrix) for score in row)
