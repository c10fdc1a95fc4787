"""Random sequences of calls on a patched model and on a plain PEFT twin: after each the outputs agree, or both raise.

120 sequences, the same at every run; SLAO_FUZZ=1000 makes three thousand, others every time (`make fuzz`).
"""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import slao_kernels
from slao.methods import make_method

EXAMPLES = int(os.environ.get("SLAO_FUZZ", "40"))
PHASES = (Phase.generate, Phase.shrink)
# fp32 as in tests/slao_kernels/twins.py, times the steps of training that may add up; 16 bits round y and the branch.
CLOSE = {torch.float64: 1e-10, torch.float32: 5e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
X = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 10), nn.Linear(10, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


def config(r: int = 3) -> peft.LoraConfig:
    return peft.LoraConfig(r=r, lora_alpha=5, target_modules=["up", "down"], init_lora_weights=False)


def plain() -> Any:
    torch.manual_seed(0)
    return peft.get_peft_model(Net(), config())


def is_adapter(name: str) -> bool:
    return "lora_" in name


def dtype_of(model: Any) -> torch.dtype:
    return model.base_model.model.up.base_layer.weight.dtype


def step(model: Any) -> None:
    """SGD on the squared output, far too small a rate to diverge."""
    model.zero_grad()
    model(X.to(dtype_of(model))).square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.02 * parameter.grad
    model.zero_grad()


def add(model: Any) -> None:
    torch.manual_seed(5)
    model.add_adapter("other", config(2))


def disabled(model: Any) -> None:
    with model.disable_adapter():
        model(X.to(dtype_of(model)))


# What both models are asked.
PEFTS: dict[str, Callable[[Any], Any]] = {
    "step": step,
    "merge": lambda m: m.merge_adapter(),
    "unmerge": lambda m: m.unmerge_adapter(),
    "set default": lambda m: m.set_adapter("default"),
    "set other": lambda m: m.set_adapter("other"),
    "add": add,
    "delete": lambda m: m.delete_adapter("other"),
    "delete default": lambda m: m.delete_adapter("default"),
    "disabled": disabled,
    "disable layers": lambda m: m.base_model.disable_adapter_layers(),
    "enable layers": lambda m: m.base_model.enable_adapter_layers(),
    "bf16": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "float": lambda m: m.float(),
    "double": lambda m: m.double(),
    "train": lambda m: m.train(),
    "eval": lambda m: m.eval(),
}
OURS = ["patch", "unpatch", "copy"]
METHOD = ["begin", "end", "merged", "save", "load", "export"]
ALL = [*PEFTS, "step", "step", *OURS, *METHOD, "begin", "end"]


class Twins:
    def __init__(self, name: str, folder: Path) -> None:
        self.model, self.twin, self.folder = plain(), plain(), folder
        slao_kernels.patch(self.model)
        self.method = make_method(name, self.model)
        self.name, self.done = name, Counter[str]()

    def run(self, call: str) -> None:
        if call in PEFTS:
            self._both(call)
        elif call == "copy":  # as PEFT's models are copied; the method stays with the one it has
            copied, before = copy.deepcopy(self.model), self.outputs(self.model)
            self.compare(self.outputs(copied), before)
        else:
            self._ours(call)
        self.compare(self.outputs(self.model), self.outputs(self.twin))

    def _both(self, call: str) -> None:
        errors = []
        for model in (self.model, self.twin):
            try:
                PEFTS[call](model)
                errors.append(None)
            except Exception as error:
                errors.append(type(error))
        assert errors[0] is errors[1], f"{call}: {errors}"
        self.done["raised" if errors[0] else "worked"] += 1

    def _ours(self, call: str) -> None:
        before = {name: value.detach().clone() for name, value in self.model.named_parameters()}
        refused: str | None = None
        try:
            self._ask(call)
        except ValueError as error:
            refused = str(error)
        now = dict(self.model.named_parameters())
        if refused is not None:
            assert len(refused.splitlines()) == 1
            self.done["refused"] += 1
        else:
            self.done["answered"] += 1
        if refused is not None or call not in ("begin", "end", "load"):
            assert now.keys() == before.keys()
            assert all(torch.equal(now[name], value) for name, value in before.items()), (call, refused)
        with torch.no_grad():
            for name, value in self.twin.named_parameters():
                if is_adapter(name):
                    value.copy_(now[name])

    def _ask(self, call: str) -> None:
        if call == "patch":
            slao_kernels.patch(self.model)
        elif call == "unpatch":
            slao_kernels.unpatch(self.model)
        elif call == "begin":
            self.method.begin_task(str(self.method.task))
        elif call == "end":
            self.method.end_task()
        elif call == "merged":
            with self.method.merged():
                assert all(bool(y.isfinite().all()) for y in self.outputs(self.model) if isinstance(y, Tensor))
        elif call == "export":
            self.method.save_pretrained(self.folder / "export")
        else:
            getattr(self.method, call)(self.folder / "state")

    def outputs(self, model: Any) -> list[Any]:
        try:
            with torch.no_grad():
                return [model(X.to(dtype_of(model)))]
        except Exception as error:
            return [type(error)]

    def compare(self, found: list[Any], expected: list[Any]) -> None:
        (y,), (exact,) = found, expected
        if not isinstance(exact, Tensor):
            assert y is exact
            return
        assert y.dtype == exact.dtype
        size = exact.double().square().mean().sqrt()
        assert (y.double() - exact.double()).square().mean().sqrt() <= CLOSE[y.dtype] * size


# clora and inclora keep a core or frozen pairs in the layers, which the twin has not.
@pytest.mark.parametrize("name", ["slao"])
def test_any_sequence_of_calls(name, tmp_path):
    done: Counter[str] = Counter()

    @settings(
        max_examples=3 * EXAMPLES,
        deadline=None,
        derandomize="SLAO_FUZZ" not in os.environ,
        database=None,
        phases=PHASES,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(st.sampled_from(ALL), min_size=3, max_size=12))
    def run(calls: list[str]) -> None:
        twins = Twins(name, tmp_path)
        for call in calls:
            twins.run(call)
        done.update(twins.done)
        done["sequences"] += 1

    run()
    assert min(done[kind] for kind in ("worked", "raised", "answered", "refused")) >= done["sequences"] / 5, done
