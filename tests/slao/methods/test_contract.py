"""What every method must do, whatever it is: export a plain adapter, go on from its saved state, refuse a bad one."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModel, AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

import slao_kernels
from slao.methods import METHODS, make_method
from slao_kernels.testing import error_ratio, tiny_model

NAMES = sorted(METHODS)


@pytest.mark.parametrize(
    "lora", [{}, {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 3}}]
)
@pytest.mark.parametrize("name", NAMES)
def test_export_is_a_plain_adapter_that_equals_the_merged_model(lab, tmp_path, name, lora):
    """After three tasks, and with a fourth one running. Logits of a few units, rounded to fp32: some 1e-7."""
    method = lab.make(METHODS[name], torch.float32, lora=lora)
    for index in range(3):
        lab.task(method, index)
    for running in (False, True):
        if running:
            lab.begin(method, 3)
            lab.train(method)
        before = lab.logits(method)
        with method.merged():
            expected = lab.logits(method)
        folder = tmp_path / str(running)
        method.save_pretrained(folder)
        assert torch.equal(lab.logits(method), before)  # nothing of it stayed in the model
        plain = PeftModel.from_pretrained(tiny_model("llama"), str(folder))
        with torch.no_grad():
            assert error_ratio(plain(lab.IDS).logits, expected) <= 3e-6
            with plain.disable_adapter():
                assert error_ratio(plain(lab.IDS).logits, expected) > 1e-3


def test_an_adapter_of_a_bare_model_loads_by_its_own_name(lab, tmp_path):
    """AutoPeftModel finds base and class in the adapter's config alone, as after `get_peft_model`."""
    tiny_model("llama").save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    slao_kernels.patch(model)
    method = make_method("slao", model)
    lab.task(method, 0)
    method.save_pretrained(tmp_path / "adapter")
    with method.merged():
        expected = lab.logits(method)
    for kind in (AutoPeftModel, AutoPeftModelForCausalLM):
        with torch.no_grad():
            assert error_ratio(kind.from_pretrained(str(tmp_path / "adapter"))(lab.IDS).logits, expected) <= 3e-6


@pytest.mark.parametrize("mid_task", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_state_goes_on_bit_identically(lab, tmp_path, name, mid_task):
    method, other = lab.make(METHODS[name], torch.float32), lab.make(METHODS[name], torch.float32, seed=5)
    lab.task(method, 0)
    lab.task(method, 1)
    if mid_task:
        lab.begin(method, 2)
        lab.train(method, shift=2)
    method.save(tmp_path)
    other.load(tmp_path)
    assert torch.equal(lab.logits(method), lab.logits(other))
    for each in (method, other):
        if mid_task:
            lab.train(each, shift=2)
            lab.end(each, 2)
        lab.task(each, 3)
    assert torch.equal(lab.logits(method), lab.logits(other))
    with method.merged(), other.merged():
        assert torch.equal(lab.logits(method), lab.logits(other))
    assert other.lambdas == method.lambdas
    assert all(torch.equal(value, other._state()[key]) for key, value in method._state().items())


@pytest.mark.parametrize("name", ["slao", "clora", "inclora"])
def test_a_model_that_was_cast_since_shows_its_merge_and_takes_its_own_state(lab, tmp_path, name):
    """What a method keeps has the dtype of when it was merged; PEFT's forward wants one for A and B. fp32 rounds."""
    method = lab.make(METHODS[name], torch.float32, patched=False)
    lab.task(method, 0)
    lab.task(method, 1)
    with method.merged():
        expected = lab.logits(method)
    method.model.double()
    with method.merged():
        found = lab.logits(method)
    assert error_ratio(found, expected) <= 3e-6
    method.save(tmp_path)
    method.load(tmp_path)
    with method.merged():
        assert torch.equal(lab.logits(method), found)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_of_another_rank_is_refused_and_nothing_changes(lab, tmp_path, name):
    method, other = (lab.make(METHODS[name], torch.float32, lora={"r": r}) for r in (4, 2))
    lab.task(method, 0)
    lab.task(method, 1)
    method.save(tmp_path)
    before = lab.logits(other)
    with pytest.raises(ValueError, match=r"is \(4, 32\) torch.float32, the model has \(2, 32\)"):
        other.load(tmp_path)
    assert torch.equal(lab.logits(other), before)
    assert (other.task, other._state().keys()) == (0, lab.make(METHODS[name], lora={"r": 2})._state().keys())


def test_names_and_options_are_checked(lab):
    method = lab.make(METHODS["seqlora"])
    for name in NAMES:
        with pytest.raises(ValueError, match=f"method '{name}': .*'no_such'"):
            make_method(name, method.model, no_such=1)
    with pytest.raises(ValueError, match=f"unknown method 'lora2'; choose one of {', '.join(NAMES)}"):
        make_method("lora2", method.model)


def test_importing_the_methods_loads_no_peft():
    code = "import sys, slao; print(sorted({'peft', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
