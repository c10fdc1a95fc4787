"""LwF: its penalty against the formula on twins, what it holds, its state and what it does with a method's batch."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from slao import SLAO, LwF, SeqLoRA
from slao_kernels.testing import error_ratio, tiny_model


def body(method: LwF) -> nn.Module:
    return method._body


def forward(method: LwF, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return method.model(input_ids=ids, attention_mask=mask, labels=ids).loss


@pytest.mark.parametrize("padded", ["no", "by keyword", "by place"])
@pytest.mark.parametrize("patched", [False, True])
def test_the_penalty_and_its_gradients_are_the_formula(lab, padded, patched):
    """By hand, from a twin that holds the old adapter and one that holds the new; on two rows, one of them padded."""
    method, old, new = lab.make(LwF, weight=3.0, patched=patched), lab.make(SeqLoRA), lab.make(SeqLoRA)
    assert forward(method, lab.IDS, None) > 0
    assert method.penalty() is None
    lab.task(method, 0)
    weights = [(pair.A.clone(), pair.B.clone()) for pair in method.pairs]
    lab.begin(method, 1)
    lab.train(method, shift=1)
    ids = torch.cat([lab.IDS, (lab.IDS + 9) % 40])
    mask = torch.ones_like(ids)
    mask[1, -5:] = 0
    given = None if padded == "no" else mask
    if padded == "by place":
        body(method)(ids, given)
    else:
        forward(method, ids, given)
    got = method.penalty()
    for pair, now, before, (A, B) in zip(method.pairs, new.pairs, old.pairs, weights, strict=True):
        with torch.no_grad():
            now.A.copy_(pair.A), now.B.copy_(pair.B), before.A.copy_(A), before.B.copy_(B)
    bodies = [twin.model.base_model.model.model for twin in (new, old)]
    h, h_old = (one(input_ids=ids, attention_mask=given).last_hidden_state for one in bodies)
    counted = mask.bool() if padded != "no" else torch.ones_like(mask).bool()
    want = 3.0 * (h - h_old.detach())[counted].square().sum() / h_old.detach()[counted].square().sum()
    assert float(want.detach()) > 1e-4
    assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-10)
    mine, theirs = ([p for pair in each.pairs for p in pair.parameters] for each in (method, new))
    gradients = torch.autograd.grad(got, mine), torch.autograd.grad(want, theirs)
    assert max(error_ratio(a, b) for a, b in zip(*gradients, strict=True)) <= 1e-10
    # The adapter that trains is in the model again.
    for pair, now in zip(method.pairs, new.pairs, strict=True):
        assert torch.equal(pair.A, now.A)
        assert torch.equal(pair.B, now.B)


def moved(lab, **options) -> LwF:
    """In its second task, with weights that are no longer those of before."""
    method = lab.make(LwF, **options)
    lab.task(method, 0)
    lab.begin(method, 1)
    lab.train(method, shift=1)
    return method


@pytest.mark.parametrize("patched", [False, True])
def test_within_autocast_the_old_adapter_is_the_old_one(lab, patched):
    """torch keeps a parameter's 16-bit copy for the length of the block, whatever its storage becomes."""
    method = moved(lab, dtype=torch.float32, patched=patched)
    forward(method, lab.IDS, None)
    plain = float(method.penalty().detach())
    with torch.autocast("cpu", torch.bfloat16):
        forward(method, lab.IDS, None)
        within = method.penalty()
    assert float(within.detach()) == pytest.approx(plain, rel=0.05)  # bf16 has eight bits
    # The old states are computed as the new ones were, also where the penalty is asked for outside.
    method._before = [(pair.A.clone(), pair.B.clone()) for pair in method.pairs]
    with torch.autocast("cpu", torch.bfloat16):
        forward(method, lab.IDS, None)
    assert float(method.penalty().detach()) == 0.0


@pytest.mark.parametrize("patched", [False, True])
def test_merged_within_autocast_shows_the_merge(lab, patched):
    method = lab.make(SLAO, dtype=torch.float32, patched=patched, schedule=0.0)
    lab.task(method, 0)
    lab.task(method, 1, steps=12)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        trained = method.model(lab.IDS).logits
        with method.merged():
            merged = method.model(lab.IDS).logits
        assert torch.equal(method.model(lab.IDS).logits, trained)
    # λ = 0 keeps the first task's B, under another A.
    assert error_ratio(merged, trained) > 10 * 2**-9


def test_the_old_states_have_no_dropout_and_every_module_its_mode_back(lab):
    method = moved(lab, lora={"lora_dropout": 0.5})
    method.model.train()
    layers = [pair.layer for pair in method.pairs]
    layers[0].eval()
    modes = {name: module.training for name, module in method.model.named_modules()}
    forward(method, lab.IDS, None)
    seen: list[bool] = []
    handle = layers[1].register_forward_pre_hook(lambda module, args: seen.append(module.training))
    old = method._last
    states = [method._states_before(old) for _ in range(2)]
    handle.remove()
    assert torch.equal(*states)
    assert seen == [False, False]
    assert {name: module.training for name, module in method.model.named_modules()} == modes


def test_a_weight_of_zero_is_seqlora_and_a_large_one_holds_the_answers(lab):
    plain, free, held = lab.make(SeqLoRA), lab.make(LwF, weight=0.0), lab.make(LwF, weight=1e4)
    moved = []
    for method in (plain, free, held):
        lab.task(method, 0)
        before = lab.logits(method)
        lab.task(method, 1, steps=10)
        moved.append(error_ratio(lab.logits(method), before))
    assert torch.equal(lab.logits(plain), lab.logits(free))
    assert moved[2] < 0.5 * moved[0]


def test_only_the_last_pass_with_gradients_of_a_task_counts(lab):
    method = lab.make(LwF)
    lab.task(method, 0)
    forward(method, lab.IDS, None)  # between tasks
    assert method.penalty() is None
    lab.begin(method, 1)
    with torch.no_grad():
        forward(method, lab.IDS, None)
    assert method.penalty() is None
    forward(method, lab.IDS, None)
    assert float(method.penalty()) == 0.0  # nothing has moved yet
    assert method.penalty() is None  # it was asked for once


def test_a_row_of_zeros_does_not_divide(lab):
    """Of a model that is none of transformers', whose output can be zero."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    method = LwF(get_peft_model(layers, LoraConfig(r=2, target_modules=["0"])))
    x = torch.randn(64, 4)
    assert bool((layers(x) == 0).all(1).any())
    for index in range(2):
        method.begin_task(str(index))
        optimizer = torch.optim.SGD([p for p in method.model.parameters() if p.requires_grad], 0.05)
        for _ in range(12):
            loss = method.model(x).square().mean()
            penalty = method.penalty()
            (loss if penalty is None else loss + penalty).backward()
            optimizer.step()
            optimizer.zero_grad()
        if index:
            assert 0 < float(penalty.detach()) < 1
        method.end_task()


def test_the_body_is_the_one_with_the_layers(lab):
    pair = nn.ModuleDict({"first": tiny_model("llama"), "second": tiny_model("llama")})
    model = get_peft_model(pair, LoraConfig(r=2, target_modules=r"second\..*q_proj"))
    assert body(LwF(model)) is model.base_model.model["second"].model
    both = get_peft_model(
        nn.ModuleDict({"first": tiny_model("llama"), "second": tiny_model("llama")}),
        LoraConfig(r=2, target_modules=["q_proj"]),
    )
    assert body(LwF(both)) is both


def test_the_hook_goes_with_the_method_and_is_nothing_in_a_copy(lab):
    method = moved(lab)
    model, own = method.model, body(method)
    copied = copy.deepcopy(model)
    forward(method, lab.IDS, None)
    copied(lab.IDS, labels=lab.IDS)
    found = method.penalty()
    assert torch.autograd.grad(found, list(method.pairs[0].parameters))[1].any()
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(lab.IDS).logits, model(lab.IDS).logits)
    assert len(own._forward_hooks) == 1
    gone = weakref.ref(method)
    del method, found
    gc.collect()
    assert gone() is None
    assert len(own._forward_hooks) == 0
    model(lab.IDS, labels=lab.IDS).loss.backward()


def test_a_task_whose_loss_lacks_the_penalty_is_said(lab, caplog):
    method = lab.make(LwF)
    lab.task(method, 0)
    assert "no step of task" not in caplog.text
    lab.task(method, 1)
    assert "no step of task" not in caplog.text
    lab.begin(method, 2)
    forward(method, lab.IDS, None).backward()
    lab.end(method, 2)
    assert "lwf: no step of task '2' had a penalty with a gradient, so nothing was held" in caplog.text
    assert method._last is None
    assert method._state() == {}


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_it_trains_under_the_trainer(tiny, kind):
    """Sequential LoRA and LwF part at the second task, and only there, also where the head sees labelled rows alone."""
    adapters = []
    for method in (SeqLoRA, LwF):
        job = tiny.Job(kind, method, tiny.stream(tasks=2))
        result = job.train(tiny.sgd())
        adapters.append([pair.B.clone() for pair in job.method.pairs])
        assert result.finished
    trained = [(a, b) for a, b in zip(*adapters, strict=True) if a.any()]  # the pooler's is not
    assert len(trained) >= 4
    assert not any(torch.equal(a, b) for a, b in trained)


class Recurrent(nn.Module):
    """Returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.linear(x), x


def test_a_model_that_returns_no_tensor_is_refused_in_its_first_step():
    method = LwF(get_peft_model(Recurrent(), LoraConfig(r=2, target_modules=["linear"])))
    method.model(torch.ones(2, 4))
    method.begin_task("a")
    with pytest.raises(ValueError, match="and got a tuple: set return_dict=True, or let the model return one tensor"):
        method.model(torch.ones(2, 4))


def test_refusals(lab):
    with pytest.raises(ValueError, match="weight must be a finite number of at least 0, not -1.0"):
        lab.make(LwF, weight=-1.0)
    method = lab.make(LwF)
    with pytest.raises(ValueError, match="the saved adapter of before does not fit .*q_proj"):
        method._load_state({"x": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"lwf holds what the model says .* and .*norm.* trains there too"):
        lab.make(LwF, lora={"modules_to_save": ["norm"]})
    assert lab.make(LwF, lora={"modules_to_save": ["norm"]}, beside="freeze").weight == 1.0
    assert lab.make(LwF, lora={"modules_to_save": ["lm_head"]}).weight == 1.0
    method = moved(lab)
    method.model(lab.IDS, attention_mask=torch.zeros(1, 1, 16, 16, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"cannot tell padding by an attention_mask \(1, 1, 16, 16\) of states"):
        method.penalty()
