"""What a patched layer costs the host: tiny layers, whose arithmetic is next to nothing, in every mode that users run.

On a GPU this is the time in which Python keeps the queue from filling; below some thousand tokens it is all that
counts. "layer, 512x1024" is a layer whose arithmetic is what counts, in the same modes, on the device that is
asked for. Each row has the frozen layer (or block of seven layers) as the floor, PEFT, PEFT with each block compiled
(--compile), ours with the backend "auto", and with "eager": torch's own GEMMs, the path that a GPU takes.
`ours / PEFT` and `eager / PEFT` are what must stay below 1 in every row.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from contestants import assert_ran_fused, lora_modules
from peft import LoraConfig, get_peft_model
from race import best, interleave, record
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import slao_kernels
from slao_kernels.testing import TOLERANCE, error_ratio


class Called(nn.Linear):
    """A linear layer that only it itself can compute, as far as anybody knows: a subclass."""


class Block(nn.Module):
    """The seven projections of a decoder's block, in their order, with as little between them as there can be."""

    def __init__(self, kind: type[nn.Linear], width: int, dtype: torch.dtype) -> None:
        super().__init__()
        for name in ("q", "k", "v", "o", "gate", "up", "down"):
            self.add_module(name, kind(width, width, bias=False, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        x = self.o(self.q(x) + self.k(x) + self.v(x))
        return self.down(self.gate(x) + self.up(x))


class Layer(nn.Module):
    """One projection."""

    def __init__(self, kind: type[nn.Linear], width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.q = kind(width, width, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x)


@dataclass(frozen=True)
class Mode:
    """How people run it. base: the dtype of the frozen weights; adapters are fp32, as PEFT makes them."""

    base: torch.dtype = torch.float32
    autocast: bool = False
    dropout: float = 0.0
    called: bool = False
    dora: bool = False
    adapters: int = 1
    rank: int = 4
    reentrant: bool | None = None  # None: no checkpointing
    training: bool = True


BF16 = torch.bfloat16
MODES = {
    "fp32": Mode(),
    "bf16": Mode(BF16),
    "bf16 autocast": Mode(BF16, autocast=True),
    "fp32 autocast": Mode(autocast=True),
    "dropout": Mode(dropout=0.05),
    "bf16 autocast, dropout": Mode(BF16, autocast=True, dropout=0.05),
    "called base": Mode(called=True),
    "bf16 called base": Mode(BF16, called=True),
    "DoRA": Mode(dora=True),
    "two adapters": Mode(adapters=2),
    "r = 256": Mode(rank=256),
    "checkpointing, reentrant": Mode(reentrant=True),
    "checkpointing": Mode(reentrant=False),
}


@dataclass(frozen=True)
class Subject:
    """What is timed, and how often."""

    module: type[nn.Module]
    iterations: int
    rounds: int = 41
    tokens: int = 16
    width: int = 16

    def build(self, mode: Mode) -> nn.Module:
        return self.module(Called if mode.called else nn.Linear, self.width, mode.base)


SUBJECTS = {
    "layer": Subject(Layer, 100),
    "block": Subject(Block, 20),
    "layer, 512x1024": Subject(Layer, 1, 21, 512, 1024),
}


def adapted(subject: Subject, mode: Mode) -> nn.Module:
    """The subject with PEFT's LoRA; the same weights for every contestant."""
    torch.manual_seed(0)
    config = partial(LoraConfig, r=mode.rank, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    options = {"lora_dropout": mode.dropout, "use_dora": mode.dora}
    model = get_peft_model(subject.build(mode), config(**options))
    for index in range(1, mode.adapters):
        model.add_adapter(f"other{index}", config(**options))
    if mode.adapters > 1:
        model.base_model.set_adapter(["default", *(f"other{index}" for index in range(1, mode.adapters))])
    model.train(mode.training)
    return model.base_model.model


def passes(model: nn.Module, mode: Mode, x: Tensor, backward: bool) -> Callable[[], Any]:
    """One forward pass (with a graph, as in training), or forward and backward to x and the adapters."""
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    dy = torch.randn_like(x)

    def forward() -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16) if mode.autocast else nullcontext():
            if mode.reentrant is None:
                return model(x)
            return checkpoint(model, x, use_reentrant=mode.reentrant)

    def both() -> list[Tensor | None]:
        y = forward()
        y.backward(dy.to(y.dtype))
        grads = [tensor.grad for tensor in wanted]
        for tensor in wanted:
            tensor.grad = None
        return grads

    return both if backward else forward


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("subject", list(SUBJECTS))
def test_host(
    subject: str, mode: str, direction: str, benchmark: Any, device: str, request: pytest.FixtureRequest
) -> None:
    if device != "cpu" and SUBJECTS[subject].width == 16:
        pytest.skip("the host's time is measured where nothing is launched: --device cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run(SUBJECTS[subject], MODES[mode], direction != "forward", benchmark, device, request.config)
    finally:
        torch.set_num_threads(threads)


def run(subject: Subject, mode: Mode, backward: bool, benchmark: Any, device: str, options: pytest.Config) -> None:
    torch.manual_seed(0)
    x = torch.randn(subject.tokens, subject.width).to(device, mode.base).requires_grad_()
    frozen = subject.build(replace(mode, called=False)).to(device).requires_grad_(False)
    models = {"frozen": frozen, "PEFT": adapted(subject, mode).to(device)}
    if options.getoption("--compile"):
        torch.compiler.reset()
        models["PEFT, compiled"] = torch.compile(adapted(subject, mode).to(device))
    for name, backend in (("ours", "auto"), ("ours, eager", "eager")):
        models[name] = adapted(subject, mode).to(device)
        slao_kernels.patch(models[name], backend=backend, strict=True)
    calls = {name: passes(model, mode, x, backward) for name, model in models.items()}
    agree(models, mode, x)
    repeats = options.getoption("--best-of")
    races = interleave(benchmark, calls, device, subject.rounds, subject.iterations, repeats)
    record(benchmark, races, "frozen", device)
    for name in ("ours", "ours, eager"):
        ratio = best(races, lambda race, name=name: race[name] / race["PEFT"])
        benchmark.extra_info[f"{name} / PEFT"] = ratio


def agree(models: dict[str, nn.Module], mode: Mode, x: Tensor) -> None:
    """A fast wrong answer is no benchmark; and a layer that fell back is PEFT under our name."""
    found = {}
    for name in ("PEFT", "ours", "ours, eager"):
        torch.manual_seed(3)  # the same dropout
        found[name] = passes(models[name], mode, x, True)()
    bf16 = mode.autocast or mode.base == torch.bfloat16
    allowed = 4 * TOLERANCE[torch.bfloat16 if bf16 else torch.float32]
    for name in ("ours", "ours, eager"):
        errors = [error_ratio(mine, theirs) for mine, theirs in zip(found[name], found["PEFT"], strict=True)]
        assert max(errors) <= allowed, f"{name} does not compute what PEFT does: off by {max(errors):.1e}"
        assert lora_modules(models[name])
        assert_ran_fused(models[name])
