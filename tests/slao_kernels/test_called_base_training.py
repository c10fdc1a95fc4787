"""Patched layers over quantised and other bases: copies, files, checkpointing, autocast, compile, training."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import slao_kernels
from slao_kernels import layers
from slao_kernels.testing import error_ratio, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = [
    "subclass of nn.Linear",
    "GPTQ, stand-in",
    "AWQ, stand-in",
    "AQLM, stand-in",
    "Transformer Engine, stand-in",
    "bitsandbytes, 4 bits",
    "bitsandbytes, 8 bits",
    "torchao, int8",
    "HQQ, 8 bits",
]


def x_of(twins, dtype: torch.dtype = torch.float32) -> Tensor:
    return twins.net_input(2, 5, 64, dtype=dtype)


def through_file(model: nn.Module, tmp_path) -> nn.Module:
    torch.save(model, tmp_path / "model.pt")
    return torch.load(tmp_path / "model.pt", weights_only=False)


COPIES = {
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "pickle": lambda model, _: pickle.loads(pickle.dumps(model)),
    "torch.save": through_file,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", KINDS)
def test_copies_stay_fused(kind, how, foreign, twins, tmp_path):
    model, twin = foreign.net(kind), foreign.net(kind)
    try:
        COPIES[how](twin, tmp_path)
    except Exception as error:
        pytest.skip(f"{kind}: the base itself cannot be copied so, patched or not: {error!r:.100}")
    report = slao_kernels.patch(model)
    expected = twins.net_step(twin, x_of(twins))
    copied = COPIES[how](model, tmp_path)
    assert type(copied.proj) is type(model.proj)
    for net in (copied, model):
        with twins.CountOps() as ops:
            found = twins.net_step(net, x_of(twins))
        assert ops.counts == {"lora_add": 1, "lora_add_backward": 1}
        twins.check_close(found, expected)
    # Its own notes and fallbacks, its own parameters, its own class to go back to.
    assert copied.proj.slao_options.notes == report.notes
    assert copied.proj.slao_options.notes is not report.notes
    copied.proj.slao_options.fell_back("a reason")
    assert report.fallbacks == {}
    assert slao_kernels.unpatch(copied) == 1
    assert type(copied.proj) is type(twin.proj)
    assert layers.is_fused(model.proj)


LOAD = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("slao_kernels_tests_foreign", sys.argv[1])
sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert "slao_kernels.layers" not in sys.modules
model = torch.load(sys.argv[2], weights_only=False)
torch.save(model(torch.load(sys.argv[3])).detach(), sys.argv[4])
print(type(model.proj).__name__)
"""


# Not HQQ, which has no forward where nobody has made a layer before, and not torchao, see above.
@pytest.mark.parametrize(
    "kind", ["subclass of nn.Linear", "GPTQ, stand-in", "bitsandbytes, 4 bits", "bitsandbytes, 8 bits"]
)
def test_load_in_another_process(kind, foreign, twins, tmp_path):
    """Nothing has asked for the class there before; the file names it and finds it."""
    model, x = foreign.net(kind), x_of(twins)
    slao_kernels.patch(model)
    torch.save(x, tmp_path / "x.pt")
    torch.save(model, tmp_path / "model.pt")
    paths = [foreign.__file__, *(str(tmp_path / name) for name in ("model.pt", "x.pt", "y.pt"))]
    done = subprocess.run([sys.executable, "-c", LOAD, *paths], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == foreign.KINDS[kind][0]
    twins.check_close({"y": torch.load(tmp_path / "y.pt")}, {"y": model(x).detach()}, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_travels(kind, foreign, twins):
    """The adapter's part of it, from PEFT's layer into ours and back."""
    model, twin = foreign.net(kind), foreign.net(kind)
    slao_kernels.patch(model)
    for source, target in ((twin, model), (model, twin)):
        with torch.no_grad():
            for name, parameter in source.named_parameters():
                if "lora_" in name:
                    parameter.mul_(1.3)
        adapter = {name: value for name, value in source.state_dict().items() if "lora_" in name}
        missing, unexpected = target.load_state_dict(adapter, strict=False)
        assert not unexpected
        assert not [name for name in missing if "lora_" in name]
        twins.check_close(twins.net_step(model, x_of(twins)), twins.net_step(twin, x_of(twins)))


class Checkpointed(nn.Module):
    """Two calls, one of them on the other's output."""

    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        y = checkpoint(self.inner, x, use_reentrant=self.reentrant)
        return y + checkpoint(lambda v: self.inner(torch.cat([v, v], -1)).tanh(), y, use_reentrant=self.reentrant)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing(kind, reentrant, dropout, foreign, twins):
    model, twin = (foreign.net(kind, lora_dropout=dropout) for _ in range(2))
    slao_kernels.patch(model)
    for _ in range(2):
        found, expected = (twins.net_step(Checkpointed(net, reentrant), x_of(twins)) for net in (model, twin))
        twins.check_close(found, expected)


@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind, base, input_dtype, foreign, twins):
    """PEFT's dtypes; as near to the fp64 branch on the base's own result as PEFT is, or nearer."""
    model, twin = (foreign.net(kind, base, torch.float32) for _ in range(2))
    report = slao_kernels.patch(model)
    x = x_of(twins, input_dtype)
    layer = twin.proj
    with torch.autocast("cpu", torch.bfloat16):
        found, theirs = twins.net_step(model, x), twins.net_step(twin, x)
        y = layer.base_layer(x).detach()
    assert {n: v.dtype for n, v in found.items()} == {n: v.dtype for n, v in theirs.items()}
    A, B = (part["default"].weight.detach().double() for part in (layer.lora_A, layer.lora_B))
    exact = y.double() + layer.scaling["default"] * (x.double() @ A.T @ B.T)
    assert error_ratio(found["y"], exact) <= max(1.5 * error_ratio(theirs["y"], exact), 1e-6)
    for name, value in theirs.items():  # two bf16 chains: a few units of 2^-8 apart
        assert error_ratio(found[name], value) <= 2e-2, name
    assert report.fallbacks == {}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_compile(kind, foreign, twins):
    """One graph forward, one backward: no break, and the branch is one operator each way."""
    model, twin = foreign.net(kind), foreign.net(kind)
    report = slao_kernels.patch(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = twins.net_step(twin, x_of(twins))
    for _ in range(2):
        found = twins.net_step(compiled, x_of(twins))
        twins.check_close({name.removeprefix("_orig_mod."): value for name, value in found.items()}, expected)
    assert report.fallbacks == {}


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_training(kind, base, foreign, twins):
    """Ten steps of SGD: the losses and the adapters end where PEFT's do."""
    models = [foreign.net(kind, base, torch.float32, lora_dropout=0.1) for _ in range(2)]
    slao_kernels.patch(models[0])
    target = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(8))
    losses: list[list[float]] = []
    for model in models:
        trained = [p for n, p in model.named_parameters() if "lora_" in n]
        optimizer = torch.optim.SGD(trained, lr=0.02)
        torch.manual_seed(6)
        losses.append([])
        for _ in range(10):
            optimizer.zero_grad()
            loss = (model(x_of(twins, base)).float() - target).square().mean()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < 0.9 * losses[0][0]
    tolerance = 1e-5 if base == torch.float32 else 1e-2
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    ours, theirs = ({n: p.detach() for n, p in m.named_parameters() if "lora_" in n} for m in models)
    twins.check_close(ours, theirs, tolerance)


@pytest.mark.parametrize("trained", [("lora_A",), ("lora_B",), ()], ids=str)
@pytest.mark.parametrize("input_grad", [True, False])
@pytest.mark.parametrize("kind", ["subclass of nn.Linear", "bitsandbytes, 4 bits", "bitsandbytes, 8 bits"])
def test_frozen_parts(kind, input_grad, trained, foreign, twins):
    model, twin = foreign.net(kind), foreign.net(kind)
    slao_kernels.patch(model)
    steps = []
    for net in (model, twin):
        for name, parameter in net.proj.named_parameters():
            parameter.requires_grad_(any(part in name for part in trained) and parameter.is_floating_point())
        leaf = x_of(twins).requires_grad_(input_grad)
        y = net(leaf)
        assert y.requires_grad is (input_grad or bool(trained))
        if y.requires_grad:
            y.square().sum().backward()
        grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
        steps.append({"y": y.detach(), **grads, **({"x": leaf.grad} if input_grad else {})})
    twins.check_close(*steps)


# A whole model


def four_bit_llama(twins) -> nn.Module:
    """Every projection a bitsandbytes 4-bit layer, as transformers' quantisation leaves them."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = tiny_model("llama", **sizes)
    for name, module in list(model.named_modules()):
        if name.endswith("_proj"):
            quantised = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
            )
            quantised.load_state_dict(module.state_dict())
            model.set_submodule(name, quantised.to("cpu"))
    model.is_loaded_in_4bit = True
    return model


def four_bit_peft(twins) -> nn.Module:
    torch.manual_seed(5)
    return twins.train_a_little(peft.get_peft_model(four_bit_llama(twins), twins.config()))


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_whole_model(reentrant, twins, tmp_path):
    """QLoRA on a tiny llama: logits, all gradients, and an adapter that loads without this library."""
    model, twin = four_bit_peft(twins), four_bit_peft(twins)
    report = slao_kernels.patch(model, strict=True)
    assert len(report.patched) == len(report.notes) == 14
    assert "base layer called: base layer is bitsandbytes's Linear4bit" in str(report)
    for net in (model, twin):
        net.train()
        if reentrant is not None:
            net.enable_input_require_grads()
            net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for _ in range(2):
        twins.check_close(twins.step(model), twins.step(twin))
    assert report.fallbacks == {}
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(four_bit_llama(twins), tmp_path, is_trainable=True)
    ids = twins.token_ids()
    twins.check_close({"logits": loaded.train()(ids).logits.detach()}, {"logits": twin(ids).logits.detach()})
