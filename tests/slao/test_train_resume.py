"""A seed decides a run, and an interrupted run that is continued ends as if nothing had happened: all bitwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from slao.methods import SeqLoRA
from slao.train import TrainConfig

KINDS = ["bert", "llama"]  # LabelMatching, CausalLM


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_decides_everything(tiny, kind):
    """Dropout, batches by length, shuffled rows: bitwise the same again, and different with another seed."""
    stream = tiny.stream(train=18, extra=3, tasks=2)
    config = TrainConfig(batch_size=2, learning_rate=1e-2, arguments={"logging_steps": 1})
    runs = []
    for seed in (3, 3, 4):
        job = tiny.Job(kind, tasks=stream, seed=seed, lora={"lora_dropout": 0.1})
        job.train(config)
        torch.rand(7)  # what else draws numbers between runs does not matter
        runs.append(job)
    first, again, other = runs
    assert first.result.losses == again.result.losses
    assert first.result.matrix == again.result.matrix
    assert tiny.differing(again.weights(), first.weights()) == []
    assert first.result.losses != other.result.losses
    # (Only the pooler, which the loss does not reach, keeps its weights.)
    still = [name for name, value in other.weights().items() if torch.equal(value, first.weights()[name])]
    assert all(name.startswith("pooler.") for name in still)


class Stop(Exception):
    """What kills a run in these tests."""


class StopInStep(TrainerCallback):
    def __init__(self, task: int) -> None:
        self.left = task

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.left -= 1

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self.left == 0:
            raise Stop


@pytest.mark.parametrize("where", ["after task 2", "within task 3", "within task 1"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_as_an_uninterrupted_one(tiny, kind, where, tmp_path):
    config = TrainConfig(batch_size=4, learning_rate=1e-2, arguments={"logging_steps": 1})
    lora = {"lora_dropout": 0.1}
    whole = tiny.Job(kind, lora=lora)
    whole.train(config)
    options: dict[str, Any] = {"callbacks": [StopInStep(int(where[-1]))]}
    if where == "after task 2":

        def stop(index: int, result: Any) -> None:
            if index == 1:
                raise Stop

        options = {"on_task": stop}
    with pytest.raises(Stop):
        tiny.Job(kind, lora=lora).train(config, state_dir=tmp_path, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["slao_state.safetensors"][: where != "within task 1"]
    resumed = tiny.Job(kind, lora=lora)
    done: list[int] = []
    resumed.train(config, state_dir=tmp_path, on_task=lambda index, result: done.append(index))
    assert done == ([0, 1, 2] if where == "within task 1" else [2])
    for name in ("matrix", "zero_shot", "lambdas", "losses", "tokens", "tasks"):
        assert getattr(resumed.result, name) == getattr(whole.result, name), name
    assert tiny.differing(resumed.weights(), whole.weights()) == []
    # A finished run is not trained again.
    finished = tiny.Job(kind, lora=lora)
    finished.train(config, state_dir=tmp_path, on_task=lambda index, result: done.append(index))
    assert done[-1] == 2
    assert len(done) == (3 if where == "within task 1" else 1)
    assert finished.result == resumed.result
    assert tiny.differing(finished.weights(), whole.weights()) == []


@pytest.mark.parametrize("how", ["keep", "merge", "freeze"])
def test_what_trains_beside_A_and_B_is_resumed_too(tiny, how, tmp_path):
    def stop(index: int, result: Any) -> None:
        raise Stop

    def job() -> Any:
        return tiny.Job("bert", lora={"bias": "lora_only"}, beside=how)

    config = TrainConfig(batch_size=4, max_steps=2, learning_rate=1e-2)
    whole, start = job(), {name: p.detach().clone() for name, p in job().model.named_parameters()}
    whole.train(config)
    with pytest.raises(Stop):
        job().train(config, state_dir=tmp_path, on_task=stop)
    resumed = job()
    resumed.train(config, state_dir=tmp_path)
    found, expected = (dict(each.model.named_parameters()) for each in (resumed, whole))
    assert tiny.differing(found, expected) == []
    moved = [name for name in tiny.differing(expected, start) if name.endswith("base_layer.bias")]
    assert len(moved) > 2


class Draws(SeqLoRA):
    """Draws a number before each task, as a method with a random start would."""

    name = "draws"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.drawn: list[float] = []

    def _begin(self, task: int) -> None:
        self.drawn.append(torch.rand(()).item())


def test_a_task_draws_from_its_seed_and_place_alone(tiny, tmp_path):
    def stop(index: int, result: Any) -> None:
        torch.rand(5)
        if index == 1:
            raise Stop

    config = TrainConfig(batch_size=4, max_steps=1)
    whole, first, second, other = (tiny.Job(method=Draws, seed=seed) for seed in (2, 2, 2, 3))
    whole.train(config)
    with pytest.raises(Stop):
        first.train(config, state_dir=tmp_path, on_task=stop)
    torch.manual_seed(99)
    second.train(config, state_dir=tmp_path)
    assert first.method.drawn + second.method.drawn == whole.method.drawn
    other.train(config)
    assert len({*whole.method.drawn, *other.method.drawn}) == 6


def test_a_state_of_something_else_is_refused_unread(tiny, tmp_path):
    config = TrainConfig(max_steps=1, batch_size=4)
    tiny.Job().train(config, state_dir=tmp_path)
    others = {
        "another stream or seed": [{"seed": 1}, {"tasks": tiny.stream(tasks=2)}],
        "saved with method 'slao', this is 'seqlora'": [{"method": SeqLoRA}],
        "saved with options": [{"init": "merged"}],
        "the model has": [{"lora": {"r": 2}}],
    }
    for message, jobs in others.items():
        for options in jobs:
            job = tiny.Job(**options)
            before = job.weights()
            with pytest.raises(ValueError, match=message):
                job.train(config, state_dir=tmp_path)
            assert job.method.task == 0
            assert tiny.differing(job.weights(), before) == []


def test_a_state_of_other_settings_or_rows_is_not_gone_on_from(tiny, tmp_path):
    first = TrainConfig(batch_size=4, max_steps=1)
    tiny.Job("bert", tasks=tiny.stream(train=8, tasks=2)).train(first, state_dir=tmp_path)
    other = TrainConfig(batch_size=4, max_steps=1, learning_rate=1e-5)
    with pytest.raises(ValueError, match=r"is of other settings or rows \(learning_rate\); choose another folder"):
        tiny.Job("bert", tasks=tiny.stream(train=8, tasks=2)).train(other, state_dir=tmp_path)
    with pytest.raises(ValueError, match=r"is of other settings or rows \(rows of task"):
        tiny.Job("bert", tasks=tiny.stream(train=6, tasks=2)).train(first, state_dir=tmp_path)
    again = tiny.Job("bert", tasks=tiny.stream(train=8, tasks=2))
    again.train(TrainConfig(batch_size=4, max_steps=1, eval_batch_size=2), state_dir=tmp_path)
    assert len(again.result.matrix) == 2
