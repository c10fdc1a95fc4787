"""`slao fold`: what it writes is what PEFT's own merge makes of base and adapter, whatever the adapter trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slao import sums
from slao.cli import main
from slao.merging import fold_model
from slao_kernels.testing import error_ratio

# A sum of 64 products in another order, and one rounding: a few units of 2^-24. The layers above amplify that: the
# largest of these models' ratio of the logits is 1.9e-6 (GPT-2, whose weights are drawn wide here).
CLOSE, ANSWERS = 1e-6, 5e-6
PATTERNS = {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"up_proj": 5}}
EXPERTS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
# kind of adapter -> (base, options of its LoraConfig)
ADAPTERS = {
    "LoRA": ("llama", {}),
    "all linear layers": ("llama", {"target_modules": "all-linear"}),
    "rsLoRA": ("llama", {"use_rslora": True}),
    "patterns": ("llama", PATTERNS),
    "patterns, rsLoRA": ("llama", {**PATTERNS, "use_rslora": True}),
    "DoRA": ("llama", {"use_dora": True}),
    "DoRA of Conv1D": ("gpt2", {"use_dora": True, "target_modules": ["c_attn", "mlp.c_proj"]}),
    "DoRA of an embedding": ("llama", {"use_dora": True, "target_modules": ["embed_tokens", "q_proj"]}),
    "DoRA of convolutions": ("resnet", {"use_dora": True, "target_modules": ["convolution"]}),
    "lora_bias": ("bert", {"lora_bias": True, "target_modules": ["query", "value"]}),
    "biases of its layers": ("bert", {"bias": "lora_only", "target_modules": ["query", "value"]}),
    "all biases": ("bert", {"bias": "all", "target_modules": ["query", "value"]}),
    "a head": ("llama", {"modules_to_save": ["lm_head"]}),
    "a head and an embedding": ("llama", {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "tokens": ("llama", {"trainable_token_indices": [3, 100, 7]}),
    "tokens by name": ("llama", {"trainable_token_indices": {"embed_tokens": [3, 100, 7]}}),
    "tokens, tied": ("gemma", {"trainable_token_indices": [3, 100, 7]}),
    "an embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "a router": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]}),
    "experts": ("mixtral", {"target_modules": ["q_proj"], **EXPERTS}),
    "experts, one parameter": ("mixtral", {"target_modules": [], "target_parameters": ["experts.down_proj"]}),
    "experts of Qwen3": ("qwen3_moe", {"target_modules": [], **EXPERTS, "use_rslora": True}),
    "a pattern of experts": ("qwen3_moe", {"target_modules": [], **EXPERTS, "alpha_pattern": {"down_proj": 3}}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "a square Conv1D": ("gpt2", {"target_modules": ["attn.c_proj"]}),
    "a patch convolution": ("vit", {"target_modules": ["projection", "query"]}),
    "an encoder and a decoder": ("t5", {"target_modules": ["q", "v", "wi"]}),
    "convolutions": ("resnet", {"target_modules": ["convolution"]}),
}  # fmt: skip


@pytest.mark.parametrize("kind", ADAPTERS)
def test_it_is_what_peft_merges(kind, folds, tmp_path):
    of, options = ADAPTERS[kind]
    base, adapter = folds.save_base(of, tmp_path / "base"), folds.save_lora(of, tmp_path / "adapter", **options)
    fold_model(base, [adapter], tmp_path / "out")
    found = folds.load(tmp_path / "out")
    peft = folds.adapted(base, adapter)
    expected = folds.answer(peft)
    assert error_ratio(folds.answer(found), expected) < ANSWERS
    assert error_ratio(folds.answer(folds.load(base)), expected) > 0.01, "the adapter changes nothing"
    merged = peft.merge_and_unload().state_dict()
    weights = found.state_dict()
    assert weights.keys() == merged.keys()
    worst = max((error_ratio(weights[name].float(), merged[name].float()), name) for name in merged)
    assert worst[0] < CLOSE, worst


def test_names_shards_and_index_are_the_bases(folds, tmp_path, capsys):
    base = folds.save_base("llama", tmp_path / "base")
    adapter = folds.save_lora("llama", tmp_path / "adapter")
    (base / "tokenizer.json").write_text("{}")
    capsys.readouterr()
    assert main(["fold", str(base), str(adapter), "-o", str(tmp_path / "deep" / "out")]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith(f"{tmp_path / 'deep' / 'out'}: 4 weights changed, 0.")
    names = sorted(path.name for path in base.iterdir())
    assert len([name for name in names if name.startswith("model-")]) > 3
    assert sorted(path.name for path in (tmp_path / "deep" / "out").iterdir()) == sorted([*names, sums.SUMS])
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    assert sums.is_whole(tmp_path / "deep" / "out")
    index, before = (json.loads((folder / "model.safetensors.index.json").read_text())
                     for folder in (tmp_path / "deep" / "out", base))  # fmt: skip
    assert index["weight_map"] == before["weight_map"]
    assert index["metadata"]["total_size"] == before["metadata"]["total_size"]
    changed = 0
    for name in names:
        if not name.endswith(".safetensors"):
            continue
        mine, old = load_file(tmp_path / "deep" / "out" / name), load_file(base / name)
        assert list(mine) == list(old)
        changed += sum(not torch.equal(mine[key], old[key]) for key in old)
    assert changed == 4


@pytest.mark.parametrize(("dtype", "stored"), [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)])
@pytest.mark.parametrize("kind", ["all linear layers", "DoRA", "experts", "Conv1D", "an embedding"])
def test_16_bits_are_the_fp32_result_rounded_once(kind, dtype, stored, folds, tmp_path):
    of, options = ADAPTERS[kind]
    base = folds.save_base(of, tmp_path / "base", dtype, shard="1MB")
    adapter = folds.save_lora(of, tmp_path / "adapter", dtype=stored, **options)
    fold_model(base, [adapter], tmp_path / "out")
    fold_model(base, [adapter], tmp_path / "wide", dtype="float32")
    mine, wide, old = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "wide", "base"))
    assert {tensor.dtype for tensor in wide.values() if tensor.is_floating_point()} == {torch.float32}
    assert sum(not torch.equal(mine[key], old[key]) for key in old) >= 3
    for key in old:
        assert mine[key].dtype == dtype
        assert torch.equal(mine[key], wide[key].to(dtype)), key
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"
    expected = folds.answer(folds.adapted(base, adapter))  # all in fp32
    assert error_ratio(folds.answer(folds.load(tmp_path / "wide")), expected) < ANSWERS


def test_a_chosen_dtype(folds, tmp_path):
    base, adapter = folds.save_base("llama", tmp_path / "base"), folds.save_lora("llama", tmp_path / "adapter")
    fold_model(base, [adapter], tmp_path / "wide")
    fold_model(base, [adapter], tmp_path / "out", dtype="bfloat16")
    wide, narrow = (folds.load(tmp_path / name).state_dict() for name in ("wide", "out"))
    assert all(torch.equal(narrow[name], wide[name].bfloat16()) for name in wide)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    before = json.loads((base / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] * 2 == before["metadata"]["total_size"]


def test_a_base_of_another_name_is_said(folds, tmp_path):
    """No reason to refuse it: folders are renamed and moved."""
    base, adapter = folds.save_base("llama", tmp_path / "base"), folds.save_lora("llama", tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    content = json.loads(path.read_text())
    for name in ("meta/base", "Base", str(base)):
        path.write_text(json.dumps({**content, "base_model_name_or_path": name}))
        assert "another base" not in str(fold_model(base, [adapter], tmp_path / f"out {Path(name).parent.name}"))
    path.write_text(json.dumps({**content, "base_model_name_or_path": "meta/other"}))
    assert "the adapter names another base, meta/other: make sure" in str(
        fold_model(base, [adapter], tmp_path / "other")
    )
