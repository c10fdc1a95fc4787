"""Weights that stop being numbers, or explode, while a task trains: said at the next log, with task and layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from slao.methods import EWC, SLAO
from slao.methods.base import STATE_FILE
from slao.train import TrainConfig

LAYER = "encoder.layer.1.attention.self.query"


class Spoil(TrainerCallback):
    """After a step of the second task, does something to B of LAYER."""

    def __init__(self, job: Any, step: int, value: float) -> None:
        self.job, self.step, self.value = job, step, value
        self.steps = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps = state.global_step
        if self.job.method.task == 2 and state.global_step == self.step:
            (pair,) = [pair for pair in self.job.method.pairs if pair.name == LAYER]
            with torch.no_grad():
                pair.parameters[1].view(-1)[0] = self.value


def config(logging_steps: int = 3) -> TrainConfig:
    arguments = {"optim": "sgd", "logging_steps": logging_steps}
    return TrainConfig(batch_size=2, max_steps=8, learning_rate=1e-6, arguments=arguments)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_weight_ends_the_training(tiny, tmp_path, value):
    job = tiny.Job(lora={"target_modules": ["query"]})
    spoil = Spoil(job, 3, value)
    with pytest.raises(ValueError, match=f"task 'second' diverged: NaN or infinite .* in 1 layers .{LAYER}"):
        job.train(config(), callbacks=[spoil], state_dir=tmp_path)
    assert spoil.steps == 3, "of 8"
    # The saved state is that after the first task; it goes on from there.
    again = tiny.Job(lora={"target_modules": ["query"]})
    done: list[int] = []
    again.train(config(), state_dir=tmp_path, on_task=lambda index, result: done.append(index))
    assert done == [1, 2]


def test_weights_that_explode_are_warned_of_once(tiny, caplog):
    job = tiny.Job(lora={"target_modules": ["query"]})
    job.train(config(), callbacks=[Spoil(job, 3, 5e4)])
    texts = [record.getMessage() for record in caplog.records if "explodes" in record.getMessage()]
    (in_second, *later) = texts
    # One entry of 32 × 4 is 5e4: 5e4 / √128.
    assert in_second.startswith(f"task 'second' explodes: after 3 steps the entries of {LAYER}.B are of size 4.42e+03 ")
    assert "1 weights exceed 100; lower the learning rate" in in_second
    assert [text[:14] for text in later] == ["task 'third' e"]
    caplog.clear()
    tiny.Job().train(config())
    assert [record for record in caplog.records if "explodes" in record.getMessage()] == []


@pytest.mark.parametrize("method", [SLAO, EWC])
def test_what_a_method_keeps_is_not_saved_broken(tiny, tmp_path, method):
    """An overflow there is in no weight yet: it would be the next task's."""
    job = tiny.Job(method=method, lora={"target_modules": ["query"]})
    job.train(config(), state_dir=tmp_path)
    before = (tmp_path / STATE_FILE).read_bytes()
    key, tensor = next((key, value) for key, value in job.method._state().items() if key.startswith(LAYER))
    tensor.view(-1)[1] = float("inf")
    with pytest.raises(ValueError, match=f"is not written: NaN or infinite numbers in {key}; training diverged"):
        job.method.save(tmp_path)
    assert (tmp_path / STATE_FILE).read_bytes() == before
