"""`slao merge` of adapters that train heads, biases or tokens beside A and B, or whose init changed the base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from slao.cli import main
from slao.methods import SLAO
from slao_kernels.inventory import beside
from slao_kernels.testing import error_ratio, tiny_model

KINDS = {
    "lora_only": {"bias": "lora_only"},
    "all": {"bias": "all"},
    "modules": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [3, 4, 5]},
}
IDS = torch.arange(3, 19)[None]


def base() -> nn.Module:
    return tiny_model("llama", attention_bias=True)


def moved(model: nn.Module, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=g) * 0.1)


def adapters(parent: Path, how: str, **options) -> tuple[list[Path], SLAO]:
    """An export of each of three tasks as trained, and the method that trained and merged them."""
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **options})
    model = get_peft_model(base(), config).eval()
    method, found = SLAO(model, beside=how), []
    for task in range(3):
        method.begin_task(str(task))
        moved(model, task)
        found.append(parent / str(task))
        model.save_pretrained(str(found[-1]))
        if options.get("bias") == "lora_only":  # which PEFT 0.20 leaves out of its file
            SLAO(model).save_pretrained(found[-1])
        method.end_task()
    return found, method


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("how", ["keep", "merge"])
@pytest.mark.parametrize("kind", KINDS)
def test_slao_is_what_the_method_merges(kind, how, tmp_path, capsys):
    """In PEFT the folder answers as the method does that trained the three: the same λ, for B and what is beside."""
    folders, method = adapters(tmp_path, how, **KINDS[kind])
    assert main(["merge", *map(str, folders), "-o", str(tmp_path / "out"), "--beside", how]) == 0
    with method.merged():
        expected = logits(method.model)
        live = {part.name: part.tensor.detach().clone() for part in beside(method.model)}
    merged = PeftModel.from_pretrained(base(), str(tmp_path / "out")).eval()
    assert error_ratio(logits(merged), expected) <= 1e-6
    found = {part.name: part.tensor for part in beside(merged)}
    assert found.keys() == live.keys() != set()
    assert all(torch.equal(found[name], tensor) for name, tensor in live.items())
    note = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()[8:].split(b"}}", 1)[0]
    assert f'\\"beside\\": \\"{how}\\"'.encode() in note


@pytest.mark.parametrize("method", ["linear", "svd", "ties", "opcm"])
def test_others_average_by_their_weights(method, tmp_path):
    folders, _ = adapters(tmp_path, "keep", **KINDS["modules"])
    out = tmp_path / "out"
    words = ["merge", *map(str, folders), "-o", str(out), "--method", method, "--beside", "merge"]
    assert main([*words, "--weights", "1,2,0.5"]) == 0
    files = [load_file(folder / "adapter_model.safetensors") for folder in (*folders, out)]
    key = "base_model.model.lm_head.weight"
    one, two, three, found = (tensors[key] for tensors in files)
    # Two steps of fp32.
    assert error_ratio(found, (one.double() + 2 * two.double() + 0.5 * three.double()) / 3.5) <= 3e-7


def test_what_makes_no_average(tmp_path, capsys):
    folders, _ = adapters(tmp_path, "keep", **KINDS["modules"])
    words = ["merge", *map(str, folders), "-o", str(tmp_path / "out"), "--method", "linear", "--beside"]
    assert main([*words, "merge", "--weights", "1,-1,1"]) == 2
    assert (
        "[1.0, -1.0, 1.0] make no average of what stands beside A and B; use beside='keep'" in capsys.readouterr().err
    )
    assert main([*words, "keep", "--weights", "1,-1,1"]) == 0


def test_interference_says_what_it_does_not_look_at(tmp_path, capsys):
    folders, _ = adapters(tmp_path, "keep", **KINDS["all"])
    assert main(["interference", *map(str, folders)]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    assert len(table) == 4
    assert last == "not looked at, since it has no B A: bias of 0; bias of 1; bias of 2"


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_converted_export_is_taken_and_another_one_refused(init, tmp_path, capsys):
    torch.manual_seed(0)
    model = get_peft_model(base(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init)).eval()
    model.peft_config["default"].init_lora_weights = True  # as PEFT's docs have it, before what is there is saved
    model.save_pretrained(str(tmp_path / "start"))
    model.peft_config["default"].init_lora_weights = init
    method = SLAO(model)
    method.begin_task("a")
    moved(model, 0)
    method.end_task()
    expected = logits(model)
    method.save_pretrained(tmp_path / "plain")
    model.save_pretrained(str(tmp_path / "new"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    words = ["merge", "-o", str(tmp_path / "out"), "--method", "svd"]
    assert main([*words, str(tmp_path / "plain")]) == 2
    assert "convert it: load it, and save it by PEFT's save_pretrained with path_initial" in capsys.readouterr().err
    assert json.loads((tmp_path / "new" / "adapter_config.json").read_text())["r"] == 8
    assert main([*words, str(tmp_path / "new")]) == 0
    # The base is changed and changed back, by an SVD.
    assert error_ratio(logits(PeftModel.from_pretrained(base(), str(tmp_path / "out")).eval()), expected) <= 1e-5
