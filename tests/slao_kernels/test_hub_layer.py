"""The ops as a hub kernel of the `kernels` package: a pure forward that replaces PEFT's (imports: test_imports.py)."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "slao_kernels"
PARTS = ["dispatch.py", "native.py", "ops"]  # what a hub build takes; patching and its classes know PEFT

# A layer as `kernels` wants it: no constructor, no members, forward(self, ...) with the signature that it replaces.
LAYER = """
from torch import nn
from .ops.lora_linear import lora_linear

class LoraLinear(nn.Module):
    can_torch_compile = True
    has_backward = True

    def forward(self, x, *args, **kwargs):
        (name,) = self.active_adapters
        base, A, B = self.base_layer, self.lora_A[name].weight, self.lora_B[name].weight
        return lora_linear(x, base.weight, base.bias, A, B, self.scaling[name])
"""

# Another process, without slao_kernels: an operator's name can be registered once.
PROGRAM = """
import json, sys, torch, kernels
from pathlib import Path
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import Linear
from torch import nn

def net():
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["0", "2"], init_lora_weights=False)
    return inject_adapter_in_model(config, nn.Sequential(nn.Linear(24, 20), nn.Tanh(), nn.Linear(20, 8))).double()

def step(model):
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    grads = [p.grad for n, p in model.named_parameters() if p.requires_grad]
    return [y.detach(), x.grad, *grads], y.grad_fn.name()

plain, theirs = step(net())
kernels.replace_kernel_forward_from_hub(Linear, "LoraLinear")
repository = kernels.LocalLayerRepository(Path(sys.argv[1]), layer_name="LoraLinear")
kernels.register_kernel_mapping({"LoraLinear": {"cpu": {kernels.Mode.TRAINING: repository}}})
model = kernels.kernelize(net(), mode=kernels.Mode.TRAINING, device="cpu", use_fallback=False)
found, node = step(model)
errors = [((a - b).square().mean().sqrt() / b.square().mean().sqrt()).item() for a, b in zip(found, plain, strict=True)]
operators = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("slao_kernels::lora_linear")]
own = "slao_kernels" in sys.modules
print(json.dumps({"errors": errors, "nodes": [theirs, node], "own": own, "operators": len(operators)}))
"""


def test_layer_from_a_local_repository(tmp_path):
    """PEFT's Linear forward, replaced through `kernels` by one built on our op: the same numbers in fp64."""
    if importlib.util.find_spec("kernels") is None:
        pytest.skip("the package `kernels` is not installed")
    build = tmp_path / "slao" / "build" / "torch-cpu"
    build.mkdir(parents=True)
    for part in PARTS:
        (shutil.copytree if (ROOT / part).is_dir() else shutil.copyfile)(ROOT / part, build / part)
    for library in ROOT.glob("_C*.so"):
        shutil.copyfile(library, build / library.name)
    (build / "__init__.py").write_text("from . import layers\n")
    (build / "layers.py").write_text(LAYER)
    metadata = {"id": "_slao_0", "name": "slao", "version": 0, "license": "Apache-2.0", "python-depends": []}
    (build / "metadata.json").write_text(json.dumps({**metadata, "backend": {"type": "cpu"}}))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-c", PROGRAM, str(tmp_path / "slao")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(result["errors"]) == 6  # y, dx, and dA and dB of two layers
    assert max(result["errors"]) < 1e-12, result
    assert result["nodes"] == ["AddBackward0", "LoraLinearBackward"]  # PEFT's forward, ours
    assert result["operators"] > 0
    assert not result["own"]
