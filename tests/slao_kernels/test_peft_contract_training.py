"""Training whole patched models: autocast, checkpointing, threads. Single layers of all kinds: test_layers.py."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

import slao_kernels
from slao_kernels.testing import error_ratio

pytestmark = pytest.mark.usefixtures("one_thread")

BF16_RATIO = 1.5  # our error over PEFT's, both against fp64; see test_patching.py


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
def test_whole_model_under_autocast(base, kind, twins):
    model, twin = (twins.peft_model(kind, base) for _ in range(2))
    layers = len(slao_kernels.patch(model).patched)
    wide = twins.step(twins.peft_model(kind, base).double())
    with torch.autocast("cpu", torch.bfloat16), twins.CountOps() as ops:
        found = twins.step(model)
        theirs = twins.step(twin)
    assert ops.forward == layers
    assert {n: v.dtype for n, v in found.items()} == {n: v.dtype for n, v in theirs.items()}
    assert error_ratio(found["logits"], wide["logits"]) <= BF16_RATIO * error_ratio(theirs["logits"], wide["logits"])

    def mean_error(of: dict[str, Tensor]) -> float:
        return sum(error_ratio(of[n], v) ** 2 for n, v in wide.items() if n != "logits") ** 0.5

    assert mean_error(found) <= BF16_RATIO * mean_error(theirs)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, twins):
    model, twin = (twins.peft_model("llama") for _ in range(2))
    layers = len(slao_kernels.patch(model).patched)
    for net in (model, twin):
        net.train()
        net.enable_input_require_grads()
        net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    with twins.CountOps() as ops:
        found = twins.step(model)
    assert ops.counts["lora_linear"] > layers  # forward, and again in the backward pass
    assert ops.counts["lora_linear_backward"] == layers
    twins.check_close(found, twins.step(twin))


def test_threads(twins):
    """Two threads at once on one patched model: each its own input's gradients, bitwise as alone."""
    model = twins.net(lambda: nn.Linear(64, 64))
    slao_kernels.patch(model)
    inputs = [torch.randn(50, 64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    parameters = [p for p in model.proj.parameters() if p.requires_grad]

    def gradients(x: Tensor, autocast: bool) -> list[Tensor]:
        x = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return list(torch.autograd.grad(model(x).float().square().sum(), [x, *parameters]))

    alone = [gradients(inputs[i], bool(i)) for i in range(2)]
    failed: list[str] = []

    def work(i: int) -> None:
        torch.set_num_threads(1)  # MKL keeps the number by thread; another one may sum in another order
        for _ in range(20):
            found = gradients(inputs[i], bool(i))
            if not all(torch.equal(a, b) for a, b in zip(found, alone[i], strict=True)):
                failed.append(f"thread {i}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
