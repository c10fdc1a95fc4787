"""`slao extract`: the LoRA on its base gives the tuned model back, as far as its rank holds it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from slao import sums
from slao.cli import main
from slao.folders import read_adapter
from slao.merging import cuts
from slao.merging.dense import cut, residual
from slao.merging.extract import extract_adapter
from slao_kernels.testing import tiny_model

TIED = {"tie_word_embeddings": True}


def make(folder: Path, kind: str, rank: int | None = None, only: str = "", **overrides) -> tuple[Path, Path]:
    """(tuned, base) folders. What has `only` in its name differs: matrices by noise, or by a product of that rank."""
    base = tiny_model(kind, 0, **overrides)
    base.save_pretrained(folder / "base")
    tuned = type(base).from_pretrained(folder / "base")
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if only not in name:
                continue
            if rank and parameter.dim() == 2 and "embed" not in name:
                (m, n) = parameter.shape
                parameter.add_(0.02 * torch.randn(m, rank, generator=g) @ torch.randn(rank, n, generator=g))
            else:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=g))
    tuned.save_pretrained(folder / "tuned")
    return folder / "tuned", folder / "base"


def logits(model, kind: str) -> torch.Tensor:
    ids = torch.arange(12).view(2, 6) % 30
    given = {"pixel_values": torch.linspace(-1, 1, 1536).view(2, 3, 16, 16)} if kind == "vit" else {"input_ids": ids}
    given |= {"decoder_input_ids": ids} if kind == "t5" else {}
    with torch.no_grad():
        return model.eval()(**given).logits


def loaded(folder: Path, kind: str):
    return type(tiny_model(kind)).from_pretrained(folder)


def error(found: torch.Tensor, expected: torch.Tensor, before: torch.Tensor) -> float:
    """Part of the change that is not there."""
    return float((found - expected).norm() / (expected - before).norm())


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [("llama", {}), ("llama", TIED), ("gpt2", {}), ("bert", {}), ("vit", {}), ("t5", {}), ("qwen3", {})],
)
def test_peft_gives_the_tuned_model_back(kind, overrides, tmp_path):
    """Full ranks; linear, Conv1D, biases, norms, embeddings, tied heads. fp32: 2e-6 at most here."""
    tuned, base = make(tmp_path, kind, **overrides)
    made = extract_adapter(tuned, base, tmp_path / "out", rank=64)
    assert made.lost <= 1e-6
    before, expected = (logits(loaded(folder, kind), kind) for folder in (base, tuned))
    model = PeftModel.from_pretrained(loaded(base, kind), tmp_path / "out")
    assert error(logits(model, kind), expected, before) <= 1e-5
    assert sums.is_whole(tmp_path / "out")


def test_each_layer_is_within_a_per_cent_of_the_dense_one(tmp_path, capsys):
    """Noise is the hard case. And what the table and layers.json say is what the file holds."""
    tuned, base = make(tmp_path, "llama", only="proj", hidden_size=96, intermediate_size=160)
    out = tmp_path / "out"
    capsys.readouterr()
    assert main(["extract", str(tuned), str(base), "-o", str(out), "--rank", "8"]) == 0
    printed, err = capsys.readouterr()
    assert err == ""
    record = json.loads((out / cuts.RECORD).read_text())
    two = [load_file(folder / "model.safetensors") for folder in (tuned, base)]
    layers = read_adapter(out)
    assert len(layers) == len(record["layers"]) == 14
    lost = total = 0.0
    for name, (A, B, scaling) in layers.items():
        delta = two[0][f"{name}.weight"].double() - two[1][f"{name}.weight"].double()
        left = float((delta - scaling * B.double() @ A.double()).norm() / delta.norm())
        S = torch.linalg.svdvals(delta)
        assert scaling == 1
        assert left / float(S[8:].norm() / S.norm()) <= 1.01
        assert record["layers"][name]["lost"] == pytest.approx(left, rel=1e-6)
        assert f"{left:.3%}" in next(line for line in printed.splitlines() if line.startswith(name))
        lost, total = lost + (left * float(delta.norm())) ** 2, total + float(delta.square().sum())
    assert record["lost"] == pytest.approx(math.sqrt(lost / total), rel=1e-6)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (8, 8, {})
    assert (config["modules_to_save"], config["bias"], config["task_type"]) == (None, "none", "CAUSAL_LM")


@pytest.mark.parametrize("shape", [(200, 120), (120, 200)])
@pytest.mark.parametrize(("rank", "keep"), [(8, None), (64, None), (None, 0.5), (None, 0.9)])
def test_a_cut_is_near_the_dense_one(rank, keep, shape):
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -2, shape[1])
    A, B = cut(delta, cuts.Limit(rank, keep))
    S = torch.linalg.svdvals(delta.double())
    r = len(A)
    if keep is None:
        assert r == rank
    else:  # at most one more than the fewest: the values found are within 1 % of the best in what they leave
        fewest = 1 + int((S.square().cumsum(0) < keep * S.square().sum()).sum())
        assert fewest <= r <= fewest + 1
    best = float(S[r:].norm())
    left = float((delta.double() - B.double() @ A.double()).norm())
    assert best * (1 - 1e-6) <= left <= 1.01 * best
    assert residual(delta, A, B) == pytest.approx(left, rel=1e-9)
    assert (A.norm(dim=1) / B.norm(dim=0) - 1).abs().max() <= 1e-4


def test_low_rank_changes_come_back_exactly(tmp_path):
    """A fine-tune of rank 3, looked for by --keep: found as such. The files hold its sum with W, rounded to fp32: 2e-6
    of the change."""
    tuned, base = make(tmp_path, "llama", rank=3, only="mlp")
    made = extract_adapter(tuned, base, tmp_path / "out", keep=0.99999)
    assert {name: layer.rank for name, layer in made.layers.items()} == {
        f"model.layers.{i}.mlp.{each}_proj": 3 for i in (0, 1) for each in ("gate", "up", "down")
    }
    assert made.lost <= 1e-5
    before, expected = (logits(loaded(folder, "llama"), "llama") for folder in (base, tuned))
    model = PeftModel.from_pretrained(loaded(base, "llama"), tmp_path / "out")
    assert error(logits(model, "llama"), expected, before) <= 1e-4


def test_layers_that_did_not_change_are_not_targets(tmp_path):
    tuned, base = make(tmp_path, "llama", only="layers.1.self_attn.q_proj")
    made = extract_adapter(tuned, base, tmp_path / "out", rank=4)
    assert list(made.layers) == ["model.layers.1.self_attn.q_proj"]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    model = PeftModel.from_pretrained(loaded(base, "llama"), tmp_path / "out")
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 1


def test_left_out_by_name(tmp_path, capsys):
    tuned, base = make(tmp_path, "llama")
    out = tmp_path / "out"
    assert main(["extract", str(tuned), str(base), "-o", str(out), "--rank", "4", "--beside", "leave"]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out")]
    two = [load_file(folder / "model.safetensors") for folder in (tuned, base)]
    rest = [name for name in two[0] if "norm" in name or "embed" in name]
    assert len(said) == len(rest) == 6
    for name in rest:
        size = float((two[0][name].double() - two[1][name].double()).norm())
        part = size / float(two[1][name].double().norm())
        assert f"left out, though it differs: {name}, by {size:.3g} ({part:.2%} of its norm)" in said
    assert all("lora_" in key for key in load_file(out / "adapter_model.safetensors"))
    assert json.loads((out / "adapter_config.json").read_text())["modules_to_save"] is None


def test_shards_and_dtypes(tmp_path):
    """bf16 shards against one bf16 file; A and B in bf16: the rounding is in what is said."""
    tuned, base = make(tmp_path, "llama", only="proj")
    for folder in (tuned, base):
        loaded(folder, "llama").bfloat16().save_pretrained(folder, max_shard_size="20KB" if folder == tuned else "5GB")
    (tuned / "model.safetensors").unlink()
    assert len(list(tuned.glob("model-*.safetensors"))) > 2
    one = extract_adapter(tuned, base / "model.safetensors", tmp_path / "one", rank=32, dtype="bfloat16")
    stored = load_file(tmp_path / "one" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert 5e-4 <= one.lost <= 4e-3
    wide = extract_adapter(tuned, base, tmp_path / "wide", rank=32)
    assert wide.lost <= 1e-6


def spoil(tuned: Path, base: Path, how: str) -> None:
    """Make the two folders unfit."""
    path = tuned / "model.safetensors"
    tensors, config = load_file(path), json.loads((tuned / "config.json").read_text())
    name = "model.layers.0.mlp.up_proj.weight"
    if how == "missing":
        del tensors[name]
    elif how == "renamed":
        tensors["model.layers.0.mlp.other.weight"] = tensors.pop(name)
    elif how == "extra":
        tensors["more.weight"] = torch.ones(3)
    elif how == "NaN":
        tensors[name][0, 0] = float("nan")
    elif how == "int8":
        tensors[name] = tensors[name].to(torch.int8)
    elif how == "quantised":
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    elif how == "wider":
        tensors[name] = torch.ones(65, 32)
    elif how == "vocabulary":
        for key in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[key] = torch.cat([tensors[key], tensors[key][:8]])
        config["vocab_size"] += 8
    elif how == "the same":
        tensors = load_file(base / "model.safetensors")
    elif how == "no config":
        (base / "config.json").unlink()
    save_file(tensors, path, metadata={"format": "pt"})
    (tuned / "config.json").write_text(json.dumps(config))
    if how in ("a link", "no weight_map", "an unnamed file"):
        other = tuned / "part.safetensors" if how != "a link" else tuned.parent / "elsewhere.safetensors"
        path.rename(other)
        if how == "a link":
            path.symlink_to(other)
        else:
            index = [] if how == "no weight_map" else {"weight_map": dict.fromkeys(tensors, "")}
            (tuned / "model.safetensors.index.json").write_text(json.dumps(index))
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "pickle":
        path.rename(tuned / "pytorch_model.bin")
    elif how == "absent":
        shutil.rmtree(tuned)


BAD = {
    "missing": "lacks 1 weights of its model, such as model.layers.0.mlp.up_proj.weight",
    "renamed": "lacks 1 weights of its model, such as model.layers.0.mlp.up_proj.weight",
    "extra": "more.weight: is no weight of the model, and is in",
    "NaN": "model.layers.0.mlp.up_proj.weight has NaN or infinite entries",
    "int8": "model.layers.0.mlp.up_proj.weight is stored as int8: it is quantised",
    "quantised": "is quantised (gptq), and the difference of such weights is mostly rounding",
    "wider": "model.layers.0.mlp.up_proj.weight is (65, 32), its config says (64, 32)",
    "vocabulary": "(if tokens were added: a LoRA keeps its base's shapes, so extract against a base with as many",
    "the same": "no linear layer of",
    "no config": "could not be loaded as a model folder or hub name",
    "cut": "is cut short or damaged",
    "a link": "leads out of its folder",
    "no weight_map": "model.safetensors.index.json has no weight_map from tensors to files",
    "an unnamed file": "names the file '', which is not in its folder",
    "pickle": "but a pickle (pytorch_model.bin), which may run any code when it is read",
    "absent": "there is no model folder and no safetensors file at",
}


@pytest.mark.parametrize("how", BAD)
def test_what_is_refused(how, tmp_path, capsys):
    tuned, base = make(tmp_path, "llama", only="proj")
    spoil(tuned, base, how)
    before = sorted(path.name for path in tmp_path.iterdir())
    capsys.readouterr()
    assert main(["extract", str(tuned), str(base), "-o", str(tmp_path / "out"), "--rank", "4"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert BAD[how] in err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(("flags", "message"), [
    ([], "say how much to keep"),
    (["--rank", "4", "--beside", "drop"], "unknown beside 'drop'; choose one of save, leave"),
    (["--rank", "4", "--dtype", "int8"], "unknown dtype 'int8'; choose one of float32, bfloat16, float16, float64"),
])  # fmt: skip
def test_flags_that_are_refused(flags, message, tmp_path, capsys):
    assert main(["extract", "a", "b", "-o", str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err


def test_experts_that_differ_are_refused_and_others_are_not(tmp_path, capsys):
    """transformers joins a file's experts into one parameter, which PEFT has no plain LoRA for."""
    tuned, base = make(tmp_path / "a", "mixtral", only="self_attn")
    made = extract_adapter(tuned, base, tmp_path / "out", rank=32)
    assert len(made.layers) == 8
    tuned, base = make(tmp_path / "b", "mixtral", only="experts")
    assert main(["extract", str(tuned), str(base), "-o", str(tmp_path / "no"), "--rank", "4"]) == 2
    assert "is one of several tensors that a weight is joined of, and differs" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
