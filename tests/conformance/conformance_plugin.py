"""A pytest plugin for PEFT's own tests: keeps those with LoRA, patches every LoRA model at its creation, and counts.

`pytest -p conformance_plugin --conform=plain|patched --conform-out=FILE`; run.py does both and compares. FILE gets
{"tests": {test: [outcome, layers patched, fused forwards, how it failed]}, "errors": {file: why not collected}}.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

_layers = 0  # that patch has fused in this process
_forwards = 0  # theirs; those of compiled code, where nobody looks on, are not among them
_KEY = "slao_kernels"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--conform", choices=["plain", "patched"], required=True)
    parser.addoption("--conform-out", type=Path, required=True)
    parser.addoption("--conform-all", action="store_true", help="also tests whose configuration is no LoraConfig")


def pytest_configure(config: pytest.Config) -> None:
    for mark in ("single_gpu_tests", "multi_gpu_tests", "bitsandbytes", "skipf"):  # PEFT's, from its pyproject.toml
        config.addinivalue_line("markers", mark)
    _no_hub()
    if config.getoption("--conform") == "patched":
        _patch_at_creation()
        _count_forwards()
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Results(config.getoption("--conform-out")))


def _no_hub() -> None:
    """PEFT's tests lift HF_HUB_OFFLINE for a model's first use; without a network each would retry for a minute."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.errors import OfflineModeIsEnabled

    def refuse() -> Any:
        raise OfflineModeIsEnabled("offline: the conformance run reaches no hub")

    set_client_factory(refuse)


def _patch_at_creation() -> None:
    """PEFT has three doors through which LoRA layers come: tuners inject them, and two loaders bring weights."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTuner
    from transformers.integrations.peft import PeftAdapterMixin

    BaseTuner.inject_adapter = _then_patched(BaseTuner.inject_adapter, lambda tuner, args, _: args[0])
    # Once more after loading: with low_cpu_mem_usage the adapters were on meta before.
    PeftModel.load_adapter = _then_patched(PeftModel.load_adapter, lambda model, *_: model)
    PeftModel.from_pretrained = classmethod(
        _then_patched(PeftModel.from_pretrained.__func__, lambda cls, args, result: result)
    )
    PeftAdapterMixin.load_adapter = _then_patched(PeftAdapterMixin.load_adapter, lambda model, *_: model)


def _then_patched(method: Callable[..., Any], model_of: Callable[..., Any]) -> Callable[..., Any]:
    import slao_kernels
    from slao_kernels.adapters import lora_layers

    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        model = model_of(self, args or tuple(kwargs.values()), result)
        if any(True for _ in lora_layers(model)):
            global _layers
            _layers += len(slao_kernels.patch(model).patched)
        return result

    return wrapper


def _count_forwards() -> None:
    """Every way from a patched layer's forward into our operators passes one of these."""
    from torch.compiler import is_compiling

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            global _forwards
            if not is_compiling():
                _forwards += 1
            return function(*args, **kwargs)

        return wrapper

    layers = importlib.import_module("slao_kernels.layers")
    doors = [(layers, "linear"), (layers, "add"), (layers.dora, "run")]
    for module, name in doors:
        setattr(module, name, counted(getattr(module, name)))


def _mentions(value: Any, depth: int = 3) -> Iterator[type]:
    """The PEFT configuration classes among a test's parameters."""
    from peft import PeftConfig

    if isinstance(value, type) and issubclass(value, PeftConfig):
        yield value
    elif isinstance(value, PeftConfig):
        yield type(value)
    elif isinstance(value, (list, tuple, dict)) and depth:
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _mentions(inner, depth - 1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without the tests that are parametrized with other methods' configurations only."""
    from peft import LoraConfig

    if config.getoption("--conform-all"):
        return
    kept, dropped = [], []
    for item in items:
        parameters = getattr(item, "callspec", None)
        classes = set(_mentions(dict(parameters.params))) if parameters else set()
        (dropped if classes and LoraConfig not in classes else kept).append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    before = _layers, _forwards
    yield
    item.user_properties.append((_KEY, [_layers - before[0], _forwards - before[1]]))


class _Results:
    """Where the reports of all workers arrive."""

    def __init__(self, out: Path) -> None:
        self.out, self.tests, self.errors = out, {}, {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        outcome = "xfailed" if report.outcome == "skipped" and hasattr(report, "wasxfail") else report.outcome
        if self.tests.get(report.nodeid, ["passed"])[0] == "failed":  # a teardown does not mend it
            return
        crash = getattr(report.longrepr, "reprcrash", None)
        why = crash.message if crash else str(report.longrepr or "")[-300:]
        counts = dict(report.user_properties).get(_KEY, [0, 0])
        self.tests[report.nodeid] = [outcome, *counts, why[:600] if outcome == "failed" else ""]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.errors[report.nodeid] = str(report.longrepr)[-600:]

    def pytest_sessionfinish(self) -> None:
        self.out.write_text(json.dumps({"tests": self.tests, "errors": self.errors}))
