"""Heads tied to their embedding, and vocabularies that an adapter resized: as base and adapter answer, or refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from slao.cli import main
from slao.merging import fold_model
from slao_kernels.testing import error_ratio

ANSWERS = 5e-6  # as in test_fold.py
# What changes one of the two alone.
APART = {
    "a head": ("gemma", {"modules_to_save": ["lm_head"]}),
    "an embedding": ("gemma", {"modules_to_save": ["embed_tokens"]}),
    "LoRA of an embedding": ("gemma", {"target_modules": ["embed_tokens", "q_proj"]}),
    "LoRA of a head": ("gemma", {"target_modules": ["lm_head", "q_proj"]}),
    "LoRA of GPT-2's embedding": ("gpt2", {"target_modules": ["wte", "c_attn"]}),
    "tokens of each": ("gemma", {"trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [5]}}),
    # PEFT ties again by the names embed_tokens and lm_head alone
    "a name that PEFT does not tie": ("gpt2", {"target_modules": ["wte", "c_attn"], "ensure_weight_tying": True}),
}


@pytest.mark.parametrize("case", APART)
def test_one_alone_is_refused_or_untied(case, folds, tmp_path, capsys):
    kind, options = APART[case]
    base, adapter = folds.save_base(kind, tmp_path / "base"), folds.save_lora(kind, tmp_path / "adapter", **options)
    out = tmp_path / "out"
    capsys.readouterr()
    assert main(["fold", str(base), str(adapter), "-o", str(out)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "are one parameter (tie_word_embeddings)" in err
    assert "--untie" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    assert main(["fold", str(base), str(adapter), "-o", str(out), "--untie"]) == 0
    assert "tie_word_embeddings is false" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    index = json.loads((out / "model.safetensors.index.json").read_text())
    stored = {key: name for name in sorted(set(index["weight_map"].values())) for key in load_file(out / name)}
    assert stored == index["weight_map"]
    assert stored["lm_head.weight"] in index["weight_map"].values()
    sizes = [tensor.nbytes for name in set(stored.values()) for tensor in load_file(out / name).values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    found = folds.load(out)
    assert found.get_input_embeddings().weight.data_ptr() != found.get_output_embeddings().weight.data_ptr()
    expected = folds.answer(folds.adapted(base, adapter))
    assert error_ratio(folds.answer(found), expected) < ANSWERS
    assert error_ratio(folds.answer(folds.load(base)), expected) > 0.01


@pytest.mark.parametrize("more", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["lm_head"]}], ids=str)
@pytest.mark.parametrize("untie", [False, True])
def test_tokens_and_a_tied_head_of_its_own(more, untie, folds, tmp_path):
    """The first does not run in PEFT; in the second the rows' place is before the delta."""
    base = folds.save_base("gemma", tmp_path / "base")
    adapter = folds.save_lora("gemma", tmp_path / "adapter", trainable_token_indices=[3, 7], **more)
    with pytest.raises(ValueError, match="trains tokens, and lm_head.weight besides"):
        fold_model(base, [adapter], tmp_path / "out", untie=untie)


ALIKE = {
    "tokens": {"trainable_token_indices": [3, 100]},
    "tokens by both names": {"trainable_token_indices": {"embed_tokens": [3, 100], "lm_head": [3, 100]}},
    "an embedding": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "a head": {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    "LoRA": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
}


@pytest.mark.parametrize("case", ALIKE)
def test_both_alike_stay_tied(case, folds, tmp_path, capsys):
    base = folds.save_base("gemma", tmp_path / "base")
    adapter = folds.save_lora("gemma", tmp_path / "adapter", **ALIKE[case])
    fold_model(base, [adapter], tmp_path / "out")
    found = folds.load(tmp_path / "out")
    assert found.get_input_embeddings().weight.data_ptr() == found.get_output_embeddings().weight.data_ptr()
    assert error_ratio(folds.answer(found), folds.answer(folds.adapted(base, adapter))) < ANSWERS
    with pytest.raises(ValueError, match="untie would do nothing"):
        fold_model(base, [adapter], tmp_path / "again", untie=True)


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_a_resized_vocabulary(kind, folds, tmp_path):
    base, adapter = folds.save_base(kind, tmp_path / "base"), folds.save_lora(kind, tmp_path / "adapter", rows=131)
    fold_model(base, [adapter], tmp_path / "out")
    found = folds.load(tmp_path / "out")
    assert found.config.vocab_size == 131
    assert found.get_input_embeddings().weight.shape[0] == found.get_output_embeddings().weight.shape[0] == 131
    expected = folds.answer(folds.adapted(base, adapter, rows=131))
    assert error_ratio(folds.answer(found), expected) < ANSWERS
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    sizes = [
        t.nbytes for name in set(index["weight_map"].values()) for t in load_file(tmp_path / "out" / name).values()
    ]
    assert index["metadata"]["total_size"] == sum(sizes)


@pytest.mark.parametrize(("kind", "more"), [("gemma", {}), ("llama", {}), ("llama", {"modules_to_save": ["lm_head"]})])
def test_tokens_of_a_resized_vocabulary(kind, more, folds, tmp_path):
    """What TRL's trainer does where a chat template brings tokens."""
    options = {"trainable_token_indices": [3, 128, 130], **more}
    base = folds.save_base(kind, tmp_path / "base")
    adapter = folds.save_lora(kind, tmp_path / "adapter", rows=131, **options)
    fold_model(base, [adapter], tmp_path / "out")
    found = folds.load(tmp_path / "out")
    assert found.config.vocab_size == 131
    tied = found.get_input_embeddings().weight.data_ptr() == found.get_output_embeddings().weight.data_ptr()
    assert tied == (kind == "gemma")
    expected = folds.answer(folds.adapted(base, adapter, rows=131))
    assert error_ratio(folds.answer(found), expected) < ANSWERS


@pytest.mark.parametrize("stored", [["lm_head.weight"], ["lm_head.weight", "model.embed_tokens.weight"]], ids=str)
def test_it_is_stored_under_the_heads_name_or_both(stored, folds, tmp_path):
    base = folds.save_base("gemma", tmp_path / "base", shard="1MB")
    path = base / "model.safetensors"
    tensors = load_file(path)
    embedding = tensors.pop("model.embed_tokens.weight")
    save_file(tensors | {name: embedding.clone() for name in stored}, path, metadata={"format": "pt"})
    tokens = folds.save_lora("gemma", tmp_path / "tokens", trainable_token_indices=[3, 100])
    lora = folds.save_lora("gemma", tmp_path / "lora", target_modules=["embed_tokens", "q_proj"])
    fold_model(base, [tokens], tmp_path / "tied")
    with pytest.raises(ValueError, match="are one parameter"):
        fold_model(base, [lora], tmp_path / "apart")
    fold_model(base, [lora], tmp_path / "apart", untie=True)
    for name, adapter, ties in (("tied", tokens, True), ("apart", lora, False)):
        found = folds.load(tmp_path / name)
        same = found.get_input_embeddings().weight.data_ptr() == found.get_output_embeddings().weight.data_ptr()
        assert same == ties
        assert error_ratio(folds.answer(found), folds.answer(folds.adapted(base, adapter))) < ANSWERS


def test_half_of_a_resized_vocabulary_is_refused(folds, tmp_path):
    base, adapter = folds.save_base("llama", tmp_path / "base"), folds.save_lora("llama", tmp_path / "a", rows=131)
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.model.lm_head.weight"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match="resizes the embedding.*lm_head.weight': 128"):
        fold_model(base, [adapter], tmp_path / "out")


def test_tied_biases_are_one(folds, tmp_path):
    """BERT's decoder has the bias of its predictions: one parameter, which bias="all" trains."""
    base = folds.save_base("bert", tmp_path / "base")
    adapter = folds.save_lora("bert", tmp_path / "a", bias="all", target_modules=["query"])
    fold_model(base, [adapter], tmp_path / "out")
    found = folds.load(tmp_path / "out")
    expected = load_file(adapter / "adapter_model.safetensors")["base_model.model.cls.predictions.bias"]
    assert torch.equal(found.cls.predictions.decoder.bias, expected)
