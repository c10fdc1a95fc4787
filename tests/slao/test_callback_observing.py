"""Methods that observe a task's rows, under SlaoCallback: the same as slao.train, and no trace in the Trainer."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback

import slao_kernels
from slao import InfLoRA, SlaoCallback
from slao.methods import METHODS
from slao.observing import batches
from slao.train import seed_everything
from slao.trainer import make_trainer

CPU = torch.device("cpu")


class Stop(Exception):
    """What kills a run here."""


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Stop


def with_callback(job: Any, config: Any, index: int, *more: Any, folder: Any = None, resume: bool = False) -> Any:
    """Task `index` of the job on the Trainer that slao.train makes for it, begun and ended by the callback."""
    task = job.stream.tasks[index]
    features = job.objective.features(task, task.train)
    seed_everything(index)
    callback = SlaoCallback(job.method, task.name)
    trainer = make_trainer(job.model, job.method, job.objective, config, features, index, [callback, *more])
    if folder is not None:
        trainer.args.output_dir, trainer.args.save_strategy, trainer.args.save_steps = str(folder), "steps", 1
    callback.attach(trainer)
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def test_inflora_as_under_slao_train(tiny):
    """All rows have one length and the batches one size, so the sums are the same numbers: bitwise."""
    ours, theirs = tiny.Job("llama", InfLoRA), tiny.Job("llama", InfLoRA)
    config = tiny.sgd(batch_size=4, eval_batch_size=4)
    theirs.train(config)
    for index in range(3):
        with_callback(ours, config, index)
    assert ours.method.names == theirs.method.names
    assert tiny.differing(ours.weights(), theirs.weights()) == []
    mine, other = ours.method._state(), theirs.method._state()
    assert tiny.differing(mine, other) == []
    assert any(key.endswith(("space", "complement")) and value.shape[1] > 0 for key, value in mine.items())


def test_inflora_is_resumed(tiny, tmp_path):
    """Killed in the second task; a fresh process goes on from the checkpoints of both, bitwise (Adam)."""
    config = tiny.sgd(batch_size=4, arguments={"optim": "adamw_torch"})
    whole, first, second = (tiny.Job("llama", InfLoRA) for _ in range(3))
    for job in (whole, first, second):  # the Trainer loads the checkpoints of a PeftModel only
        torch.manual_seed(0)
        job.model = get_peft_model(tiny.base("llama"), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        slao_kernels.patch(job.model)
        job.method = InfLoRA(job.model)
    for index in range(2):
        with_callback(whole, config, index, folder=tmp_path / "whole" / str(index))
    with_callback(first, config, 0, folder=tmp_path / "0")
    with pytest.raises(Stop):
        with_callback(first, config, 1, StopAt(2), folder=tmp_path / "1")
    second.method.load(tmp_path / "0")
    with_callback(second, config, 1, folder=tmp_path / "1", resume=True)
    assert tiny.differing(second.weights(), whole.weights()) == []
    assert tiny.differing(second.method._state(), whole.method._state()) == []


def test_batches_leave_the_generators_as_they_were():
    def collate(rows: list[int]) -> dict[str, Any]:
        noise = random.random() + np.random.rand() + float(torch.rand(()))  # noqa: NPY002
        return {"ids": torch.tensor(rows), "noise": torch.tensor(noise), "text": "no tensor"}

    loader = DataLoader(list(range(7)), batch_size=2, shuffle=True, collate_fn=collate)
    drawn = []
    for look in (False, True):
        seed_everything(3)
        if look:
            found = list(batches(loader, 3, CPU))
            assert [batch["ids"].tolist() for batch in found] == [[0, 1, 2], [3, 4, 5], [6]]
            assert all(batch.keys() == {"ids", "noise"} for batch in found)
        drawn.append([batch["ids"].tolist() for batch in loader] + [random.random(), np.random.rand()])  # noqa: NPY002
    assert drawn[0] == drawn[1]


def test_what_it_refuses(tiny):
    class Once(IterableDataset):
        def __iter__(self) -> Any:
            return iter([])

    with pytest.raises(ValueError, match="Once can be read only once: use a data set with a length"):
        next(batches(SimpleNamespace(dataset=Once(), collate_fn=None), 2, CPU))
    job = tiny.Job("llama", METHODS["sdlora"])
    with pytest.raises(ValueError, match="sdlora begins a task with new parameters, which the Trainer's optimizer"):
        with_callback(job, tiny.sgd(), 0)
    assert not job.method.names


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_says_whether_it_adds_parameters(tiny, name):
    """Whatever trains in a task trained before it began, except where `adds_parameters` says so."""
    job = tiny.Job("llama", METHODS[name])
    batch = job.objective.collate(job.objective.features(job.stream.tasks[0], job.stream.tasks[0].train[:2]))
    added = False
    for index in range(2):
        before = {id(p) for p in job.model.parameters() if p.requires_grad}
        job.method.observe([batch])
        job.method.begin_task(str(index))
        added |= any(p.requires_grad and id(p) not in before for p in job.model.parameters())
        job.method.observe([batch])
        job.method.end_task()
    assert added is job.method.adds_parameters
