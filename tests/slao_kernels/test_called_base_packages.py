"""PEFT's LoRA classes that exist only beside a package we cannot install here (EETQ, INC): over packages made up for
the test, whose layers really quantise; PEFT's dispatch, its class and ours are the real ones. In another process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

STAND_IN = """
import torch
from torch import nn
class {name}(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
    def forward(self, x):
        return nn.functional.linear(x, (self.weight * self.scale).to(x.dtype), self.bias.to(x.dtype))
"""

RUN = """
import importlib, pickle, sys
import peft, torch
from torch import nn
import slao_kernels
from slao_kernels import layers
from slao_kernels.testing import error_ratio

module, name, theirs, ours, file = sys.argv[1:]
base_class = getattr(importlib.import_module(module), name)

def net():
    torch.manual_seed(0)
    model = nn.Sequential(base_class(nn.Linear(24, 20)))
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0"], init_lora_weights=False)
    return peft.inject_adapter_in_model(config, model)

def step(model):
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = model(x)
    parameters = [p for n, p in model.named_parameters() if "lora_" in n]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *parameters])]

model, twin = net(), net()
assert type(twin[0]).__name__ == theirs, type(twin[0])
report = slao_kernels.patch(model, strict=True)
assert type(model[0]).__name__ == ours, type(model[0])
assert type(model[0]) is getattr(layers, ours)
assert list(report.notes) == ["0"]
worst = max(error_ratio(a, b) for a, b in zip(step(model), step(twin), strict=True))
assert worst <= 1e-6, worst
assert report.fallbacks == {}
copied = pickle.loads(pickle.dumps(model))
assert type(copied[0]) is type(model[0])
assert slao_kernels.unpatch(model) == 1
assert type(model[0]) is type(twin[0])
torch.save(copied, file)
print("compared", worst)
"""

LOAD = """
import sys
import torch
model = torch.load(sys.argv[1], weights_only=False)
print(type(model[0]).__name__, tuple(model(torch.ones(2, 24)).shape))
"""

INC = "neural_compressor.torch.algorithms.fp8_quant._quant_common.helper_modules"
# package -> (module of its layer, the layer, PEFT's class, ours)
PACKAGES = {
    "EETQ": ("eetq", "EetqLinear", "EetqLoraLinear", "FusedEetqLoraLinear"),
    "INC": (INC, "PatchedLinear", "IncLoraLinear", "FusedIncLoraLinear"),
}


@pytest.mark.parametrize("package", ["EETQ", pytest.param("INC", marks=pytest.mark.exhaustive)])
def test_class_of_a_package(package, tmp_path):
    module, name, theirs, ours = PACKAGES[package]
    folder = tmp_path
    for part in module.split("."):
        folder = folder / part
        folder.mkdir()
        (folder / "__init__.py").touch()
    (folder / "__init__.py").write_text(STAND_IN.format(name=name))
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}

    def run(*arguments: str) -> str:
        command = [sys.executable, "-c", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    file = str(Path(tmp_path) / "model.pt")
    assert "compared" in run(RUN, module, name, theirs, ours, file)
    assert run(LOAD, file).split("\n")[-2] == f"{ours} (2, 20)"
