"""LoRA on a mixture's experts: forward and backward of one experts module of transformers; ours against PEFT.

"frozen" is the module without adapters, whose tokens and routing weights ask for their gradients as they do in
training: what training through it costs at least. All contestants have the same frozen weights in memory; adapters are
fp32, as PEFT makes them. What ours computes, and every gradient of it, may be no further from PEFT's formula in fp64
than what PEFT computes: before anything is timed, or it is wrong.
A row also says what is allocated at the peak of forward and backward beyond what lies there between steps, and how much
of it the forward keeps for the backward. On a CPU that is what torch's allocator gave out, as its profiler saw it;
scratch memory that MKL and oneDNN take for themselves is nobody's. 4x64x32 is the host's time, next to no arithmetic.
128x2048x768, top 8 of 4,096 tokens, is the setting of PEFT's own benchmark, and needs a GPU.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import pytest
import torch
from contestants import ALPHA, RANK, fused, twin
from models import on_device
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import layer as lora
from race import Check, best, checker, interleave, record
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from slao_kernels import dispatch
from slao_kernels.testing import error_ratio

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
IMPLEMENTATIONS = ("grouped_mm", "eager")  # transformers' default first

# Errors against fp64 in multiples of PEFT's that are allowed, and what is added where both are next to nothing. The
# variance of roundings: x W and its sum with x A B are two where PEFT's x (W + s B A) is one.
NO_FURTHER, NOTHING = 2**0.5, {torch.float32: 1e-7, torch.bfloat16: 1e-4}


@dataclass(frozen=True)
class Case:
    """A module by its sizes, and a batch of it. for_a_gpu: PEFT's gradient of the weights alone is 1.2 GB."""

    experts: int
    hidden: int
    intermediate: int
    tokens: int
    top_k: int
    iterations: int = 1
    rounds: int = 7
    for_a_gpu: bool = False

    def build(self, implementation: str, dtype: torch.dtype) -> nn.Module:
        sizes = {"hidden_size": self.hidden, "intermediate_size": self.intermediate, "num_local_experts": self.experts}
        config = MixtralConfig(**sizes, num_experts_per_tok=self.top_k)
        config._experts_implementation = implementation
        return Experts(config).to(dtype)


CASES = {
    "4x64x32": Case(4, 64, 32, 16, 2, iterations=10, rounds=31),
    "16x512x256": Case(16, 512, 256, 1024, 2),
    "128x2048x768": Case(128, 2048, 768, 4096, 8, rounds=11, for_a_gpu=True),
}


class Experts(nn.Module):
    """Experts with a name, by which PEFT finds their parameters."""

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__()
        self.experts = MixtralExperts(config)
        for weight in self.experts.parameters():
            nn.init.normal_(weight, std=0.02)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return self.experts(x, index, weights)


def adapted(model: nn.Module) -> nn.Module:
    """`model` with PEFT's LoRA on both parameters of all experts, fp32 and random, the same each time."""
    names = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=[], target_parameters=names)
    model = get_peft_model(model, config).base_model.model
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for wrapper in wrappers(model):
            A, B = wrapper.lora_A["default"], wrapper.lora_B["default"]
            # Then the branch is about as large as the base product.
            for part, size in ((A, A.weight.shape[1] ** -0.5), (B, 0.05)):
                part.float().weight.copy_(torch.randn(part.weight.shape, generator=generator) * size)
    return model


def wrappers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, lora.ParamWrapper)]


class Step:
    """Forward and backward of one contestant; a call leaves no gradients."""

    def __init__(self, model: nn.Module, x: Tensor, index: Tensor, weights: Tensor, dy: Tensor) -> None:
        self.model, self.inputs, self.dy = model.train(), (x, index, weights), dy
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.wanted = {"x": x, "weights": weights, **trained}

    def __call__(self) -> None:
        self.forward().backward(self.dy)
        for tensor in self.wanted.values():
            tensor.grad = None

    def forward(self) -> Tensor:
        return self.model(*self.inputs)

    def found(self) -> dict[str, Tensor]:
        """y, and the gradients by their names."""
        y = self.forward()
        grads = torch.autograd.grad(y, list(self.wanted.values()), self.dy)
        return {"y": y.detach(), **dict(zip(self.wanted, grads, strict=True))}

    def in_fp64(self) -> dict[str, Tensor]:
        """What `found` would be without rounding, by transformers' plainest loop."""
        model = copy.deepcopy(self.model).double()
        (experts,) = (module for module in model.modules() if isinstance(module, MixtralExperts))
        experts.config._experts_implementation = "eager"
        x, index, weights = self.inputs
        wide = [tensor.detach().double().requires_grad_() for tensor in (x, weights)]
        return Step(model, wide[0], index, wide[1], self.dy.double()).found()


def agree(steps: dict[str, Step], exact: dict[str, Tensor], check: Check) -> dict[str, float]:
    """The largest of ours' errors against `exact`, in multiples of PEFT's, by contestant."""
    theirs, worst = steps["PEFT"].found(), {}
    for name, step in steps.items():
        if not name.startswith("ours"):
            continue
        mine = step.found()
        assert set(mine) == set(theirs) == set(exact)
        errors = {key: (error_ratio(mine[key], exact[key]), error_ratio(theirs[key], exact[key])) for key in exact}
        nothing = NOTHING[step.dy.dtype]
        far = {key: pair for key, pair in errors.items() if not pair[0] <= NO_FURTHER * pair[1] + nothing}
        check(name, not far, f"is further from fp64 than PEFT: {far}")
        found = wrappers(step.model)
        reasons = {why for wrapper in found for why in wrapper.slao_options.fallbacks.values()}
        check(name, len(found) == 2 and not reasons, f"runs PEFT's own forward: {reasons}")
        worst[name] = max(own / max(peft, nothing) for own, peft in errors.values())
    return worst


def contestants(case: Case, implementation: str, dtype: torch.dtype, device: str) -> dict[str, Step]:
    """All of them on one frozen base; on a GPU also ours by Triton, where "auto" does not take it."""
    base = on_device(partial(case.build, implementation), dtype, device, case.for_a_gpu)
    base.requires_grad_(False)
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weights, index = normal(case.tokens, case.experts).softmax(1).topk(case.top_k)
    x, weights, dy = (
        tensor.to(device, dtype)
        for tensor in (normal(case.tokens, case.hidden), weights, normal(case.tokens, case.hidden))
    )
    data = x.requires_grad_(), index.to(device), weights.requires_grad_(), dy
    models = {"frozen": twin(base), "PEFT": adapted(twin(base)), "ours": fused(adapted(twin(base)))}
    by_triton = device == "cuda" and dispatch.why_not("expert_linear", "triton", device) is None
    if by_triton and dispatch.choose("expert_linear", device) != "triton":
        models["ours, triton"] = fused(adapted(twin(base)), "triton")
    return {name: Step(model, *data) for name, model in models.items()}


def peak_bytes(step: Step, device: str) -> int:
    """Allocated at the peak of a step beyond what was before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))


def saved_bytes(step: Step) -> int:
    """Of the storages that the graph keeps from forward to backward, without parameters and inputs."""
    lasting = {tensor.untyped_storage().data_ptr() for tensor in (*step.model.parameters(), *step.inputs)}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in lasting:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        y = step.forward()
    assert y.requires_grad  # and the graph has been there all the while, so that no storage had another's place
    return sum(kept.values())


@pytest.fixture(autouse=True)
def _memory_back(device: str) -> Iterator[None]:
    yield
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", list(CASES))
def test_experts(
    case: str, implementation: str, dtype: str, benchmark: Any, device: str, request: pytest.FixtureRequest
) -> None:
    chosen = CASES[case]
    if chosen.for_a_gpu and device == "cpu":
        pytest.skip("a GPU's module: minutes a step on a CPU")
    if dtype != "bf16" and device == "cuda":
        pytest.skip("nobody trains it in fp32 there")
    info = benchmark.extra_info
    try:
        steps = contestants(chosen, implementation, DTYPES[dtype], device)
        off = agree(steps, steps["PEFT"].in_fp64(), checker(benchmark, device))
        calls: dict[str, Callable[[], object]] = dict(steps)
        best_of = request.config.getoption("--best-of")
        races = interleave(benchmark, calls, device, chosen.rounds, chosen.iterations, best_of)
        peaks = {name: peak_bytes(step, device) for name, step in steps.items()}
        saved = {name: saved_bytes(step) for name, step in steps.items()}
    except torch.OutOfMemoryError as error:
        pytest.skip(f"out of memory: {str(error).splitlines()[0]}")
    record(benchmark, races, "frozen", device)
    rows = []
    for name in steps:
        of_peft = best(races, lambda race, name=name: race[name] / race["PEFT"])
        info[f"{name} memory / PEFT"] = peaks[name] / peaks["PEFT"]
        line = {"contestant": name, "ms": info[f"{name} ms"]}
        line["x frozen"] = best(races, lambda race, name=name: race[name] / race["frozen"])
        line |= {"PEFT / it": 1 / of_peft, "step GB": peaks[name] / 1e9, "of PEFT's": peaks[name] / peaks["PEFT"]}
        rows.append(line | {"saved GB": saved[name] / 1e9, "error / PEFT's": off.get(name)})
        if name == "ours":
            info["PEFT / ours"] = line["PEFT / it"]
    info["rows"] = rows
