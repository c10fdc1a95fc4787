"""What a person sees of a run: the bar over training and scoring, a line a task, what is said before the first step."""

from __future__ import annotations

import html
import io
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slao import stopping
from slao.cli import main
from slao.methods import Joint
from slao.progress import RunProgress, Work, steps_of
from slao.report import table, write_report
from slao.result import Result
from slao.streams import Stream
from slao.train import TrainConfig


@pytest.fixture
def unequal(tiny) -> Stream:
    """Three tasks of 8, 4 and 12 training rows and six test rows each."""
    tasks = tiny.stream().tasks
    return Stream(
        "unequal", tuple(replace(t, train=tiny.rows(t.labels, n)) for t, n in zip(tasks, (8, 4, 12), strict=True))
    )


def test_steps_are_those_of_the_trainer(tiny, unequal):
    for options in ({"epochs": 2}, {"epochs": 0.5}, {"max_steps": 3}, {"gradient_accumulation": 2, "epochs": 3}):
        config = TrainConfig(batch_size=3, **options)
        found: list[int] = []

        class Steps(RunProgress):
            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                found.append(state.max_steps)  # noqa: B023

        job = tiny.Job(tasks=unequal)
        work = Work.of(unequal, config)
        job.train(config, callbacks=[Steps("x", work)])
        assert found == work.steps == [steps_of(rows, config) for rows in (8, 4, 12)]


def test_the_bar_covers_training_and_scoring(tiny, unequal, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    config = TrainConfig(batch_size=4, epochs=2, eval_batch_size=4)
    said: list[str] = []
    progress = RunProgress("slao seed 0", Work.of(unequal, config), said.append)
    # 12 steps of 4 rows, a row trained as dear as three scored, and four rounds of 18 rows.
    assert progress.total == 3 * 4 * 12 + 4 * 18
    assert (progress.done, progress.left()) == (0, None)
    done: list[float] = []

    def on_score(index: int, part: float) -> None:
        progress.on_score(index, part)
        done.append(progress.done)
        assert progress.left() > 0 or progress.done == progress.total

    seen = []
    options = {"on_start": progress.on_start, "on_score": on_score}
    job = tiny.Job(tasks=unequal)
    job.train(
        config,
        callbacks=[progress],
        on_task=lambda i, r: (progress.on_task(i, r), seen.append(progress.done)),
        **options,
    )
    assert done == sorted(done)
    assert done[:6] == [pytest.approx(n) for n in (4, 6, 10, 12, 16, 18)]  # six rows, four a batch
    assert seen == [18 + 48 + 18, 18 + 48 + 18 + 24 + 18, progress.total]
    assert progress.bar.n == pytest.approx(1)
    progress.close()
    text = screen.getvalue()
    for what in ("scoring before task 1: first", "task 2/3 second", "scoring after task 3/3: third", "left"):
        assert f"{what}" in text, what
    assert len(said) == 4


def test_joint_training_is_one_task(tiny, unequal):
    config = TrainConfig(batch_size=4, max_steps=2, evaluate="seen")
    work = Work.of(unequal, config, together=True)
    assert (work.tasks, work.steps, work.rows) == (["joint"], [6], [[6, 6, 6], [6, 6, 6]])
    assert Work.of(unequal, config).rows == [[6, 6, 6], [6], [6, 6], [6, 6, 6]]
    said: list[str] = []
    progress = RunProgress("joint", work, said.append)
    tiny.Job(method=Joint, tasks=unequal).train(
        config, callbacks=[progress], on_start=progress.on_start, on_score=progress.on_score, on_task=progress.on_task
    )
    assert progress.done == progress.total
    assert said[1].startswith("joint, task 1/1 joint: first ")


@pytest.fixture
def command(saved_llama, stream_folder, tmp_path) -> list[str]:
    fixed = ["run", "--model", str(saved_llama), "--stream", "jsonl", "--stream-path", str(stream_folder)]
    return [*fixed, "--runs", str(tmp_path), "--name", "x", "--seeds", "0", "--batch-size", "4", "--no-shuffle"]


def test_a_pipe_gets_a_line_a_task(command, tmp_path, capsys):
    capsys.readouterr()
    assert main([*command, "--methods", "slao"]) == 0
    out, err = capsys.readouterr()
    score = r"first \d\.\d{3}, second \d\.\d{3}"
    assert re.search(rf"^slao seed 0, before any training: {score}$", out, re.M)
    for number, name, lam in ((1, "first", ""), (2, "second", "λ 0.707; ")):  # the first is whole in the merge
        line = rf"^slao seed 0, task {number}/2 {name}: {score}; {lam}[\d,]+ tokens/s$"
        assert re.search(line, out, re.M), out
    assert "|" not in err.replace("it/s", "")
    # What was said before the first step.
    told = out[: out.index("before any training")]
    for line in (
        "training  slao seed 0; objective causal_lm",
        "patched   slao_kernels: 14 of 14 LoRA layers fused",
        "rows      trained + scored (test): first 8 + 6, second 8 + 6",
        "steps     4 of at most 4 rows (2 a task); 3 rounds of scoring",
        "tokens    about 240 in one pass over the training rows; longest row 15",
        f"results   {tmp_path / 'x' / 'results.json'}, after every task",
    ):
        assert line in told
    assert re.search(r"^memory    at least \d+\.\d MiB \(model .*, logits and their gradient 0.1 MiB\)", told, re.M)
    # The time, in its three parts.
    method = json.loads((tmp_path / "x" / "results.json").read_text())["methods"]["slao"]
    parts = [method[f"{part}_seconds"][0] for part in ("train", "score", "merge")]
    assert all(part > 0 for part in parts)
    header = next(line for line in out.splitlines() if line.startswith("method")).split("  ")
    assert [title.strip() for title in header if title.strip() in ("train s", "score s", "merge s")] == [
        "train s", "score s", "merge s"
    ]  # fmt: skip
    page = (tmp_path / "x" / "report.html").read_text()
    assert all(f">{title}</th>" in page for title in ("train s", "score s", "merge s"))


def test_a_dry_run_shows_all_and_writes_nothing(command, tmp_path, capsys):
    capsys.readouterr()
    assert main([*command, "--methods", "seqlora,slao", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "training  seqlora seed 0, the first of 2 trainings; objective causal_lm" in out
    shown = out[out.index("task first") :].splitlines()
    assert shown[0].endswith("train.jsonl, line 1):")
    assert shown[1:3] == [
        "  reads   13 tokens 'Option : red , blue , green a red b c Answer :'", "  LEARNS  2 tokens ' red [EOS]'"
    ]  # fmt: skip
    assert shown[4:6] == [
        "  reads   13 tokens 'Option : cat , dog , bird a cat b c Answer :'", "  LEARNS  2 tokens ' cat [EOS]'"
    ]  # fmt: skip
    assert shown[-1] == f"dry run: nothing was trained, nothing written to {tmp_path / 'x'}"
    assert list(tmp_path.iterdir()) == []
    assert main([*command, "--dry-run", "--rank", "0"]) == 2  # what is wrong is said as ever


def test_results_and_report_of_an_unfinished_run(command, tmp_path, capsys, monkeypatch):
    """Stopped within the second method's second task: what there is, and that it is not all; then resumed."""
    whole = [*command, "--methods", "seqlora,slao"]
    folder = tmp_path / "x"
    on_task, kept = RunProgress.on_task, []

    def watched(self: RunProgress, index: int, result: Result) -> None:
        on_task(self, index, result)
        path = folder / "results.json"
        kept.append(json.loads(path.read_text()) if path.exists() else None)

    begin = RunProgress.on_train_begin

    def stops(self: RunProgress, *args: Any, **kwargs: Any) -> None:
        if self.title == "slao seed 0" and self.task == 1:
            raise stopping.Stopped()
        begin(self, *args, **kwargs)

    monkeypatch.setattr(RunProgress, "on_task", watched)
    monkeypatch.setattr(RunProgress, "on_train_begin", stops)
    assert main(whole) == 143
    # Written after each task: before the first there was nothing, before the second the first.
    assert kept[0] is None
    assert kept[1]["unfinished"] == {"seqlora seed 0": [1, 2], "slao seed 0": [0, 2]}
    assert list(kept[1]["methods"]) == ["seqlora"]
    content = json.loads((folder / "results.json").read_text())
    assert content["unfinished"] == {"slao seed 0": [1, 2]}
    assert content["methods"]["slao"]["matrix"][0][1] == [None, None]
    assert content["methods"]["slao"]["AA"] == [None]
    assert content["methods"]["seqlora"]["AA"][0] is not None
    line = "unfinished: slao seed 0 (1 of 2 tasks); scores over all tasks are missing until a run's end"
    assert table(content).splitlines()[1] == line
    page = write_report(folder).read_text()
    assert line in html.unescape(page)
    monkeypatch.undo()
    capsys.readouterr()
    assert main([*whole, "--resume"]) == 0
    resumed = json.loads((folder / "results.json").read_text())
    assert resumed["unfinished"] == {}
    assert "unfinished" not in (folder / "report.html").read_text()
    shutil.rmtree(folder)
    assert main(whole) == 0
    again = json.loads((folder / "results.json").read_text())
    for name in ("seqlora", "slao"):
        for key in ("matrix", "losses", "zero_shot"):
            assert resumed["methods"][name][key] == again["methods"][name][key]


@pytest.mark.exhaustive
def test_processes_keep_results_too(command, tmp_path, capsys, monkeypatch):
    from slao.run import Run

    kept: list[dict[str, Any]] = []
    write = Run._write

    def watched(self: Run, content: dict[str, Any]) -> None:
        write(self, content)
        kept.append(json.loads(Path(self.folder / "results.json").read_text())["unfinished"])

    monkeypatch.setattr(Run, "_write", watched)
    monkeypatch.setattr("slao.workers._LOOK_EVERY", 0.01)
    assert main([*command, "--methods", "seqlora,slao", "--jobs", "2", "--epochs", "5"]) == 0
    assert kept[-1] == {}
    assert any(done == 1 for each in kept for done, _ in each.values()), kept


def test_results_from_before_the_time_was_split(tiny):
    """A state without score_seconds is read, and a table of results without it is as it was."""
    assert Result(tasks=["a"], train_seconds=2.0).score_seconds == 0.0
    method = {
        "seeds": [0], "matrix": [[[0.5]]], "tasks": [["a"]], "AA": [0.5], "BWT": [None], "forgetting": [None],
        "FWT": [None], "zero_shot": [[0.1]], "tokens_per_second": [10.0], "train_seconds": [4.0],
        "merge_seconds": [2.0], "peak_memory_mb": [1.0],
    }  # fmt: skip
    text = table({"stream": "s", "model": "m", "metric": "accuracy", "methods": {"slao": method}})
    assert "score s" not in text
    assert "train s" not in text
    assert re.split("  +", text.splitlines()[-1])[-2:] == ["6.00", "1.00"]
