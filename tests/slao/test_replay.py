"""Rows of tasks before: which are kept, and that they are trained and counted."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import TrainerCallback

from slao.methods import Joint
from slao.progress import Work
from slao.replay import Replay, size
from slao.settings import complete, train_config
from slao.streams import ImageRow, Row, Task
from slao.train import TrainConfig


def tasks(*counts: int) -> list[Task]:
    rows = [tuple(Row(f"{index} {place}", "a") for place in range(count)) for index, count in enumerate(counts)]
    return [Task(str(index), own, (), own, ("a",)) for index, own in enumerate(rows)]


def counts(kept: list[tuple[Task, Row]]) -> dict[str, int]:
    """How many of each task; every row is its task's, and none stands twice."""
    assert len(set(kept)) == len(kept)
    assert all(row in task.train for task, row in kept)
    found: dict[str, int] = {}
    for task, _ in kept:
        found[task.name] = found.get(task.name, 0) + 1
    return found


def test_a_fraction_of_every_task():
    assert counts(Replay(fraction=0.05).kept(tasks(200, 40, 3), 0)) == {"0": 10, "1": 2, "2": 1}
    assert Replay(fraction=0.05).kept([], 0) == []


def test_rows_in_all_shared_by_the_tasks():
    for many in range(1, 6):
        assert counts(Replay(rows=7).kept(tasks(*[20] * many), 0)) == {
            str(index): 7 // many + (index < 7 % many) for index in range(many)
        }
    assert counts(Replay(rows=7).kept(tasks(2, 20), 0)) == {"0": 2, "1": 5}
    assert counts(Replay(rows=12).kept(tasks(3, 20, 1, 20), 0)) == {"0": 3, "1": 4, "2": 1, "3": 4}
    assert counts(Replay(rows=99).kept(tasks(3, 20), 0)) == {"0": 3, "1": 20}


@pytest.mark.parametrize("replay", [Replay(rows=12), Replay(fraction=0.3), Replay(rows=12, source="reservoir")])
def test_what_is_given_up_does_not_come_back_and_the_seed_decides(replay):
    every = tasks(20, 30, 2, 20)
    for many in range(1, 4):
        before, after = replay.kept(every[:many], 3), replay.kept(every[: many + 1], 3)
        assert {item for item in after if item[0] is not every[many]} <= set(before)
    assert replay.kept(every, 3) == replay.kept(every, 3)
    assert replay.kept(every, 3) != replay.kept(every, 4)


def test_a_reservoir_gives_every_row_the_same_chance():
    """10 of 50 rows in 2,000 draws: 400 times each, ± 18 (binomial); five of those would be one in two million."""
    every, seen = tasks(35, 15), {}
    for seed in range(2000):
        kept = Replay(rows=10, source="reservoir").kept(every, seed)
        assert len(kept) == 10
        for _, row in kept:
            seen[row.prompt] = seen.get(row.prompt, 0) + 1
    assert len(seen) == 50
    assert max(abs(count - 400) for count in seen.values()) < 5 * 18


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "takes either rows"),
        ({"rows": 3, "fraction": 0.1}, "takes either rows"),
        ({"rows": 0}, "rows must be at least 1, not 0"),
        ({"fraction": 0.0}, r"fraction must lie in \(0, 1\], not 0.0"),
        ({"fraction": 1.5}, r"fraction must lie in \(0, 1\], not 1.5"),
        ({"rows": 3, "source": "newest"}, "unknown replay source 'newest'; choose per_task or reservoir"),
        ({"fraction": 0.1, "source": "reservoir"}, "a reservoir has a fixed number of rows"),
    ],
)
def test_what_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        Replay(**given)


def test_what_would_do_nothing_is_refused():
    with pytest.raises(ValueError, match=r"train\.replay_from would do nothing without replay_rows"):
        complete({"train": {"replay_from": "reservoir"}})
    with pytest.raises(
        ValueError, match=r"methods\.joint: replay would do nothing, since all tasks are trained at once"
    ):
        complete({"methods": {"joint": {"replay_rows": 3}}})
    with pytest.raises(ValueError, match=r"methods\.slao: unknown replay source 'newest'"):
        complete({"methods": {"slao": {"replay_rows": 3, "replay_from": "newest"}}})


def test_data_sets_of_any_trainer():
    every = [[f"{task} {row}" for row in range(20)] for task in range(3)]
    replay = Replay(rows=4)
    assert list(replay.mixed(every[:1], 1)) == every[0]
    found = list(replay.mixed(every, 1))
    assert found[:20] == every[2]
    assert found[20:] == [f"{task} {row}" for task, row in replay.drawn([20, 20], 1)]
    assert len(found) == 24


def test_data_sets_of_the_library_stay_such():
    datasets = pytest.importorskip("datasets", reason="datasets is not installed (extra hub)")
    every = [datasets.Dataset.from_dict({"text": [f"{task} {row}" for row in range(20)]}) for task in range(3)]
    replay = Replay(fraction=0.1)
    assert replay.mixed(every[:1]) is every[0]
    found = replay.mixed(every, 1)
    assert isinstance(found, datasets.Dataset)
    assert found["text"][:20] == every[2]["text"]
    assert found["text"][20:] == [f"{task} {row}" for task, row in replay.drawn([20, 20], 1)]
    assert len(found) == 24


class Seen(TrainerCallback):
    """The rows of each task's Trainer, and its steps."""

    def __init__(self) -> None:
        self.rows: list[list[Any]] = []
        self.steps: list[int] = []

    def on_train_begin(self, args, state, control, train_dataloader=None, **given):
        self.rows.append([tuple(row["input_ids"]) for row in train_dataloader.dataset])
        self.steps.append(state.max_steps)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_task_trains_what_is_kept_beside_its_own(tiny, kind):
    job, seen = tiny.Job(kind), Seen()
    config = TrainConfig(batch_size=4, learning_rate=1e-2, replay_rows=5)
    result = job.train(config, callbacks=[seen])
    done = job.stream.tasks
    for index, task in enumerate(done):
        again = config.replay.kept(done[:index], 0)
        assert len(again) == (0, 5, 5)[index]
        rows = [(task, row) for row in task.train] + again
        assert seen.rows[index] == [tuple(job.objective.features(of, [row])[0]["input_ids"]) for of, row in rows]
    assert seen.steps == Work.of(job.stream, config).steps == [2, 4, 4]
    state = job.method.state_bytes() / 2**20
    kept = [size(config.replay.kept(done[: index + 1], 0)) / 2**20 for index in range(3)]
    assert kept[0] > 0
    assert result.state_mb[-1] == pytest.approx(state + kept[-1], rel=1e-12)


def test_joint_training_keeps_nothing(tiny):
    job, seen = tiny.Job(method=Joint), Seen()
    config = TrainConfig(batch_size=4, replay_fraction=0.5)
    result = job.train(config, callbacks=[seen])
    assert len(seen.rows[0]) == sum(len(task.train) for task in job.stream.tasks)
    assert seen.steps == Work.of(job.stream, config, together=True).steps
    assert result.state_mb[-1] == job.method.state_bytes() / 2**20


def test_bytes():
    rows = (Row("ä", "b", ("cd",)), Row("", "x", messages=(("user", "hi"), ("assistant", "x"))))
    image = ImageRow("", "one", pixels=b"1234", shape=(1, 2, 2))
    texts, images = Task("t", rows[:1], (), rows[:1]), Task("i", (image,), (), (image,))
    assert size([(texts, rows[0])]) == 2 + 1 + 2
    assert size([(texts, rows[1])]) == 1 + 4 + 2 + 9 + 1
    assert size([(images, image)]) == 3 + 4


def test_a_resumed_run_replays_the_same_rows(tiny, tmp_path):
    config = TrainConfig(batch_size=4, learning_rate=1e-2, replay_fraction=0.4)
    whole, first, second = tiny.Job(), tiny.Job(), tiny.Job()
    whole.train(config)

    def stop(index, result):
        if index == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.train(config, state_dir=tmp_path, on_task=stop)
    second.train(config, state_dir=tmp_path)
    assert tiny.differing(second.weights(), whole.weights()) == []
    plain = tiny.Job()
    plain.train()
    assert tiny.differing(plain.weights(), whole.weights()) != []


def test_settings_of_all_and_of_a_method():
    settings = complete({
        "train": {"replay_fraction": 0.05},
        "methods": {"slao": {}, "more": {"method": "slao", "replay_fraction": 0, "replay_rows": 9},
                    "none": {"method": "slao", "replay_fraction": 0}},
    })  # fmt: skip
    assert train_config(settings, "slao").replay == Replay(fraction=0.05)
    assert train_config(settings, "more").replay == Replay(rows=9)
    assert train_config(settings, "none").replay is None
    settings = complete({
        "train": {"replay_from": "reservoir"}, "methods": {"slao": {}, "more": {"method": "slao", "replay_rows": 9}}
    })  # fmt: skip
    assert train_config(settings, "slao").replay is None
    assert train_config(settings, "more").replay == Replay(rows=9, source="reservoir")
    with pytest.raises(ValueError, match=r"methods\.slao: replay takes either rows"):
        complete({"train": {"replay_fraction": 0.05}, "methods": {"slao": {"replay_rows": 9}}})
