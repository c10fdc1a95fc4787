"""`slao merge --method svd --base`: DoRA adapters count as the exact change of the base's weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from slao.cli import main
from slao.folders import read_adapter
from slao.merging import merge_adapters
from slao_kernels.testing import error_ratio, tiny_model

TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}


def make(folder: Path, base: Path, kind: str, seed: int, **options) -> Path:
    """Far from the base: magnitudes change by a tenth, so that the exact change has full rank."""
    model = get_peft_model(loaded(base, kind), LoraConfig(r=4, target_modules=TARGETS[kind], **options))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=g))
            elif parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=g))
    model.save_pretrained(str(folder))
    return folder


def loaded(base: Path, kind: str) -> nn.Module:
    return type(tiny_model(kind)).from_pretrained(base)


def changes(folder: Path, base: Path, kind: str) -> dict[str, torch.Tensor]:
    """W' − W of every layer, W' as PEFT merges it, in fp64."""
    model = loaded(base, kind).double()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    names = [
        name
        for name, module in PeftModel.from_pretrained(model, str(folder), autocast_adapter_dtype=False)
        .double()
        .base_model.model.named_modules()
        if hasattr(module, "lora_A")
    ]
    model = PeftModel.from_pretrained(loaded(base, kind), str(folder)).double().merge_and_unload()
    after = model.state_dict()
    turned = kind == "gpt2"  # Conv1D's weight is (in, out)
    found = {name: after[f"{name}.weight"] - before[f"{name}.weight"] for name in names}
    return {name: delta.T if turned else delta for name, delta in found.items()}


@pytest.fixture(params=["llama", "gpt2"])
def kind(request) -> str:
    return request.param


@pytest.fixture
def base(kind, tmp_path) -> Path:
    tiny_model(kind, initializer_range=0.3).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("rank", [5, 32])
def test_two_doras_and_a_lora(rank, kind, base, tmp_path, capsys):
    """fp32 against PEFT's own merge in fp64; at 32 of 32 the whole, at 5 within 1 % of the dense truncation."""
    folders = [make(tmp_path / str(i), base, kind, i, use_dora=i != 1, use_rslora=i == 2) for i in range(3)]
    words = ["merge", *map(str, folders), "-o", str(tmp_path / "out"), "--method", "svd", "--rank", str(rank)]
    assert main([*words, "--weights", "0.5,-0.3,0.8", "--base", str(base)]) == 0
    printed = capsys.readouterr().out
    each = [changes(folder, base, kind) for folder in folders]
    assert f"{len(each[0])} of {len(each[0])} layers are DoRA's in some adapter: the exact change of {base}" in printed
    found = read_adapter(tmp_path / "out")
    assert found.keys() == each[0].keys()
    lost = total = 0.0
    for name, (A, B, scaling) in found.items():
        expected = 0.5 * each[0][name] - 0.3 * each[1][name] + 0.8 * each[2][name]
        S = torch.linalg.svdvals(expected)
        left = float((expected - scaling * B.double() @ A.double()).norm())
        if rank == 32:
            assert left / float(expected.norm()) <= 2e-6  # deltas and factors in fp32
        else:
            assert float(S[rank:].norm()) * (1 - 1e-6) <= left <= 1.01 * float(S[rank:].norm())
        lost, total = lost + left**2, total + float(expected.square().sum())
    assert f"leaves out {(lost / total) ** 0.5:.2%} of the merge" in printed
    model = PeftModel.from_pretrained(loaded(base, kind), str(tmp_path / "out"))
    assert model.peft_config["default"].use_dora is False


def test_one_dora_becomes_a_lora_that_every_method_takes(kind, base, tmp_path):
    folders = [make(tmp_path / str(i), base, kind, i, use_dora=True) for i in range(2)]
    plain = [tmp_path / f"plain {i}" for i in range(2)]
    for folder, out in zip(folders, plain, strict=True):
        merge_adapters([folder], out, "svd", rank=32, base=base)
        expected = changes(folder, base, kind)
        assert all(error_ratio(s * B.double() @ A.double(), expected[name]) <= 2e-6
                   for name, (A, B, s) in read_adapter(out).items())  # fmt: skip
    merge_adapters(plain, tmp_path / "out", "slao")
    assert read_adapter(tmp_path / "out").keys() == expected.keys()


def test_an_absent_layer_is_zero_for_doras_too(tmp_path):
    tiny_model("llama", initializer_range=0.3).save_pretrained(tmp_path / "base")
    a = make(tmp_path / "a", tmp_path / "base", "llama", 0, use_dora=True)
    b = make(tmp_path / "b", tmp_path / "base", "llama", 1, use_dora=True, layers_to_transform=[0])
    merge_adapters([a, b], tmp_path / "out", "svd", rank=32, weights=[1, 1], base=tmp_path / "base", union=True)
    one, two = (changes(folder, tmp_path / "base", "llama") for folder in (a, b))
    for name, (A, B, _) in read_adapter(tmp_path / "out").items():
        assert error_ratio(B.double() @ A.double(), one[name] + two.get(name, 0)) <= 2e-6


BAD = {
    "no base": "(slao merge takes a DoRA by --method svd --base FOLDER)",
    "another method": "svd alone takes base=, for DoRA adapters: make a LoRA of each",
    "no dora": "base= is for DoRA, and no adapter is one: leave it out",
    "another shape": "the adapter belongs to another model",
    "no magnitude": "has no lora_magnitude_vector, though the config says use_dora",
    "more": "holds more than A and B, which are merged: other.weight",
    "lora_bias": "has lora_bias: more than A and B, which is not folded or merged",
    "NaN": "has NaN or infinite entries",
    "no model": "there is no model folder and no safetensors file at",
}


@pytest.mark.parametrize("how", BAD)
def test_what_is_refused(how, tmp_path, capsys):
    base = tmp_path / "base"
    tiny_model("llama").save_pretrained(base)
    a = make(tmp_path / "a", base, "llama", 0, use_dora=how != "no dora")
    if how == "lora_bias":  # which PEFT makes of no DoRA
        config = json.loads((a / "adapter_config.json").read_text())
        (a / "adapter_config.json").write_text(json.dumps({**config, "lora_bias": True}))
    path = a / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if "magnitude" in key) if how != "no dora" else ""
    if how == "no magnitude":
        del tensors[key]
    elif how == "more":
        tensors["other.weight"] = torch.ones(2)
    elif how == "NaN":
        tensors[key][0] = float("nan")
    save_file(tensors, path)
    if how == "another shape":
        tiny_model("llama", hidden_size=64).save_pretrained(base)
    words = ["merge", str(a), str(a), "-o", str(tmp_path / "out")]
    words += ["--method", "svd"] if how != "another method" else []
    words += ["--base", str(tmp_path / "nowhere" if how == "no model" else base)] if how != "no base" else []
    capsys.readouterr()
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert BAD[how] in err
    assert not (tmp_path / "out").exists()
