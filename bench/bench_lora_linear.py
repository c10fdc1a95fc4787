"""An adapted linear layer, and q, k and v of one x, against the bare frozen layer, PEFT and a plain autograd node.

The frozen layer is the floor of what training through a layer costs: forward, and backward to x. Columns: "PEFT" and
"ours" have fp32 adapters, as PEFT makes them; ", base dtype" marks adapters in the dtype of the frozen weight.
"ours" on fp32 adapters computes its branch in the base's dtype (patch's default), PEFT in fp32.
On a GPU also: "ours, triton" (its rank-r products in Triton); ", graph": captured in a CUDA graph and replayed, which
leaves out the host's time for the launches, its ratio being to "frozen, graph"; Axolotl's and Unsloth's kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import rivals
import torch
import torch.nn.functional as F
from contestants import ALPHA, RANK, MmAddmm, adapted, fell_back, fused, lora_modules
from race import Check, best, checker, first_line, in_graphs, interleave, record
from torch import Tensor, nn

from slao_kernels.testing import TOLERANCE, error_ratio

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Size:
    """M tokens through N × K. A lap times `iterations` calls: one alone is too short for the clock where M is small."""

    tokens: int
    width: int
    rounds: int
    iterations: int


# Sizes of a decoder's projection (and of one on a GPU), of MiniLM in training, and of a batch of two short sentences.
SIZES = {
    "2048x4096x4096": Size(2048, 4096, 5, 1),
    "1024x384x384": Size(1024, 384, 51, 4),
    "32x384x384": Size(32, 384, 101, 20),
    "8192x4096x4096": Size(8192, 4096, 15, 2),
}
FOR_A_GPU = "8192x4096x4096"


class Projections(nn.Module):
    """Frozen linear layers that read one x: the first of q, k and v, or all three."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        for name, weight in zip(("q_proj", "k_proj", "v_proj"), weights, strict=False):
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            layer.weight = nn.Parameter(weight, requires_grad=False)  # every contestant reads the same memory
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.children()]


@dataclass
class Contestant:
    """`forward` gives the outputs, `wanted` are the tensors whose gradients the backward pass computes."""

    forward: Callable[[], list[Tensor] | tuple[Tensor, ...]]
    wanted: list[Tensor]
    model: nn.Module | None = None

    def both(self, dys: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(tuple(self.forward()), self.wanted, dys)


def contestants(x: Tensor, weights: list[Tensor], compiled: bool) -> dict[str, Contestant]:
    def of_modules(prepare: Callable[[nn.Module], Any], base_dtype: bool) -> Contestant:
        model = Projections(weights)
        model = prepare(adapted(model, [name for name, _ in model.named_children()], base_dtype))
        layers = lora_modules(model)
        if prepare is torch.compile:
            return Contestant(lambda: model(x), [x, *adapters(layers)], model)
        with torch.no_grad():
            model(x)  # as evaluation before training; whatever is learned from a first call is learned here
        return Contestant(lambda: [layer(x) for layer in layers], [x, *adapters(layers)], model)

    def as_is(model: nn.Module) -> nn.Module:
        return model

    found = {"frozen": Contestant(lambda: [F.linear(x, W) for W in weights], [x])}
    adapter_dtypes = {"": False} if x.dtype == torch.float32 else {"": False, ", base dtype": True}
    if compiled:
        torch.compiler.reset()  # Dynamo gives up on a function after eight models
    for suffix, base_dtype in adapter_dtypes.items():
        found[f"PEFT{suffix}"] = of_modules(as_is, base_dtype)
        if compiled:
            found[f"PEFT{suffix}, compiled"] = of_modules(torch.compile, base_dtype)
    pairs = [part.detach().to(x.dtype).requires_grad_() for part in found["PEFT"].wanted[1:]]
    layers = zip(weights, pairs[::2], pairs[1::2], strict=True)
    flat = [part for layer in layers for part in layer]
    found["mm+addmm_"] = Contestant(lambda: MmAddmm.apply(x, ALPHA / RANK, *flat), [x, *pairs])
    backends = {"": "auto", ", triton": "triton"} if x.is_cuda else {"": "auto"}
    for name, backend in backends.items():
        for suffix, base_dtype in adapter_dtypes.items():
            found[f"ours{name}{suffix}"] = of_modules(partial(fused, backend=backend), base_dtype)
    return found


def adapters(layers: list[Any]) -> list[Tensor]:
    return [part["default"].weight for layer in layers for part in (layer.lora_A, layer.lora_B)]


def foreign(x: Tensor, weights: list[Tensor], wanted: str) -> tuple[dict[str, Contestant], dict[str, str]]:
    """Other projects' kernels on adapters of the base's dtype, which they compute in; and who is left out, and why."""
    kernels, left_out = rivals.load(wanted)
    found = {}
    for name, module in kernels.items():
        model = Projections(weights)
        layers = lora_modules(adapted(model, [name for name, _ in model.named_children()], base_dtype=True))
        call = rivals.of_layers(module, layers)
        found[name] = Contestant(partial(call, x), [x, *adapters(layers)])
    return found, left_out


def difference(contestant: Contestant, expected: list[Tensor], dys: list[Tensor]) -> float:
    return max(map(error_ratio, [*contestant.forward(), *contestant.both(dys)], expected))


def agree(
    found: dict[str, Contestant], others: dict[str, Contestant], dys: list[Tensor], check: Check
) -> dict[str, str]:
    """A fast wrong answer is no benchmark: outputs and all gradients against PEFT's.

    Returns who cannot run, and why: of others, which are not this project's to repair, who is wrong too.
    """
    failed: dict[str, str] = {}
    peft, allowed = found["PEFT"], 2 * TOLERANCE[dys[0].dtype]  # either may be as far as that from the exact result
    expected = [*peft.forward(), *peft.both(dys)]
    for name, contestant in (found | others).items():
        if name in ("PEFT", "frozen"):
            continue
        try:
            error = difference(contestant, expected, dys)
        except Exception as problem:
            if name == "ours":
                raise
            failed[name] = first_line(problem)
            check(name, name in others, failed[name])
            continue
        what = f"does not compute what PEFT does: off by {error:.1e}"
        if name in others:
            if not error <= 2 * allowed:  # they round a scaled branch before it is added
                failed[name] = what
            continue
        check(name, error <= allowed, what)
        if name.startswith("ours") and contestant.model is not None:
            reasons = fell_back(contestant.model)
            check(name, not reasons, f"runs PEFT's own forward: {reasons}")
    return failed


def run(
    size: Size, projections: int, dtype: str, backward: bool, benchmark: Any, device: str, options: pytest.Config
) -> None:
    torch.manual_seed(0)
    x = torch.randn(size.tokens, size.width).to(device, DTYPES[dtype]).requires_grad_()
    shape = size.width, size.width
    weights = [(torch.randn(shape) / size.width**0.5).to(device, DTYPES[dtype]) for _ in range(projections)]
    dys = [torch.randn(size.tokens, size.width).to(device, DTYPES[dtype]) for _ in weights]
    found = contestants(x, weights, options.getoption("--compile"))
    others, left_out = foreign(x, weights, options.getoption("--rivals")) if device == "cuda" else ({}, {})
    failed = agree(found, others, dys, checker(benchmark, device))
    found = {name: contestant for name, contestant in (found | others).items() if name not in failed}
    calls: dict[str, Callable[[], object]] = {}
    for name, contestant in found.items():
        calls[name] = partial(contestant.both, dys) if backward else contestant.forward
    graphs, without = in_graphs(calls, ("frozen", "ours", "ours, triton"), device)
    calls |= graphs
    races = interleave(benchmark, calls, device, size.rounds, size.iterations, options.getoption("--best-of"))
    record(benchmark, races, "frozen", device)
    if device != "cuda":
        return
    for name in graphs if "frozen, graph" in graphs else ():
        if name != "frozen, graph":
            ratio = best(races, lambda race, name=name: race[name] / race["frozen, graph"])
            benchmark.extra_info[f"{name} / frozen, graph"] = ratio
    benchmark.extra_info |= {"left out": left_out | failed | without, "rows": rows(benchmark.extra_info)}


def rows(info: dict[str, Any]) -> list[dict[str, Any]]:
    """A line for each contestant: with this many, a table with one column each is too wide to read."""
    found = []
    for key in info:
        name = key.removesuffix(" ms")
        if name != key:
            floor = "frozen, graph" if name.endswith(", graph") else "frozen"
            found.append({"contestant": name, "ms": info[key], "x frozen": info.get(f"{name} / {floor}")})
    return found


def skip_on_a_cpu(size: str, device: str) -> None:
    if size == FOR_A_GPU and device == "cpu":
        pytest.skip("a GPU's size: minutes on a CPU")


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("size", list(SIZES))
def test_layer(
    size: str, dtype: str, direction: str, benchmark: Any, device: str, request: pytest.FixtureRequest
) -> None:
    skip_on_a_cpu(size, device)
    run(SIZES[size], 1, dtype, direction != "forward", benchmark, device, request.config)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("size", ["2048x4096x4096", FOR_A_GPU])
def test_qkv(size: str, dtype: str, benchmark: Any, device: str, request: pytest.FixtureRequest) -> None:
    """Forward and backward of three layers that share x."""
    skip_on_a_cpu(size, device)
    run(SIZES[size], 3, dtype, True, benchmark, device, request.config)
