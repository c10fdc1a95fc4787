"""C-LoRA over tasks: its start, its gradients against the fp64 formula, penalty, export, state."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from slao import CLoRA, SeqLoRA
from slao_kernels import extension
from slao_kernels.testing import error_ratio, tiny_model


def test_a_task_starts_where_the_last_one_ended_and_its_delta_alone_gets_the_first_gradient(lab):
    method = lab.make(CLoRA, orthogonality_weight=0.0)
    before = lab.logits(method)
    for name in ("a", "b"):
        method.begin_task(name)
        assert torch.equal(lab.logits(method), before)
        method.model(lab.IDS, labels=lab.IDS).loss.backward()
        for pair, layer in zip(method.pairs, method.layers, strict=True):
            assert not pair.parameters[0].grad.any()
            assert not pair.parameters[1].grad.any()
            assert layer.slao_core_delta.grad.abs().max() > 0
        method.model.zero_grad()
        lab.train(method)
        trained = lab.logits(method)
        assert error_ratio(trained, before) > 1e-4
        method.end_task()
        assert error_ratio(lab.logits(method), trained) <= 1e-12  # R_old + R_δ is the same sum, added before
        assert all(not layer.slao_core_delta.any() for layer in method.layers)
        before = lab.logits(method)
    assert method.lambdas == [1.0, 1.0]


@pytest.mark.parametrize("patched", [True, False])
def test_gradients_in_the_model_are_autograds_of_the_stop_gradient_formula(lab, patched):
    """Both ways through the whole model, in fp64: agreement to 1e-10 leaves room for the order of sums only."""
    method = lab.make(CLoRA, patched=patched, delta_std=0.1)
    method.begin_task("a")
    for layer in method.layers:
        layer.slao_core.normal_(generator=torch.Generator().manual_seed(5))
    wanted = [p for p in method.model.parameters() if p.requires_grad]
    got = torch.autograd.grad(method.model(lab.IDS, labels=lab.IDS).loss, wanted)

    def formula(layer):
        def forward(x):
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            core, delta = layer.slao_core, layer.slao_core_delta
            y = x @ A.detach().T @ (core + delta).T @ B.detach().T
            new = x.detach() @ A.T @ delta.detach().T @ B.T
            return layer.base_layer(x) + layer.scaling["default"] * (y + new - new.detach())

        return forward

    for layer in method.layers:
        layer.forward = formula(layer)
    want = torch.autograd.grad(method.model(lab.IDS, labels=lab.IDS).loss, wanted)
    assert len(got) == 3 * len(method.pairs)
    for mine, theirs in zip(got, want, strict=True):
        assert error_ratio(mine, theirs) <= 1e-10


def test_b_std_is_that_of_its_start(lab):
    """Without it B is as wide as PEFT draws A; with the one that the docstring names, to first order a step of Adam
    (lr · Σ|gradient|) gains what it does in ordinary LoRA."""
    for std in (0.25, 3.0):
        method = lab.make(CLoRA, b_std=std)
        method.begin_task("a")
        assert all(float(pair.B.std()) == pytest.approx(std, rel=0.15) for pair in method.pairs)
    model = tiny_model("llama", hidden_size=512, num_key_value_heads=4)
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).double()
    ids = torch.arange(32).view(2, 16)
    model(ids, labels=ids).loss.backward()
    ordinary = [pair.parameters[1].grad.abs().sum() for pair in SeqLoRA(model).pairs]
    for std, low, high in ((512**0.5 / 4, 0.5, 2.0), (None, 0.02, 0.1)):
        model.zero_grad()
        method = CLoRA(model, b_std=std)
        for pair in method.pairs:
            torch.nn.init.zeros_(pair.parameters[1])
        method.begin_task("a")
        model(ids, labels=ids).loss.backward()
        for pair, layer, wanted in zip(method.pairs, method.layers, ordinary, strict=True):
            expected = std or 12**-0.5
            assert float(pair.B.std()) == pytest.approx(expected, rel=0.05)  # 2048 draws
            assert float(pair.B.abs().max()) <= expected * 3**0.5
            assert low <= float(layer.slao_core_delta.grad.abs().sum() / wanted) <= high
            extension.retract(pair.layer)


def test_penalties_are_their_formulas(lab):
    for orthogonality in ("core", "up"):
        method = lab.make(CLoRA, orthogonality=orthogonality, orthogonality_weight=0.3, delta_std=0.1)
        method.begin_task("a")
        lab.train(method)
        method.end_task()
        method.begin_task("b")
        penalty = method.penalty()
        deltas = [layer.slao_core_delta for layer in method.layers]
        expected = 0.0
        for pair, layer in zip(method.pairs, method.layers, strict=True):
            left = layer.slao_core.T if orthogonality == "core" else pair.B
            expected = expected + 0.3 * (left @ layer.slao_core_delta).square().sum()
        got, want = (torch.autograd.grad(value, deltas) for value in (penalty, expected))
        assert float(penalty) == pytest.approx(float(expected), rel=1e-6)  # summed in fp32
        assert max(error_ratio(a, b) for a, b in zip(got, want, strict=True)) <= 1e-6
    assert lab.make(CLoRA, orthogonality_weight=0.0).penalty() is None


def test_export_is_a_plain_adapter_that_equals_the_module(lab, tmp_path):
    method = lab.make(CLoRA, torch.float32)
    for name in ("a", "b"):
        method.begin_task(name)
        lab.train(method)
        method.end_task()
    expected = lab.logits(method)
    method.save_pretrained(tmp_path)
    assert torch.equal(lab.logits(method), expected)  # nothing of it stayed in the model
    plain = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path))
    with torch.no_grad():
        # B R is rounded once to fp32; logits of a few units then move by some 1e-7.
        assert error_ratio(plain(lab.IDS).logits, expected) <= 2e-6
        with plain.disable_adapter():
            assert error_ratio(plain(lab.IDS).logits, expected) > 1e-3


def test_a_loaded_state_goes_on_bit_identically(lab, tmp_path):
    method = lab.make(CLoRA, torch.float32, delta_std=0.01)
    method.begin_task("a")
    lab.train(method)
    method.end_task()
    method.begin_task("b")
    lab.train(method)
    method.save(tmp_path)
    other = lab.make(CLoRA, torch.float32, delta_std=0.01)
    other.load(tmp_path)
    for each in (method, other):
        lab.train(each)
        each.end_task()
        each.begin_task("c")
        lab.train(each)
        each.end_task()
    assert torch.equal(lab.logits(method), lab.logits(other))
    with pytest.raises(ValueError, match="was saved with options"):
        lab.make(CLoRA, torch.float32).load(tmp_path)


def test_nothing_grows_with_the_number_of_tasks(lab):
    method = lab.make(CLoRA, torch.float32)

    def held() -> int:
        return sum(t.numel() for t in [*method.model.parameters(), *method.model.buffers()])

    sizes = []
    for index in range(50):
        method.begin_task(str(index))
        lab.train(method, steps=1)
        method.end_task()
        sizes.append(held() + sum(t.numel() for t in method._state().values()))
    assert sizes[1] == sizes[-1]


def test_refusals(lab):
    method = lab.make(CLoRA)
    with pytest.raises(ValueError, match="another method has extended it already"):
        CLoRA(method.model)
    for options, message in (
        ({"orthogonality": "down"}, "unknown orthogonality 'down'; choose one of core, up"),
        ({"delta_std": -1.0}, "delta_std must be a finite number of at least 0, not -1.0"),
        ({"b_std": 0.0}, "b_std must be a finite number above 0, or None, not 0.0"),
        ({"orthogonality_weight": float("nan")}, "orthogonality_weight must be"),
    ):
        with pytest.raises(ValueError, match=message):
            lab.make(CLoRA, **options)
    method.begin_task("a")
    with torch.no_grad():
        method.layers[1].slao_core_delta[0, 0] = float("nan")
    with pytest.raises(
        ValueError, match=f"diverged: NaN or infinite adapter weights in 1 layers .{method.pairs[1].name}"
    ):
        method.end_task()
    with pytest.raises(ValueError, match="was saved with method|no saved state"):
        SeqLoRA(lab.make(CLoRA).model).load("/nowhere")
