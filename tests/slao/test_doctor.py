"""`slao doctor`: it names this machine, and a kernel that is wrong, raises or changes bits makes it fail."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from slao.cli import main
from slao_kernels import dispatch, environment, selftest
from slao_kernels.ops.exact_fold import reference as exact_fold
from slao_kernels.ops.fold import reference as fold
from slao_kernels.ops.lora_linear.products import TorchProducts
from slao_kernels.ops.orthogonal_init import reference as orthogonal_init
from slao_kernels.ops.scaled_merge import reference as scaled_merge
from slao_kernels.testing import ONCE, TOLERANCE


def diagnosis(capsys: pytest.CaptureFixture[str], code: int) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["doctor", "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    return found


def wrong(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [check for check in found["checks"] if not check["passed"]]


@pytest.fixture
def in_fp32(monkeypatch) -> None:
    """The other dtypes take their time, too."""
    monkeypatch.setattr(selftest, "DTYPES", (torch.float32,))


def test_every_op_on_every_backend_in_every_dtype(capsys):
    found = diagnosis(capsys, 0)
    assert found.keys() == {"versions", "devices", "backends", "checks", "passed"}
    assert found["passed"] is True
    assert found["versions"]["torch"] == torch.__version__
    assert found["devices"] == environment.devices()
    chosen = {each["op"]: each["backend"] for each in found["backends"] if each["device"] == "cpu"}
    assert chosen == {op: dispatch.choose(op, "cpu") for op in dispatch.OPS}
    assert all(each["others"] and each["problem"] is None for each in found["backends"])
    kernels = {
        (op, backend, device)
        for device in found["devices"]
        for op in dispatch.OPS
        for backend in dispatch.BACKENDS[1:]
        if dispatch.why_not(op, backend, device) is None
    }
    dtypes = ("float32", "bfloat16", "float16", "float64")
    expected = {(*kernel, dtype) for kernel in kernels for dtype in dtypes}
    assert {tuple(check[key] for key in ("op", "backend", "device", "dtype")) for check in found["checks"]} == expected
    for check in found["checks"]:
        assert (check["run"], check["passed"], check["problem"]) == (True, True, None)
        assert 0 <= check["error"] <= check["bound"]
        dtype = getattr(torch, check["dtype"])
        if check["op"] in ("lora_linear", "expert_linear"):
            assert check["bound"] == TOLERANCE[dtype]
            assert check["result"] in ("y", "dx", "dweight", "dbias", "dA", "dB")
        elif check["op"] in ("fold", "scaled_merge"):
            assert check["bound"] == ONCE[dtype]


def scaled(dA: float) -> Callable[..., Any]:
    """The backward pass of lora_linear with another dA."""
    right = TorchProducts.backward

    def backward(self: TorchProducts, *args: Any, **options: Any) -> Any:
        dx, found, *rest = right(self, *args, **options)
        return dx, found * dA, *rest

    return backward


def off(function: Callable[..., None], change: Callable[[torch.Tensor], object]) -> Callable[..., None]:
    """An op in place whose first tensor is changed afterwards."""

    def run(tensors: Any, *more: Any) -> Any:
        done = function(tensors, *more)
        change(tensors[0])
        return done

    return run


# what is broken -> (where, name, what stands there, the op, the result that the doctor names)
BROKEN = {
    "a fold that is off by a millionth": (
        fold, "fold_", off(fold.fold_, lambda W: W.mul_(1 + 2e-6)), "fold", "W",
    ),
    "a merge that leaves a NaN": (
        scaled_merge, "scaled_merge_", off(scaled_merge.scaled_merge_, lambda m: m[0].fill_(math.nan)),
        "scaled_merge", "merged",
    ),
    "an init whose rows are not of length 1": (
        orthogonal_init, "orthogonal_init_", off(orthogonal_init.orthogonal_init_, lambda A: A[3].mul_(1 + 1e-5)),
        "orthogonal_init", "|A A^T - I|",
    ),
    "a gradient that is too large": (TorchProducts, "backward", scaled(dA=1.00001), "lora_linear", "dA"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_kernel_that_is_wrong(case, in_fp32, capsys, monkeypatch):
    where, name, broken, op, result = BROKEN[case]
    monkeypatch.setattr(where, name, broken)
    checks = wrong(diagnosis(capsys, 1))
    backends = [check["backend"] for check in checks]
    # The core's products for bf16 stand on torch's for the rest.
    assert backends == (["reference"] if op != "lora_linear" else ["eager", "native"][: len(backends)])
    for check in checks:
        assert (check["op"], check["result"]) == (op, result)
        assert check["error"] is None or check["error"] > check["bound"]
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    failed = [line.split() for line in lines if " FAILED " in line]
    assert sorted(words[1:5] for words in failed) == [[op, backend, "FAILED", "float32"] for backend in backends]
    assert re.fullmatch(rf"(\d+) checks of \1 kernels: {len(backends)} FAILED", lines[-1])


def test_bits_that_do_not_come_back(in_fp32, capsys, monkeypatch):
    """One bit of one weight, which unfold_ cannot know of: it comes after it has looked."""
    right = exact_fold.unfold

    def unfold(layers: Any, streams: Any) -> None:
        right(layers, streams)
        layers[0].W.view(torch.int32)[2, 3] ^= 1

    monkeypatch.setattr(exact_fold, "unfold", unfold)
    (check,) = wrong(diagnosis(capsys, 1))
    assert (check["op"], check["backend"]) == ("exact_fold", "reference")
    assert (check["result"], check["error"], check["bound"]) == ("bytes changed", 1.0, 0.0)


def test_a_kernel_that_raises(in_fp32, capsys, monkeypatch):
    def merge(*given: object) -> None:
        raise RuntimeError("no kernel image is available\nfor execution")

    monkeypatch.setattr(scaled_merge, "scaled_merge_", merge)
    (check,) = wrong(diagnosis(capsys, 1))
    assert check["problem"] == "RuntimeError: no kernel image is available for execution"
    assert (check["run"], check["error"], check["bound"]) == (True, None, None)
    assert main(["doctor"]) == 1
    assert "FAILED  float32 RuntimeError: no kernel image is available" in capsys.readouterr().out


def test_checks_that_no_time_is_left_for_are_named(capsys, monkeypatch):
    left = list(selftest.checks(seconds=0.0))
    assert len(left) >= 4 * len(dispatch.OPS)
    assert not any(check.run for check in left)
    assert all(check.passed and math.isnan(check.error) for check in left)
    monkeypatch.setattr(selftest.checks, "__defaults__", (0.0,))
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"cpu +fold +reference +not run float32, bfloat16, float16, float64: no time was left", out)
    assert "0 checks of " in out


def test_a_backend_that_cannot_be_had(in_fp32, capsys, monkeypatch):
    monkeypatch.setattr(dispatch, "_environment", "gpu")
    found = diagnosis(capsys, 1)
    assert wrong(found) == []
    assert found["passed"] is False
    assert {each["backend"] for each in found["backends"]} == {None}
    assert all("SLAO_KERNELS_BACKEND='gpu' is not a backend" in each["problem"] for each in found["backends"])


def test_on_a_terminal(in_fp32, capsys, monkeypatch):
    """80 columns; the same verdicts as in a pipe."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert main(["doctor"]) == 0
    plain = capsys.readouterr().out
    shown = Terminal()
    with monkeypatch.context() as change:
        change.setenv("COLUMNS", "80")
        change.setenv("TERM", "xterm")
        change.setattr(sys, "stdout", shown)
        assert main(["doctor"]) == 0
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown.getvalue()).splitlines()
    assert max(map(len, lines)) <= 80
    verdicts = [line for line in plain.splitlines() if re.match(r"cpu  \w+ +\w+ +ok ", line)]
    assert len(verdicts) >= len(dispatch.OPS)
    assert [line.rstrip() for line in lines][-len(verdicts) - 2 : -1] == plain.splitlines()[-len(verdicts) - 2 : -1]
    assert "\x1b" not in plain
    for op in dispatch.OPS:
        assert any(re.match(rf"{op} +{dispatch.choose(op, 'cpu')} ", line) for line in lines)
