"""Parts of an adapter × operations: every cell is treated, and checked, or refused by name; docs/adapter_parts.md has
the same table."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from slao import make_method
from slao.export import save_adapter
from slao.folders import Source, triples
from slao.interference import compare
from slao.merging import merge_adapters
from slao.methods import Method
from slao_kernels import interference, weighted_merge
from slao_kernels.testing import error_ratio, tiny_model

DOCS = Path(__file__).parents[2] / "docs" / "adapter_parts.md"
IDS = torch.arange(3, 19)[None]
OPERATIONS = ("begin, end, merged", "save, load", "export", "by name", "from folders")


def unfrozen(model: nn.Module) -> None:
    model.get_submodule("base_model.model.model.norm").weight.requires_grad_(True)


# part -> (what LoraConfig takes, the method, what is done to the model before the method is made)
PARTS: dict[str, tuple[dict[str, Any], str, Callable[[nn.Module], None]]] = {
    "A, B": ({}, "slao", lambda model: None),
    "scaling": ({"use_rslora": True, "alpha_pattern": {"v_proj": 3}}, "slao", lambda model: None),
    "C-LoRA's core": ({}, "clora", lambda model: None),
    "frozen pairs": ({}, "inclora", lambda model: None),
    "frozen pairs' magnitudes": ({}, "sdlora", lambda model: None),
    "lora_bias": ({"lora_bias": True}, "slao", lambda model: None),
    "DoRA's magnitude": ({"use_dora": True}, "slao", lambda model: None),
    'bias="lora_only"': ({"bias": "lora_only"}, "slao", lambda model: None),
    'bias="all"': ({"bias": "all"}, "slao", lambda model: None),
    "modules_to_save": ({"modules_to_save": ["lm_head", "embed_tokens"]}, "slao", lambda model: None),
    "trainable_token_indices": ({"trainable_token_indices": [3, 4, 5]}, "slao", lambda model: None),
    "target_parameters": ({"target_parameters": ["o_proj.weight"]}, "slao", lambda model: None),
    "what no config names": ({}, "slao", unfrozen),
    "base changed by pissa, olora": ({"init_lora_weights": "pissa"}, "slao", lambda model: None),
    "base changed by other inits": ({"init_lora_weights": "pissa_niter_4"}, "slao", lambda model: None),
}


def base() -> nn.Module:
    return tiny_model("llama", attention_bias=True)


def adapted(part: str, seed: int = 0) -> nn.Module:
    config, _, prepare = PARTS[part]
    torch.manual_seed(seed)
    model = get_peft_model(base(), LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **config})).eval()
    prepare(model)
    return model


def moved(model: nn.Module, seed: int) -> None:
    """Every parameter that trains is another afterwards."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=g) * 0.1)


def trained(part: str, tasks: int = 2) -> Method:
    method = make_method(PARTS[part][1], adapted(part))
    for task in range(tasks):
        method.begin_task(str(task))
        moved(method.model, task)
        method.end_task()
    return method


def by_peft(part: str) -> nn.Module:
    """For parts that no method takes: the adapter alone."""
    model = adapted(part)
    moved(model, 0)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def run(part: str, tmp_path: Path) -> None:
    """begin_task, end_task, merged(): after one task the merge is what was trained, with everything in it."""
    method = trained(part, 1)
    live = logits(method.model)
    with method.merged():
        assert error_ratio(logits(method.model), live) <= 1e-6
    start = logits(adapted(part))
    assert error_ratio(live, start) > 1e-2


def save_and_load(part: str, tmp_path: Path) -> None:
    method = trained(part)
    method.save(tmp_path)
    seed = 0 if "other inits" in part else 5  # which draw what they change the base by
    other = make_method(PARTS[part][1], adapted(part, seed))
    other.load(tmp_path)
    assert torch.equal(logits(method.model), logits(other.model))
    with method.merged(), other.merged():
        assert torch.equal(logits(method.model), logits(other.model))


def export(part: str, tmp_path: Path) -> None:
    if part in ("lora_bias", "DoRA's magnitude"):
        model = by_peft(part)
        save_adapter(model, tmp_path / "out")
        expected = logits(model)
    else:
        method = trained(part)
        with method.merged():
            expected = logits(method.model)
        method.save_pretrained(tmp_path / "out")
    assert error_ratio(logits(PeftModel.from_pretrained(base(), str(tmp_path / "out")).eval()), expected) <= 1e-5


def by_name(part: str, tmp_path: Path) -> None:
    model = by_peft(part) if part in ("lora_bias", "DoRA's magnitude") else trained(part).model
    merge = weighted_merge(["default"], [1.0], rank=8, model=model)
    true = [layer.get_delta_weight("default") for layer in model.modules() if hasattr(layer, "lora_A")]
    for (A, B), delta in zip(merge.pairs, true, strict=True):
        assert error_ratio(B @ A, delta) <= 1e-5
    norm = sum(delta.double().square().sum() for delta in true).sqrt()
    assert abs(float(interference(["default"], model=model).whole().norms) / float(norm) - 1) <= 1e-5


def from_folders(part: str, tmp_path: Path) -> None:
    """`slao merge` and `slao interference` read with the same reader."""
    if part in ("lora_bias", "DoRA's magnitude") or "base changed" in part:
        by_peft(part).save_pretrained(tmp_path / "out")
    else:
        trained(part).save_pretrained(tmp_path / "out")
    beside = "keep" if TABLE[part] == _BESIDE else None
    if beside is not None:
        with pytest.raises(ValueError, match="more than A and B; merge it with --beside keep"):
            merge_adapters([tmp_path / "out"], tmp_path / "merged", "svd")
        assert "not looked at, since it has no B A: " in str(compare([tmp_path / "out"] * 2))
    source = Source(tmp_path / "out", beside is not None)
    deltas = {name: s * B.double() @ A.double() for name, (A, B, s) in triples(source).items()}
    merge_adapters([tmp_path / "out"], tmp_path / "merged", "svd", beside=beside)
    model = PeftModel.from_pretrained(base(), str(tmp_path / "merged"))
    for name, delta in deltas.items():
        layer = model.base_model.model.get_submodule(name)
        assert error_ratio(layer.get_delta_weight("default"), delta) <= 1e-5


RUN = dict(zip(OPERATIONS, (run, save_and_load, export, by_name, from_folders), strict=True))
_PAIRS = ("treated",) * 5
_BESIDE = ("treated", "treated", "treated", "trains beside A and B", "treated")


def _no_method(why: str, by_name: str, folder: str = "more than A and B") -> tuple[str, ...]:
    return (why, why, "treated", by_name, folder)


TABLE: dict[str, tuple[str, ...]] = {
    "A, B": _PAIRS,
    "scaling": _PAIRS,
    "C-LoRA's core": _PAIRS,
    "frozen pairs": _PAIRS,
    "frozen pairs' magnitudes": _PAIRS,
    "lora_bias": _no_method("lora_bias trains more than A and B", "lora_bias trains more than A and B"),
    "DoRA's magnitude": _no_method("trains more than A and B", "trains more than A and B"),
    'bias="lora_only"': _BESIDE,
    'bias="all"': _BESIDE,
    "modules_to_save": _BESIDE,
    "trainable_token_indices": _BESIDE,
    "target_parameters": _PAIRS,
    "what no config names": ("treated", "treated", "PEFT would not save it", "treated", "PEFT would not save it"),
    "base changed by pissa, olora": ("treated", "treated", "treated", "treated", "which changes the base"),
    "base changed by other inits": ("treated", "treated", "PEFT cannot repeat", "treated", "which changes the base"),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("part", PARTS)
def test_every_cell_is_treated_or_refused(part, operation, tmp_path):
    expected = TABLE[part][OPERATIONS.index(operation)]
    if expected == "treated":
        RUN[operation](part, tmp_path)
        return
    with pytest.raises(ValueError, match=re.escape(expected)) as caught:
        RUN[operation](part, tmp_path)
    assert not (tmp_path / "merged").exists()
    assert operation != "export" or not (tmp_path / "out").exists()
    assert "\n" not in str(caught.value).strip() or operation == "by name"  # whose every problem has a line


def test_the_docs_have_the_same_table():
    rows = [line.strip("| ").split(" | ") for line in DOCS.read_text(encoding="utf-8").splitlines() if "|" in line]
    found = {row[0].replace("`", ""): tuple(row[1:]) for row in rows}
    assert found["part"] == tuple(OPERATIONS)
    assert {part: found.get(part) for part in TABLE} == {
        part: tuple(cell if cell == "treated" else f"refused: “{cell}”" for cell in row) for part, row in TABLE.items()
    }
