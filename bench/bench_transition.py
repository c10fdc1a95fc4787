"""A whole end_task + begin_task of SLAO on a model of real size: how much of it is not the two kernels' work.

Peer: the merger of the package `backpropagate` (`pip install --no-deps backpropagate`), where it is installed. It takes
a state dict and returns the next task's, which is loaded here as its users do.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch
from peft import LoraConfig
from race import capped, clock
from torch import nn

import slao_kernels
from slao import SLAO
from slao_kernels.adapters import find_pairs

RANK = 16


class Model(nn.Module):
    """Every linear layer of the geometry with a LoRA, base weights on the meta device: only A and B are real."""

    def __init__(self, layers: list[tuple[int, int]], device: str) -> None:
        super().__init__()
        from peft.tuners.lora import Linear

        config = LoraConfig(r=RANK, lora_alpha=RANK)
        self.layers = nn.ModuleList()
        for n, k in layers:
            base = nn.Linear(k, n, bias=False, device="meta")
            self.layers.append(Linear(base, "default", config, r=RANK, lora_alpha=RANK))
        for name, parameter in list(self.named_parameters()):
            if "lora_" in name:
                owner = self.get_submodule(name.rpartition(".")[0])
                values = torch.randn(parameter.shape, device=device) / parameter.shape[1] ** 0.5
                owner.weight = nn.Parameter(values)


def backpropagate_too(model: nn.Module) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """(its merge of what was trained and its start of the next task, why it is left out)."""
    try:
        from backpropagate.slao import SLAOMerger
    except ImportError:
        return {}, {"backpropagate": "it is not installed"}
    merger = SLAOMerger()
    state = {name: tensor.detach() for name, tensor in model.state_dict().items() if "lora_" in name}
    merger.initialize(state)

    def transition() -> None:
        merger.merge(state)
        for name, tensor in merger.get_init_weights().items():
            state[name].copy_(tensor)

    return {"backpropagate": transition}, {}


@pytest.mark.parametrize("rounds", [9])
def test_transition(rounds: int, benchmark: Any, device: str, layers: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    model = Model(layers, device)
    method = SLAO(model)
    pairs, _ = find_pairs(model)
    As, Bs = [pair.A.detach() for pair in pairs], [pair.B.detach() for pair in pairs]
    B_merged, A_kept = [B.clone() for B in Bs], [A.clone() for A in As]
    kernels: list[float] = []
    method.begin_task("warm-up")

    def transition() -> None:
        method.end_task()
        method.begin_task(f"task {len(method.names) + 1}")

    def calls() -> None:  # the same work by the calls alone
        totals = torch.stack([tensor.sum() for tensor in As + Bs])
        assert bool(totals.isfinite().all())
        slao_kernels.scaled_merge_(B_merged, Bs, 0.5)
        slao_kernels.orthogonal_init_(As, keep=A_kept)

    peers, left_out = backpropagate_too(Model(layers, device))
    times: dict[str, list[float]] = {name: [] for name in peers}
    one = clock(transition, device) * (2 + len(peers))
    mine: list[float] = []

    def others() -> None:
        kernels.append(clock(calls, device))
        for name, peer in peers.items():
            times[name].append(clock(peer, device))

    benchmark.pedantic(
        lambda: mine.append(clock(transition, device)), setup=others, rounds=capped(rounds, one, device), iterations=1
    )
    benchmark.extra_info |= {"ours_ms": median(mine) * 1e3, "its calls ms": median(kernels) * 1e3}
    benchmark.extra_info |= {"its calls / ours": median(kernels) / median(mine), "left out": left_out}
    for name, values in times.items():
        benchmark.extra_info |= {f"{name} ms": median(values) * 1e3, f"{name} / ours": median(values) / median(mine)}
