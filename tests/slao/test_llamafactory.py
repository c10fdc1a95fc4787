"""LLaMA-Factory's own launcher and its v1 kernel plugin, on a saved tiny Llama."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import slao_kernels
from slao.integrations.llamafactory import LlamaFactoryCallback, register_kernel
from slao_kernels.layers import is_fused

os.environ.setdefault("DISABLE_VERSION_CHECK", "1")  # it asks for an older PEFT than this library does
pytest.importorskip("llamafactory", reason="llamafactory is not installed (pip install --no-deps llamafactory)")


@pytest.fixture(scope="module")
def arguments(tiny, saved_llama, tmp_path_factory) -> Any:
    """A YAML's content, for a task of the tiny stream."""
    folder = tmp_path_factory.mktemp("data")
    info = {}
    for task in tiny.stream(tasks=2).tasks:
        rows = [{"instruction": row.prompt, "input": "", "output": row.answer} for row in task.train]
        (folder / f"{task.name}.json").write_text(json.dumps(rows))
        info[task.name] = {"file_name": f"{task.name}.json"}
    (folder / "dataset_info.json").write_text(json.dumps(info))

    def make(task: str, output: Any, **options: Any) -> dict[str, Any]:
        return {
            "model_name_or_path": str(saved_llama), "stage": "sft", "do_train": True, "finetuning_type": "lora",
            "lora_target": "all", "lora_rank": 4, "dataset": task, "dataset_dir": str(folder), "template": "default",
            "output_dir": str(output), "per_device_train_batch_size": 4, "max_steps": 4, "save_steps": 2,
            "learning_rate": 1e-2, "logging_steps": 1, "report_to": "none", "use_cpu": True, "seed": 1,
            "disable_gradient_checkpointing": True,  # 0.9.5's wrapper does not know transformers 5.23
            "overwrite_cache": True, "preprocessing_num_workers": None, **options,
        }  # fmt: skip

    return make


def run(args: dict[str, Any], callback: Any) -> Any:
    tuner = pytest.importorskip("llamafactory.train.tuner", reason="LLaMA-Factory's own requirements are missing")
    tuner.run_exp(args=args, callbacks=[callback])
    return callback


def test_two_launches_are_two_tasks(arguments, tmp_path):
    one = run(arguments("first", tmp_path / "1"), LlamaFactoryCallback("first"))
    assert len(one.report.patched) == 14
    assert one.report.fallbacks == {}
    two = run(arguments("second", tmp_path / "2"), LlamaFactoryCallback("second", state=tmp_path / "1"))
    assert two.method.names == ["first", "second"]
    assert two.method.lambdas == [1.0, 1 / 2**0.5]
    plain = run(arguments("first", tmp_path / "p1"), LlamaFactoryCallback("first", patch=None))
    assert not any(is_fused(module) for module in plain.method.model.modules())
    plain = run(arguments("second", tmp_path / "p2"), LlamaFactoryCallback("second", state=tmp_path / "p1", patch=None))
    losses = []
    for folder in ("1", "2", "p1", "p2"):
        history = json.loads((tmp_path / folder / "trainer_state.json").read_text())["log_history"]
        losses.append([entry["loss"] for entry in history if "loss" in entry])
        assert any("slao/lambda" in entry for entry in history)
    assert [len(found) for found in losses] == [4] * 4
    for found, expected in zip(losses[:2], losses[2:], strict=True):
        assert found == pytest.approx(expected, rel=1e-5)  # eight fp32 steps, each product rounded in another order
    two.method.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_a_launch_is_resumed_identically(tiny, arguments, tmp_path):
    whole = run(arguments("first", tmp_path / "a"), LlamaFactoryCallback("first"))
    checkpoint = str(tmp_path / "a" / "checkpoint-2")
    again = run(arguments("first", tmp_path / "a", resume_from_checkpoint=checkpoint), LlamaFactoryCallback("first"))
    states = [{k: v for k, v in c.method.model.state_dict().items() if "lora_" in k} for c in (whole, again)]
    assert tiny.differing(*states) == []


def test_full_fine_tuning_is_refused(arguments, tmp_path):
    with pytest.raises(ValueError, match="set finetuning_type: lora"):
        run(arguments("first", tmp_path, finetuning_type="full"), LlamaFactoryCallback("first"))
    with pytest.raises(ValueError, match="unknown method 'nothing'"):
        LlamaFactoryCallback("first", method="nothing")


def test_v1_kernel(tiny):
    interface = pytest.importorskip(
        "llamafactory.v1.plugins.model_plugins.kernels.interface", reason="this LLaMA-Factory has no v1 engine"
    )
    register_kernel()
    torch.manual_seed(0)
    model = get_peft_model(tiny.base("llama"), LoraConfig(r=4, target_modules="all-linear"))
    # As ModelEngine does with kernel_config: {name: slao}.
    config = SimpleNamespace(name="slao", include_kernels=None)
    found = interface.KernelPlugin(config.name)(model=model, include_kernels=config.include_kernels)
    assert found is model
    assert isinstance(found, PeftModel)
    assert slao_kernels.unpatch(found) == 14
    with pytest.raises(ValueError, match=r"set peft_config: {name: lora}"):
        interface.KernelPlugin("slao")(model=tiny.base("llama"), include_kernels=None)
