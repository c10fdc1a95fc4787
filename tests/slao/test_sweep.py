"""Sweeps of `slao run`: variants, orders, several processes, and trainings that fail."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from slao import workers
from slao.cli import main
from slao.settings import complete, load_preset, presets
from slao.streams import make_stream
from slao.sweep import jobs, variants
from slao.train import TrainConfig, train

MEASURED = ("tokens_per_second", "train_seconds", "merge_seconds", "score_seconds", "peak_memory_mb")


def settings(**changes: Any) -> dict[str, Any]:
    return complete({"methods": "seqlora,slao", "seeds": [3], **changes})


def test_every_combination_is_a_variant_with_a_name():
    sweep = {"train.learning_rate": [1e-4, "1e-3"], "stream": {"docs": "python_docs", "mine": {"name": "jsonl"}}}
    found = variants(settings(sweep=sweep))
    assert [variant.name for variant in found] == [
        "learning_rate=0.0001, docs", "learning_rate=0.0001, mine",
        "learning_rate=1e-3, docs", "learning_rate=1e-3, mine",
    ]  # fmt: skip
    assert [variant.settings["train"]["learning_rate"] for variant in found] == [1e-4, 1e-4, 1e-3, 1e-3]
    assert [variant.settings["stream"]["name"] for variant in found] == ["python_docs", "jsonl"] * 2
    assert all(variant.settings["sweep"] == {} for variant in found)
    assert found[2].label("slao") == "slao (learning_rate=1e-3, docs)"
    # A part of a section changes that part.
    mixed = {"stream": {"few": {"tasks": 2}, "mine": {"name": "jsonl"}}}
    few, mine = variants(settings(stream={"name": "python_docs", "seed": 3}, sweep=mixed))
    assert few.settings["stream"] == {"name": "python_docs", "seed": 3, "tasks": 2}
    assert mine.settings["stream"] == {"name": "jsonl"}
    (alone,) = variants(settings())
    assert (alone.name, alone.label("slao")) == ("", "slao")


def test_jobs_go_through_seeds_orders_variants_and_methods():
    found = list(jobs(settings(seeds=[0, 4], orders=[0, 2], sweep={"lora.r": [1, 2]})))
    assert len(found) == len({job.folder for job in found}) == 16
    assert [job.label for job in found[:4]] == ["seqlora (r=1)", "slao (r=1)", "seqlora (r=2)", "slao (r=2)"]
    assert [(job.seed, job.order) for job in found[::4]] == [(0, 0), (0, 2), (4, 0), (4, 2)]
    assert found[0].folder == "seqlora_r=1-0-order0"
    assert found[-1].title == "slao (r=2) seed 4 order 2"
    assert [job.folder for job in jobs(settings())] == ["seqlora-3", "slao-3"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sweep": {"seeds": [1, 2]}}, "'seeds' cannot be swept; what can be begins with one of train, lora"),
        ({"sweep": {"train.epochs": 3}}, "sweep.train.epochs must be a list of different values, or a mapping"),
        ({"sweep": {"train.epochs": [1, 1]}}, "sweep.train.epochs must be a list of different values"),
        ({"sweep": {"train.epochs": [1, "many"]}}, "train.epochs must be a number, not 'many'"),
        ({"sweep": [1]}, "'sweep' must be a section"),
        (
            {"methods": {"slao": {"learning_rate": 1e-3}}, "sweep": {"train.learning_rate": [1e-4, 1e-3]}},
            "sweep: train.learning_rate would change nothing of slao, which has a learning_rate of its own",
        ),
        ({"orders": [0, 0]}, "an order stands twice"),
        ({"orders": [-1]}, "orders must be whole numbers from 0"),
        ({"orders": [0], "shuffle_tasks": False}, "orders choose task orders, which shuffle_tasks: false"),
        ({"methods": {"slao": {"learning_rate": "fast"}}}, "methods.slao.learning_rate must be a number"),
        ({"test_rows": "all"}, "test_rows must be a whole number"),
    ],
)
def test_what_cannot_be_swept_is_refused(changes, says):
    with pytest.raises(ValueError, match=says.replace("(", r"\(")):
        variants(settings(**changes))


def test_test_rows_are_limited_without_touching_the_rest(stream_folder):
    stream = make_stream("jsonl", path=str(stream_folder))
    small = stream.limited(rows=3, test=2)
    assert [(len(task.train), len(task.test)) for task in small.tasks] == [(3, 2)] * 2
    assert stream.limited(rows=3).limited(test=2) == small
    for task, whole in zip(small.tasks, stream.tasks, strict=True):
        assert set(task.test) <= set(whole.test)
        assert task.validation == whole.validation


def study(tmp_path: Path, model: Path, stream: Path, **changes: Any) -> list[str]:
    """The command of a run of a few seconds."""
    content = {
        "model": str(model),
        "stream": {"name": "jsonl", "path": str(stream)},
        "methods": {"seqlora": {}, "fast": {"method": "slao", "learning_rate": 3e-2}},
        "seeds": [0],
        "lora": {"r": 2, "target_modules": ["query"]},
        "train": {"max_steps": 2, "batch_size": 4, "learning_rate": 1e-2, "arguments": {"logging_steps": 1}},
    }
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(content | changes, sort_keys=False))
    return ["run", str(file), "--runs", str(tmp_path / "runs")]


def outcome(folder: Path) -> dict[str, Any]:
    methods = json.loads((folder / "results.json").read_text())["methods"]
    return {name: {k: v for k, v in method.items() if k not in MEASURED} for name, method in methods.items()}


@pytest.mark.exhaustive
def test_a_sweep_over_two_orders_in_two_processes(saved_bert, stream_folder, tmp_path, capsys):
    """The same numbers as one after another in one process, and as a run without a sweep; resumed where it stopped."""
    changes = {"sweep": {"lora.r": [2, 3]}, "orders": [0, 1], "similarity": True}
    command = study(tmp_path, saved_bert, stream_folder, **changes)
    assert main([*command, "--jobs", "2", "--name", "two"]) == 0
    assert main([*command, "--name", "one"]) == 0
    two, one = outcome(tmp_path / "runs" / "two"), outcome(tmp_path / "runs" / "one")
    assert list(one) == ["seqlora (r=2)", "fast (r=2)", "seqlora (r=3)", "fast (r=3)"]
    assert two == one
    for method in one.values():
        assert (method["seeds"], method["orders"]) == ([0, 0], [0, 1])
        assert method["tasks"] == [["first", "second"], [*make_order(stream_folder)]]
    for table in one["fast (r=3)"]["similarity"]:
        assert (len(table["tasks"]), table["shapes"]["A"][0][0]) == (2, 3)
    assert (tmp_path / "runs" / "one" / "report" / "similarity_fast_r_2_.svg").is_file()
    assert one["fast (r=2)"]["losses"] != one["fast (r=3)"]["losses"]
    # All that SeqLoRA keeps is A and B.
    assert one["seqlora (r=3)"]["state_mb"][0][0] == pytest.approx(1.5 * one["seqlora (r=2)"]["state_mb"][0][0])
    out = capsys.readouterr().out
    assert "[8/8] " in out

    # One state and one adapter gone: those two are trained again, nothing else.
    folder = tmp_path / "runs" / "two"
    shutil.rmtree(folder / "state" / "fast_r=3-0-order1")
    shutil.rmtree(folder / "adapters" / "seqlora_r=2-0-order0")
    kept = {path: path.stat().st_mtime_ns for path in (folder / "state").rglob("slao_state.safetensors")}
    assert len(kept) == 7
    assert main([*command, "--name", "two", "--resume"]) == 0
    assert outcome(folder) == one
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(list((folder / "adapters").iterdir())) == 8

    alone = study(tmp_path, saved_bert, stream_folder, seeds=[0], shuffle_tasks=False)
    assert main([*alone, "--name", "alone"]) == 0
    for label, method in outcome(tmp_path / "runs" / "alone").items():
        assert method["matrix"][0] == one[f"{label} (r=2)"]["matrix"][0]
        assert method["losses"][0] == one[f"{label} (r=2)"]["losses"][0]


def make_order(stream_folder: Path) -> list[str]:
    return [task.name for task in make_stream("jsonl", path=str(stream_folder)).shuffled(1).tasks]


@pytest.mark.parametrize("processes", ["1", pytest.param("2", marks=pytest.mark.exhaustive)])
def test_a_training_that_diverges_is_reported_and_the_others_go_on(
    saved_bert, stream_folder, tmp_path, capfd, processes
):
    """And standard output is one JSON document, of all processes."""
    methods = {"seqlora": {}, "fast": {"method": "slao"}}
    command = study(tmp_path, saved_bert, stream_folder, methods=methods, sweep={"train.learning_rate": [1e-2, 1e38]})
    capfd.readouterr()
    assert main([*command, "--jobs", processes, "--json"]) == 1
    out, err = capfd.readouterr()
    told = json.loads(out)
    assert "failed: seqlora (learning_rate=1e+38) seed 0: task " in err
    assert "seqlora (learning_rate=0.01) seed 0, task 2/2 " in err
    assert "diverged" in err
    content = json.loads((tmp_path / "runs" / "study" / "results.json").read_text())
    assert list(content["methods"]) == ["seqlora (learning_rate=0.01)", "fast (learning_rate=0.01)"]
    assert list(content["failed"]) == [f"{name} (learning_rate=1e+38) seed 0" for name in methods]
    assert told["failed"] == content["failed"]
    assert list(told["methods"]) == list(content["methods"])
    assert Path(told["report"]).is_file()


def test_a_process_that_dies_is_said(saved_bert, stream_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(workers, "_work", _die)
    command = study(tmp_path, saved_bert, stream_folder)
    assert main([*command, "--jobs", "2"]) == 2
    err = capsys.readouterr().err
    assert "a training process died, perhaps for lack of memory, while " in err
    assert "--resume and fewer --jobs" in err


def _die(*_: Any) -> str:
    os._exit(1)


def test_nothing_but_failures_is_an_error(saved_bert, stream_folder, tmp_path, capsys):
    command = study(tmp_path, saved_bert, stream_folder, methods=["seqlora"])
    assert main([*command, "--learning-rate", "1e38"]) == 2
    assert "diverged" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "study" / "results.json").exists()


def test_scores_on_validation_rows(tiny):
    """Validation rows that are another run's test rows give its scores; a task without any is refused."""
    with pytest.raises(ValueError, match="unknown score_on 'train'; choose test or validation"):
        TrainConfig(score_on="train")
    whole = tiny.stream(tasks=2)
    matrices = []
    for split in ("test", "validation"):
        tasks = [
            replace(task, **{split: task.test, ("test" if split != "test" else "validation"): task.train[:1]})
            for task in whole.tasks
        ]
        job = tiny.Job(tasks=replace(whole, tasks=tuple(tasks)))
        config = TrainConfig(max_steps=1, batch_size=4, score_on=split)
        matrices.append(train(job.model, job.method, job.stream, job.objective, config).matrix)
    assert matrices[0] == matrices[1]
    bare = replace(whole, tasks=tuple(replace(task, validation=()) for task in whole.tasks))
    job = tiny.Job(tasks=bare)
    with pytest.raises(ValueError, match="has no validation rows to score"):
        train(job.model, job.method, job.stream, job.objective, config)


@pytest.mark.parametrize("preset", presets())
def test_presets_have_their_data_and_names_of_their_own(preset):
    """What a preset can find wrong only once it runs: too few topics on this Python, two trainings in one folder."""
    found = complete(load_preset(preset))
    names = [job.folder for job in jobs(found)]
    assert len(set(names)) == len(names)
    for variant in variants(found):
        options = dict(variant.settings["stream"])
        if (name := options.pop("name")) == "python_docs":
            assert len(make_stream(name, **options).tasks) == options["tasks"]
