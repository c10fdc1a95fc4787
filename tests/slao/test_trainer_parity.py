"""Thirty steps a task, two tasks of SLAO, on transformers' Trainer: fused layers against PEFT's own, seven
architectures; and a fused run that was killed and resumed against one that was not.

Mixtral twice: LoRA on its attention, with SLAO; and on router and experts too, which SLAO refuses and PEFT's own
forward runs, without a method. Each test prints the patch report. Largest differences of eight settings of MKL, ATen
and threads: a loss 1e-5 of the first one in fp32 (T5; the others 1e-6), weights 1e-12 in fp64.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

import slao_kernels
from slao import SLAO, SlaoCallback
from slao_kernels.testing import tiny_model

STEPS = 30
KINDS = ["llama", "qwen3", "gpt2", "bert", "t5", "vit", "mixtral", "mixtral+experts"]
TASKS = {"first": 1, "second": 2}
# Of the first loss, as are all errors of losses here. Both runs round every product once, in another order: 1e-7 an
# operation in fp32, which sixty steps of AdamW, whose step is g/|g| while its averages are young, carry on. How far is
# seen in plain PEFT, by its distance from itself in fp64; the fused run may be so many times as far from that. In fp64
# they differ by less than the fp32 number that the Trainer keeps the loss in can show; so the trained weights are
# compared as well.
FACTOR = 10
LOSS_DIGIT = 1.2e-7
WEIGHTS_FP64 = 1e-9  # RMS error ratio: 2e-16 an operation, times what AdamW makes of it (1e6 in the fp32 losses' case)
SKIPPED = {"mixtral+experts": {"MixtralTopKRouter is no experts module of transformers' registry"}}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


class Stop(Exception):
    """What kills a run here."""


class StopAt(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 25:
            raise Stop


class Session:
    """One process: a PeftModel, fused or not, and SLAO on it."""

    def __init__(self, kind: str, dtype: torch.dtype, fused: bool, folder: Path) -> None:
        self.kind, _, experts = kind.partition("+")
        smooth = {"initializer_factor": 1.0, "feed_forward_proj": "gated-gelu"}  # see test_patched_training.py
        model = tiny_model(self.kind, **(smooth if kind == "t5" else {"initializer_range": 0.1})).to(dtype)
        if self.kind == "mixtral" and dtype == torch.float64:
            model.set_experts_implementation("eager")  # torch's grouped GEMM takes no fp64
        torch.manual_seed(0)
        options: dict[str, Any] = {"target_modules": "all-linear", "lora_dropout": 0.1}
        if kind == "gpt2":
            options["fan_in_fan_out"] = True
        elif kind == "mixtral":
            options["target_modules"] = ATTENTION
        elif experts:  # all-linear takes the router in; PEFT has no dropout for parameters
            options["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
            options["lora_dropout"] = 0.0
        self.folder = folder
        self.model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **options)).to(dtype)
        self.report = slao_kernels.patch(self.model)
        if not fused:
            assert slao_kernels.unpatch(self.model) == len(self.report.patched)
        self.method = SLAO(self.model)
        self.losses: list[float] = []

    def train(self, inputs: Any, task: str, *others: Any, resume: bool = False) -> Session:
        args = TrainingArguments(
            str(self.folder / task), max_steps=STEPS, per_device_train_batch_size=4, learning_rate=1e-2, save_steps=10,
             logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        ours = [SlaoCallback(self.method, task)]
        trainer = Trainer(
            self.model,
            args,
            train_dataset=inputs(self.kind, TASKS[task], 32),
            data_collator=default_data_collator,
            callbacks=[*ours, *others],
        )
        for callback in ours:
            callback.attach(trainer)
        trainer.train(resume_from_checkpoint=resume)
        self.losses += [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return self

    def weights(self) -> dict[str, torch.Tensor]:
        with self.method.merged():
            merged = {f"merged.{name}": value.clone() for name, value in self.model.state_dict().items()}
        return {**self.model.state_dict(), **merged}


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory) -> Any:
    @functools.cache
    def run(kind: str, dtype: torch.dtype, fused: bool) -> Session:
        session = Session(kind, dtype, fused, tmp_path_factory.mktemp(kind))
        for task in TASKS:
            session.train(tiny.inputs, task)
        return session

    return run


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.float32, id="fp32", marks=pytest.mark.exhaustive), pytest.param(torch.float64, id="fp64")],
)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_plain_peft(tiny, finished, kind, dtype, capsys):
    ours, plain, exact = finished(kind, dtype, True), finished(kind, dtype, False), finished(kind, torch.float64, False)
    found, expected, right = (torch.tensor(session.losses, dtype=torch.float64) for session in (ours, plain, exact))
    assert len(found) == 2 * STEPS
    for task in (slice(0, STEPS), slice(STEPS, 2 * STEPS)):
        assert found[task][-8:].mean() < 0.95 * found[task][:8].mean(), "nothing was learned: this run tests nothing"
    worst, theirs = (((losses - right).abs().max() / right[0]).item() for losses in (found, expected))
    weights = tiny.largest_error(ours.model.state_dict(), plain.model.state_dict())
    with capsys.disabled():
        print(f"\n{kind} {dtype}: largest error of a loss {worst:.1e}, plain {theirs:.1e}; of weights {weights:.1e}")
        print(ours.report)
    assert set(ours.report.skipped.values()) == SKIPPED.get(kind, set())
    assert ours.report.fallbacks == {}, "these layers ran PEFT's forward in some call"
    assert plain.model.state_dict().keys() == ours.model.state_dict().keys()
    assert worst <= (LOSS_DIGIT if dtype == torch.float64 else FACTOR * max(theirs, LOSS_DIGIT)) <= 1e-3
    assert dtype == torch.float32 or weights <= WEIGHTS_FP64


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_is_bit_identical(tiny, finished, kind, tmp_path):
    """Killed at step 25 of the second task; a fresh session continues from the checkpoint at step 20."""
    whole = finished(kind, torch.float32, True)
    killed, resumed = (Session(kind, torch.float32, True, tmp_path) for _ in range(2))
    with pytest.raises(Stop):
        killed.train(tiny.inputs, "first").train(tiny.inputs, "second", StopAt())
    resumed.train(tiny.inputs, "second", resume=True)
    assert resumed.losses == whole.losses[STEPS:]
    assert resumed.method is not None
    assert resumed.method.lambdas == whole.method.lambdas
    assert tiny.differing(resumed.weights(), whole.weights()) == []
