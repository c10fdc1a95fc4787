"""TRL's SDFTTrainer, which generates, and switches adapters for its teacher, under SlaoCallback: fused as unfused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import slao_kernels
from slao import SLAO, SlaoCallback

sdft = pytest.importorskip("trl.experimental.sdft", reason="TRL with SDFT is not installed (pip install trl)")
datasets = pytest.importorskip("datasets", reason="datasets is not installed (pip install datasets)")
if "teacher_model_kind" not in {field.name for field in dataclasses.fields(sdft.SDFTConfig)}:
    pytest.skip("this TRL's SDFT has one kind of teacher (pip install -U trl)", allow_module_level=True)


def trained(tiny: Any, folder: Any, teacher: str, fused: bool) -> dict[str, Any]:
    """Two tasks; what each step's loss was, and the merge."""
    torch.manual_seed(0)
    model = get_peft_model(tiny.base("llama"), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    report = slao_kernels.patch(model, strict=True) if fused else None
    method, losses = SLAO(model), []
    for task in tiny.stream(train=16).tasks[:2]:
        rows = [{"prompt": row.prompt, "privileged_context": f"The answer is {row.answer}."} for row in task.train]
        args = sdft.SDFTConfig(
            str(folder / task.name), max_steps=3, per_device_train_batch_size=4, num_generations=2,
            max_completion_length=6, learning_rate=1.0, optim="sgd", logging_steps=1, report_to="none",
            use_cpu=True, bf16=False, disable_tqdm=True, save_strategy="no", teacher_model_kind=teacher,
        )  # fmt: skip
        trainer = sdft.SDFTTrainer(
            model, args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tiny.tokenizer()
        )
        SlaoCallback(method, task.name).attach(trainer).train()
        losses += [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        if teacher == "ema":
            model.delete_adapter("teacher")  # of this trainer's; the next one's would be refused
    with method.merged():
        weights = {name: value.clone() for name, value in model.state_dict().items() if "lora_" in name}
    return {"losses": losses, "weights": weights, "report": report, "method": method}


@pytest.mark.parametrize("teacher", ["live", "ema", "base"])
def test_two_tasks(tiny, tmp_path, teacher):
    """The tokens drawn are the same while logits differ by rounding alone, of which SGD, unlike Adam, makes no more."""
    ours, plain = (trained(tiny, tmp_path / str(fused), teacher, fused) for fused in (True, False))
    assert ours["report"].fallbacks == {}, "these layers ran PEFT's forward in some call"
    assert len(ours["losses"]) == 6
    assert min(ours["losses"]) > 0.01, "the teacher says what the student says: this run tests nothing"
    assert ours["losses"] == pytest.approx(plain["losses"], rel=1e-5)
    assert ours["method"].lambdas == pytest.approx([1.0, 2**-0.5])
    assert ours["weights"].keys() == plain["weights"].keys()
    moved = tiny.largest_error(ours["weights"], {name: 0 * value for name, value in ours["weights"].items()})
    assert tiny.largest_error(ours["weights"], plain["weights"]) <= 1e-4 * moved
