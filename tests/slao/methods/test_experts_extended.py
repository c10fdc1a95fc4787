"""Frozen pairs, magnitudes and cores on a mixture's experts: each expert has its own, as a layer of its own would."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from method_experts import IDS, base, by_expert, model_of, task, train
from peft import PeftModel
from peft.tuners import lora
from torch import Tensor, nn

import slao_kernels
from slao.methods import METHODS
from slao_kernels import extension
from slao_kernels.adapters import LoraPair

EXTENDED = ["inclora", "olora", "sdlora", "clora"]
KINDS = ["mixtral", "gpt_oss"]  # which stores its experts transposed, with biases


def trained(name: str, kind: str, tasks: int = 3, patched: bool = True) -> Any:
    """A method in its last task, with something of its own in everything that trains."""
    model = model_of(kind)
    if not patched:
        slao_kernels.unpatch(model)
    method = METHODS[name](model)
    for index in range(tasks - 1):
        task(method, index)
        stir(method, index)
    method.begin_task("last")
    train(method, tasks)
    stir(method, tasks)
    return method


def stir(method: Any, index: int) -> None:
    """Cores and magnitudes as training would leave them."""
    generator = torch.Generator().manual_seed(100 + index)
    for pair in method.pairs:
        for name in ("slao_core", "slao_core_delta", "slao_frozen_scale"):
            value = getattr(pair.layer, name, None)
            if value is not None:
                with torch.no_grad():
                    value.add_(torch.randn(value.shape, generator=generator, dtype=value.dtype) * 0.3)


def loss_and_grads(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def dense(kind: str, folder: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and dL/dW of every weight of the plain model into which the exported adapter is merged: nothing of ours."""
    model = PeftModel.from_pretrained(base(kind), folder).double().merge_and_unload()
    model.requires_grad_(True)
    return loss_and_grads(model)


def gradients_of(pair: LoraPair, grads: dict[str, Tensor]) -> list[Tensor]:
    """dL/dW (N, K) of the layer, or of each of its experts."""
    layer: Any = pair.layer
    name = pair.name.removeprefix("base_model.model.")
    if pair.experts == 1:
        return [grads[f"{name}.weight"]]
    # PEFT nests a wrapper a parameter; what they wrap is where the outermost is.
    found = grads[f"{name.partition('.experts')[0]}.experts.{layer.parameter_name}"]
    return list(found if layer._did_swap_in_out_features else found.mT)


@pytest.mark.parametrize("patched", [True, False], ids=["patched", "plain"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", EXTENDED)
def test_forward_and_every_gradient_are_those_of_the_dense_weights(name, kind, patched, tmp_path):
    """In fp64, each expert's by the chain rule from the gradient of its own W_eff."""
    method = trained(name, kind, patched=patched)
    loss, _ = loss_and_grads(method.model)
    assert not patched or all(pair.layer.slao_options.fallbacks == {} for pair in method.pairs)
    live = {pair.name: [p.grad for p in pair.parameters] for pair in method.pairs}
    extra = {
        pair.name: [getattr(getattr(pair.layer, key), "grad", None) for key in ("slao_core_delta", "slao_frozen_scale")]
        for pair in method.pairs
    }
    method.end_task()
    method.save_pretrained(tmp_path)
    expected, grads = dense(kind, tmp_path)
    assert abs(loss - expected) <= 1e-12
    # end_task adds the change of a core to the core, and leaves everything else as it was
    again = trained(name, kind, patched=patched)
    for pair in again.pairs:
        layer: Any = pair.layer
        dA, dB = (by for by in zip(*by_expert(pair, *live[pair.name]), strict=True))
        for index, (dW, (A, B)) in enumerate(
            zip(gradients_of(pair, grads), by_expert(pair, pair.A, pair.B), strict=True)
        ):
            dW = dW * pair.scaling
            d_delta, d_scale = extra[pair.name]
            if name == "clora":
                delta = layer.slao_core_delta.detach().view(-1, pair.rank, pair.rank)[index]
                assert close(dA[index], (B @ delta).T @ dW)
                assert close(dB[index], dW @ (delta @ A).T)
                assert close(d_delta.view(-1, pair.rank, pair.rank)[index], B.T @ dW @ A.T)
                continue
            assert close(dA[index], B.T @ dW)
            assert close(dB[index], dW @ A.T)
            if name == "sdlora":
                frozen = by_expert(pair, layer.slao_frozen_A, layer.slao_frozen_B)[index]
                for k, one in enumerate(d_scale.view(-1, pair.experts)[:, index]):
                    rows = slice(k * pair.rank, (k + 1) * pair.rank)
                    assert close(one, (dW * (frozen[1][:, rows] @ frozen[0][rows])).sum())


def close(found: Tensor, expected: Tensor) -> bool:
    """Two ways to sum in fp64, through a model forward and back; zero is zero."""
    return bool((found - expected).norm() <= 1e-12 * expected.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_the_sum_of_all_pairs_of_each_expert(kind):
    method = METHODS["inclora"](model_of(kind))
    sums: list[list[Tensor]] = []
    for index in range(3):
        task(method, index)
        now = [[B @ A for A, B in by_expert(pair, pair.A, pair.B)] for pair in method.pairs]
        sums = now if not sums else [[a + b for a, b in zip(*two, strict=True)] for two in zip(sums, now, strict=True)]
    for pair, (A, B), expected in zip(method.pairs, method._exported_weights(), sums, strict=True):
        for (own_A, own_B), right in zip(by_expert(pair, A, B), expected, strict=True):
            assert own_A.shape[0] == 9
            assert close(own_B @ own_A, right)


@pytest.mark.parametrize("name", ["inclora", "sdlora", "clora"])
def test_a_task_begins_where_the_last_one_ended(name):
    method = METHODS[name](model_of())
    for index in range(2):
        task(method, index)
    with torch.no_grad():
        before = method.model(input_ids=IDS).logits
        method.begin_task("third")
        assert (method.model(input_ids=IDS).logits - before).abs().max() <= 1e-12


def test_sdloras_directions_have_length_one_in_every_expert():
    method = METHODS["sdlora"](model_of())
    for index in range(2):
        task(method, index)
    norms = [[(B @ A).norm() for A, B in by_expert(pair, pair.A, pair.B)] for pair in method.pairs]
    method.begin_task("third")
    for pair, expected in zip(method.pairs, norms, strict=True):
        layer: Any = pair.layer
        for A, B in by_expert(pair, layer.slao_frozen_A, layer.slao_frozen_B):
            for k in range(2):
                rows = slice(3 * k, 3 * k + 3)
                assert float((B[:, rows] @ A[rows]).norm()) == pytest.approx(1.0, abs=1e-12)
        assert close(layer.slao_frozen_scale.detach()[-pair.experts :], torch.stack(expected))


def test_oloras_penalty_is_each_experts():
    method = METHODS["olora"](model_of(), l2_weight=0.25)
    for index in range(2):
        task(method, index)
    method.begin_task("third")
    train(method, 3)
    expected = 0.0
    for pair in method.pairs:
        layer: Any = pair.layer
        old = by_expert(pair, layer.slao_frozen_A, layer.slao_frozen_B)
        for (A_old, _), (A, B) in zip(old, by_expert(pair, pair.A, pair.B), strict=True):
            expected += 0.5 * float((A_old @ A.T).abs().sum()) + 0.25 * float(A.norm() + B.norm())
    assert float(method.penalty()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("orthogonality", ["core", "up"])
def test_cloras_penalty_is_each_experts(orthogonality):
    method = METHODS["clora"](model_of(), orthogonality=orthogonality, orthogonality_weight=1.0, delta_std=0.1)
    task(method, 0)
    stir(method, 0)
    method.begin_task("second")
    expected = 0.0
    for pair in method.pairs:
        layer: Any = pair.layer
        cores, deltas = (core.detach().view(-1, 3, 3) for core in (layer.slao_core, layer.slao_core_delta))
        for (_, B), core, delta in zip(by_expert(pair, pair.A, pair.B), cores, deltas, strict=True):
            assert delta.any()
            expected += float(((core.T if orthogonality == "core" else B) @ delta).square().sum())
    assert float(method.penalty()) == pytest.approx(expected, rel=1e-6)  # summed in fp32


def test_opcm_projects_each_expert_and_rescales_them_all():
    """Dense, from the paper's formula: the diagonal and the block of the largest singular values go."""
    method = METHODS["opcm"](model_of())
    merged: list[Tensor] = []
    norms = []
    for index in range(3):
        task(method, index)
        tau = [pair.scaling * B @ A for pair in method.pairs for A, B in by_expert(pair, pair.A, pair.B)]
        norms.append(total(tau))
        if not merged:
            merged, factor = tau, 1.0
            continue
        sums = []
        for old, new in zip(merged, tau, strict=True):
            U, S, Vh = torch.linalg.svd(old, full_matrices=False)
            count = int((1e-6 * S[0] < S).sum())
            top = int((S[:count].cumsum(0) <= 0.5 * S[:count].sum()).sum())
            C = U.T @ new @ Vh.T
            gone = torch.diag(torch.where(torch.arange(len(S)) < count, C.diagonal(), 0.0))
            gone[:top, :top] = C[:top, :top]
            sums.append(factor * old + new - U @ gone @ Vh)
        factor = total(sums) / (sum(norms) / len(norms))
        merged = [one / factor for one in sums]
        assert method.lambdas[-1] == pytest.approx(1 / factor, rel=1e-9)
    found = [
        pair.scaling * B @ A
        for pair, weights in zip(method.pairs, method._merged_weights(), strict=True)
        for A, B in by_expert(pair, *weights)
    ]
    assert [one.shape for one in found] == [one.shape for one in merged]
    assert all(close(one, right) for one, right in zip(found, merged, strict=True))


def total(matrices: list[Tensor]) -> float:
    return float(torch.stack([one.square().sum() for one in matrices]).sum().sqrt())


@pytest.mark.parametrize("name", ["inclora", "clora"])
def test_merged_into_the_base_and_out_again(name):
    """By PEFT's merge_adapter, to the last bit, and by `merged(fold=True)`."""
    method = trained(name, "gpt_oss")
    method.end_task()
    before = {key: p.detach().clone() for key, p in method.model.named_parameters()}
    with torch.no_grad():
        expected = method.model(input_ids=IDS).logits
        method.model.merge_adapter()
        assert (method.model(input_ids=IDS).logits - expected).abs().max() <= 1e-12
        method.model.unmerge_adapter()
        assert (method.model(input_ids=IDS).logits - expected).abs().max() == 0
        with method.merged(fold=True):
            assert (method.model(input_ids=IDS).logits - expected).abs().max() <= 1e-12
    assert all(torch.equal(p, before[key]) for key, p in method.model.named_parameters())


def test_unpatched_copied_and_let_go():
    method = trained("inclora", "mixtral")
    with torch.no_grad():
        expected = method.model(input_ids=IDS).logits
        for again in (copy.deepcopy(method.model), pickle.loads(pickle.dumps(method.model))):
            assert torch.equal(again(input_ids=IDS).logits, expected)
        assert slao_kernels.unpatch(method.model) == 3
        assert (method.model(input_ids=IDS).logits - expected).abs().max() <= 1e-12
    for pair in method.pairs:
        extension.retract(pair.layer)
        assert type(pair.layer) in (lora.Linear, lora.ParamWrapper)
        assert not [name for name in vars(pair.layer) if name.startswith("slao_")]


def test_a_second_adapter_beside_it_is_refused():
    method = trained("inclora", "mixtral")
    method.model.add_adapter("second", method.model.peft_config["default"])
    for layer in (pair.layer for pair in method.pairs):
        layer.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="cannot be active beside"):
        method.model(input_ids=IDS)
