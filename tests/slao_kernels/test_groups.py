"""Groups on whole models and on a small block: they are found and used, and the numbers stay those of single layers.

Everything that can go wrong between a leader's call and its siblings': test_groups_broken.py.
"""

from __future__ import annotations

import copy
import gc
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import slao_kernels
from slao_kernels import groups

pytestmark = pytest.mark.usefixtures("one_thread", "small_groups")

# kind -> sizes of the groups of target_modules="all-linear", in the order of the forward. T5: the encoder's and the
# decoder's q/k/v, and k/v of the cross-attention; GPT-2 projects q, k and v at once.
SIZES = {"llama": [3, 2, 3, 2], "qwen3": [3, 2, 3, 2], "bert": [3, 3], "t5": [3, 3, 3, 2, 3, 2], "gpt2": []}
LAYERS = {"llama": 14, "qwen3": 14, "gpt2": 8, "bert": 13, "t5": 32}


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


@pytest.mark.parametrize("kind", SIZES)
def test_steps_are_those_of_single_layers(kind, twins):
    """Four optimizer steps: every gradient PEFT's; single layers in the first, groups from the second on."""
    model, twin = twins.peft_model(kind), twins.peft_model(kind)
    slao_kernels.patch(model)
    ours, theirs = optimizer(model), optimizer(twin)
    for i in range(4):
        with twins.CountOps() as ops:
            found = twins.step(model)
        assert ops.grouped == (SIZES[kind] if i else [])
        assert ops.forward == LAYERS[kind]
        assert ops.counts.get("lora_linear_group_backward", 0) == len(ops.grouped)
        # Weights that differ by the steps' rounding.
        twins.check_close(found, twins.step(twin), twins.FP32_RATIO * (1 + i))
        ours.step()
        theirs.step()
    assert [len(names) for names in groups.describe(model)] == SIZES[kind]


def test_describe(twins):
    model = twins.base_model("llama")
    slao_kernels.patch(model, twins.config(target_modules=["q_proj", "v_proj", "o_proj"]))
    assert groups.describe(model) == []
    for _ in range(2):
        twins.step(model)
    assert groups.describe(model) == [
        [f"model.layers.{i}.self_attn.{name}" for name in ("q_proj", "v_proj")] for i in range(2)
    ]


@pytest.mark.parametrize("options", [{"group": False}, {"precision": "adapter"}, {"backend": "reference"}], ids=str)
def test_opt_out(options, twins):
    model = twins.peft_model("llama")
    slao_kernels.patch(model, **options)
    for _ in range(3):
        with twins.CountOps() as ops:
            twins.step(model)
        assert ops.grouped == []


def test_unlike_layers(twins):
    """Ranks and scalings of their own, one layer frozen, one base trained."""
    patterns = {"rank_pattern": {"q_proj": 1, "k_proj": 7}, "alpha_pattern": {"v_proj": 11}}
    model, twin = (twins.peft_model("llama", **patterns) for _ in range(2))
    for net in (model, twin):
        for name, parameter in net.named_parameters():
            if "k_proj" in name:
                parameter.requires_grad_(False)
            if "q_proj.base" in name or "v_proj.lora_A" in name:
                parameter.requires_grad_("q_proj" in name)
    slao_kernels.patch(model)
    twins.step(model)
    with twins.CountOps() as ops:
        found = twins.step(model)
    assert ops.grouped == SIZES["llama"]
    twins.check_close(found, twins.step(twin))


@pytest.mark.parametrize("autocast", [False, True])
def test_without_gradients(autocast, twins):
    """Evaluation learns and uses groups too; generation goes on with them."""
    model, twin = twins.peft_model("llama"), twins.peft_model("llama")
    slao_kernels.patch(model)
    ids = twins.token_ids()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(ids)
        with twins.CountOps() as ops:
            found = model(ids).logits
        assert ops.grouped == SIZES["llama"]
        twins.check_close({"y": found}, {"y": twin(ids).logits}, 2e-2 if autocast else twins.FP32_RATIO)
    assert torch.equal(
        model.generate(ids, max_new_tokens=4, do_sample=False), twin.generate(ids, max_new_tokens=4, do_sample=False)
    )
    with twins.CountOps() as ops:
        twins.check_close(twins.step(model), twins.step(twin))
    assert ops.grouped == SIZES["llama"]


def test_inference_mode_runs_alone(twins):
    """Inference tensors have no version that would tell whether x has changed."""
    model = twins.peft_model("llama")
    slao_kernels.patch(model)
    twins.step(model)
    with torch.inference_mode(), twins.CountOps() as ops:
        model(twins.token_ids())
    assert ops.counts == {"lora_linear": 14}
    with twins.CountOps() as ops:
        twins.step(model)
    assert ops.grouped == SIZES["llama"]


def enable_checkpointing(model: nn.Module, reentrant: bool) -> None:
    model.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})


@pytest.mark.parametrize("stepping", [True, False])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "bert", "t5"])
def test_checkpointing(kind, reentrant, stepping, twins):
    """Learned in one forward, used from a later one on, never between a forward and its recompute."""
    model, twin = twins.peft_model(kind), twins.peft_model(kind)
    slao_kernels.patch(model)
    optimizers = []
    for net in (model, twin):
        enable_checkpointing(net, reentrant)
        optimizers.append(optimizer(net))
    for i in range(3):
        with twins.CountOps() as ops:
            found = twins.step(model)
        twins.check_close(found, twins.step(twin), twins.FP32_RATIO * (1 + i))
        # Forward, and once more in the backward.
        assert len(ops.grouped) == (2 * len(SIZES[kind]) if i else 0)
        for each in optimizers if stepping else ():
            each.step()


@pytest.mark.parametrize("freed", [False, True])
def test_a_graph_that_can_be_recomputed_keeps_groups_off(freed, twins):
    """Two forwards before the backward of the first, learned in the first of them; its loss kept or dropped."""
    model, twin = twins.peft_model("llama"), twins.peft_model("llama")
    slao_kernels.patch(model)
    ids, losses = twins.token_ids(), {}
    for net in (model, twin):
        enable_checkpointing(net, False)
        losses[net] = net(input_ids=ids, labels=ids).loss
    if freed:
        del losses[model]
        gc.collect()
    with twins.CountOps() as ops:
        second = model(input_ids=ids, labels=ids).loss
        assert ops.grouped == (SIZES["llama"] if freed else [])
        second.backward()
        if not freed:
            losses[model].backward()
            assert ops.grouped == []
    # The old graphs live on (`second`, `losses`): an optimizer's step switches.
    optimizer(model).step()
    with twins.CountOps() as ops:
        model(input_ids=ids, labels=ids).loss.backward()
    assert len(ops.grouped) == 2 * len(SIZES["llama"])


@pytest.mark.parametrize("worth", [16 * 11 * 32, 16 * 11 * 32 + 1])
def test_a_small_x_on_a_cpu_is_left_to_each_layer(worth, twins, monkeypatch):
    """Training, with non-reentrant checkpointing: the recompute decides the same."""
    model, twin = twins.peft_model("llama"), twins.peft_model("llama")
    slao_kernels.patch(model)
    ids = torch.randint(1, 128, (16, 11))
    for net in (model, twin):
        enable_checkpointing(net, False)
        with torch.no_grad():
            net(input_ids=ids)
    monkeypatch.setattr(groups, "_WORTH", worth)
    losses = [net(input_ids=ids, labels=ids).loss for net in (model, twin)]
    with twins.CountOps() as ops:
        again = model(input_ids=ids, labels=ids).loss
        again.backward()
    assert len(ops.grouped) == (2 * len(SIZES["llama"]) if worth == 16 * 11 * 32 else 0)
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(again, losses[1])


class Block(nn.Module):
    """q, k and v of one x. `between` happens after q's call."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.between = lambda x: x

    def forward(self, x):
        q = self.q(x)
        z = self.between(x)
        return self.o(torch.tanh(q * self.k(z) + self.v(z)))


def test_block_ended_within_a_checkpointed_forward(twins):
    """The sibling that does not come is missed in the forward; its recompute still does what the forward did."""
    import peft

    torch.manual_seed(0)
    twin = peft.inject_adapter_in_model(twins.config(target_modules=["q", "k", "v", "o"]), Block()).train()
    twins.train_a_little(twin)
    model = copy.deepcopy(twin)
    slao_kernels.patch(model)

    class Checkpointed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    nets = [Checkpointed(model), Checkpointed(twin)]
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        twins.check_close(*(twins.net_step(net, x) for net in nets))
    assert [len(names) for names in groups.describe(model)] == [3]
    model.between = twin.between = lambda x: x * 2
    with twins.CountOps() as ops:
        twins.check_close(*(twins.net_step(net, x) for net in nets))
    assert ops.grouped == [3, 3]
    with twins.CountOps() as ops:
        twins.check_close(*(twins.net_step(net, x) for net in nets))
    assert ops.grouped == []
    assert groups.describe(model) == []


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model)), "copy": copy.copy}


@pytest.mark.parametrize("how", COPIES)
def test_copies_learn_for_themselves(how, twins):
    model, twin = twins.peft_model("llama"), twins.peft_model("llama")
    slao_kernels.patch(model)
    expected = twins.step(twin)
    for _ in range(2):
        twins.step(model)
    copied = COPIES[how](model)
    if how != "copy":
        assert groups.describe(copied) == []
    for _ in range(2):
        for net in (copied, model):
            twins.check_close(twins.step(net), expected)
    for net in (copied, model):
        with twins.CountOps() as ops:
            twins.step(net)
        assert ops.grouped == SIZES["llama"]
    assert list(copied.state_dict()) == list(twin.state_dict())


def test_unpatch_and_patch_again(twins):
    model, twin = twins.peft_model("llama"), twins.peft_model("llama")
    for _ in range(2):
        slao_kernels.patch(model)
        for grouped in ([], SIZES["llama"]):
            with twins.CountOps() as ops:
                twins.check_close(twins.step(model), twins.step(twin))
            assert ops.grouped == grouped
        assert slao_kernels.unpatch(model) == 14
        with twins.CountOps() as ops:
            twins.step(model)
        assert ops.counts == {}


def test_learning_keeps_nothing_alive(twins):
    """Neither the watched run nor the groups own the model."""
    import weakref

    model = twins.peft_model("llama")
    slao_kernels.patch(model)
    for _ in range(2):
        twins.step(model)
    ref = weakref.ref(model)
    del model
    gc.collect()
    assert ref() is None


def test_threads(twins):
    """Two threads on one model, which learns meanwhile: each its own input's logits."""
    model = twins.peft_model("llama")
    inputs = [twins.token_ids(2, 7), twins.token_ids(3, 5)]
    with torch.no_grad():
        alone = [model(ids).logits for ids in inputs]
    slao_kernels.patch(model)
    failed: list[str] = []

    def work(i: int) -> None:
        torch.set_num_threads(1)
        for _ in range(10):
            with torch.set_grad_enabled(bool(i)):
                logits = model(inputs[i]).logits
            if not torch.allclose(logits, alone[i], rtol=1e-4, atol=1e-5):
                failed.append(f"thread {i}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
