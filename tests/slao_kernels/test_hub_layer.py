"""lora_linear as a repository of the package `kernels` (tools/hub): PEFT's forward replaced by one on our op."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Another process, in which nothing imports slao_kernels before the end.
PROGRAM = """
import importlib, json, pkgutil, sys, torch, kernels
from pathlib import Path
from kernels._rust import Digest, DigestAlgorithm, Metadata
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import Linear
from torch import nn

folder = Path(sys.argv[1])
variant = folder / "build" / "torch-cpu"
digest = Digest.hash_variant(DigestAlgorithm.SHA256, variant)
Metadata.read_from_file(variant / "metadata.json").digest.validate(digest)

def net(dtype=torch.float64, **more):
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["0", "2"], init_lora_weights=False, **more)
    return inject_adapter_in_model(config, nn.Sequential(nn.Linear(24, 20), nn.Tanh(), nn.Linear(20, 8))).to(dtype)

def step(model, call=None):
    dtype = model[0].base_layer.weight.dtype
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    torch.manual_seed(2)
    y = (call or model)(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)], y.grad_fn.name()

def errors(found, expected):
    pairs = list(zip(found, expected, strict=True))
    return [((a - b).double().square().mean().sqrt() / b.double().square().mean().sqrt()).item() for a, b in pairs]

def mixed():  # fp32 adapters over bf16, as PEFT makes them
    model = net(torch.bfloat16)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.float()
    return model

kernels.replace_kernel_forward_from_hub(Linear, "LoraLinear")
repository = kernels.LocalLayerRepository(folder, layer_name="LoraLinear")
mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
kernels.register_kernel_mapping({"LoraLinear": {"cpu": {mode: repository}}})
replaced = lambda model: kernels.kernelize(model, mode=mode, device="cpu", use_fallback=False)

plain, theirs = step(net())
found, node = step(replaced(net()))
result = {"plain": errors(found, plain), "nodes": [theirs, node]}
model = replaced(net())
compiled, _ = step(model, torch.compile(model, backend="aot_eager", fullgraph=True))
result["compiled"] = errors(compiled, found)
result["dropout"] = errors(step(replaced(net(lora_dropout=0.5)))[0], step(net(lora_dropout=0.5))[0])
exact = step(mixed().double())[0]
result["mixed"] = [errors(step(model)[0], exact) for model in (replaced(mixed()), mixed())]

kernel = kernels.get_local_kernel(folder)
x = torch.zeros(2, 24).double()
reasons = {}
for what, model in {"DoRA": net(use_dora=True), "bias": net(lora_bias=True), "hook": net(), "off": net()}.items():
    if what == "hook":
        model[0].base_layer.register_forward_hook(lambda *_: None)
    if what == "off":
        model[0].enable_adapters(False)
    reasons[what] = kernel.layers.why_not(model[0], x)
    y = model[0](x + 1)
    assert torch.equal(replaced(model)[0](x + 1), y), what
result["reasons"] = reasons | {"none": kernel.layers.why_not(net()[0], x)}

for module in pkgutil.walk_packages(kernel.__path__, kernel.__name__ + "."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
count = lambda space: sum(name.startswith(f"{space}::lora_") for name in torch._C._dispatch_get_all_op_names())
result["own"] = "slao_kernels" in sys.modules
result["operators"] = [count(kernel.__name__), count("slao_kernels")]
import slao_kernels
result["beside"] = [count(kernel.__name__), count("slao_kernels"), kernel.__name__]
print(json.dumps(result))
"""


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "hub" / "build.py"), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_folder(tmp_path):
    """Three variants of the same modules, no binary, ids of their own; nothing is written over."""
    done = build(tmp_path / "hub")
    assert done.returncode == 0, done.stderr
    variants = sorted((tmp_path / "hub" / "build").iterdir())
    assert [variant.name for variant in variants] == ["torch-cpu", "torch-cuda", "torch-rocm"]
    names = {tuple(sorted(p.relative_to(v).as_posix() for p in v.rglob("*") if p.is_file())) for v in variants}
    assert len(names) == 1
    listed = names.pop()
    assert {"__init__.py", "layers.py", "ops/lora_linear/triton.py", "ops/lora_linear/configs/default.json"} < {*listed}
    assert {Path(name).suffix for name in listed} == {".py", ".json"}
    about = [json.loads((variant / "metadata.json").read_text()) for variant in variants]
    assert [one["backend"]["type"] for one in about] == ["cpu", "cuda", "rocm"]
    assert len({one["id"] for one in about}) == 3
    assert all(one["id"].isidentifier() and len(one["digest"]["files"]) == len(listed) - 1 for one in about)

    again = build(tmp_path / "hub")
    assert again.returncode == 2
    assert again.stderr == f"{tmp_path / 'hub'} is there already: remove it, or name a new folder\n"


@pytest.mark.exhaustive
def test_layer_from_a_local_repository(tmp_path):
    """PEFT's Linear forward, replaced through `kernels` by one built on our op: the same numbers."""
    if importlib.util.find_spec("kernels") is None:
        pytest.skip("the package `kernels` is not installed")
    build(tmp_path / "hub").check_returncode()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"  # the folder's digest knows no __pycache__
    command = [sys.executable, "-P", "-c", PROGRAM, str(tmp_path / "hub")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    # y, dx, and dA and dB of two layers; fp64 (eps 2.2e-16) in another order of summation, at most 24 terms.
    assert len(result["plain"]) == 6
    assert max(result["plain"]) < 1e-14, result
    assert max(result["compiled"]) < 1e-14, result
    assert max(result["dropout"]) < 1e-14, result  # one mask a layer, drawn by torch from the same seed
    assert result["nodes"] == ["AddBackward0", "LoraLinearBackward"]  # PEFT's forward, ours
    # fp32 adapters over bf16, from the same model in fp64: no further than PEFT's layer but for chance (two roundings
    # of 2^-9 that fall differently).
    ours, peft = (max(errors) for errors in result["mixed"])
    assert 0 < ours < 1.5 * peft < 0.02, result
    assert result["reasons"] == {
        "DoRA": "DoraLinearVariant: not plain LoRA",
        "bias": "lora_bias",
        "hook": "a part of the layer has hooks or another forward, and has to be called",
        "off": "not one active adapter (disabled, merged, none, or several)",
        "none": None,
    }
    assert not result["own"]
    assert result["operators"] == [4, 0]
    assert result["beside"][:2] == [4, 4]  # in one process, each with operators of its own
    assert result["beside"][2].startswith("_slao_lora_linear_cpu_")
