"""Every bad input to `slao run`: one line that says what to do, exit code 2, and no folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from slao import prepare
from slao.cli import main
from slao.methods import METHODS
from slao.objectives import OBJECTIVES
from slao.streams import STREAMS
from slao_kernels.dispatch import BACKENDS

# name -> (flags after a command that would run, what the line says)
BAD: dict[str, tuple[list[str], list[str]]] = {
    "method": (["--methods", "slao,lora2"], ["unknown method 'lora2'; choose one of", *METHODS]),
    "no method": (["--methods", "''"], ["methods must name at least one of", *METHODS]),
    "method option": (["--set", "methods.slao.rate=1"], ["method 'slao'", "'rate'"]),
    "method option value": (["--set", "methods.slao.init=zero"], ["unknown init 'zero'; choose one of last_ft"]),
    "stream": (["--stream", "imagenet"], ["unknown stream 'imagenet'; choose one of", *STREAMS]),
    "stream option": (["--set", "stream.rows=1"], ["stream 'jsonl' has no option 'rows'; its options are path, order"]),
    "path": (["--stream-path", "/no/such/folder"], ["no folder /no/such/folder"]),
    "order": (["--set", "stream.order=[fourth]"], ["order names the task 'fourth'", "first", "second"]),
    "backend": (["--backend", "cublas"], ["unknown backend 'cublas'; choose one of", *BACKENDS]),
    "precision": (["--precision", "high"], ["unknown precision 'high'; choose one of base, adapter"]),
    "dtype": (["--dtype", "int8"], ["unknown dtype 'int8'; choose one of auto, float32, bfloat16, float16"]),
    "device": (["--device", "abacus"], ["cannot go to device 'abacus'", "choose auto, cpu or cuda"]),
    "objective": (["--objective", "mlm"], ["unknown objective 'mlm'; choose one of", *OBJECTIVES]),
    "objective option": (["--set", "objective.margin=1"], ["has no option 'margin'; its options are temperature"]),
    "candidates": (["--train-candidates", "some"], ["unknown train_candidates 'some'; choose one of own, all"]),
    "temperature": (["--set", "objective.temperature=cold"], ["objective.temperature must be a number, not 'cold'"]),
    "model": (["--model", "/no/such/model"], ["no model folder at /no/such/model"]),
    "model name": (["--model", "no-such-model"], ["'no-such-model' could not be loaded as a model folder or hub name"]),
    "nothing to inject": (["--target-modules", "gate"], ["no LoRA adapter could be injected into BertModel", "gate"]),
    "r > n": (["--rank", "33"], ["A (r, n) with r > n has no orthonormal rows", "(33, 32)", "lower r there"]),
    "rank 0": (["--rank", "0"], ["should be a positive integer value but the value passed is 0"]),
    "rank": (["--rank", "many"], ["lora.r must be a whole number, not 'many'"]),
    "rank 2.5": (["--rank", "2.5"], ["lora.r must be a whole number, not 2.5"]),
    "alpha": (["--alpha", "big"], ["lora.lora_alpha must be a number, not 'big'"]),
    "lora option": (["--set", "lora.rang=1"], ["lora has no option 'rang'; its options are", "rank_pattern"]),
    "dora": (["--set", "lora.use_dora=true"], ["cannot treat 13 layers", "trains more than A and B"]),
    "epochs": (["--epochs", "0"], ["epochs must be positive, not 0 (or give max_steps)"]),
    "learning rate": (["--learning-rate", "fast"], ["train.learning_rate must be a number, not 'fast'"]),
    "batch size": (["--batch-size", "2.5"], ["train.batch_size must be a whole number, not 2.5"]),
    "bf16": (["--set", "train.bf16=maybe"], ["train.bf16 must be true or false, not 'maybe'"]),
    "evaluate": (["--set", "train.evaluate=some"], ["unknown evaluate 'some'; choose all or seen"]),
    "train field": (["--set", "train.rate=1"], ["train has no option 'rate'; its options are epochs, max_steps"]),
    "argument": (["--set", "train.arguments.no_such=1"], ["train.arguments has no option 'no_such'"]),
    "argument of ours": (["--set", "train.arguments.seed=1"], ["set seed through TrainConfig's own fields"]),
    "schedule": (["--set", "train.lr_scheduler=zigzag"], ["zigzag is not a valid SchedulerType", "linear", "cosine"]),
    "tracker": (["--set", "train.report_to=diary"], ["diary is not supported", "wandb"]),
    "setting": (["--set", "modle=x"], ["unknown setting 'modle'; the settings are name, model, stream"]),
    "not a pair": (["--set", "train.bf16"], ["--set takes KEY=VALUE, such as train.bf16=true; got 'train.bf16'"]),
    "not YAML": (["--set", "lora.target_modules=[a"], ["the value '[a' of lora.target_modules is not YAML"]),
    "value, not section": (["--set", "model.name=x"], ["cannot set model.name: model is a value, not a section"]),
    "seeds": (["--seeds", "a,b"], ["--seeds takes whole numbers, such as 0,1; got 'a,b'"]),
    "a seed twice": (["--seeds", "1,1"], ["a seed stands twice in [1, 1]"]),
    "train rows": (["--train-rows", "0"], ["rows must be at least 1, not 0"]),
    "train fraction": (["--train-fraction", "2"], ["fraction must lie in (0, 1], not 2"]),
    "preset": (["--preset", "x"], ["unknown preset 'x'; choose one of "]),
    "flag": (["--leraning-rate", "1"], ["No such option: --leraning-rate", "--learning-rate", "--help"]),
    # Contradictions.
    "resume and overwrite": (["--resume", "--overwrite"], ["--resume and --overwrite exclude each other: drop one"]),
    "preset and file": (["x.yaml", "--preset", "demo"], ["CONFIG and --preset exclude each other: drop one"]),
    "no patch, but a backend": (["--no-patch", "--backend", "eager"], ["which --no-patch turns off: drop one of them"]),
    "no patch, but a precision": (["--no-patch", "--precision", "adapter"], ["--no-patch turns off"]),
    "flag and set": (["--rank", "3", "--set", "lora.r=4"], ["lora.r is set by a flag and by --set: drop one of them"]),
    "seeds and set": (["--seeds", "1", "--set", "seeds=[2]"], ["seeds is set by a flag and by --set"]),
    "rows and fraction": (["--train-rows", "2", "--train-fraction", "0.5"], ["both limit the training rows"]),
}  # fmt: skip


@pytest.fixture
def refused(saved_bert, stream_folder, tmp_path, capfd, caplog) -> Callable[..., str]:
    """The one line that a command is refused with, on the process's own standard error; no run folder is left."""

    def run(*flags: str, model: Path = saved_bert, stream: Path = stream_folder) -> str:
        usual = {"--model": str(model), "--stream": "jsonl", "--stream-path": str(stream), "--name": "tiny"}
        arguments = ["run", "--runs", str(tmp_path / "runs")]
        for flag, value in usual.items():
            arguments += [] if flag in flags or "--preset" in flags else [flag, value]
        if "--stream" in flags:
            arguments = [a for a in arguments if a not in ("--stream-path", str(stream))]
        capfd.readouterr()
        code = main([*arguments, *flags])
        out, err = capfd.readouterr()
        assert code == 2, err
        assert out == ""
        assert err.startswith("slao: ")
        assert err.count("\n") == 1, err
        assert caplog.records == [], "a library's warnings would stand on standard error too"
        assert not (tmp_path / "runs").exists()
        return err

    return run


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, refused):
    flags, parts = BAD[case]
    line = refused(*flags)
    assert [part for part in parts if part not in line] == [], line


# What settings say alone, and what the data say with them.
EARLY = {
    "settings": ("device", "method option value", "rank 0", "argument of ours", "schedule", "tracker"),
    "data": ("candidates", "temperature", "objective option"),
}


@pytest.mark.parametrize("known", EARLY)
def test_refused_before_anything_heavy(known, refused, monkeypatch):
    def load(*given: object, **options: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(prepare, "load_model", load)
    if known == "settings":
        monkeypatch.setattr(prepare, "make_stream", load)
    for case in EARLY[known]:
        flags, parts = BAD[case] if case != "temperature" else (["--set", "objective.temperature=0"], ["positive"])
        line = refused(*flags)
        assert [part for part in parts if part not in line] == [], line


def test_nothing_is_generated(refused, saved_llama):
    line = refused("--set", "objective.max_new_tokens=4", model=saved_llama)
    assert "max_new_tokens would do nothing: every task is scored by its labels' likelihood" in line


def test_a_device_that_is_not_here(refused):
    line = refused("--device", "mps" if torch.cuda.is_available() else "cuda")
    assert "the model cannot go to device" in line


# name -> (file of the task "second", its content, what the line says)
BAD_DATA = {
    "no rows": ("train.jsonl", "\n", ["second/train.jsonl holds no rows; add some or remove the file"]),
    "no test": ("test.jsonl", None, ["second has no test.jsonl or test.json; every task needs one"]),
    "label": (
        "test.jsonl",
        '{"text": "a", "label": "rad"}',
        ["task 'second', test: label 'rad' is not among its labels", "'cat'", "or correct the row"],
    ),
    "labels twice": ("labels.json", '["cat", "dog", "bird", "cat"]', ["task 'second' lists a label twice"]),
    "not JSON": ("train.jsonl", "{", ["second/train.jsonl, line 1: not JSON"]),
    "no answer": ("train.jsonl", '{"text": "a"}', ["line 1: a row needs"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_one_line(case, refused, tiny, tmp_path):
    name, content, parts = BAD_DATA[case]
    stream = tiny.write_stream(tiny.stream(tasks=2), tmp_path / "data")
    file = stream / "second" / name
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
    line = refused(stream=stream)
    assert [part for part in parts if part not in line] == [], line


def test_a_stream_without_labels_or_room(refused, saved_llama, tiny, tmp_path):
    stream = tiny.write_stream(tiny.stream(tasks=2), tmp_path / "data")
    assert "take 12 tokens; max_length is 9: raise it" in refused("--set", "objective.max_length=9", model=saved_llama)
    for file in stream.rglob("*.json*"):
        if file.name == "labels.json":
            file.unlink()
        else:
            file.write_text(json.dumps({"prompt": "a", "answer": "b"}))
    assert "label_matching needs labels; tasks without: first, second (use causal_lm)" in refused(stream=stream)


def test_a_model_that_is_no_language_model(refused):
    """transformers has much to say about such a checkpoint; none of it stands beside our line."""
    assert "no end-of-sequence token" in refused("--objective", "causal_lm")


def test_bad_settings_files(refused, tmp_path):
    file = tmp_path / "settings.yaml"
    assert f"no settings file at {file}" in refused(str(file))
    for content, message in (
        ("a: [1", "is not YAML"),
        ("- 1", "must be a mapping of settings, not a list"),
        ("methods: {slao: 3}", "setting 'methods.slao' must be a section, not 3"),
        ("name: 3", "name must be a text, not 3"),
        ("patch: perhaps", "patch must be true or false, not 'perhaps'"),
        ("train: 3", "setting 'train' must be a section, not 3"),
        ("seeds: 3", "seeds must be a list, not 3"),
    ):
        file.write_text(content)
        assert message in refused(str(file))


def test_the_process_itself_exits_with_2(stream_folder, tmp_path):
    """As a user meets it: a new process, with whatever libraries print while they load."""
    command = [sys.executable, "-m", "slao.cli", "run", "--methods", "nope", "--runs", str(tmp_path / "runs")]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"slao: unknown method 'nope'; choose one of {', '.join(sorted(METHODS))}\n"
    assert not (tmp_path / "runs").exists()
