"""TRACE from files of its layout, with rows made here, scored by each task's own metric after a few steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slao import SLAO
from slao.objectives import CausalLM
from slao.streams import make_stream
from slao.streams.trace import METRICS
from slao.train import TrainConfig, train

ORDER = ["C-STANCE", "FOMC", "MeetingBank", "Py150", "ScienceQA", "NumGLUE-cm", "NumGLUE-ds", "20Minuten"]


@pytest.fixture
def folder(tmp_path) -> Path:
    """As the archive unpacks: its folder of 5,000 rows a task, and one of replay that is no task."""
    for name in (*ORDER, "Lima"):
        for split, count in (("train", 20), ("eval", 4), ("test", 3)):
            rows = [{"prompt": f"{name} {split} {i}:", "answer": f"{'ABC'[i % 3]} {i}"} for i in range(count)]
            file = tmp_path / "LLM-CL-Benchmark_5000" / name / f"{split}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(rows))
    return tmp_path


@pytest.mark.parametrize("above", [True, False])
def test_the_tasks_their_rows_and_metrics(folder, above):
    stream = make_stream("trace", path=str(folder if above else folder / "LLM-CL-Benchmark_5000"))
    assert [task.name for task in stream.tasks] == ORDER
    assert {task.name: task.metric for task in stream.tasks} == METRICS
    for task in stream.tasks:
        assert [len(rows) for rows in (task.train, task.validation, task.test)] == [20, 4, 3]
        assert (task.labels, task.instruction, task.kind) == ((), "", "prompt and answer")
        assert task.validation[1].prompt == f"{task.name} eval 1:"
        assert task.test[2].answer == "C 2"


def test_without_eval_rows_a_part_of_the_training_rows_is_kept_apart(folder):
    (folder / "LLM-CL-Benchmark_5000" / "FOMC" / "eval.json").unlink()
    (task,) = make_stream("trace", path=str(folder), order=["FOMC"], validation_fraction=0.2).tasks
    assert (len(task.train), len(task.validation)) == (16, 4)
    assert {row.prompt for row in (*task.train, *task.validation)} == {f"FOMC train {i}:" for i in range(20)}


def test_refusals(folder):
    root = folder / "LLM-CL-Benchmark_5000"
    with pytest.raises(ValueError, match="order names the task 'Lima'; those of trace are C-STANCE, FOMC, "):
        make_stream("trace", path=str(folder), order=["Lima"])
    (root / "Py150" / "test.json").unlink()
    with pytest.raises(ValueError, match="Py150 has no test.json"):
        make_stream("trace", path=str(folder))
    (root / "Py150" / "train.json").write_text(json.dumps([{"text": "a", "label": "b"}]))
    (root / "Py150" / "test.json").write_text(json.dumps([{"prompt": "a", "answer": "b"}]))
    with pytest.raises(ValueError, match=r'a row of trace is \{"prompt", "answer"\}'):
        make_stream("trace", path=str(folder))
    (root / "Py150" / "train.json").unlink()
    with pytest.raises(ValueError, match="has no folder for Py150; it holds 20Minuten, C-STANCE, "):
        make_stream("trace", path=str(folder))


def test_a_model_learns_it_and_is_scored_by_each_metric(tiny, folder):
    pytest.importorskip("rouge_score", reason="the package rouge-score is missing")
    stream = make_stream("trace", path=str(folder), order=["ScienceQA", "20Minuten", "Py150", "MeetingBank"])
    model = tiny.adapted("llama")
    objective = CausalLM(model, tiny.tokenizer(), stream, max_new_tokens=3)
    result = train(model, SLAO(model), stream, objective, TrainConfig(max_steps=2, batch_size=4))
    assert result.finished
    assert all(score is not None and 0 <= score <= 1 for row in result.matrix for score in row)
