"""slao.SlaoCallback on transformers' own Trainer: the same as by hand, and resumed the same as in one go."""

from __future__ import annotations

import gc
import json
import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

import slao_kernels
from slao import SLAO, CLoRA, SeqLoRA, SlaoCallback, checkpoint
from slao.integrations.llamafactory import LlamaFactoryCallback
from slao.logits import labelled_only
from slao.methods import METHODS, Method
from slao.methods.base import STATE_FILE

TASKS = {"first": 1, "second": 2}
STEPS = 6
FIRST = "base_model.model.model.layers.0.self_attn.q_proj"  # of the method's layers


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    settings: dict[str, Any] = {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    settings |= {"save_steps": 2, "logging_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    return TrainingArguments(str(folder), **{**settings, **options})


class Session:
    """What one process has: a model, a method, and Trainers one after another."""

    def __init__(
        self,
        tiny: Any,
        folder: Path,
        method: Any = SLAO,
        dropout: float = 0.1,
        bare: bool = False,
        lora: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.tiny, self.folder = tiny, folder
        settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": dropout}
        settings |= lora or {}
        torch.manual_seed(0)
        model = tiny.base("llama")
        self.model: Any = model if bare else get_peft_model(model, LoraConfig(**settings))
        slao_kernels.patch(self.model, LoraConfig(**settings) if bare else None)
        self.losses: list[list[float]] = []
        self.method: Method = method(self.model, **options)

    def trainer(self, task: str, callbacks: list[Any], **options: Any) -> Trainer:
        data = self.tiny.inputs("llama", TASKS[task], 16)
        torch.manual_seed(TASKS[task])
        return Trainer(self.model, arguments(self.folder / task, **options), train_dataset=data, callbacks=callbacks)

    def train(self, task: str, *others: Any, resume: Any = None, attach: bool = True, **options: Any) -> Trainer:
        callback = SlaoCallback(self.method, task)
        trainer = self.trainer(task, [callback, *others], **options)
        if attach:
            callback.attach(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    def state(self, folder: Path) -> dict[str, torch.Tensor]:
        """Everything the method would save, and what answers are computed from."""
        self.method.save(folder)
        tensors, meta = checkpoint.read_state(folder / STATE_FILE)
        with self.method.merged():
            merged = {f"merged.{name}": value.clone() for name, value in self.model.state_dict().items()}
        lambdas = torch.tensor(meta["lambdas"], dtype=torch.float64)
        return {**tensors, **merged, "lambdas": lambdas}


class Stop(Exception):
    """What kills a run here."""


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Stop


@pytest.mark.parametrize("method", [SLAO, SeqLoRA, CLoRA, METHODS["inclora"], METHODS["olora"]])
def test_two_tasks_as_by_hand(tiny, tmp_path, method):
    ours, hand = Session(tiny, tmp_path / "ours", method), Session(tiny, tmp_path / "hand", method)
    losses = []
    for session in (ours, hand):
        for task in TASKS:
            if session is ours:
                trainer = session.train(task)
            else:
                session.method.begin_task(task)
                trainer = session.trainer(task, [])
                with labelled_only(session.model):  # `attach` does it too
                    trainer.train()
                session.method.end_task()
            losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
            assert len(losses[-1]) == STEPS
    assert ours.method.names == ["first", "second"]
    assert not ours.method.in_task
    if method.penalty is Method.penalty:  # which the plain Trainer above leaves out
        assert losses[:2] == losses[2:]
        assert tiny.differing(ours.state(tmp_path / "a"), hand.state(tmp_path / "b")) == []
    else:
        assert losses[0] == losses[2], "the first task has nothing before it: its penalty is zero"
        assert losses[1] != losses[3]


@pytest.mark.parametrize("step", [3, 5])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", [SLAO, CLoRA, METHODS["olora"]])
def test_a_resumed_run_is_identical(tiny, tmp_path, method, task, step):
    """Killed in a step, with dropout; the second process has the checkpoint folders only."""
    whole, first, second = (Session(tiny, tmp_path / name, method) for name in ("whole", "killed", "killed"))
    history = [whole.train(name).state.log_history for name in TASKS]
    with pytest.raises(Stop):
        for name in TASKS:
            first.train(name, *([StopAt(step)] if name == task else []))
    torch.manual_seed(99)
    trainer = second.train(task, resume=True)
    again = trainer.state.log_history
    expected = history[list(TASKS).index(task)]
    kept = ("loss", "grad_norm", "slao/lambda", "slao/task", "slao/patched")
    assert [{k: e[k] for k in kept if k in e} for e in again] == [{k: e[k] for k in kept if k in e} for e in expected]
    if task == "first":
        second.train("second")
    assert tiny.differing(second.state(tmp_path / "a"), whole.state(tmp_path / "b")) == []
    assert second.method.names == whole.method.names


def test_a_run_that_trains_heads_and_tokens_is_resumed(tiny, tmp_path):
    lora = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"], "trainable_token_indices": [4, 5]}
    whole, first, second = (Session(tiny, tmp_path / n, lora=lora, beside="merge") for n in ("whole", "cut", "cut"))
    for task in TASKS:
        whole.train(task)
    first.train("first")
    with pytest.raises(Stop):
        first.train("second", StopAt(5))
    torch.manual_seed(99)
    second.train("second", resume=True)
    state = whole.state(tmp_path / "b")
    assert {name.split("/")[0] for name in state if "/" in name} == {"beside", "beside_merged"}
    assert tiny.differing(second.state(tmp_path / "a"), state) == []


def test_a_finished_task_is_resumed_from_its_folder(tiny, tmp_path):
    whole, first, second, third = (Session(tiny, tmp_path / name) for name in ("whole", "parts", "parts", "parts"))
    for task in TASKS:
        whole.train(task)
    first.train("first")
    second.method.load(tmp_path / "parts" / "first")  # the state of a task that has ended
    assert not second.method.in_task
    second.train("second")
    assert tiny.differing(second.state(tmp_path / "a"), whole.state(tmp_path / "b")) == []
    third.train("second", resume=True)  # from its last step: nothing left but to end it
    assert tiny.differing(third.state(tmp_path / "c"), whole.state(tmp_path / "b")) == []


@pytest.mark.parametrize("attach", [True, False])
def test_metrics(tiny, tmp_path, attach, caplog):
    """Through `trainer.log` other callbacks see them too; in any case they are in the history and its file."""
    seen: list[dict[str, float]] = []

    class Listener(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append({key: value for key, value in logs.items() if key.startswith("slao/")})

    session = Session(tiny, tmp_path, keep_cosines=True, schedule=lambda i, stats: [0.25] * len(stats.layers))
    slao_kernels.unpatch(session.model.get_submodule("base_model.model.model.layers.1"))
    with caplog.at_level(logging.INFO, "slao"):
        histories = [session.train(task, Listener(), attach=attach).state.log_history for task in TASKS]
    found = [{k: v for k, v in e.items() if k.startswith("slao/")} for history in histories for e in history]
    found = [entry for entry in found if entry]
    cosine = found[3].pop("slao/cosine")
    assert cosine == pytest.approx(sum(session.method.cosines[1]) / 14)
    assert abs(cosine) <= 1
    assert found == [
        {"slao/task": 1, "slao/lora_layers": 14, "slao/patched": 7},
        {"slao/task": 1, "slao/fallbacks": 0, "slao/lambda": 1.0},
        {"slao/task": 2, "slao/lora_layers": 14, "slao/patched": 7},
        {"slao/task": 2, "slao/fallbacks": 0, "slao/lambda": 0.25},
    ]
    seen = [{key: value for key, value in entry.items() if key != "slao/cosine"} for entry in seen if entry]
    assert seen == (found if attach else [])
    assert ("second: slao/task 2" in caplog.text) is not attach
    saved = json.loads((tmp_path / "second" / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    assert {"slao/task": 2, "slao/lora_layers": 14, "slao/patched": 7}.items() <= saved["log_history"][0].items()


def test_fallbacks_are_counted_with_their_reasons(tiny, tmp_path):
    """A hook on lora_A, set after patch, sends that layer's calls to PEFT's forward."""
    session = Session(tiny, tmp_path)
    layer = session.model.get_submodule(FIRST)
    layer.lora_A["default"].register_forward_hook(lambda *args: None)
    trainer = session.train("first")
    assert trainer.state.log_history[-1]["slao/fallbacks"] == 1
    (name, reason), *rest = SlaoCallback(session.method).fallbacks().items()
    assert rest == []
    assert name == FIRST
    assert "hook" in reason


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_penalty_counts_once_an_optimiser_step(tiny, tmp_path, accumulation):
    """With A = 0 the loss has no gradient in B, so B moves by -rate * 0.5 a step and nothing else."""

    class Pull(SeqLoRA):
        name = "pull"

        def penalty(self) -> torch.Tensor:
            return 0.5 * torch.stack([pair.parameters[1].sum() for pair in self.pairs]).sum()

    session = Session(tiny, tmp_path, Pull, dropout=0.0)
    for pair in session.method.pairs:
        pair.parameters[0].requires_grad_(False).zero_()
    options = {"optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "learning_rate": 0.1}
    session.train("first", gradient_accumulation_steps=accumulation, save_strategy="no", **options)
    for pair in session.method.pairs:
        torch.testing.assert_close(pair.B.detach(), torch.full_like(pair.B, -0.05 * STEPS), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match=r"pull adds a penalty to the loss: call attach\(trainer\)"):
        session.train("second", attach=False)
    assert session.method.task == 1


def test_tasks_are_numbered_and_nothing_is_written_unasked(tiny, tmp_path):
    session = Session(tiny, tmp_path)
    callback = SlaoCallback(session.method)
    for task in TASKS:
        session.trainer(task, [callback], save_strategy="no", max_steps=1).train()
    assert session.method.names == ["task1", "task2"]
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_a_bare_model_is_trained_and_its_checkpoints_warned_of(tiny, tmp_path, caplog):
    """transformers' Trainer writes the adapter of a model without a PeftModel around it, but does not load it."""
    bare, peft = Session(tiny, tmp_path / "bare", bare=True), Session(tiny, tmp_path / "peft")
    for session in (bare, peft):
        caplog.clear()
        losses = [[e["loss"] for e in session.train(task).state.log_history if "loss" in e] for task in TASKS]
        assert ("cannot be resumed" in caplog.text) is (session is bare)
        session.losses = losses
    assert bare.losses == peft.losses
    with pytest.raises(ValueError, match="Can't find a checkpoint index"):
        bare.train("second", resume=True)
    assert not bare.method.in_task


def test_what_it_refuses(tiny, tmp_path):
    session, other = Session(tiny, tmp_path), Session(tiny, tmp_path)
    wrong = session.trainer("first", [SlaoCallback(other.method)], max_steps=1)
    with pytest.raises(ValueError, match=f"does not hold the method's layer {FIRST}"):
        wrong.train()
    with pytest.raises(ValueError, match="auto_find_batch_size"):
        session.train("first", auto_find_batch_size=True)
    session.method.begin_task("mine")
    with pytest.raises(ValueError, match="task 'mine' is still running"):
        session.train("first")
    session.method.end_task()
    assert session.method.names == ["mine"]


def test_a_checkpoint_without_its_state_is_refused(tiny, tmp_path):
    Session(tiny, tmp_path).train("first")
    folder = tmp_path / "first"
    fresh = Session(tiny, tmp_path)

    def refused(message: str, task: str = "first", **options: Any) -> None:
        trainer = fresh.trainer("first", [SlaoCallback(fresh.method, task)], **options)
        with pytest.raises(ValueError, match=message):
            trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
        assert fresh.method.task == 0

    refused("was saved in task 'first', this is 'second'", "second")
    refused("was saved at step 2, not at 4", resume_from_checkpoint=str(folder / "checkpoint-2"))
    path = folder / "checkpoint-4" / STATE_FILE
    tensors, meta = checkpoint.read_state(path)
    name = next(iter(tensors))
    checkpoint.write_state(path, {**tensors, name: tensors[name] + 1}, meta)
    refused("is not of the checkpoint that the Trainer loaded")
    path.unlink()
    refused(f"resumed at step 4, but .* holds no {STATE_FILE}")
    elsewhere = tmp_path / "elsewhere"
    (folder / "checkpoint-2").rename(elsewhere)
    moved = Session(tiny, tmp_path)
    moved.train("first", resume=str(elsewhere), resume_from_checkpoint=str(elsewhere))
    assert moved.method.names == ["first"]


def test_the_best_checkpoint_is_what_ends_the_task(tiny, tmp_path):
    """Of which the Trainer loads what PEFT saves: not C-LoRA's routing matrices."""
    session = Session(tiny, tmp_path, CLoRA, delta_std=0.1)
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "learning_rate": 0.2}
    options |= {"metric_for_best_model": "eval_loss", "greater_is_better": False}
    losses: dict[int, float] = {}
    watching = Watching(lambda state, metrics: losses.update({state.global_step: metrics["eval_loss"]}))
    rows = {"train_dataset": tiny.inputs("llama", 1, 16), "eval_dataset": tiny.inputs("llama", 3, 8)}
    trainer = Trainer(session.model, arguments(tmp_path / "first", **options), callbacks=[watching], **rows)
    SlaoCallback(session.method, "first").attach(trainer).train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == f"checkpoint-{min(losses, key=lambda step: losses[step])}" != f"checkpoint-{STEPS}"
    there, here = checkpoint.read_state(best / STATE_FILE)[0], session.method._live_tensors()
    for name in (pair.name for pair in session.method.pairs):
        assert torch.equal(here[f"{name}.core"], there[f"{name}.core"] + there[f"{name}.core_delta"])
        assert torch.equal(here[f"{name}.B"], there[f"{name}.B"])


class Watching(TrainerCallback):
    def __init__(self, on_evaluate: Any) -> None:
        self.told = on_evaluate

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.told(state, metrics)


def test_a_trainer_goes_when_its_task_is_done(tiny, tmp_path):
    """And its optimizer with it, without waiting for the collector."""
    session = Session(tiny, tmp_path)
    trainer = SlaoCallback(session.method, "first").attach(session.trainer("first", [], save_strategy="no"))
    trainer.train()
    gone = weakref.ref(trainer.optimizer.optimizer)  # within accelerate's
    gc.collect()
    gc.disable()
    try:
        del trainer
        assert gone() is None
    finally:
        gc.enable()


def test_a_callback_of_a_launcher_that_builds_the_model_itself(tiny, tmp_path):
    """LLaMA-Factory's, which is handed a class and knows the model from on_init_end on; here by a plain Trainer."""
    model = get_peft_model(tiny.base("llama"), LoraConfig(r=4, target_modules="all-linear"))
    callback = LlamaFactoryCallback("first")
    rows = tiny.inputs("llama", 1, 16)
    Trainer(model, arguments(tmp_path / "first"), train_dataset=rows, callbacks=[callback]).train()
    assert (callback.method.names, callback.method.lambdas) == (["first"], [1.0])
    later = LlamaFactoryCallback("second", state=tmp_path / "first")
    Trainer(model, arguments(tmp_path / "second"), train_dataset=rows, callbacks=[later]).train()
    assert later.method.names == ["first", "second"]


def test_an_export_has_no_form_that_nobody_filled_in(tiny, tmp_path):
    """PEFT's card: its head stays, for the hub."""
    Session(tiny, tmp_path).method.save_pretrained(tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert card.startswith("---\n")
    assert "library_name: peft\n" in card
    assert "PeftModel.from_pretrained(base, folder)" in card
    assert "More Information Needed" not in card
