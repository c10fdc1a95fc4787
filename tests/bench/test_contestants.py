"""What the benches compare: one frozen base for all, real geometries, other projects' kernels, and their tables."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import bench_lora_kernels
import bench_lora_linear
import bench_training_step
import models
import pytest
import rivals
import torch
import torch.nn.functional as F
from contestants import adapted, lora_modules, twin
from models import CASES, Case
from race import checker
from shapes import GEOMETRIES
from torch import Tensor, nn

from slao_kernels.testing import tiny_model

MUST = checker(None, "cpu")  # what is wrong is an error
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}


def test_twins_share_every_parameter_and_no_module():
    model = tiny_model("llama", tie_word_embeddings=True).requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    copied = twin(model)
    assert {id(p) for p in copied.parameters()} == {id(p) for p in model.parameters()}
    assert {id(b) for b in copied.buffers()} == {id(b) for b in model.buffers()}
    assert not {id(module) for module in copied.modules()} & {id(module) for module in model.modules()}
    adapted(copied, "all-linear")
    assert len(lora_modules(copied)) == 14
    assert lora_modules(model) == []
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


# Parameters of the published models.
@pytest.mark.parametrize(("name", "count"), [("llama-3.2-1b", 1_235_814_400), ("llama-3-8b", 8_030_261_248)])
def test_geometries_are_the_published_ones(name, count):
    (build,) = {case.build for key, case in CASES.items() if key.startswith(name)}
    model = models.on_device(build, torch.bfloat16, "meta", in_place=True)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    linear = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    assert [tuple(layer.weight.shape) for layer in linear] == GEOMETRIES[name].all_layers()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_training_step_as_on_a_gpu(dtype, checkpointing):
    """A GPU's case with a small model: built in place, all on one base; every contestant trains, and none the base."""
    case = Case(partial(models.llama, **TINY), 2, 8, 1, for_a_gpu=True, checkpointing=checkpointing)
    found = bench_training_step.contestants(case, dtype, "cpu", others={"Axolotl": StandIn})
    modes = ["", ", base dtype"] if dtype == torch.bfloat16 else [""]
    assert set(found) == {"frozen", "Axolotl", *(f"{who}{mode}" for who in ("PEFT", "ours") for mode in modes)}
    assert bench_training_step.agree(found, MUST) == {}
    frozen = found["frozen"].model
    before = [parameter.clone() for parameter in frozen.parameters()]
    for name, training in found.items():
        start = [parameter.detach().clone() for parameter in training.trained]
        training.step()
        training.step()
        assert training.model.is_gradient_checkpointing == checkpointing
        moved = [not torch.equal(a, b) for a, b in zip(start, training.trained, strict=True)]
        # The rate is small: in bf16 a step is less than a bit of it.
        assert all(moved) or training.trained[0].dtype == torch.bfloat16 or name == "frozen"
        assert training.embeddings.grad is None
    assert all(torch.equal(a, b) for a, b in zip(before, frozen.parameters(), strict=True))


def test_a_rival_that_is_wrong_is_left_out():
    class Wrong(StandIn):
        @staticmethod
        def apply_lora_o(module, x: Tensor) -> Tensor:
            return StandIn.apply_lora_o(module, x) * 3

    class Broken(StandIn):
        @staticmethod
        def apply_lora_qkv(module, x: Tensor, inplace: bool = True):
            raise RuntimeError("no such device")

    case = Case(partial(models.llama, **TINY), 2, 8, 1)
    found = bench_training_step.contestants(case, torch.float32, "cpu", others={"Axolotl": Wrong, "Unsloth": Broken})
    failed = bench_training_step.agree(found, MUST)
    assert set(failed) == {"Axolotl", "Unsloth"}
    assert "does not compute what PEFT does" in failed["Axolotl"]
    assert failed["Unsloth"] == "RuntimeError: no such device"


def scaled(found, name: str) -> None:
    """From now on that contestant's B is three times what it was."""
    for layer in lora_modules(found[name].model):
        layer.lora_B["default"].weight.data.mul_(3)


def test_ours_that_is_wrong_is_an_error_on_a_cpu_and_a_note_on_a_gpu():
    note = SimpleNamespace(extra_info={})
    steps = bench_training_step.contestants(Case(partial(models.llama, **TINY), 2, 8, 1), torch.float32, "cpu")
    torch.manual_seed(0)
    x, weights = torch.randn(10, 24, requires_grad=True), [torch.randn(24, 24)]
    layers = bench_lora_linear.contestants(x, weights, compiled=False)
    for found in (steps, layers):
        scaled(found, "ours")
    dys = [torch.randn(10, 24)]
    for agree in (
        lambda check: bench_training_step.agree(steps, check),
        lambda check: bench_lora_linear.agree(layers, {}, dys, check),
    ):
        with pytest.raises(AssertionError, match="ours does not compute what PEFT does"):
            agree(MUST)
        note.extra_info.clear()
        assert agree(checker(note, "cuda")) == {}  # and takes part in the race
        assert list(note.extra_info["wrong"]) == ["ours"]
        assert "does not compute what PEFT does" in note.extra_info["wrong"]["ours"]


def test_one_of_ours_that_raises_on_a_gpu_does_not_race():
    torch.manual_seed(0)
    x, dys = torch.randn(10, 24, requires_grad=True), [torch.randn(10, 24)]
    found = bench_lora_linear.contestants(x, [torch.randn(24, 24)], compiled=False)

    def broken():
        raise RuntimeError("no such kernel")

    found["ours, triton"] = bench_lora_linear.Contestant(broken, [x])
    note = SimpleNamespace(extra_info={})
    failed = bench_lora_linear.agree(found, {}, dys, checker(note, "cuda"))
    assert failed == note.extra_info["wrong"] == {"ours, triton": "RuntimeError: no such kernel"}


def test_rows_of_a_step():
    races = [
        {
            "PEFT, base dtype, compiled": 1.1,
            "frozen": 1.0,
            "PEFT": 2.0,
            "PEFT, base dtype": 1.5,
            "ours": 1.25,
            "ours, base dtype": 1.2,
            "Unsloth": 1.4,
        }
    ]
    rows = {row["contestant"]: row for row in bench_training_step.rows(races, 1000, {"ours": 2_000_000_000})}
    assert rows["ours"] == {
        "contestant": "ours",
        "ms": 1250.0,
        "x frozen": 1.25,
        "tokens/s": 800,
        "overhead left": 0.25,
        "step GB": 2.0,
    }
    assert rows["ours, base dtype"]["overhead left"] == pytest.approx(0.4)
    assert rows["PEFT, base dtype, compiled"]["overhead left"] == pytest.approx(0.2)
    assert rows["Unsloth"]["overhead left"] == pytest.approx(0.8)
    assert rows["PEFT"]["overhead left"] is rows["frozen"]["overhead left"] is rows["frozen"]["step GB"] is None


# Other projects' kernels


class StandIn:
    """Their three functions, by PEFT's formula."""

    @staticmethod
    def layer(layer, x: Tensor) -> Tensor:
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        t = F.linear(F.linear(x.to(A.dtype), A), B) * layer.scaling["default"]
        return F.linear(x, layer.base_layer.weight) + t.to(x.dtype)

    @staticmethod
    def apply_lora_o(module, x: Tensor) -> Tensor:
        return StandIn.layer(module.o_proj, x)

    @staticmethod
    def apply_lora_qkv(module, x: Tensor, inplace: bool = True) -> tuple[Tensor, ...]:
        return tuple(StandIn.layer(layer, x) for layer in (module.q_proj, module.k_proj, module.v_proj))

    @staticmethod
    def apply_lora_mlp_swiglu(module, x: Tensor, inplace: bool = True) -> Tensor:
        hidden = F.silu(StandIn.layer(module.gate_proj, x)) * StandIn.layer(module.up_proj, x)
        return StandIn.layer(module.down_proj, hidden)


def test_rivals_that_are_not_there_have_a_reason(monkeypatch):
    monkeypatch.setitem(rivals.MODULES, "axolotl", "no_such_package.kernels")
    rivals.load.cache_clear()
    monkeypatch.setattr(
        rivals.importlib.util, "find_spec", lambda name: None if name == "unsloth" else SimpleNamespace()
    )
    found, left_out = rivals.load("axolotl, unsloth")
    assert found == {}
    assert left_out["Unsloth"] == "not installed"
    assert left_out["Axolotl"].startswith("cannot be imported: ModuleNotFoundError")
    rivals.load.cache_clear()
    assert rivals.load("") == ({}, {})
    with pytest.raises(ValueError, match="unknown 'liger'; choose from axolotl, unsloth"):
        rivals.load("liger")


@pytest.mark.parametrize("projections", [1, 3])
def test_rivals_take_one_layer_or_three(projections):
    torch.manual_seed(0)
    x, dys = torch.randn(10, 24, requires_grad=True), [torch.randn(10, 24) for _ in range(projections)]
    weights = [torch.randn(24, 24) for _ in range(projections)]
    found = bench_lora_linear.contestants(x, weights, compiled=False)
    model = bench_lora_linear.Projections(weights)
    layers = lora_modules(adapted(model, [name for name, _ in model.named_children()], base_dtype=True))
    call = partial(rivals.of_layers(StandIn, layers), x)
    other = bench_lora_linear.Contestant(call, [x, *bench_lora_linear.adapters(layers)])
    wrong = bench_lora_linear.Contestant(lambda: [y * 2 for y in call()], other.wanted)
    failed = bench_lora_linear.agree(found, {"Axolotl": other, "Unsloth": wrong}, dys, MUST)
    assert list(failed) == ["Unsloth"]


def test_rows_of_a_layer():
    info = {"frozen ms": 1.0, "ours ms": 1.5, "ours / frozen": 1.5, "frozen, graph ms": 0.5, "ours_ms": 1.5}
    info |= {"ours, graph ms": 0.6, "ours, graph / frozen": 0.6, "ours, graph / frozen, graph": 1.2}
    assert bench_lora_linear.rows(info) == [
        {"contestant": "frozen", "ms": 1.0, "x frozen": None},
        {"contestant": "ours", "ms": 1.5, "x frozen": 1.5},
        {"contestant": "frozen, graph", "ms": 0.5, "x frozen": None},
        {"contestant": "ours, graph", "ms": 0.6, "x frozen": 1.2},
    ]


# The kernels alone


def test_figures_of_a_kernel():
    """1 GB and 10 GFLOP in 1 ms: half of a 2 TB/s copy, a tenth of a 100 TFLOP/s GEMM."""
    row = bench_lora_kernels.figures(1e-3, 2e-3, 10**9, 10**10, 2e12, 1e14)
    expected = {"us": 1000, "torch us": 2000, "torch / ours": 2, "GB/s": 1000, "% copy": 50, "TFLOP/s": 10}
    assert row == pytest.approx(expected | {"% GEMM": 10, "% roof": 50})


@pytest.mark.parametrize("product", list(bench_lora_kernels.PRODUCTS))
def test_products_touch_what_is_counted(product, monkeypatch):
    """Inputs once and outputs once: the bytes of TOUCHED."""
    monkeypatch.setitem(bench_lora_kernels.ROTATED, "cpu", 3 * 40 * 24 * 4)
    sets = bench_lora_kernels.draw(product, 40, 24, 8, torch.float32, "cpu")
    assert len(sets) == 3
    written = bench_lora_kernels.PRODUCTS[product](bench_lora_kernels.TORCH, sets[0])
    x, t, A = 40 * 24, 40 * 8, 8 * 24  # y is as large as x, g as t, B, dA and dB as A
    outputs = {"shrink": [t], "expand": [x], "outer": [A], "grad_t": [t, A]}[product]
    assert [tensor.numel() for tensor in written] == outputs
    inputs = {"shrink": x + A, "expand": t + A, "outer": t + x, "grad_t": x + t + A}[product]
    assert bench_lora_kernels.bytes_of(sets[0], written) == 4 * (inputs + sum(outputs))


INTERPRETED = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import bench_lora_kernels as bench
from race import checker
from slao_kernels.ops.operators import products_of
from slao_kernels.testing import error_ratio

bench.ROTATED["cpu"] = 1
for product in ("shrink", "outer", "expand"):
    theirs, masked, sets, found = bench.dropped(product, 80, 64, 8, torch.float32, "cpu", checker(None, "cpu"))
    share = (masked.kept == 0).double().mean().item()
    assert 0.05 < share < 0.15, share
for product, run in bench.PRODUCTS.items():
    s = bench.draw(product, 80, 64, 8, torch.float32, "cpu")[0]
    exact = run(bench.TORCH, {name: tensor.double() for name, tensor in s.items()})
    assert max(map(error_ratio, run(products_of("triton"), s), exact)) < 2e-6, product
parts, out = torch.randn(5, 24, 8), torch.empty(24, 8)
for reduce in bench.reducers():
    reduce(parts, out.fill_(float("nan")))
    assert error_ratio(out, parts.double().sum(0)) < 1e-6
print("all right")
"""


def test_triton_kernels_under_the_interpreter():
    pytest.importorskip("triton", reason="triton is not installed")
    folder = os.path.dirname(bench_lora_kernels.__file__)
    command = [sys.executable, "-c", INTERPRETED, folder]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.stdout == "all right\n", done.stderr[-3000:]
