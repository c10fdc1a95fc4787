"""`slao` from the command line: whole runs on tiny saved models, settings, resuming."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from peft import PeftModel
from transformers import AutoModel, AutoModelForCausalLM

from slao import settings
from slao.checkpoint import read_state
from slao.cli import main
from slao.cli.app import app
from slao.cli.training import settings_from
from slao.methods import METHODS
from slao.objectives import CausalLM, LabelMatching
from slao.streams import make_stream
from slao_kernels.layers import FusedLoraLinear


def command(model: Path, stream: Path, runs: Path, *more: str) -> list[str]:
    """A run of a few seconds: two tasks, eight rows each, two steps a task."""
    fixed = ["run", "--model", str(model), "--stream", "jsonl", "--stream-path", str(stream), "--runs", str(runs)]
    small = ["--epochs", "1", "--batch-size", "4", "--learning-rate", "1e-2", "--rank", "4", "--name", "tiny"]
    return [*fixed, *small, *more]


def ok(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that succeeds prints."""
    capsys.readouterr()
    code = main(arguments)
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that is refused."""
    capsys.readouterr()
    code = main(arguments)
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.startswith("slao: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    return err


@pytest.fixture(scope="module")
def finished(saved_bert, stream_folder, tmp_path_factory) -> Path:
    """A finished run of both methods on two seeds. Look, do not touch."""
    runs = tmp_path_factory.mktemp("finished")
    arguments = command(saved_bert, stream_folder, runs, "--methods", "seqlora,slao", "--seeds", "0,1")
    assert main([*arguments, "--set", "train.arguments.logging_steps=1"]) == 0
    return runs / "tiny"


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def outcome(folder: Path) -> dict[str, Any]:
    """What a run computed, without what its clock and memory said."""
    measured = ("tokens_per_second", "train_seconds", "merge_seconds", "score_seconds", "peak_memory_mb")
    return {
        label: {key: value for key, value in method.items() if key not in measured}
        for label, method in results(folder)["methods"].items()
    }


def test_a_run_leaves_results_report_and_adapters(finished):
    content = results(finished)
    assert {"stream", "model", "methods", "throughput", "versions"} <= content.keys()
    assert sorted(content["methods"]) == ["seqlora", "slao"]
    for method in content["methods"].values():
        assert {"seeds", "matrix", "AA", "BWT", "forgetting", "FWT", "zero_shot", "tokens_per_second"} <= method.keys()
        assert method["seeds"] == [0, 1]
        for seed, matrix in enumerate(method["matrix"]):
            assert [len(row) for row in matrix] == [2, 2]
            assert method["AA"][seed] == pytest.approx(sum(matrix[1]) / 2)
            assert method["BWT"][seed] == pytest.approx(matrix[1][0] - matrix[0][0])
            assert method["forgetting"][seed] == pytest.approx(matrix[0][0] - matrix[1][0])
            assert method["FWT"][seed] == pytest.approx(matrix[0][1] - method["zero_shot"][seed][1])
            assert sorted(method["tasks"][seed]) == ["first", "second"]
            assert [len(losses) for losses in method["losses"][seed]] == [2, 2]
        assert all(speed > 0 for speed in method["tokens_per_second"])
    slao, seqlora = content["methods"]["slao"], content["methods"]["seqlora"]
    assert slao["lambdas"] == [[1.0, pytest.approx(2**-0.5)]] * 2
    # Same seed: same base, same adapter, same order, same first task.
    assert slao["zero_shot"] == seqlora["zero_shot"]
    for seed in (0, 1):
        assert slao["tasks"][seed] == seqlora["tasks"][seed]
        assert slao["losses"][seed][0] == seqlora["losses"][seed][0]
        assert slao["losses"][seed][1] != seqlora["losses"][seed][1]
    assert slao["losses"][0][0] != slao["losses"][1][0]
    assert (finished / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert content["versions"]["torch"] == torch.__version__
    assert content["settings"]["train"] == {
        "epochs": 1, "batch_size": 4, "learning_rate": 1e-2, "arguments": {"logging_steps": 1}
    }  # fmt: skip


def test_its_adapters_answer_in_plain_peft(finished, saved_bert, stream_folder, tiny):
    """The last row of every matrix, from the exported folder alone."""
    stream = make_stream("jsonl", path=str(stream_folder))
    for label, method in results(finished)["methods"].items():
        for seed, matrix in enumerate(method["matrix"]):
            base = AutoModel.from_pretrained(saved_bert)
            objective = LabelMatching(base, tiny.tokenizer("bert"), stream)
            model = PeftModel.from_pretrained(base, finished / "adapters" / f"{label}-{seed}")
            assert not any(isinstance(module, FusedLoraLinear) for module in model.modules())
            tasks = {task.name: task for task in stream.tasks}
            scores = [objective.score(model, tasks[name], tasks[name].test, 64) for name in method["tasks"][seed]]
            assert scores == matrix[-1]


def test_a_causal_lm_run(saved_llama, stream_folder, tiny, tmp_path, capsys):
    arguments = command(saved_llama, stream_folder, tmp_path, "--methods", "slao", "--seeds", "3", "--no-shuffle")
    out = ok(arguments, capsys)
    assert "slao seed 3: AA " in out
    assert f"report: {tmp_path / 'tiny' / 'report.html'}" in out
    content = results(tmp_path / "tiny")
    assert content["settings"]["objective"] == {"name": "causal_lm"}
    (matrix,) = content["methods"]["slao"]["matrix"]
    stream = make_stream("jsonl", path=str(stream_folder))
    base = AutoModelForCausalLM.from_pretrained(saved_llama)
    model = PeftModel.from_pretrained(base, tmp_path / "tiny" / "adapters" / "slao-3")
    objective = CausalLM(base, tiny.tokenizer(), stream)
    assert [objective.score(model, task, task.test, 64) for task in stream.tasks] == matrix[-1]


@pytest.mark.exhaustive
def test_methods_of_one_run_do_not_meet(saved_bert, stream_folder, tmp_path, capsys):
    """All in one run, and some in one of their own: the same, though all are tried on one model at first."""
    names = ["slao", *sorted(METHODS.keys() - {"slao"})]
    alone = ("slao", "clora", "inflora", "joint", "ewc")
    for folder, methods in {"all": names, **{name: [name] for name in alone}}.items():
        arguments = command(saved_bert, stream_folder, tmp_path / folder, "--methods", ",".join(methods))
        ok([*arguments, "--seeds", "0", "--set", "train.arguments.logging_steps=1"], capsys)
    together = outcome(tmp_path / "all" / "tiny")
    assert list(together) == names
    for name in alone:
        assert outcome(tmp_path / name / "tiny") == {name: together[name]}
    assert together["slao"]["losses"] != together["inclora"]["losses"]
    assert together["joint"]["matrix"][0][0] == [None, None]
    assert "lambdas" in together["slao"]
    assert not any("lambdas" in together[name] for name in names[1:])


def test_a_report_of_one_lambda_a_layer(saved_bert, stream_folder, tmp_path, capsys):
    """It shows their mean; the state keeps them all."""
    arguments = command(saved_bert, stream_folder, tmp_path, "--methods", "slao,joint", "--seeds", "0")
    ok([*arguments, "--set", "methods.slao.schedule=adaptive"], capsys)
    (lambdas,) = results(tmp_path / "tiny")["methods"]["slao"]["lambdas"]
    state = read_state(tmp_path / "tiny" / "state" / "slao-0" / "slao_state.safetensors")[1]["lambdas"]
    assert len(state[1]) == 13
    assert lambdas == [1.0, pytest.approx(sum(state[1]) / 13)]
    assert 0.5 <= lambdas[1] <= 1.0


def test_resume_trains_only_what_is_missing(finished, saved_bert, stream_folder, tmp_path, capsys):
    """Without the last method's state: the others are read back, it is trained again, and all is as it was."""
    shutil.copytree(finished, tmp_path / "tiny")
    folder = tmp_path / "tiny"
    shutil.rmtree(folder / "state" / "slao-1")
    (folder / "results.json").unlink()
    kept = {path: path.stat().st_mtime_ns for path in (folder / "state").rglob("*.safetensors")}
    arguments = command(saved_bert, stream_folder, tmp_path, "--methods", "seqlora,slao", "--seeds", "0,1")
    ok([*arguments, "--set", "train.arguments.logging_steps=1", "--resume"], capsys)
    assert outcome(folder) == outcome(finished)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(list((folder / "state").rglob("*.safetensors"))) == 4
    for name in ("seqlora-0", "slao-1"):
        file = Path("adapters") / name / "adapter_model.safetensors"
        assert (folder / file).read_bytes() == (finished / file).read_bytes()


def test_a_folder_is_kept_unless_asked_otherwise(saved_bert, stream_folder, tmp_path, capsys):
    arguments = command(saved_bert, stream_folder, tmp_path, "--methods", "seqlora", "--seeds", "0")
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "thesis.txt").write_text("not a run's")
    assert f"{folder} is not empty: pass --resume to continue it, or --overwrite" in refused(arguments, capsys)
    assert "no settings.json, so there is no run to resume" in refused([*arguments, "--resume"], capsys)
    assert "is no run's folder, so it is not emptied" in refused([*arguments, "--overwrite"], capsys)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
    (folder / "thesis.txt").unlink()
    ok(arguments, capsys)
    before = (folder / "results.json").read_bytes()
    (folder / "leftover").touch()
    assert "is not empty" in refused(arguments, capsys)
    other = [*arguments, "--precision", "adapter", "--set", "train.evaluate=seen"]
    capsys.readouterr()
    assert main([*other, "--resume"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"slao: {folder} holds another run; choose another --name, or --overwrite it:",
        "  precision: 'base' there, 'adapter' now",
        "  train.evaluate: nothing there, 'seen' now",
    ]
    assert (folder / "results.json").read_bytes() == before
    # A bad setting is found before the folder is emptied.
    assert "unknown backend" in refused([*arguments, "--overwrite", "--backend", "cublas"], capsys)
    assert (folder / "results.json").read_bytes() == before
    ok([*other, "--overwrite"], capsys)
    assert not (folder / "leftover").exists()
    assert results(folder)["settings"]["precision"] == "adapter"
    assert results(folder)["methods"]["seqlora"]["matrix"][0][0][1] is None


def parsed(*arguments: str) -> dict[str, Any]:
    command = typer.main.get_command(app).commands["run"]
    return settings_from(command.make_context("run", list(arguments)).params)


def test_values_are_read_as_yaml():
    found = parsed(
        "--rank", "3", "--learning-rate", "1e-4", "--target-modules", "query, value", "--train-fraction", "0.5",
        "--set", "train.bf16=true", "--set", "train.arguments.optim=sgd", "--set", "lora.rank_pattern={query: 2}",
        "--set", "methods.slao.schedule=0.5", "--methods", "seqlora,slao", "--seeds", "4,2", "--no-shuffle",
    )  # fmt: skip
    assert found["lora"] == {
        "r": 3, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": ["query", "value"],
        "rank_pattern": {"query": 2},
    }  # fmt: skip
    assert found["train"] == {"learning_rate": 1e-4, "bf16": True, "arguments": {"optim": "sgd"}}
    assert (found["train_fraction"], found["seeds"], found["shuffle_tasks"]) == (0.5, [4, 2], False)
    assert found["methods"] == {"seqlora": {}, "slao": {"schedule": 0.5}}
    assert settings.DEFAULTS["methods"] == {"seqlora": {}, "slao": {}}, "the defaults were written into"
    assert parsed("--target-modules", "all-linear")["lora"]["target_modules"] == "all-linear"


def test_presets(capsys):
    assert "demo" in settings.presets()
    for name in settings.presets():
        found = parsed("--preset", name)
        assert found["name"] == name
        settings.train_config(found)
    changed = parsed("--preset", "demo", "--epochs", "7", "--set", "methods.slao.init=merged")
    assert changed["train"] == {**parsed("--preset", "demo")["train"], "epochs": 7}
    assert changed["methods"] == {**parsed("--preset", "demo")["methods"], "slao": {"init": "merged"}}
    # Another stream does not inherit the options of the preset's.
    assert parsed("--preset", "demo", "--stream", "jsonl", "--stream-path", "x")["stream"] == {
        "name": "jsonl", "path": "x"
    }  # fmt: skip
    assert refused(["run", "--preset", "no"], capsys) == (
        f"slao: unknown preset 'no'; choose one of {', '.join(settings.presets())}\n"
    )


def test_a_yaml_file_is_a_run(saved_bert, stream_folder, tmp_path, capsys):
    content = {
        "model": str(saved_bert),
        "stream": {"name": "jsonl", "path": str(stream_folder), "order": ["second", "first"]},
        "shuffle_tasks": False,
        "objective": "label_matching",
        "methods": {"mine": {"method": "slao", "merge": "AB", "schedule": 0.25}},
        "seeds": [5],
        "lora": {"r": 2, "target_modules": ["query"]},
        "train": {"max_steps": 1, "batch_size": 2},
    }
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(content))
    ok(["run", str(file), "--runs", str(tmp_path / "runs")], capsys)
    method = results(tmp_path / "runs" / "study")["methods"]["mine"]
    assert method["tasks"] == [["second", "first"]]
    assert method["lambdas"] == [[1.0, 0.25]]
    assert results(tmp_path / "runs" / "study")["settings"]["lora"]["r"] == 2


def test_no_patch_trains_pefts_own_layers(saved_bert, stream_folder, tmp_path, capsys, finished):
    """The same run without the fused layers: fp32 rounding apart, the same scores and losses."""
    arguments = command(saved_bert, stream_folder, tmp_path, "--methods", "slao", "--seeds", "0", "--no-patch")
    ok([*arguments, "--set", "train.arguments.logging_steps=1"], capsys)
    assert "fused layers are off" in results(tmp_path / "tiny")["patch"]
    assert "13 of 13 LoRA layers fused" in results(finished)["patch"]
    plain, fused = (outcome(folder)["slao"] for folder in (tmp_path / "tiny", finished))
    assert plain["matrix"][0] == fused["matrix"][0]
    torch.testing.assert_close(plain["losses"][0], fused["losses"][0], rtol=1e-4, atol=0)


def test_report_is_written_again_and_bad_folders_are_refused(finished, tmp_path, capsys):
    folder = tmp_path / "again"
    folder.mkdir()
    assert f"there is no directory {tmp_path / 'none'}" in refused(["report", str(tmp_path / "none")], capsys)
    assert "has no results.json: let its `slao run` finish a task" in refused(["report", str(folder)], capsys)
    (folder / "results.json").write_text("{")
    assert "cannot be read" in refused(["report", str(folder)], capsys)
    (folder / "results.json").write_text("{}")
    assert "the results lacks 'stream'" in refused(["report", str(folder)], capsys)
    assert [path.name for path in folder.iterdir()] == ["results.json"]
    shutil.copy(finished / "results.json", folder)
    assert ok(["report", str(folder)], capsys) == f"report: {folder / 'report.html'}\n"
    assert (folder / "report.html").stat().st_size > 10_000
