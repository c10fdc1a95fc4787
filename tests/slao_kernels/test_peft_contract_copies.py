"""Copies of a patched model, in memory and in files: what its layers share, adapters that load without this library.

Layers by themselves: test_layers_peft.py.
"""

from __future__ import annotations

import copy
import json
import pickle

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import slao_kernels
from slao_kernels.layers import FusedLoraLinear

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = 4
TARGETS = ["q_proj", "down_proj"]


@pytest.fixture
def model(twins) -> nn.Module:
    model = twins.peft_model("llama", target_modules=TARGETS)
    slao_kernels.patch(model)
    return model


@pytest.fixture
def twin(twins) -> nn.Module:
    return twins.peft_model("llama", target_modules=TARGETS)


def through_file(model: nn.Module, tmp_path) -> nn.Module:
    torch.save(model, tmp_path / "model.pt")
    return torch.load(tmp_path / "model.pt", weights_only=False)


COPIES = {
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "pickle": lambda model, _: pickle.loads(pickle.dumps(model)),
    "torch.save": through_file,
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_share_their_fallbacks_among_themselves_only(how, model, twins, tmp_path):
    """The layers of one copy write into one dictionary, which is not the original's report."""
    report = slao_kernels.patch(model)
    copied = COPIES[how](model, tmp_path)
    copied.get_submodule(report.patched[0])(twins.net_input(2, 3, 32), alora_offsets=[1])
    fallbacks = [m.slao_options.fallbacks for m in copied.modules() if type(m) is FusedLoraLinear]
    assert all(found is fallbacks[0] for found in fallbacks)
    assert list(fallbacks[0]) == report.patched[:1]
    assert report.fallbacks == {}


def test_save_pretrained_loads_in_plain_peft(model, twin, twins, tmp_path):
    """The same files as without us, bytes of the weights and keys of the configuration included."""
    model.save_pretrained(tmp_path / "ours")
    twin.save_pretrained(tmp_path / "theirs")
    files = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == files
    twins.check_equal(*(load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "theirs")))
    configs = [json.loads((tmp_path / side / "adapter_config.json").read_text()) for side in ("ours", "theirs")]
    for config in configs:
        config["target_modules"] = sorted(config["target_modules"])
    assert configs[0] == configs[1]
    loaded = peft.PeftModel.from_pretrained(twins.base_model("llama"), tmp_path / "ours")
    assert not any(type(m) is FusedLoraLinear for m in loaded.modules())
    assert torch.equal(loaded(twins.token_ids()).logits, twin(twins.token_ids()).logits)


def test_injected_adapter_is_saved_by_transformers(twins, tmp_path):
    """A plain model's own save_pretrained writes the adapter that patch injected."""
    model = twins.base_model("llama")
    slao_kernels.patch(model, twins.config(target_modules=TARGETS))
    twins.train_a_little(model)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").exists()
    loaded = peft.PeftModel.from_pretrained(twins.base_model("llama"), tmp_path)
    expected = {"logits": loaded(twins.token_ids()).logits}
    twins.check_close({"logits": model(twins.token_ids()).logits}, expected)


def test_load_adapter_into_a_patched_model(model, twins, tmp_path):
    other = twins.peft_model("llama", r=6, target_modules=TARGETS)
    twins.train_a_little(other, seed=31).save_pretrained(tmp_path)
    model.load_adapter(tmp_path, adapter_name="other")
    model.set_adapter("other")
    with twins.CountOps() as ops:
        found = model(twins.token_ids()).logits
    assert ops.forward == LAYERS
    twins.check_close({"logits": found}, {"logits": other(twins.token_ids()).logits})


def test_moved_and_cast(model, twin, twins):
    """.to() and .double() work on the layers as on PEFT's."""
    twins.check_close(twins.step(model.double()), twins.step(twin.double()), 1e-12)
    twins.check_close(twins.step(model.float()), twins.step(twin.float()))
