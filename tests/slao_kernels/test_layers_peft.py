"""Every kind of layer, patched: what PEFT does with layers (merge, disable, delete, save), copies and files."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import foreign
import pytest
import torch
import twins
from kinds import FEW, KINDS, MERGING, PLAIN, all_kinds, build, grid, operators, pair, x_of
from torch import Tensor, nn

import slao_kernels
from slao_kernels import layers
from slao_kernels.testing import error_ratio

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
    pytest.mark.filterwarnings("ignore:(Merge|Unmerge) lora module"),
]


def check_fused(kind: str, model: nn.Module, twin: nn.Module) -> None:
    twins.check_same(model, twin, ops=operators(kind))


def check_pefts(model: nn.Module, twin: nn.Module) -> Tensor:
    """Bit for bit PEFT's, without an operator of ours."""
    with twins.CountOps() as ops:
        y = model(x_of())
    assert ops.counts == {}
    assert torch.equal(y, twin(x_of()))
    return y.detach()


def through_file(net: nn.Module, folder) -> nn.Module:
    torch.save(net, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


COPIES = {
    "deepcopy": lambda net, _: copy.deepcopy(net),
    "pickle": lambda net, _: pickle.loads(pickle.dumps(net)),
    "torch.save": through_file,
}


@pytest.mark.parametrize("how", COPIES)
@all_kinds
def test_copies_stay_fused(kind, how, tmp_path):
    """With notes, fallbacks and parameters of their own, and a class of their own to go back to."""
    try:
        COPIES[how](build(kind), tmp_path)
    except Exception as error:
        pytest.skip(f"{kind}: the base itself cannot be copied so, patched or not: {error!r:.100}")
    model, twin, report = pair(kind)
    check_fused(kind, model, twin)
    copied = COPIES[how](model, tmp_path)
    assert type(copied.proj) is type(model.proj)
    ours = {p.data_ptr() for p in model.parameters()}
    assert not any(p.data_ptr() in ours - {0} for p in copied.parameters())  # 0: torchao's
    for net in (copied, model):
        check_fused(kind, net, twin)
    assert copied.proj.slao_options.notes == report.notes
    assert copied.proj.slao_options.notes is not report.notes
    copied.proj.slao_options.fell_back("a reason")
    assert report.fallbacks == {}
    assert slao_kernels.unpatch(copied) == 1
    assert type(copied.proj) is type(twin.proj)
    twins.check_equal(twins.net_step(copied, x_of()), twins.net_step(twin, x_of()))
    assert layers.is_fused(model.proj)


LOAD = """
import sys, torch
sys.path.insert(0, sys.argv[1])
assert "slao_kernels.layers" not in sys.modules
for folder in sys.argv[2:]:
    model = torch.load(folder + "/model.pt", weights_only=False)
    torch.save(model(torch.load(folder + "/x.pt")).detach(), folder + "/y.pt")
    print(type(model.proj).__name__)
"""
# Not HQQ, which has no forward where nobody has made a layer before, and not torchao, which cannot be pickled.
LOADED = [
    "EETQ, made up",
    "bias",
    "DoRA",
    "subclass of nn.Linear",
    "GPTQ, stand-in",
    "bitsandbytes, 4 bits",
    "bitsandbytes, 8 bits",
]


def test_load_in_another_process(tmp_path):
    """Nothing has asked for the classes there before; the file names them and finds them."""
    nets = []
    for i, kind in enumerate(LOADED):
        (tmp_path / str(i)).mkdir()
        nets.append(pair(kind)[0])
        torch.save(nets[i], tmp_path / str(i) / "model.pt")
        torch.save(x_of(), tmp_path / str(i) / "x.pt")
    folders = [str(tmp_path / str(i)) for i in range(len(LOADED))]
    command = [sys.executable, "-c", LOAD, str(foreign.__file__).rpartition("/")[0], *folders]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-len(LOADED) :] == [type(net.proj).__name__ for net in nets]
    for folder, net in zip(folders, nets, strict=True):
        twins.check_close({"y": torch.load(f"{folder}/y.pt")}, {"y": net(x_of()).detach()}, 1e-6)


@all_kinds
def test_state_and_identity_stay(kind):
    """Names, parameters and PEFT's class; patched again nothing changes; the adapter travels both ways."""
    model, twin = build(kind), build(kind)
    parameters, theirs = dict(model.named_parameters()), type(model.proj)
    first = slao_kernels.patch(model)
    for _ in range(2):
        assert list(model.state_dict()) == list(twin.state_dict())
        assert all(p is parameters[name] for name, p in model.named_parameters())
        assert len(parameters) == len(dict(model.named_parameters()))
        assert isinstance(model.proj, theirs)
        assert layers.peft_class(model.proj) is theirs
        again = slao_kernels.patch(model)
        assert (again.patched, again.notes) == (first.patched, first.notes)
    for source, target in ((twin, model), (model, twin)):
        with torch.no_grad():
            for name, parameter in source.named_parameters():
                if "lora_" in name:
                    parameter.mul_(1.3)
        adapter = {name: value for name, value in source.state_dict().items() if "lora_" in name}
        missing, unexpected = target.load_state_dict(adapter, strict=False)
        assert not unexpected
        assert not [name for name in missing if "lora_" in name]
        check_fused(kind, model, twin)


EXACT = [kind for kind in MERGING if not kind.startswith(("DoRA", "bitsandbytes", "HQQ"))]


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("kind", grid(MERGING, FEW))
def test_merged_and_back(kind, safe):
    """What PEFT's merge is, bit for bit where it is PEFT's (DoRA, quantised bases), else exact (test_exact_merge.py);
    merged layers run PEFT's forward, unmerged ones ours again."""
    model, twin, report = pair(kind)
    before, base = twin(x_of()).detach(), copy.deepcopy(model.proj.base_layer)
    for net in (model, twin):
        net.proj.merge(safe_merge=safe)
    exact = kind in EXACT
    assert ("slao_kept" in model.proj.__dict__) == exact
    if exact:
        for ours, theirs in zip(model.proj.base_layer.parameters(), twin.proj.base_layer.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        twin.proj.base_layer = copy.deepcopy(model.proj.base_layer)
    merged = check_pefts(model, twin)
    if kind not in foreign.KINDS:  # a quantised base is quantised again
        assert error_ratio(merged, before) <= 1e-5
    model.proj.unmerge()
    twin.proj.unmerge()
    if exact:
        for ours, theirs in zip(model.proj.base_layer.parameters(), base.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        twin.proj.base_layer = base
    check_fused(kind, model, twin)
    assert report.fallbacks == {}


@all_kinds
def test_disabled(kind):
    model, twin, _ = pair(kind)
    on = twin(x_of()).detach()
    for net in (model, twin):
        net.proj.enable_adapters(False)
    assert error_ratio(check_pefts(model, twin), on) > 1e-2  # the adapter does something
    for net in (model, twin):
        net.proj.enable_adapters(True)
    check_fused(kind, model, twin)


@pytest.mark.parametrize("tensor_scaling", [False, True])
@pytest.mark.parametrize("kind", grid([k for k in KINDS if not k.startswith("DoRA")], FEW))  # that: test_dora.py
def test_several_adapters(kind, tensor_scaling):
    """Added, active together, one of them, deleted; each keeps its own bias and rank. Scalings: PEFT's hotswap has
    tensors."""
    model, twin, report = pair(kind)
    for net in (model, twin):
        torch.manual_seed(4)
        own_bias = kind.startswith("lora_bias") and tensor_scaling
        config = foreign.config(r=5, lora_alpha=3, lora_bias=own_bias)
        net.proj.update_layer("more", r=5, lora_alpha=3, lora_bias=own_bias, config=config)
        if tensor_scaling:
            net.proj.scaling = {name: torch.tensor(value) for name, value in net.proj.scaling.items()}
    for active in (["default", "more"], ["more"], ["more", "default"], ["default"]):
        for net in (model, twin):
            net.proj.set_adapter(active)
        check_fused(kind, model, twin)
    for net in (model, twin):
        net.proj.set_adapter(["more"])
        net.proj.delete_adapter("default")
    check_fused(kind, model, twin)
    assert report.fallbacks == {}


# PEFT's classes for torchao and HQQ refuse it.
@pytest.mark.parametrize("kind", grid([k for k in foreign.KINDS if k not in ("torchao, int8", "HQQ, 8 bits")], FEW))
def test_lora_bias_over_a_called_base(kind):
    model, twin, _ = pair(kind, lora_bias=True)
    assert "proj.lora_B.default.bias" in twins.net_step(model, x_of())
    check_fused(kind, model, twin)


def test_names_and_classes(told):
    assert set(FEW) < set(KINDS)
    assert set(MERGING) < set(KINDS) == {*PLAIN, *foreign.KINDS}
    for kind, theirs in (("GPTQ, stand-in", "FusedGPTQLoraLinear"), ("bias", "FusedLoraLinear")):
        fused = type(pair(kind)[0].proj)
        assert fused is getattr(layers, theirs) is getattr(layers, theirs)
        assert (fused.__module__, fused.__qualname__) == ("slao_kernels.layers", theirs)
    with pytest.raises(AttributeError, match="has no attribute 'FusedNothing'"):
        layers.FusedNothing  # noqa: B018
    assert "peft" not in vars(layers)
    for kind in ("EETQ, made up", "INC, made up"):
        check_fused(kind, *pair(kind)[:2])
    # Nobody knows what a subclass computes, of PEFT's class or of ours.
    model = foreign.net("GPTQ, stand-in")
    for _ in range(2):
        model.proj.__class__ = type("Mine", (type(model.proj),), {})
        assert slao_kernels.unpatch(model) == 0
        assert slao_kernels.patch(model).skipped["proj"].endswith("Mine has no fused forward")
        model.proj.__class__ = type(model.proj).__mro__[1]
        slao_kernels.patch(model)
    assert told() != []
