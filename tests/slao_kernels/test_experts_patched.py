"""When experts are fused and when PEFT computes them, and what the class swap leaves PEFT's: files, merges, copies."""

from __future__ import annotations

import copy
import functools
import pickle

import peft
import pytest
import torch
import twins
from expert_models import EXACT, IDS, config, experts_of, model_of, step, wrapper_of
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import slao_kernels
from slao_kernels.testing import error_ratio, tiny_model


def test_state_dict_and_save_are_pefts(tmp_path):
    model, plain = (model_of("mixtral", torch.float32) for _ in range(2))
    slao_kernels.patch(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.save_pretrained(tmp_path)
    base = tiny_model("mixtral", num_hidden_layers=1)
    base.set_experts_implementation("eager")
    again = peft.PeftModel.from_pretrained(base, tmp_path)
    assert error_ratio(model(input_ids=IDS).logits, again(input_ids=IDS).logits) <= 1e-6
    assert slao_kernels.unpatch(model) == 2
    assert all(type(a) is type(b) for a, b in zip(model.modules(), plain.modules(), strict=True))


def test_copied_pickled_deleted():
    model = model_of("mixtral", torch.float64)
    slao_kernels.patch(model)
    expected = model(input_ids=IDS).logits
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(input_ids=IDS).logits, expected)
        assert slao_kernels.unpatch(again) == 2
    model.add_adapter("second", config(5, 8))
    model.delete_adapter("second")
    assert torch.equal(model(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_unmerging_gives_the_base_its_bits_back(kind, dtype):
    """gpt_oss stores its experts transposed. What is merged answers as the adapter does."""
    model = model_of(kind, dtype)
    slao_kernels.patch(model)
    experts = experts_of(model)
    before = {name: p.detach().clone() for name, p in experts.named_parameters()}
    expected = [
        layer.get_delta_weight("default").double() for layer in model.modules() if hasattr(layer, "parameter_name")
    ]
    for cycle in range(5):
        model.merge_adapter(safe_merge=cycle % 2 == 0)
        for name, delta in zip(("down_proj", "gate_up_proj"), expected, strict=True):
            now = getattr(experts, name).double()
            assert (now - before[name].double() - delta).norm() <= 2 * torch.finfo(dtype).eps * now.norm()
            assert not torch.equal(now, before[name].double())
        model.unmerge_adapter()
        assert all(torch.equal(p, before[name]) for name, p in experts.named_parameters())
    model.merge_adapter()
    experts.down_proj.data[1, 2, 3] += 1
    with pytest.raises(ValueError, match="has changed since the fold"):
        model.unmerge_adapter()


def test_merged_and_disabled_are_pefts():
    model = model_of("qwen3_moe", torch.float64)
    plain = copy.deepcopy(model)
    report = slao_kernels.patch(model)
    with model.disable_adapter(), plain.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    tuned = model(input_ids=IDS).logits
    model.merge_adapter()
    assert error_ratio(model(input_ids=IDS).logits, tuned) <= EXACT
    model.unmerge_adapter()
    assert error_ratio(model(input_ids=IDS).logits, tuned) <= EXACT
    assert report.fallbacks == {}


def _hooked(model: nn.Module) -> None:
    experts_of(model).register_forward_hook(lambda *args: None)


def _trains(model: nn.Module) -> None:
    experts_of(model).down_proj.requires_grad_(True)


def _foreign(model: nn.Module) -> None:
    experts_of(model).config._experts_implementation = "sonicmoe"


def _spread(model: nn.Module) -> None:
    experts_of(model)._is_expert_parallel = True


def _parametrized(model: nn.Module) -> None:
    nn.utils.parametrize.register_parametrization(experts_of(model), "down_proj", nn.Identity())


REASONS = {
    "a hook": (_hooked, "its MixtralExperts has hooks"),
    "the base trains": (_trains, "its down_proj trains too"),
    "other kernels": (_foreign, "the config asks for experts_implementation='sonicmoe', whose kernels are its own"),
    "expert parallel": (_spread, "its experts are spread over devices (expert parallel)"),
    "parametrized": (_parametrized, "a parameter of its experts is parametrized"),
}


@pytest.mark.parametrize("what", REASONS)
def test_what_keeps_pefts_forward(what):
    """Before patch it is skipped, after it falls back, each with the reason."""
    change, reason = REASONS[what]
    early, late = model_of("mixtral", torch.float32), model_of("mixtral", torch.float32)
    change(early)
    report = slao_kernels.patch(early)
    assert len(report.skipped) == 2
    assert set(report.skipped.values()) == {reason}
    report = slao_kernels.patch(late)
    assert len(report.patched) == 2
    expected = late(input_ids=IDS).logits
    change(late)
    if what != "other kernels":  # which need a GPU
        assert error_ratio(late(input_ids=IDS).logits, expected) <= 1e-5
        assert report.fallbacks[report.patched[0]] == reason


def test_a_forward_of_its_own():
    """A subclass may compute something else."""
    model = model_of("mixtral", torch.float32)
    experts = experts_of(model)
    own = type("Mine", (type(experts),), {"forward": lambda self, *args: 2 * super(type(self), self).forward(*args)})
    experts.__class__ = own
    report = slao_kernels.patch(model)
    assert set(report.skipped.values()) == {"Mine has a forward of its own"}


def test_a_served_name_that_was_registered_anew(monkeypatch):
    model = model_of("mixtral", torch.float32, "grouped_mm")
    report = slao_kernels.patch(model)

    @functools.wraps(ALL_EXPERTS_FUNCTIONS["grouped_mm"])
    def nothing(self, hidden_states, index, weights):
        return torch.zeros_like(hidden_states)

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "grouped_mm", nothing)
    found = wrapper_of(model)(torch.randn(6, 32), torch.zeros(6, 1, dtype=torch.long), torch.ones(6, 1))
    assert found.count_nonzero() == 0
    said = "experts_implementation='grouped_mm' was registered anew, with kernels of its own"
    assert report.fallbacks[report.patched[0]] == said


def test_one_of_two_wrappers_with_nothing_to_add():
    """Still one node: the other's adapter alone."""
    model, plain = model_of("mixtral", torch.float64), model_of("mixtral", torch.float64)
    report = slao_kernels.patch(model)
    for each in (model, plain):
        chain = [module for module in each.modules() if hasattr(module, "parameter_name")]
        chain[-1].enable_adapters(False)
    with twins.CountOps() as ops:
        model(input_ids=IDS)
    assert ops.counts["expert_linear"] == 2
    found, expected = step(model), step(plain)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert error_ratio(value, expected[name]) <= EXACT, name
    assert report.fallbacks == {}


def test_a_router_keeps_pefts_forward():
    """A 2-D parameter is none of the experts'."""
    model = model_of("mixtral", torch.float32, parameters=["mlp.gate.weight"])
    report = slao_kernels.patch(model)
    assert list(report.skipped.values()) == ["MixtralTopKRouter is no experts module of transformers' registry"]


def test_the_report_names_experts():
    text = str(slao_kernels.patch(model_of("mixtral", torch.float32)))
    assert "2 of 2 LoRA layers fused" in text
    assert "gate_up_proj of 4 experts" in text
    assert "down_proj of 4 experts" in text
