"""Patched layers and lora_linear on a real GPU, by the bodies that a CPU runs too: steps in a graph, streams, threads,
compile, synchronisation, memory. All shapes and dtypes of every op there: ops/test_every_op.py.

The model is an attention-like block; transformers' models wait for the device here and there, which is not what these
tests ask.
"""

from __future__ import annotations

import threading

import peft
import pytest
import torch
import twins
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import slao_kernels
from slao_kernels import extension
from slao_kernels.testing import error_ratio

# Of a bf16 step against PEFT's own bf16 step, which rounds more often: four layers, each rounded to 2^-8.
BF16 = 2e-2


class Block(nn.Module):
    """q, k and v of one x, and o after them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.q(x) * self.k(x) + self.v(x)))


def pair(place, dtype: torch.dtype = torch.float32, precision: str = "base", **options) -> tuple[Block, Block]:
    """(patched, PEFT's own), alike."""
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        config = twins.config(target_modules=["q", "k", "v", "o"], **options)
        block = peft.inject_adapter_in_model(config, Block(32).to(place.device, dtype)).train()
        found.append(twins.train_a_little(block).to(place.device))
    slao_kernels.patch(found[0], strict=True, backend=place.backend, precision=precision)
    return found[0], found[1]


def batches(place, count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(2, 9, 32, generator=g).to(place.device, dtype) for _ in range(count)]


def gradients(model: nn.Module, x: Tensor, run=lambda model, x: model(x)) -> dict[str, Tensor]:
    """The output and every gradient, x's included."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = run(model, x)
    y.float().square().mean().backward()
    return {"y": y.detach(), "x": x.grad} | {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


class Trainer:
    """Steps on one static batch, which is what a graph can hold."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model, self.x = model, x.clone()
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(self.trained, lr=0.5)

    def step(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model(self.x).float().square().mean()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_steps_in_a_graph(dtype, place):
    """Forward, backward and optimizer captured once, replayed for five batches: PEFT's losses and PEFT's adapters."""
    model, twin = pair(place, dtype)
    ours, theirs = (Trainer(net, batches(place, 1, dtype)[0]) for net in (model, twin))
    start = [p.detach().clone() for p in ours.trained]
    replay = place.captured(ours.step)
    with torch.no_grad():  # warming up has trained
        for parameter, value in zip(ours.trained, start, strict=True):
            parameter.copy_(value)
    losses: list[Tensor] = []
    expected: list[Tensor] = []
    for x in batches(place, 5, dtype):
        for trainer, run, kept in ((ours, replay, losses), (theirs, theirs.step, expected)):
            trainer.x.copy_(x)
            kept.append(run().clone())
    tolerance = 1e-5 if dtype == torch.float32 else BF16
    assert error_ratio(torch.stack(losses), torch.stack(expected)) <= tolerance
    assert expected[0] != expected[1]
    for mine, other, before in zip(ours.trained, theirs.trained, start, strict=True):
        moved = other.detach() - before
        assert moved.abs().max() > 0
        # What five steps changed, and not what was there before, has to agree.
        assert error_ratio(mine.detach() - before, moved) <= 5 * tolerance


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant, place):
    model, twin = pair(place)

    def run(net: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(net, x, use_reentrant=reentrant)

    for x in batches(place, 2):
        with twins.CountOps() as ops:
            found = gradients(model, x, run)
        assert ops.counts == {"lora_linear": 8, "lora_linear_backward": 4}
        twins.check_close(found, gradients(twin, x, run))


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.exhaustive), torch.bfloat16], ids=str)
def test_on_a_side_stream(dtype, place):
    """Everything that a call starts is on the caller's stream: one that is far behind gives the same bits."""
    model, twin = pair(place, dtype)
    x, later = batches(place, 2, dtype)
    gradients(model, later)
    expected = gradients(model, x)
    with place.side_stream():
        place.busy()
        found = gradients(model, x)
    twins.check_equal(found, expected)
    twins.check_close(found, gradients(twin, x), twins.FP32_RATIO if dtype == torch.float32 else BF16)


def test_threads_with_streams_of_their_own(place):
    """One model and its plans; autocast in one, no gradients in another: each bitwise as alone, which is PEFT's."""
    if place.device == "cpu" and place.backend == "triton":
        pytest.skip("Triton's interpreter changes its language module for the time of a launch: one thread only")
    model, twin = pair(place)
    inputs = batches(place, 3)

    def run(net: nn.Module, i: int) -> dict[str, Tensor]:
        x = inputs[i].clone().requires_grad_()
        with torch.set_grad_enabled(i != 0), place.autocast(i == 2):
            y = net(x)
            leaves = [x, *(p for p in net.parameters() if p.requires_grad)] if i else []
            grads = torch.autograd.grad(y.float().square().sum(), leaves) if i else []
        return {"y": y.detach(), **{str(j): grad for j, grad in enumerate(grads)}}

    alone = [run(model, i) for i in range(3)]
    for i, found in enumerate(alone):
        twins.check_close(found, run(twin, i), BF16 if i == 2 else twins.FP32_RATIO)
    failed: list[str] = []

    def work(i: int) -> None:
        try:
            torch.set_num_threads(1)  # MKL keeps the number by thread; another one may sum in another order
            with place.side_stream():
                for _ in range(10):
                    place.busy()
                    twins.check_equal(run(model, i), alone[i])
        except Exception as error:
            failed.append(f"thread {i}: {error!r}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_a_graph_draws_new_masks(place):
    model, _ = pair(place, lora_dropout=0.3)
    (x,) = batches(place, 1)
    replay = place.captured(lambda: list(gradients(model, x).values()))
    first, second = ([value.clone() for value in replay()] for _ in range(2))
    assert all(value.isfinite().all() for value in first + second)
    assert error_ratio(first[0], second[0]) > 0.01


WAYS = {
    "plain": {},
    "dropout": {"lora_dropout": 0.3},
    "fp32 adapters": {},
    "adapter precision": {"precision": "adapter"},
    "core": {},
    "autocast": {},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_step_does_not_wait_for_the_device(way, place):
    """Forward, backward and optimizer; and not waiting changes nothing."""
    dtype = torch.float32 if way in ("autocast", "core") else torch.bfloat16
    model, _ = pair(place, dtype, **WAYS[way])
    for layer in model.children():
        if way in ("fp32 adapters", "adapter precision"):
            layer.lora_A.float()
            layer.lora_B.float()
        if way == "core":
            extension.extend(layer, "default").slao_core = torch.eye(3, device=place.device)
            layer.slao_core_delta = nn.Parameter(torch.eye(3, device=place.device))
    (x,) = batches(place, 1, dtype)
    trainer = Trainer(model, x)

    def run() -> dict[str, Tensor]:
        torch.manual_seed(3)
        with place.autocast(way == "autocast"):
            return gradients(model, x)

    expected = run()  # kernels are compiled, libraries are loaded
    with place.no_waiting():
        found = run()
        loss = trainer.step()
    twins.check_equal(found, expected)
    assert found["y"].isfinite().all()
    assert loss.isfinite()


@pytest.mark.parametrize("p", [pytest.param(0.0, marks=pytest.mark.exhaustive), 0.3])
def test_compiled_block(p, place):
    """One graph, no break; with dropout every run draws a mask."""
    model, twin = pair(place, lora_dropout=p)
    (x,) = batches(place, 1)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=place.compiler)
    first, second = (
        {name.removeprefix("_orig_mod."): value for name, value in gradients(compiled, x).items()} for _ in range(2)
    )
    if p:
        assert all(value.isfinite().all() for value in first.values())
        assert error_ratio(first["y"], second["y"]) > 0.01
    else:
        twins.check_close(first, gradients(twin, x))


def test_fp32_adapters_at_the_width_of_a_model(place):
    """Sums of thousands of products, where an accumulator that truncates would drift away from fp32's own rounding."""
    m, k, n, r = (8192, 4096, 4096, 16) if place.on_gpu else (512, 512, 256, 8)

    def draw(*size: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        return (torch.randn(size, device=place.device) * scale).to(dtype)

    x, weight, dy = (draw(*size, dtype=torch.bfloat16) for size in ((m, k), (n, k), (m, n)))
    A, B = draw(r, k, scale=k**-0.5).requires_grad_(), draw(n, r, scale=r**-0.5).requires_grad_()
    y = slao_kernels.lora_linear(x, weight * k**-0.5, None, A, B, 0.7, precision="adapter", backend=place.backend)
    found = torch.autograd.grad(y, (A, B), dy)
    wide = A.detach().double().requires_grad_(), B.detach().double().requires_grad_()
    branch = 0.7 * (x.double() @ wide[0].T) @ wide[1].T
    for name, mine, exact in zip("AB", found, torch.autograd.grad(branch, wide, dy.double()), strict=True):
        assert mine.dtype is torch.float32
        assert error_ratio(mine, exact) <= 2e-6, name  # fp32's own is 3e-7; truncated sums drift to 5e-6


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(
    "wide", [pytest.param(False, marks=pytest.mark.exhaustive, id="one dtype"), pytest.param(True, id="fp32 adapters")]
)
def test_memory_of_a_step(wide, p, place):
    """Forward keeps y and t; at its peak a step holds these, x's gradient, and tensors of the adapters' size."""
    m, k, n, r = (16384, 4096, 4096, 16) if place.on_gpu else (256, 96, 80, 8)
    dtype = torch.bfloat16 if place.on_gpu else torch.float32  # a CPU's bf16 GEMM has copies of its own
    wider = torch.float32 if place.on_gpu else torch.float64

    def draw(*size: int, adapter: bool = False) -> Tensor:
        return torch.randn(size, device=place.device, dtype=wider if wide and adapter else dtype)

    weight, bias, dy = draw(n, k), draw(n), draw(m, n)
    x, A, B = leaves = draw(m, k), draw(r, k, adapter=True), draw(n, r, adapter=True)
    for leaf in leaves:
        leaf.requires_grad_()

    def forward() -> Tensor:
        return slao_kernels.lora_linear(x, weight, bias, A, B, 0.7, dropout=p, backend=place.backend)

    def step() -> tuple[Tensor, tuple[Tensor, ...]]:
        y = forward()
        return y, torch.autograd.grad(y, leaves, dy)

    step()  # kernels are compiled, the libraries have their workspaces
    size = dtype.itemsize
    of_y, of_t, of_x, adapters = m * n * size, m * r * size, m * k * size, (k + n) * r * size
    drawn = p > 0 and place.backend == "eager"  # F.dropout keeps the masked x, and its mask for backward
    mask = m * k if place.on_gpu else of_x  # bytes on a GPU, numbers on a CPU
    kept = of_y + of_t + wide * adapters + drawn * (of_x + mask)
    # dx, g, dA and dB, and these once more in the adapters' own dtype; F.dropout's backward makes x's gradient anew.
    added = of_x + of_t + adapters + wide * 2 * adapters + drawn * of_x
    # A few numbers, or a GPU library's workspace (32 MiB on Hopper); and the parts of Triton's sums, which
    # one_pass_pays keeps under half of dy. Less than x altogether, so that nothing of its size can hide in it.
    slack = (48 << 20 if place.on_gpu else 4096) + (of_y // 2 if place.backend == "triton" else 0)
    assert slack < of_x
    peak, left, result = place.memory(forward)
    assert left <= kept + slack, (left, kept)
    del result
    peak, _, _ = place.memory(step)
    assert peak <= kept + added + slack, (peak, kept, added)
