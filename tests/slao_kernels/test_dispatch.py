"""Which backend an op takes, who decides, and what importing the package does (nothing) and `-m` prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
import twins

import slao_kernels
from slao_kernels import dispatch, native
from slao_kernels.environment import describe

pytestmark = pytest.mark.usefixtures("one_thread")

# What "auto" takes here: an install without a compiler is complete too.
AUTO = "eager" if dispatch.why_not("lora_linear", "native", "cpu") else "native"
ALL = "auto, reference, eager, native, triton"


def python(*args: str, **environment: str) -> subprocess.CompletedProcess:
    """A fresh interpreter, without this one's SLAO_KERNELS_BACKEND."""
    env = {key: value for key, value in os.environ.items() if key != "SLAO_KERNELS_BACKEND"}
    command = [sys.executable, *args]
    return subprocess.run(command, env=env | environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    """The variable as the package reads it at import."""
    monkeypatch.setattr(dispatch, "_environment", "auto")


def test_automatic_choice():
    whole_model = "reference" if native.why_not("cpu") else "native"
    assert {op: dispatch.choose(op, "cpu") for op in dispatch.OPS} == {
        "lora_linear": AUTO,
        "expert_linear": "eager",
        "orthogonal_init": whole_model,
        "scaled_merge": whole_model,
        "fold": whole_model,
        "exact_fold": whole_model,
    }
    kernels = "triton" if dispatch.why_not("exact_fold", "triton", "cuda") is None else "reference"
    assert dispatch.choose("exact_fold", "cuda") == kernels


@pytest.fixture
def pretend(monkeypatch) -> Iterator[Callable[..., None]]:
    """pretend(name=value): dispatch.name is that, and nothing is remembered of what was."""

    def apply(**values: bool) -> None:
        for name, value in values.items():
            monkeypatch.setattr(dispatch, name, value)
        dispatch._available.cache_clear()
        dispatch._no_fp64_products.cache_clear()

    yield apply
    monkeypatch.undo()
    apply()


def test_triton_has_to_be_asked_for_until_it_is_measured(pretend):
    pretend(_triton_installed=True)
    assert dispatch.choose("lora_linear", "cuda") == "eager"
    assert dispatch.choose("lora_linear", "cuda", "triton") == "triton"
    assert "no such device" in dispatch.why_not("lora_linear", "triton", "cpu")
    assert "no such device" in dispatch.why_not("lora_linear", "triton", "mps")
    pretend(_triton_interprets=True)
    assert dispatch.choose("lora_linear", "cpu") == AUTO
    assert dispatch.choose("lora_linear", "cpu", "triton") == "triton"
    pretend(_triton_installed=False)
    for device in ("cpu", "cuda"):
        assert dispatch.why_not("lora_linear", "triton", device) == "triton is not installed"


@pytest.mark.parametrize("op", ["orthogonal_init", "scaled_merge", "fold"])
def test_triton_serves_a_gpu_where_the_cuda_build_is_missing(op, monkeypatch, pretend):
    """Also on ROCm, whose device torch calls "cuda" too. On a CPU it only interprets: the last choice."""
    missing: dict[str, str | None] = {"cuda": "the extension was built without CUDA", "cpu": "no compiler"}
    monkeypatch.setattr(native, "why_not", missing.get)
    pretend(_triton_installed=True, _triton_interprets=True)
    assert dispatch._available(op, "cuda") == ("triton", "reference")
    assert dispatch._available(op, "cpu") == ("reference", "triton")
    missing["cuda"] = None
    pretend()
    assert dispatch.choose(op, "cuda") == "native"
    assert dispatch.choose(op, "cuda", "triton") == "triton"
    missing["cuda"] = "ROCm"
    pretend(_triton_installed=False)
    assert dispatch.choose(op, "cuda") == "reference"


def test_every_choice_can_be_imported():
    for op in dispatch.OPS:
        for backend in dispatch.BACKENDS[1:]:
            if dispatch.why_not(op, backend, "cpu") is None:
                module = dispatch.implementation(op, backend)
                assert module.__name__.startswith(f"slao_kernels.ops.{op}.")


def test_use_backend():
    with slao_kernels.use_backend("reference"):
        assert dispatch.choose("lora_linear", "cpu") == "reference"
        assert dispatch.choose("lora_linear", "cpu", "eager") == "reference"  # wins over a layer's own wish
        with slao_kernels.use_backend("auto"):  # lifts the outer wish
            assert dispatch.choose("lora_linear", "cpu") == AUTO
            with slao_kernels.use_backend("eager"):
                assert dispatch.choose("lora_linear", "cpu") == "eager"
        assert dispatch.choose("lora_linear", "cpu") == "reference"
    assert dispatch.choose("lora_linear", "cpu") == AUTO
    with slao_kernels.use_backend("auto"):  # wins over a layer's own wish too
        assert dispatch.choose("lora_linear", "cpu", "reference") == AUTO
    with pytest.raises(KeyError), slao_kernels.use_backend("reference"):
        raise KeyError
    assert dispatch.choose("lora_linear", "cpu") == AUTO
    assert dispatch.choose("lora_linear", "cpu", "reference") == "reference"  # a layer's own wish
    assert dispatch.choose("fold", "cpu", "eager") == "reference"  # "eager" is torch's calls; fold has one order


def test_unknown_names_list_the_valid_ones():
    message = f"unknown backend 'cuda'; choose one of {ALL}"
    with pytest.raises(ValueError, match=message), slao_kernels.use_backend("cuda"):
        raise AssertionError("must not be entered")
    with pytest.raises(ValueError, match=message):
        dispatch.choose("lora_linear", "cpu", "cuda")
    assert dispatch.choose("lora_linear", "cpu") == AUTO


def test_a_wish_that_cannot_be_met():
    """An error where the op is called, with what could be had instead; nothing is written."""
    x, w, A, B = torch.ones(2, 4), torch.ones(3, 4), torch.ones(1, 4), torch.ones(3, 1)
    message = "backend 'triton' cannot run {} on cpu: .*; available here: (native, )?{}reference"
    with slao_kernels.use_backend("triton"):
        with pytest.raises(ValueError, match=message.format("lora_linear", "eager, ")):
            slao_kernels.lora_linear(x, w, None, A, B, 1.0)
        with pytest.raises(ValueError, match=message.format("fold", "")):
            slao_kernels.fold_([w], [A], [B], [1.0])
    assert torch.equal(w, torch.ones(3, 4))


def test_patched_layers_take_their_backend():
    """ "reference" is plain operations: our operator does not run; the numbers are the same."""
    model, twin = twins.net(), twins.net()
    assert slao_kernels.patch(model, backend="reference").backend == "reference"
    twins.check_same(model, twin, ops={})
    with slao_kernels.use_backend("eager"):
        twins.check_fused(model)


def test_the_choice_is_traced_and_guarded():
    """torch.compile sees the backend as a constant, and compiles again when the wish changes."""

    @torch.compile(fullgraph=True, backend="eager")
    def which(x):
        return x + dispatch.BACKENDS.index(dispatch.choose("lora_linear", "cpu"))

    zero = torch.zeros(())
    assert which(zero) == dispatch.BACKENDS.index(AUTO)
    with slao_kernels.use_backend("reference"):
        assert which(zero) == dispatch.BACKENDS.index("reference")
    assert which(zero) == dispatch.BACKENDS.index(AUTO)


ENVIRONMENT = """
import json, torch, slao_kernels
from slao_kernels import dispatch
found = {"auto": dispatch.choose("lora_linear", "cpu"), "wish": dispatch.choose("lora_linear", "cpu", "eager")}
with slao_kernels.use_backend("eager"):
    found["block"] = dispatch.choose("lora_linear", "cpu")
print(json.dumps(found))
"""


def test_environment_variable():
    """Weaker than a layer's own wish, weaker than use_backend."""
    done = python("-c", ENVIRONMENT, SLAO_KERNELS_BACKEND="reference")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"auto": "reference", "wish": "eager", "block": "eager"}


IMPORT = """
import json, os, sys, threading
import torch
before, tasks = set(sys.modules), len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0
import slao_kernels
new = sorted({name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))
started = len(os.listdir("/proc/self/task")) - tasks if tasks else 0
print(json.dumps({
    "new": new,
    "loaded": [name for name in ("peft", "transformers", "triton", "accelerate") if name in sys.modules],
    "threads": started + threading.active_count() - 1,
    "cuda": torch.cuda.is_initialized(),
}))
"""


def test_import_does_nothing():
    """torch alone is needed; no thread is started, no CUDA context made."""
    done = python("-c", IMPORT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"new": ["slao_kernels"], "loaded": [], "threads": 0, "cuda": False}


def test_what_main_prints_of_every_op_and_its_backend():
    said = describe()
    lines = [line.split() for line in said.splitlines() if line.startswith("  ")]
    chosen = {line[0]: line[1] for line in lines}
    assert chosen.items() >= {op: dispatch.choose(op, "cpu") for op in dispatch.OPS}.items()
    assert said.count("triton: Triton has no such device") + said.count("triton is not installed") == len(dispatch.OPS)
    assert f"torch         {torch.__version__}" in said
    assert "\ncpu: " in said


def test_a_wish_of_the_environment_that_cannot_be_met(monkeypatch):
    """Importing works, the first op says what is wrong, the command that explains the choice ends in no traceback."""
    for name in ("triton", "gpu"):
        monkeypatch.setattr(dispatch, "_environment", name)
        assert repr(name) in describe()
    with pytest.raises(ValueError, match=f"SLAO_KERNELS_BACKEND='gpu' is not a backend; choose one of {ALL}"):
        dispatch.choose("fold", "cpu")
    done = python("-m", "slao_kernels", SLAO_KERNELS_BACKEND="gpu")
    assert (done.returncode, done.stderr) == (0, "")
    assert repr("gpu") in done.stdout
    assert all(op in done.stdout for op in dispatch.OPS)


@pytest.mark.parametrize(
    ("version", "hip", "capability", "refused"),
    [
        ("3.6.0", None, (9, 0), False),
        ("3.7.1", None, (10, 0), True),
        ("3.6.0", "6.4", (9, 4), True),
        ("3.8.0", None, (10, 0), False),
        ("3.9.0+git", "7.0", (9, 5), False),
        ("nightly", None, (10, 0), False),
    ],
)
def test_triton_s_init_is_refused_where_an_old_compiler_fails(monkeypatch, pretend, version, hip, capability, refused):
    monkeypatch.setattr("importlib.metadata.version", {"triton": version}.get)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    pretend(_triton_installed=True)
    reason = dispatch.why_not("orthogonal_init", "triton", "cuda")
    assert (reason is not None) == refused == ("does not compile" in str(reason)), reason
    assert dispatch.why_not("scaled_merge", "triton", "cuda") is None
