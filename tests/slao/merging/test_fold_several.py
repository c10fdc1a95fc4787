"""Several adapters: the exact sum, what `slao merge` makes of them, and what --verify says of either."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from slao.cli import main
from slao.folders import read_adapter
from slao.merging import METHODS, fold_model, merge_adapters
from slao_kernels import fold_

CLOSE = 1e-6  # as in test_fold.py


def three(folds, tmp_path, **options):
    base = folds.save_base("llama", tmp_path / "base", shard="1MB")
    return base, [folds.save_lora("llama", tmp_path / f"a{seed}", seed, **options) for seed in (1, 2, 3)]


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_svd_without_a_rank_is_the_exact_sum(folds, tmp_path):
    base, adapters = three(folds, tmp_path)
    adapters[1] = folds.save_lora("llama", tmp_path / "wide", 2, r=7, lora_alpha=3)
    shares = [0.5, -0.3, 0.8]
    folded = fold_model(base, adapters, tmp_path / "out", "svd", weights=shares)
    assert folded.lost is None
    old, new = weights(base), weights(tmp_path / "out")
    deltas = [read_adapter(folder) for folder in adapters]
    for key in old:
        exact = old[key].double()
        for share, found in zip(shares, deltas, strict=True):
            if key.removesuffix(".weight") in found:
                A, B, s = found[key.removesuffix(".weight")]
                exact = exact + share * s * B.double() @ A.double()
        assert float((new[key] - exact).norm() / exact.norm()) < CLOSE, key
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        note = json.loads(file.metadata()["slao_fold"])
    assert note == {"method": "svd", "adapters": ["a1", "wide", "a3"], "weights": shares}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_a_merge_and_a_fold(method, folds, tmp_path):
    """bit-equal, but for svd, whose merge is cut to the rank of one adapter."""
    base, adapters = three(folds, tmp_path)
    rank = {"rank": 3} if method == "svd" else {}
    merged = merge_adapters(adapters, tmp_path / "merged", method, **rank)
    folded = fold_model(base, adapters, tmp_path / "out", method, **rank)
    assert (folded.lost or 0.0) == merged.lost
    old, new = weights(base), weights(tmp_path / "out")
    for name, (A, B, s) in read_adapter(tmp_path / "merged").items():
        W = old.pop(f"{name}.weight")
        fold_([W], [A], [B], s)
        assert torch.equal(new[f"{name}.weight"], W), name
    assert all(torch.equal(new[key], old[key]) for key in old)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a1", "a2", "a3", "base", "merged", "out"]
    assert not (tmp_path / "out" / ".adapter").exists()


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_one_adapter_times_a_weight(kind, folds, tmp_path):
    """lora_bias is a part of the product, and is weighted as that is."""
    base = folds.save_base(kind, tmp_path / "base", shard="1MB")
    bias = {"lora_bias": True, "target_modules": ["query", "value"]} if kind == "bert" else {}
    adapter = folds.save_lora(kind, tmp_path / "adapter", **bias)
    fold_model(base, [adapter], tmp_path / "out", weights=[-0.5])
    fold_model(base, [adapter], tmp_path / "whole")
    old, half, whole = weights(base), weights(tmp_path / "out"), weights(tmp_path / "whole")
    assert sum(not torch.equal(old[key], whole[key]) for key in old) == (8 if bias else 4)
    for key in old:
        expected = old[key].double() - 0.5 * (whole[key].double() - old[key].double())
        assert float((half[key] - expected).norm() / expected.norm()) < CLOSE


@pytest.mark.parametrize(("how", "method"), [("keep", "svd"), ("merge", "svd"), ("keep", "slao"), ("merge", "linear")])
def test_heads_of_several(how, method, folds, tmp_path):
    base, adapters = three(folds, tmp_path, modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="has modules_to_save: more than A and B; merge it with --beside keep"):
        fold_model(base, adapters, tmp_path / "out", method)
    fold_model(base, adapters, tmp_path / "out", method, beside=how)
    merge_adapters(adapters, tmp_path / "merged", method, beside=how)
    expected = load_file(tmp_path / "merged" / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    assert torch.equal(weights(tmp_path / "out")["lm_head.weight"], expected)


@pytest.fixture(scope="module")
def told(folds, tiny, tmp_path_factory):
    """A base with a tokenizer in bf16, and three adapters."""
    folder = tmp_path_factory.mktemp("told")
    base = folds.save_base("llama", folder / "base", torch.bfloat16)
    tiny.tokenizer().save_pretrained(base)
    return base, [folds.save_lora("llama", folder / f"a{seed}", seed) for seed in (1, 2, 3)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("more", [[], ["--method", "svd"], ["--method", "slao"]])
def test_verify(dtype, more, told, tmp_path, capsys):
    base, adapters = told
    words = ["fold", str(base), *map(str, adapters if more else adapters[:1]), "-o", str(tmp_path / "out"), *more]
    capsys.readouterr()
    assert main([*words, "--dtype", dtype, "--verify", "red cat sky"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    found = re.fullmatch(r"verified: logits differ by (\S+) at most, which rounding explains \((\S+)\); next.*", line)
    assert found is not None, line
    difference, allowed = map(float, found.groups())
    eps = torch.finfo(getattr(torch, dtype)).eps
    assert difference <= allowed < 20 * eps + 2**-19  # the rounding's, and a GEMM's in fp32
    assert difference > 0.05 * eps, "as little as that is no rounding"


def test_verify_finds_another_model(told, folds, tmp_path, capsys, monkeypatch):
    """An adapter whose alpha changes between the fold and the comparison, by a tenth."""
    from slao.merging import fold

    base, (adapter, *_) = told
    whole = fold.verified

    def later(made, folders, *rest):
        path = adapter / "adapter_config.json"
        before = path.read_text()
        path.write_text(json.dumps({**json.loads(before), "lora_alpha": 6.6}))
        try:
            return whole(made, folders, *rest)
        finally:
            path.write_text(before)

    monkeypatch.setattr(fold, "verified", later)
    capsys.readouterr()
    assert main(["fold", str(base), str(adapter), "-o", str(tmp_path / "out"), "--verify", "red cat"]) == 1
    out, err = capsys.readouterr()
    assert "which rounding DOES NOT explain" in out
    assert err.splitlines()[-1] == f"slao: {tmp_path / 'out'} was written, and does not answer as base and adapters do"
    assert (tmp_path / "out" / "SHA256SUMS").exists()


def test_verify_needs_a_tokenizer_first(folds, tmp_path, capsys):
    base, adapters = three(folds, tmp_path)
    capsys.readouterr()
    assert main(["fold", str(base), str(adapters[0]), "-o", str(tmp_path / "out"), "--verify", "red"]) == 2
    assert "slao: --verify needs a tokenizer, and none loads from" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_verify_of_several_heads_is_refused(told, folds, tmp_path, capsys):
    base, _ = told
    adapters = [folds.save_lora("llama", tmp_path / f"h{seed}", seed, modules_to_save=["lm_head"]) for seed in (1, 2)]
    words = [
        "fold",
        str(base),
        *map(str, adapters),
        "-o",
        str(tmp_path / "out"),
        "--beside",
        "merge",
        "--verify",
        "red",
    ]
    capsys.readouterr()
    assert main([*words, "--method", "svd"]) == 2
    assert "verify compares with PEFT, which answers with one adapter's heads" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*words, "--method", "linear"]) == 0  # one merged adapter
    assert "which rounding explains" in capsys.readouterr().out


def test_replicated_layers_of_several(folds, tmp_path):
    """The names of the replicated model's first layers are the base's."""
    base, adapters = three(folds, tmp_path)
    for folder in adapters:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "layer_replication": [[0, 2], [1, 2]]}))
    for method in ("svd", "slao"):
        with pytest.raises(ValueError, match="has layer_replication"):
            fold_model(base, adapters, tmp_path / "out", method)
    assert not (tmp_path / "out").exists()


def test_adapters_of_different_bases(folds, tmp_path):
    base, adapters = three(folds, tmp_path)
    path = adapters[1] / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "other"}))
    for method in ("svd", "slao"):
        with pytest.raises(ValueError, match="base_model_name_or_path is 'other'"):
            fold_model(base, adapters, tmp_path / "out", method)
    assert not (tmp_path / "out").exists()
