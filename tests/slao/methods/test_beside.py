"""What trains beside A and B: averaged, kept or frozen from task to task, saved with the state, and in every export."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

import slao_kernels
from slao import SLAO, SeqLoRA, make_method
from slao_kernels.inventory import beside
from slao_kernels.testing import tiny_model

IDS = torch.arange(3, 19)[None]
HEAD = "classifier.weight"


def classifier() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return BertForSequenceClassification(BertConfig(vocab_size=64, num_labels=3, **sizes)).eval()


def config() -> LoraConfig:
    return LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")


def make(**options) -> SLAO:
    model = classifier()
    slao_kernels.patch(model, config())
    return SLAO(model, **options)


def head(method: SLAO) -> torch.Tensor:
    return next(part.tensor for part in beside(method.model) if part.name.endswith("weight"))


def task(method, value: float) -> None:
    """The head becomes `value` where it trains."""
    method.begin_task(str(method.task))
    with torch.no_grad():
        for pair in method.pairs:
            pair.B.add_(0.1 * (method.task + 1))
        if head(method).requires_grad:
            head(method).fill_(value)
    method.end_task()


def shown(method) -> float:
    with method.merged():
        return float(head(method).mean())


def test_keep_merge_and_freeze(tmp_path):
    found = {}
    for how in ("keep", "merge", "freeze"):
        method = make(beside=how, schedule=0.25)
        for value in (1.0, 2.0):
            task(method, value)
        method.begin_task("third")
        trains = head(method).requires_grad
        method.save(tmp_path / how)
        other = make(beside=how, schedule=0.25)
        other.load(tmp_path / how)
        assert (shown(other), float(head(other).mean()), head(other).requires_grad) == (
            shown(method),
            float(head(method).mean()),
            trains,
        )
        found[how] = (shown(method), float(head(method).mean()), trains)
        for each in (method, other):
            each.end_task()
            assert head(each).requires_grad  # every optimizer made between tasks holds the same parameters
    assert found == {"keep": (2.0, 2.0, True), "merge": (1.25, 2.0, True), "freeze": (1.0, 1.0, False)}
    with pytest.raises(ValueError, match=r"was saved with options .*'beside': 'merge'"):
        make(schedule=0.25).load(tmp_path / "merge")


def test_the_merged_head_is_exported(tmp_path):
    method = make(beside="merge", schedule=0.5)
    for value in (1.0, 2.0):
        task(method, value)
    method.save_pretrained(tmp_path)
    with method.merged(), torch.no_grad():
        expected = method.model(input_ids=IDS).logits
    loaded = PeftModel.from_pretrained(classifier(), str(tmp_path)).eval()
    assert float(loaded.base_model.model.classifier.modules_to_save["default"].weight.mean()) == 1.5
    with torch.no_grad():
        assert (loaded(input_ids=IDS).logits - expected).abs().max() <= 1e-6


def test_options_are_checked():
    with pytest.raises(ValueError, match="unknown beside 'sum'; choose one of keep, merge, freeze"):
        make(beside="sum")
    with pytest.raises(ValueError, match="beside='merge' averages with SLAO's λ, and seqlora has none"):
        make_method("seqlora", make().model, beside="merge")


def test_patch_trains_the_head_that_get_peft_model_trains():
    model, theirs = classifier(), get_peft_model(classifier(), config())
    slao_kernels.patch(model, config())
    names = {name for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    assert {f"base_model.model.{name}" for name, p in model.named_parameters() if p.requires_grad} == names
    assert any("classifier" in name for name in names)


def test_a_diverged_head_is_named():
    method = make()
    method.begin_task("a")
    with torch.no_grad():
        head(method)[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"diverged.*classifier\.weight"):
        method.end_task()
    assert method.in_task


def llama(**options) -> SeqLoRA:
    torch.manual_seed(0)
    base = tiny_model("llama", attention_bias=True)
    return SeqLoRA(get_peft_model(base, LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **options})))


def test_a_state_and_a_model_that_train_different_things(tmp_path):
    plain, biased = llama(), llama(bias="lora_only")
    for method in (plain, biased):
        method.begin_task("a")
        method.end_task()
    plain.save(tmp_path / "plain")
    biased.save(tmp_path / "biased")
    with pytest.raises(ValueError, match=r"holds no .*q_proj.base_layer.bias, which the model trains beside A and B"):
        llama(bias="lora_only").load(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"holds .*q_proj.base_layer.bias, which this model does not train"):
        llama().load(tmp_path / "biased")
    llama().load(tmp_path / "plain")


def test_a_state_of_another_scaling_is_refused(tmp_path):
    method = llama(lora_alpha=8)
    method.begin_task("a")
    method.end_task()
    method.save(tmp_path)
    for options, scaling in (({"lora_alpha": 32}, "8"), ({"lora_alpha": 8, "use_rslora": True}, "4")):
        other = llama(**options)
        before = [pair.A.clone() for pair in other.pairs]
        with pytest.raises(ValueError, match=f"was saved with scaling 2 in .*q_proj, the model has {scaling}"):
            other.load(tmp_path)
        assert other.task == 0
        assert all(torch.equal(pair.A, A) for pair, A in zip(other.pairs, before, strict=True))


def test_a_state_without_scalings_loads(tmp_path):
    """As older versions wrote it."""
    from slao import checkpoint
    from slao.methods.base import STATE_FILE

    method = llama()
    method.begin_task("a")
    method.end_task()
    method.save(tmp_path)
    tensors, meta = checkpoint.read_state(tmp_path / STATE_FILE)
    del meta["scalings"]
    checkpoint.write_state(tmp_path / STATE_FILE, tensors, meta)
    llama(lora_alpha=32).load(tmp_path)


def test_a_state_over_a_changed_base_loads_over_no_other(tmp_path):
    for init, message in (
        ("pissa", r"\(pissa\), .* \(None\)"),
        ("pissa_niter_1", r"\(pissa_niter_1, \w+\), .* \(None\)"),
    ):
        method = llama(init_lora_weights=init)
        method.begin_task("a")
        method.end_task()
        method.save(tmp_path)
        llama(init_lora_weights=init).load(tmp_path)
        with pytest.raises(ValueError, match=message):
            llama().load(tmp_path)
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa_niter_1")
    other = SeqLoRA(get_peft_model(tiny_model("llama", attention_bias=True), config))
    with pytest.raises(ValueError, match="those here are not the same"):
        other.load(tmp_path)
