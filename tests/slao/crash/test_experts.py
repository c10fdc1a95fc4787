"""`slao run` on models with experts: patched as unpatched, and killed and resumed as if nothing had happened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

PARAMETERS = "[mlp.experts.gate_up_proj,mlp.experts.down_proj]"


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def run(request, tiny, server, stream_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    model = tiny.save(request.param, root / "model")

    def run(name: str, *more: str, **job):
        argv = [
            "run", "--model", str(model), "--stream", "jsonl", "--stream-path", str(stream_folder),
            "--methods", "seqlora,slao", "--rank", "2", "--batch-size", "4", "--seeds", "0",
            "--set", "lora.target_modules=[q_proj]", "--set", f"lora.target_parameters={PARAMETERS}",
            "--set", "train.max_steps=3", "--set", "train.arguments.logging_steps=1",
            "--set", "train.learning_rate=0.01",
            "--runs", str(root / name), "--name", "tiny",
        ]  # fmt: skip
        answer = server.run([*argv, *more], root / f"{name}.log", **job)
        return root / name / "tiny", answer

    return run


@pytest.fixture(scope="module")
def whole(run) -> Path:
    folder, answer = run("whole")
    assert answer["code"] == 0, answer["err"]
    assert "6 of 6 LoRA layers fused" in answer["out"], answer["out"]
    assert "gate_up_proj of 4 experts" in answer["out"]
    run.events = answer["events"]
    return folder


def test_patched_is_plain(run, whole):
    plain, answer = run("plain", "--set", "patch=false")
    assert answer["code"] == 0, answer["err"]
    ours, theirs = (json.loads((folder / "results.json").read_text())["methods"] for folder in (whole, plain))
    for name in ("seqlora", "slao"):
        assert ours[name]["matrix"] == theirs[name]["matrix"]
        for left, right in zip(ours[name]["losses"][0], theirs[name]["losses"][0], strict=True):
            assert left == pytest.approx(right, rel=1e-3)  # logged with four digits


@pytest.mark.parametrize("part", [0.3, 0.8])
def test_killed_and_resumed(run, whole, tools, part):
    name = f"killed{part}"
    folder, answer = run(name, at=int(part * len(run.events)))
    assert answer["code"] == -9
    assert run(name, "--resume")[1]["code"] == 0
    assert tools.changed(folder, whole) == []
