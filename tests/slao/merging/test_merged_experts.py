"""Saved adapters of a mixture's experts: each expert is merged, compared and folded as a layer of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from slao.folders import read_adapter
from slao.interference import compare
from slao.merging import METHODS, compress_adapter, fold_model, merge_adapters
from slao_kernels.testing import tiny_model

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
IDS = torch.randint(0, 128, (2, 6), generator=torch.Generator().manual_seed(1))
COUNT = 4


def base(kind: str) -> nn.Module:
    model = tiny_model(kind, num_hidden_layers=1)
    model.set_experts_implementation("eager")
    return model


def saved(kind: str, folder: Path, seed: int, r: int = 3, **options: Any) -> Path:
    options = {"target_modules": ["q_proj"], "target_parameters": EXPERTS, **options}
    model = get_peft_model(base(kind), LoraConfig(r=r, lora_alpha=5, **options))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def taken_apart(folder: Path, to: Path) -> Path:
    """The same adapter as if each expert were a linear layer: by PEFT's layout, without our code."""
    tensors: dict[str, Tensor] = {}
    for key, value in load_file(folder / "adapter_model.safetensors").items():
        name, factor = key.removesuffix(".weight").rsplit(".", 1)
        if ".experts" not in key:
            tensors[key] = value
            continue
        for e in range(COUNT):
            own = value.chunk(COUNT)[e] if factor == "lora_A" else value[:, e::COUNT]
            tensors[f"{name}[{e}].{factor}.weight"] = own.contiguous()
    to.mkdir()
    save_file(tensors, to / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text()) | {"target_parameters": None}
    (to / "adapter_config.json").write_text(json.dumps(config))
    return to


@pytest.fixture
def three(tmp_path):
    return [saved("mixtral", tmp_path / f"a{seed}", seed) for seed in range(3)]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_merges_each_expert_as_a_layer(method, three, tmp_path):
    apart = [taken_apart(folder, tmp_path / f"apart_{folder.name}") for folder in three]
    merged = merge_adapters(three, tmp_path / "merged", method)
    expected = merge_adapters(apart, tmp_path / "expected", method)
    assert merged.lost == pytest.approx(expected.lost, rel=1e-6, abs=1e-7)
    found, right = read_adapter(tmp_path / "merged"), read_adapter(tmp_path / "expected")
    assert found.keys() == right.keys()
    assert len(found) == 1 + 2 * COUNT
    for name, (A, B, scaling) in right.items():
        product = scaling * B.double() @ A.double()
        error = (found[name][2] * found[name][1].double() @ found[name][0].double() - product).norm()
        assert error <= 1e-6 * product.norm(), name


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_the_merge_loads_into_plain_peft_and_folds(kind, tmp_path):
    """svd at the sum of the ranks is exact: the model's own answer with all three deltas in its weights."""
    folders = [saved(kind, tmp_path / f"a{seed}", seed) for seed in range(3)]
    weights = [0.5, -0.3, 0.8]
    merge_adapters(folders, tmp_path / "merged", "svd", weights=weights, rank=9)
    exact = base(kind).double()
    for folder, weight in zip(folders, weights, strict=True):
        one = PeftModel.from_pretrained(base(kind), folder).double()
        alone = {name: p.detach().clone() for name, p in base(kind).double().named_parameters()}
        for name, p in one.merge_and_unload().named_parameters():
            exact.get_parameter(name).data += weight * (p.detach() - alone[name])
    with torch.no_grad():
        expected = exact(input_ids=IDS).logits
        plain = PeftModel.from_pretrained(base(kind), tmp_path / "merged").double()
        assert (plain(input_ids=IDS).logits - expected).abs().max() <= 1e-5  # A and B were rounded to fp32
        base(kind).save_pretrained(tmp_path / "base")
        fold_model(tmp_path / "base", folders, tmp_path / "folded", "svd", weights=weights)
        folded = type(exact).from_pretrained(tmp_path / "folded", attn_implementation="eager").double()
        folded.set_experts_implementation("eager")
        assert (folded(input_ids=IDS).logits - expected).abs().max() <= 1e-5


def test_interference_of_folders_is_that_of_their_experts(three, tmp_path):
    apart = [taken_apart(folder, tmp_path / "apart" / folder.name) for folder in three if _made(tmp_path / "apart")]
    assert str(compare(three)) == str(compare(apart))


def _made(folder: Path) -> bool:
    folder.mkdir(exist_ok=True)
    return True


def test_slao_keeps_rank_and_scaling(three, tmp_path):
    merge_adapters(three, tmp_path / "merged", "slao")
    config = json.loads((tmp_path / "merged" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], sorted(config["target_parameters"])) == (3, 5, sorted(EXPERTS))


@pytest.mark.parametrize("method", ["svd", "slao", "linear"])
def test_experts_that_only_one_file_holds(method, three, tmp_path):
    """--union: absent ones count as zero; slao's first adapter then stands over an A of the others."""
    path = three[1] / "adapter_model.safetensors"
    kept = {key: value for key, value in load_file(path).items() if ".base_layer." not in key}
    save_file(kept, path, metadata={"format": "pt"})
    apart = [taken_apart(folder, tmp_path / f"apart_{folder.name}") for folder in three]
    merge_adapters(three, tmp_path / "merged", method, union=True)
    merge_adapters(apart, tmp_path / "expected", method, union=True)
    found, right = read_adapter(tmp_path / "merged"), read_adapter(tmp_path / "expected")
    assert len(found) == 1 + 2 * COUNT
    for name, (A, B, scaling) in right.items():
        product = scaling * B.double() @ A.double()
        error = (found[name][2] * found[name][1].double() @ found[name][0].double() - product).norm()
        assert error <= 1e-6 * product.norm(), name


REFUSED = {
    "other parameters": ({"target_parameters": EXPERTS[:1]}, "svd", {}, "target_parameters are"),
    "another rank": ({"r": 2}, "linear", {}, "has rank 2"),
    "a rank_pattern": ({"rank_pattern": {"q_proj": 2}}, "svd", {}, "rank_pattern or an alpha_pattern"),
    "a rank that not all can have": ({}, "svd", {"rank": 33}, "rank 33 is too large"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged_is_refused(case, three, tmp_path):
    options, method, given, message = REFUSED[case]
    other = saved("mixtral", tmp_path / "other", 7, **options)
    with pytest.raises(ValueError, match=message):
        merge_adapters([three[0], other], tmp_path / "merged", method, **given)
    assert not (tmp_path / "merged").exists()


def test_rows_that_are_no_multiple_of_the_rank(three, tmp_path):
    config = json.loads((three[0] / "adapter_config.json").read_text())
    (three[0] / "adapter_config.json").write_text(json.dumps(config | {"r": 7}))
    with pytest.raises(ValueError, match="has 12 rows, for experts of rank 7|has 3 rows, for experts of rank 7"):
        merge_adapters(three, tmp_path / "merged", "svd")


def test_compress_says_what_to_do_instead(three, tmp_path):
    with pytest.raises(ValueError, match="slao merge --method svd --rank"):
        compress_adapter(three[0], tmp_path / "out", rank=2)
    cut = merge_adapters(three[:1], tmp_path / "out", "svd", rank=2)
    assert 0 < cut.lost < 1
    PeftModel.from_pretrained(base("mixtral"), tmp_path / "out")
