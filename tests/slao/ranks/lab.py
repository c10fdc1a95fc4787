"""The tiny model, the tasks, and what is left of them, for every process and for the one that does the same alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import slao_kernels
from slao import SLAO
from slao.methods import Method
from slao_kernels.testing import tiny_model

TASKS, STEPS, BATCH, RATE = 2, 2, 4, 0.2


def make(dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """Adapters on layers of several shapes; r = 3 over two ranks leaves uneven shards. options: of the LoraConfig."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "down_proj"], **options}
    model = get_peft_model(tiny_model("llama", initializer_range=0.3), LoraConfig(**settings))
    slao_kernels.patch(model.to(dtype))
    return model.train()


def batch(task: int, step: int, rank: int, ranks: int) -> torch.Tensor:
    """(rows, 9) token ids: this rank's rows of the batch, which is the same however many ranks share it."""
    ids = torch.randint(1, 128, (BATCH, 9), generator=torch.Generator().manual_seed(100 * task + step))
    return ids.chunk(ranks)[rank]


def learn(model: nn.Module, task: int, rank: int = 0, ranks: int = 1, engine: Any = None) -> None:
    """Plain gradient descent: what differs in the gradient differs as much in the weights."""
    optimizer = None if engine else torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    for step in range(STEPS):
        ids = batch(task, step, rank, ranks)
        loss = (engine or model)(input_ids=ids, labels=ids).loss
        if engine:
            engine.backward(loss)
            engine.step()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def run(method: Method, model: nn.Module, rank: int = 0, ranks: int = 1) -> None:
    for task in range(TASKS):
        method.begin_task(str(task))
        learn(model, task, rank, ranks)
        method.end_task()


def weights(method: Method) -> dict[str, torch.Tensor]:
    """Every A and B as trained and as merged, whole."""
    found: dict[str, torch.Tensor] = {}
    with method._whole(write=False):
        for pair in method.pairs:
            found |= {f"{pair.name}.A": pair.A.clone(), f"{pair.name}.B": pair.B.clone()}
        for pair, merged in zip(method.pairs, method._merged_weights(), strict=True):
            shown = pair.with_weights(*merged)
            found |= {f"{pair.name}.A.merged": shown.A.clone(), f"{pair.name}.B.merged": shown.B.clone()}
    return found


def decided(kind: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the mathematics decides of a state. Factors of OPCM, InfLoRA, IncSLAO and SLoRA come from decompositions,
    whose vectors may have either sign; their products (plain gradient descent gives the same ones for either) and
    projections do not."""
    if kind not in ("opcm", "inflora", "incslao", "slora"):
        return state
    found: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        layer, _, what = key.rpartition(".")
        if what in ("A", "frozen_A", "A_merged"):
            found[f"{key} B"] = state[f"{layer}.{what.replace('A', 'B')}"].double() @ value.double()
        elif what in ("space", "complement"):
            found[key] = value @ value.T
        elif "B" not in what:
            found[key] = value
    return found


def outcome(method: Method, model: nn.Module) -> dict[str, Any]:
    """What a case leaves: the weights, the merged model's logits, what fell back and why."""
    found: dict[str, Any] = {"weights": weights(method)}
    model.eval()
    with torch.no_grad(), method.merged():
        found["logits"] = model(input_ids=batch(9, 9, 0, 1)).logits.clone()
    with torch.no_grad(), Operators() as operators:
        found["trained_logits"] = model(input_ids=batch(9, 9, 0, 1)).logits.clone()
    found["operators"] = operators.counts
    found["after"] = weights(method)
    options = [m.slao_options for m in model.modules() if "slao_options" in m.__dict__]
    found["fused"] = len(options)
    found["fallbacks"] = dict(options[0].fallbacks) if options else {}
    found["notes"] = dict(options[0].notes) if options else {}
    return found


class Operators(TorchDispatchMode):
    """How often each of the library's operators ran within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "slao_kernels":
            self.counts[func._opname] = self.counts.get(func._opname, 0) + 1
        return func(*args, **(kwargs or {}))


def reference(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """One process, whole batches."""
    model = make(dtype)
    method = SLAO(model)
    run(method, model)
    return outcome(method, model)


def with_head(dtype: torch.dtype = torch.float32) -> nn.Module:
    """An output layer that trains beside A and B."""
    return make(dtype, modules_to_save=["lm_head"])


def head_reference(dtype: torch.dtype = torch.float32, how: str = "keep") -> dict[str, torch.Tensor]:
    model = with_head(dtype)
    method = SLAO(model, beside=how)
    run(method, model)
    return head(method)


def head(method: Method) -> dict[str, torch.Tensor]:
    """A and B, and the head as trained and, where it is merged, as merged; whole."""
    with method._swapped_in(method._merged_weights):
        shown = {f"{name}.shown": tensor.clone() for name, tensor in method.beside.live().items()}
    return weights(method) | {name: tensor.clone() for name, tensor in method.beside.live().items()} | shown


def message(call: Callable[[], object]) -> str:
    """Of the ValueError or RuntimeError that `call` raises."""
    try:
        call()
    except (ValueError, RuntimeError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
