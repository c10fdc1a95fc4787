"""TRL's SFTTrainer: under `slao.train`, and by itself with SlaoCallback, bf16 and gradient checkpointing."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import slao_kernels
from slao import SLAO, CLoRA, SlaoCallback
from slao.cli import main
from slao.train import TrainConfig

trl = pytest.importorskip("trl", reason="TRL is not installed (pip install trl)")
datasets = pytest.importorskip("datasets", reason="datasets is not installed (pip install datasets)")


@pytest.mark.parametrize("method", [SLAO, CLoRA])
def test_slao_train_on_sft_trainer_is_slao_train(tiny, method):
    """Same rows, order and loss; TRL takes log-probabilities a chunk at a time: fp32 sums in another order."""
    runs = []
    for trainer in ("transformers", "trl"):
        job = tiny.Job("llama", method, tiny.stream(extra=3, tasks=2))
        job.train(tiny.sgd(trainer=trainer, batch_size=2, gradient_accumulation=2))
        runs.append(job)
    ours, theirs = runs
    assert [len(losses) for losses in theirs.result.losses] == [2, 2]
    torch.testing.assert_close(torch.tensor(theirs.result.losses), torch.tensor(ours.result.losses), rtol=1e-5, atol=0)
    assert theirs.result.tokens == ours.result.tokens
    assert theirs.result.matrix == ours.result.matrix
    start = tiny.Job("llama", method).weights()
    moved = tiny.largest_error(ours.weights(), start)
    assert moved > 1e-3
    assert tiny.largest_error(theirs.weights(), ours.weights()) <= 1e-4 * moved


class Session:
    """One process: a PeftModel over a tiny Llama, fused or not, and SLAO."""

    def __init__(self, tiny: Any, folder: Any, fused: bool = True) -> None:
        self.tiny, self.folder = tiny, folder
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.1)
        self.model = get_peft_model(tiny.base("llama"), config)
        self.report = slao_kernels.patch(self.model, strict=True)
        if not fused:
            slao_kernels.unpatch(self.model)
        self.method = SLAO(self.model, keep_cosines=True)
        self.losses: list[float] = []
        self.forwards = 0  # of a block's MLP
        self.model.get_submodule("base_model.model.model.layers.0.mlp").register_forward_pre_hook(self._count)

    def _count(self, *args: Any) -> None:
        self.forwards += 1

    def train(self, task: str, resume: bool = False, steps: int = 8, **options: Any) -> list[dict[str, float]]:
        rows = [{"prompt": row.prompt, "completion": f" {row.answer}"} for row in self._rows(task)]
        settings: dict[str, Any] = {"bf16": True, "gradient_checkpointing": True, **options}
        args = trl.SFTConfig(
            str(self.folder / task), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2, save_steps=4,
            logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, **settings,
        )  # fmt: skip
        callback = SlaoCallback(self.method, task)
        trainer = trl.SFTTrainer(
            self.model,
            args,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=self.tiny.tokenizer(),
        )
        callback.attach(trainer).train(resume_from_checkpoint=resume)
        history: list[dict[str, float]] = trainer.state.log_history
        self.losses += [entry["loss"] for entry in history if "loss" in entry]
        return history

    def _rows(self, task: str) -> Any:
        return next(found.train for found in self.tiny.stream(train=16).tasks if found.name == task)

    def weights(self) -> dict[str, torch.Tensor]:
        with self.method.merged():
            return {name: value.clone() for name, value in self.model.state_dict().items()}


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory) -> Session:
    session = Session(tiny, tmp_path_factory.mktemp("whole"))
    for task in ("first", "second"):
        session.train(task)
    return session


def test_two_tasks_bf16_and_checkpointing(tiny, whole, tmp_path):
    """Fused against PEFT's own layers, under bf16 autocast and with every block recomputed in backward."""
    plain = Session(tiny, tmp_path, fused=False)
    history = [plain.train(task) for task in ("first", "second")]
    assert whole.report.fallbacks == {}, "these layers ran PEFT's forward in some call"
    found, expected = torch.tensor(whole.losses), torch.tensor(plain.losses)
    assert len(found) == 16
    for task in (found[:8], found[8:]):
        assert task[4:].mean() < 0.9 * task[:4].mean(), "nothing was learned: this run tests nothing"
    assert whole.forwards == plain.forwards == 2 * 16, "every block runs twice a step"
    # bf16 keeps 8 bits, 0.4 % an operation; a loss is a mean over tokens of differences of such numbers.
    assert ((found - expected).abs() / expected[0]).max() <= 0.03
    metrics = {key: value for entry in history[1] for key, value in entry.items() if key.startswith("slao/")}
    assert metrics.pop("slao/cosine") == pytest.approx(sum(plain.method.cosines[1]) / 14)
    assert metrics == {
        "slao/task": 2, "slao/lora_layers": 14, "slao/patched": 0, "slao/fallbacks": 0, "slao/lambda": 1 / 2**0.5
    }  # fmt: skip


def test_checkpointing_changes_nothing(tiny, tmp_path):
    """fp32: the recomputed forward draws the same dropout masks and gives the same numbers."""
    with_it, without = Session(tiny, tmp_path / "with"), Session(tiny, tmp_path / "without")
    for session in (with_it, without):
        session.train("first", bf16=False, gradient_checkpointing=session is with_it)
    assert (with_it.forwards, without.forwards) == (16, 8)
    assert with_it.losses == pytest.approx(without.losses, rel=1e-6)
    assert tiny.largest_error(with_it.weights(), without.weights()) <= 1e-5


def test_resumed_is_bit_identical(tiny, whole, tmp_path_factory):
    """A fresh process goes on from the checkpoint in the middle of the second task."""
    resumed = Session(tiny, whole.folder)
    shutil.rmtree(whole.folder / "second" / "checkpoint-8")
    (whole.folder / "second" / "slao_state.safetensors").unlink()
    resumed.train("second", resume=True)
    assert resumed.losses == whole.losses[8:]
    assert tiny.differing(resumed.weights(), whole.weights()) == []


def test_an_encoder_is_refused(tiny):
    job = tiny.Job("bert")
    with pytest.raises(ValueError, match=r"trains causal language models; objective 'label_matching' has its own"):
        job.train(TrainConfig(trainer="trl", max_steps=1))


def test_peft_config_is_refused(tiny, tmp_path):
    """SFTTrainer would wrap the method's model once more; TRL itself says no to a PeftModel, we to another model."""
    session = Session(tiny, tmp_path)
    data = datasets.Dataset.from_list([{"text": "red"}] * 4)
    args = trl.SFTConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match="peft_config"):
        trl.SFTTrainer(
            session.model, args, train_dataset=data, processing_class=tiny.tokenizer(), peft_config=LoraConfig()
        )


def test_from_the_command_line(saved_llama, stream_folder, tmp_path):
    command = ["run", "--model", str(saved_llama), "--stream", "jsonl", "--stream-path", str(stream_folder)]
    command += ["--runs", str(tmp_path), "--name", "trl", "--methods", "slao", "--seeds", "0", "--rank", "4"]
    assert main([*command, "--epochs", "1", "--batch-size", "4", "--set", "train.trainer=trl"]) == 0
    results = json.loads((tmp_path / "trl" / "results.json").read_text())
    assert len(results["methods"]["slao"]["matrix"][0]) == 2
    assert results["settings"]["train"]["trainer"] == "trl"
