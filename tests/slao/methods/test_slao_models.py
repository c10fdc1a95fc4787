"""SLAO's bad input, call order, and the kinds of model and layer that it takes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import slao_kernels
from slao import SLAO, make_method
from slao_kernels.testing import tiny_model


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(tiny_model("llama"), LoraConfig(r=6, target_modules=["q_proj", "v_proj", "down_proj"]))


def snapshot(method: SLAO) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {pair.name: (pair.A.numpy().copy(), pair.B.numpy().copy()) for pair in method.pairs}


def run_tasks(method: SLAO, count: int) -> list[dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Pretend to train; per task what it was fine-tuned to."""
    recorded = []
    g = torch.Generator().manual_seed(0)
    for i in range(count):
        method.begin_task(f"task {i}")
        for pair in method.pairs:
            for tensor in (pair.A, pair.B):
                tensor.add_(torch.randn(tensor.shape, generator=g) * 0.2)
        recorded.append(snapshot(method))
        method.end_task()
    return recorded


BAD = {
    "init": ({"init": "zeros"}, "unknown init 'zeros'; choose one of last_ft, merged, random"),
    "merge": ({"merge": "BA"}, "unknown merge 'BA'; choose one of B, A, AB"),
    "schedule": ({"schedule": "sqrt"}, "unknown schedule 'sqrt'; choose one of inv_sqrt, inverse"),
    "constant": ({"schedule": 1.5}, r"must lie in \[0, 1\], not 1.5"),
    "preserve": ({"preserve": True, "orthogonal": False}, "it needs orthogonal=True"),
    "adapter": ({"adapter": "other"}, "no LoRA adapter 'other': it has 'default'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_named(model, case):
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        SLAO(model, **options)


def test_rank_above_the_width_is_refused_before_training():
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=40, target_modules=["q_proj", "down_proj"]))
    with pytest.raises(ValueError, match=r"q_proj \(40, 32\).*lower r there"):
        SLAO(model)
    SLAO(model, orthogonal=False)


def test_unknown_names_and_options(model):
    with pytest.raises(ValueError, match="unknown method 'lora2'; choose one of clora, (.+, )?seqlora, slao"):
        make_method("lora2", model)
    with pytest.raises(ValueError, match="method 'slao'.*unexpected keyword argument 'lam'"):
        make_method("slao", model, lam=0.5)


def test_calls_out_of_order(model):
    method = SLAO(model)
    with pytest.raises(ValueError, match="no task is running; call begin_task"):
        method.end_task()
    method.begin_task("a")
    with pytest.raises(ValueError, match="task 'a' is still running; call end_task"):
        method.begin_task("b")
    with method.merged():
        for call in (method.end_task, lambda: method.save("x"), lambda: method.load("x"), method.merged().__enter__):
            with pytest.raises(ValueError, match=r"was called inside merged\(\)"):
                call()
    method.end_task()


@pytest.mark.parametrize("kind", ["gpt2", "bert", "t5"])
def test_other_architectures_and_injected_adapters(kind):
    model = tiny_model(kind)
    slao_kernels.patch(model)
    method = SLAO(model)
    recorded = run_tasks(method, 2)
    with method.merged():
        merged = snapshot(method)
    for name, (A, B) in merged.items():
        first, second = recorded[0][name][1], recorded[1][name][1]
        assert np.abs(B - (first + (second - first) / math.sqrt(2))).max() <= 1e-6
        assert np.array_equal(A, recorded[1][name][0])


def test_embedding_and_convolution_adapters_take_part():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(40, 12)
            self.conv = nn.Conv1d(12, 16, 3)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.conv(self.embed(ids).transpose(1, 2))

    torch.manual_seed(0)
    model = get_peft_model(Net(), LoraConfig(r=4, target_modules=["embed", "conv"]))
    method = SLAO(model)
    assert sorted(tuple(pair.A.shape) for pair in method.pairs) == [(4, 36), (4, 40)]
    ids = torch.randint(0, 40, (2, 9))
    run_tasks(method, 2)
    trained = model(ids)
    with method.merged():
        merged = model(ids)
    assert (merged - trained).abs().max() > 1e-3
    assert torch.equal(model(ids), trained)
    method.begin_task("third")
    for pair in method.pairs:
        A = pair.parameters[0].detach().flatten(1).double()
        assert (A @ A.T - torch.eye(4)).abs().max() <= 1e-6


def test_parts_that_the_method_cannot_treat_are_refused():
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ValueError, match="slao cannot treat 2 layers: .*DoraLinearVariant trains more than A and B"):
        SLAO(model)
