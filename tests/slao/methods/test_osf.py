"""OSF: what a task trains lies off the leading directions of the weights as it finds them, earlier tasks included."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import slao_kernels
from slao import OSF, IncLoRA, SeqLoRA
from slao_kernels.testing import error_ratio, tiny_model


def weights(method: OSF) -> list[torch.Tensor]:
    """Per layer W + s Σ B A of all pairs, (m, n)."""
    method.model.eval()
    found = []
    for pair in method.pairs:
        base = pair.layer.get_base_layer().weight.detach()
        base = base.T if pair.layer.fan_in_fan_out else base
        delta = pair.layer.get_delta_weight(method.adapter).detach()
        found.append(base + (delta.T if pair.layer.fan_in_fan_out else delta))
    return found


def test_each_task_leaves_what_the_weights_do_most(lab):
    method, plain = lab.make(OSF, keep=0.25), lab.make(IncLoRA)
    for index in range(3):
        before, before_plain = weights(method), weights(plain)
        for each in (method, plain):
            lab.task(each, index)
        for old, new, old_plain, new_plain in zip(before, weights(method), before_plain, weights(plain), strict=True):
            U, _, Vh = torch.linalg.svd(old)
            count, change = int(0.25 * min(old.shape)), new - old
            assert change.norm() > 1e-3
            assert (U[:, :count].T @ change).norm() <= 1e-12 * change.norm() * old.norm()
            assert (change @ Vh[:count].T).norm() <= 1e-12 * change.norm() * old.norm()
            # IncLoRA's change has a part there.
            assert (U[:, :count].T @ (new_plain - old_plain)).norm() >= 0.1 * (new_plain - old_plain).norm()


def test_gradients_are_projected_and_only_within_a_task(lab):
    method, plain = lab.make(OSF), lab.make(IncLoRA)
    lab.begin(method, 0)
    with torch.no_grad():
        for mine, theirs in zip(method.pairs, plain.pairs, strict=True):
            mine.B.normal_()
            theirs.A.copy_(mine.A), theirs.B.copy_(mine.B)
    held = [(U.clone(), V.clone()) for U, V in method._held]
    for each in (method, plain):
        each.model(lab.IDS, labels=lab.IDS).loss.backward()
    for mine, theirs, (U, V) in zip(method.pairs, plain.pairs, held, strict=True):
        (dA, dB), (A, B) = ([p.grad for p in pair.parameters] for pair in (mine, theirs))
        assert error_ratio(dA, A - A @ V @ V.T) <= 1e-12
        assert error_ratio(dB, B - U @ (U.T @ B)) <= 1e-12
        assert error_ratio(dB, B) > 0.1
    lab.end(method, 0)
    method.model.zero_grad(), plain.model.zero_grad()
    with torch.no_grad():
        for mine, theirs in zip(method.pairs, plain.pairs, strict=True):
            theirs.A.copy_(mine.A), theirs.B.copy_(mine.B)
    for each in (method, plain):
        each.model(lab.IDS, labels=lab.IDS).loss.backward()
    for mine, theirs in zip(method.pairs, plain.pairs, strict=True):
        assert torch.equal(mine.parameters[1].grad, theirs.parameters[1].grad)


def test_weights_that_are_stored_transposed(lab):
    """GPT-2's Conv1D."""
    model = get_peft_model(tiny_model("gpt2"), LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)).double()
    slao_kernels.patch(model)
    method = OSF(model, keep=0.5)
    before = weights(method)
    lab.task(method, 0)
    for old, new in zip(before, weights(method), strict=True):
        U, _, Vh = torch.linalg.svd(old)
        count, change = int(0.5 * min(old.shape)), new - old
        assert change.norm() > 1e-3
        assert (U[:, :count].T @ change).norm() <= 1e-12 * change.norm() * old.norm()
        assert (change @ Vh[:count].T).norm() <= 1e-12 * change.norm() * old.norm()


def test_a_task_that_is_saved_in_its_middle_goes_on(lab, tmp_path):
    whole = lab.make(OSF)
    lab.task(whole, 0)
    lab.begin(whole, 1)
    whole.save(tmp_path)
    resumed = lab.make(OSF, seed=3)
    resumed.load(tmp_path)
    with torch.no_grad():
        for old, new in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
            new.copy_(old)
    for method in (whole, resumed):
        lab.train(method, shift=1)
        lab.end(method, 1)
    for old, new in zip(whole.pairs, resumed.pairs, strict=True):
        assert torch.equal(old.A, new.A)
        assert torch.equal(old.B, new.B)


def test_refusals(lab):
    for keep in (0.0, 1.0):
        with pytest.raises(ValueError, match=rf"keep must lie in \(0, 1\), not {keep}"):
            lab.make(OSF, keep=keep)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 4))
    model = get_peft_model(layers, LoraConfig(r=2, target_modules=["0", "2"]))
    with pytest.raises(ValueError, match=r"osf cannot treat 1 layers: .*\.0: the base weight has 4 dimensions"):
        OSF(model)
    method = lab.make(OSF)
    with pytest.raises(ValueError, match="the saved directions of .*q_proj do not fit its A"):
        method._load_state({"x.held_U": torch.zeros(1)})


def test_an_adapter_that_was_frozen_when_it_was_made(lab):
    plain = lab.make(SeqLoRA)
    plain.model.set_requires_grad("default", False)
    later = OSF(plain.model)
    later.model.set_requires_grad("default", True)
    lab.begin(later, 0)
    with torch.no_grad():
        for pair in later.pairs:
            pair.B.normal_()
    later.model(lab.IDS, labels=lab.IDS).loss.backward()
    for pair, (U, _) in zip(later.pairs, later._held, strict=True):
        dB = pair.parameters[1].grad
        assert (U.T @ dB).norm() <= 1e-12 * dB.norm()


def test_a_trained_adapter_and_a_single_direction_are_refused(lab):
    method = lab.make(OSF)
    with torch.no_grad():
        method.pairs[0].B.normal_()
    with pytest.raises(ValueError, match=r"osf begins with B = 0, and 1 layers have a trained one \(.*q_proj"):
        lab.begin(method, 0)
    head = get_peft_model(nn.Sequential(nn.Linear(8, 1)), LoraConfig(r=1, target_modules=["0"]))
    with pytest.raises(ValueError, match="its weight has one direction alone, which would be held"):
        OSF(head)


def test_experts_are_refused_by_name():
    model = tiny_model("mixtral")
    config = LoraConfig(r=2, target_modules=[], target_parameters=["experts.gate_up_proj"])
    with pytest.raises(ValueError, match=r"osf cannot treat \d layers: .*: its weights are a mixture's experts"):
        OSF(get_peft_model(model, config))
