"""The Axolotl plugin, through Axolotl's own plugin manager, around transformers' Trainer."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from slao import SLAO, CLoRA
from slao_kernels.layers import is_fused

base = pytest.importorskip("axolotl.integrations.base", reason="axolotl is not installed (pip install axolotl)")

from axolotl.utils.dict import DictDefault  # noqa: E402

NAME = "slao.integrations.axolotl.SlaoPlugin"
KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")


@pytest.fixture
def manager() -> Any:
    """A fresh one: it is a singleton that keeps its plugins."""
    base.PluginManager._instance = None
    found = base.PluginManager.get_instance()
    found.plugins.clear()
    found.register(NAME)
    yield found
    found.plugins.clear()
    base.PluginManager._instance = None


def peft_model(tiny: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(tiny.base("llama"), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))


def run(tiny: Any, manager: Any, folder: Any, seed: int, **settings: Any) -> tuple[Any, Any, Any]:
    """What Axolotl does with a plugin in a run, in its order."""
    cfg = DictDefault(settings)
    (plugin,) = manager.plugins.values()
    plugin.register(cfg)
    model = peft_model(tiny)
    manager.post_lora_load(cfg, model)
    args = TrainingArguments(
        str(folder), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, report_to="none", use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=tiny.inputs("llama", seed, 8))
    manager.post_trainer_create(cfg, trainer)
    trainer.train()
    return cfg, plugin, model


def test_registered_by_its_name(manager):
    assert list(manager.plugins) == [NAME]
    (fields,) = manager.get_input_args()
    module, _, name = fields.rpartition(".")
    known = getattr(importlib.import_module(module), name)(slao_task="x", slao_options={"init": "merged"})
    assert (known.slao_task, known.slao_backend, known.slao_method) == ("x", "auto", None)


def test_patches_and_turns_axolotls_kernels_off(tiny, manager, tmp_path):
    cfg, plugin, model = run(tiny, manager, tmp_path, 1)
    assert [cfg[name] for name in KERNELS] == [False] * 4
    assert len(plugin.report.patched) == 14
    assert sum(is_fused(module) for module in model.modules()) == 14
    assert plugin.report.fallbacks == {}
    assert plugin.callback is None


@pytest.mark.parametrize("name", KERNELS)
def test_refuses_axolotls_kernels(tiny, manager, name):
    (plugin,) = manager.plugins.values()
    with pytest.raises(ValueError, match=f"{name} bypass the LoRA layers that this plugin fuses: set them to false"):
        plugin.register(DictDefault({name: True}))
    with pytest.raises(ValueError, match=f"{name} were turned on after"):
        manager.post_lora_load(DictDefault({name: True}), peft_model(tiny))
    with pytest.raises(ValueError, match="set adapter: lora"):
        manager.post_lora_load(DictDefault({}), tiny.base("llama"))


@pytest.mark.parametrize(("name", "method"), [("slao", SLAO), ("clora", CLoRA)])
def test_two_runs_are_two_tasks(tiny, manager, tmp_path, name, method):
    """The second run, with a fresh model, goes on from the first one's output_dir; as one process does by hand."""
    run(tiny, manager, tmp_path / "a", 1, slao_method=name, slao_task="one")
    manager.plugins.clear()
    manager.register(NAME)
    state = str(tmp_path / "a")
    _, plugin, model = run(tiny, manager, tmp_path / "b", 2, slao_method=name, slao_task="two", slao_state=state)
    found = plugin.callback.method
    assert type(found) is method
    assert found.names == ["one", "two"]
    assert len(found.lambdas) == 2
    if method is SLAO:
        import slao_kernels

        hand = peft_model(tiny)
        slao_kernels.patch(hand)
        mine = SLAO(hand)
        for seed in (1, 2):
            mine.begin_task(str(seed))
            args = TrainingArguments(
                str(tmp_path / "hand"), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2,
                report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no",
            )  # fmt: skip
            Trainer(hand, args, train_dataset=tiny.inputs("llama", seed, 8)).train()
            mine.end_task()
        with mine.merged(), found.merged():
            assert tiny.differing(hand.state_dict(), model.state_dict()) == []


def test_options_reach_the_method(tiny, manager, tmp_path):
    _, plugin, _ = run(tiny, manager, tmp_path, 1, slao_method="slao", slao_options={"init": "merged"})
    assert plugin.callback.method.init == "merged"
    assert plugin.callback.method.names == ["task1"]
