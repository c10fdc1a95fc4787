"""Every base and adapter that cannot be folded: one line that says why, exit code 2, and nothing on the disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from slao.cli import main
from slao.merging import fold_model

HEAD = "base_model.model."
Q_A, Q_B = (f"{HEAD}model.layers.0.self_attn.q_proj.lora_{f}.weight" for f in "AB")


@pytest.fixture(scope="module")
def made(folds, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    folds.save_base("llama", folder / "base")
    folds.save_lora("llama", folder / "adapter")
    return folder


def config(folder: Path, **changes) -> None:
    """Of a model or of an adapter; None takes a key away."""
    path = next(path for name in ("adapter_config.json", "config.json") if (path := folder / name).exists())
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def tensors(folder: Path, **changes) -> None:
    """A function of the adapter's tensors for each name, under which its result is stored; None takes it away."""
    path = folder / "adapter_model.safetensors"
    found = load_file(path)
    for name, change in changes.items():
        key = {"A": Q_A, "B": Q_B}.get(name, HEAD + name.replace("__", "."))
        found[key] = change(found[Q_B]) if name not in "AB" or change is None else change(found[key])
    save_file(found, path)


def shard(base: Path, key: str = "model.layers.0.self_attn.q_proj.weight") -> Path:
    return base / json.loads((base / "model.safetensors.index.json").read_text())["weight_map"][key]


def stored(base: Path, change, key: str = "model.layers.0.self_attn.q_proj.weight") -> None:
    path = shard(base, key)
    found = load_file(path)
    found[key] = change(found[key])
    save_file(found, path, metadata={"format": "pt"})


def cut(base: Path, length: int) -> None:
    path = shard(base)
    path.write_bytes(path.read_bytes()[:length])


def replaced(weight, value):
    weight = weight.clone()
    weight.view(-1)[3] = value
    return weight


def link_out(path: Path) -> None:
    elsewhere = path.parent.parent / f"elsewhere-{path.name}"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


# name -> (what happens to base and adapter, flags, what the line says)
BAD = {
    "no folder": (lambda b, a: shutil.rmtree(b), [], "base is no folder: download the base first"),
    "no config": (lambda b, a: (b / "config.json").unlink(), [], "holds no model: there is no config.json"),
    "no weights": (lambda b, a: (b / "model.safetensors.index.json").unlink(), [], "has no model.safetensors and no"),
    "no shard": (lambda b, a: shard(b).unlink(), [], "which is not in its folder; download it again"),
    "cut shard": (lambda b, a: cut(b, -40), [], "is cut short or damaged"),
    "cut header": (lambda b, a: cut(b, 100), [], "is no safetensors file, or cut short"),
    "empty shard": (lambda b, a: cut(b, 0), [], "is no safetensors file, or cut short"),
    "another's shard": (lambda b, a: shutil.copy(shard(b, "lm_head.weight"), shard(b)), [], "stands in two of its"),
    "quantised": (lambda b, a: config(b, quantization_config={"quant_method": "bitsandbytes"}), [],
                  "is quantised (bitsandbytes), and a delta cannot be added"),
    "quantised within": (lambda b, a: config(b, text_config={"quantization_config": {"bits": 4}}), [], "is quantised"),
    "integers": (lambda b, a: stored(b, lambda w: w.to(torch.int8)), [], "q_proj.weight as int8: it is quantised"),
    "fp8": (lambda b, a: stored(b, lambda w: w.to(torch.float8_e4m3fn)), [], "as float8_e4m3fn: it is quantised"),
    "other shape": (lambda b, a: stored(b, lambda w: w[:16].clone()), [], "is (16, 32) in the base's file, and (32, 3"),
    "unknown kind": (lambda b, a: config(b, architectures=["GrokForCausalLM"]), [], "has no GrokForCausalLM"),
    "unknown type": (lambda b, a: config(b, model_type="grok9"), [], "could not be loaded"),
    "NaN in the base": (lambda b, a: stored(b, lambda w: replaced(w, float("nan"))), [], "weight has infinite or"),
    "shard out of the folder": (lambda b, a: link_out(shard(b)), [], "leads out of its folder"),
    "config out of the folder": (lambda b, a: link_out(b / "config.json"), [], "leads out of its folder"),
    "adapter elsewhere": (lambda b, a: link_out(a / "adapter_model.safetensors"), [], "leads out of its folder"),
    "another kind": (lambda b, a: config(a, peft_type="IA3"), [], "does not describe a LoRA adapter"),
    "pissa": (lambda b, a: config(a, init_lora_weights="pissa"), [], "which changes the base"),
    "aLoRA": (lambda b, a: config(a, alora_invocation_tokens=[1]), [], "has alora_invocation_tokens: more than"),
    "replicated layers": (lambda b, a: config(a, layer_replication=[[0, 2]]), [], "has layer_replication"),
    "NaN": (lambda b, a: tensors(a, B=lambda B: replaced(B, float("nan"))), [], "q_proj has NaN or infinite entries"),
    "wider A": (lambda b, a: tensors(a, A=lambda A: torch.ones(4, 40)), [],
                "q_proj is (32, 40), and model.layers.0.self_attn.q_proj.weight of the base (32, 32)"),
    "a name too many": (lambda b, a: tensors(a, model__layers__7__mlp__up_proj__bias=lambda B: B[:, 0].clone()), [],
                        "or with a head that these files lack: the base has no weight for "
                        "base_model.model.model.layers.7.mlp.up_proj.bias"),
    "half a pair": (lambda b, a: tensors(a, lm_head__lora_B__weight=lambda B: B.clone()), [], "has no weight for base"),
    "a magnitude alone": (lambda b, a: tensors(a, lm_head__lora_magnitude_vector=lambda B: torch.ones(128)), [],
                          "belongs to no A and B"),
    "a bias of the adapter's": (lambda b, a: tensors(a, model__layers__0__self_attn__q_proj__lora_B__bias=lambda B:
                                B[:, 0].clone()), [], "which the base does not have: lora_bias needs a layer that"),
    "tokens beyond": (lambda b, a: (config(a, trainable_token_indices=[3, 128]), tensors(a,
                      model__embed_tokens__token_adapter__trainable_tokens_delta=lambda B: torch.ones(2, 32))), [],
                      "for the tokens [3, 128]"),
    "overflow": (lambda b, a: tensors(a, B=lambda B: B * 1e6), ["--dtype", "float16"],
                 "q_proj.weight has infinite or NaN entries in float16"),
    "dtype": (lambda b, a: None, ["--dtype", "int8"], "unknown dtype 'int8'; choose one of float32, bfloat16, float16"),
    "method": (lambda b, a: None, ["--method", "ties"], "ties merges two adapters or more; got 1"),
    "beside": (lambda b, a: None, ["--beside", "keep"], "beside='keep' is about several adapters"),
    "untie": (lambda b, a: None, ["--untie"], "untie would do nothing"),
    "weights": (lambda b, a: None, ["--weights", "1,2"], "weights are 2 numbers for 1 adapters"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_one_line_and_nothing_written(case, made, tmp_path, capsys):
    change, flags, message = BAD[case]
    for name in ("base", "adapter"):
        shutil.copytree(made / name, tmp_path / "in" / name)
    base, adapter = tmp_path / "in" / "base", tmp_path / "in" / "adapter"
    change(base, adapter)
    (tmp_path / "to").mkdir()
    capsys.readouterr()
    assert main(["fold", str(base), str(adapter), "-o", str(tmp_path / "to" / "out"), *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("slao: ")
    assert err.count("\n") == 1, err
    assert message in err
    assert list((tmp_path / "to").iterdir()) == []


def test_a_base_of_another_kind(made, folds, tmp_path, capsys):
    base = folds.save_base("gpt2", tmp_path / "gpt2")
    capsys.readouterr()
    assert main(["fold", str(base), str(made / "adapter"), "-o", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert "the base has no weight for base_model.model.model.layers.0" in err
    assert "was trained on another model, or with a head that these files lack: the base has no weight for" in err


def test_what_is_there_stays(made, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(made / "base", base)
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    assert main(["fold", str(base), str(made / "adapter"), "-o", str(base)]) == 2
    assert "exists already: choose another -o" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before


def test_what_is_copied(made, tmp_path, capsys):
    """Everything but weights, pickles, what is hidden, and what a link leads out of the folder to; it is said."""
    base = tmp_path / "base"
    shutil.copytree(made / "base", base)
    kept = {
        "tokenizer.json": b"{}",
        "generation_config.json": b'{"a": 1}',
        "LICENSE": b"x",
        "1_Pooling/config.json": b"y",
    }
    for name, content in kept.items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(content)
    left = ["pytorch_model.bin", "training_args.bin", "optimizer.pt", "consolidated.safetensors", "model.onnx"]
    for name in left:
        (base / name).write_bytes(b"weights")
    (base / ".git").mkdir()
    (base / ".git" / "HEAD").write_text("x")
    (tmp_path / "secret").write_text("s")
    (base / "vocab.txt").symlink_to(tmp_path / "secret")
    (tmp_path / "secrets").mkdir()
    (base / "folder").symlink_to(tmp_path / "secrets")
    (base / "merges.txt").symlink_to("LICENSE")
    capsys.readouterr()
    assert main(["fold", str(base), str(made / "adapter"), "-o", str(tmp_path / "out")]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("not copied: ")
    for name in left:
        assert f"{name} (weights that are not folded)" in line
    assert "vocab.txt (a link out of the folder)" in line
    assert "folder (a link to a folder)" in line
    for name, content in {**kept, "merges.txt": b"x"}.items():
        assert (tmp_path / "out" / name).read_bytes() == content
        assert not (tmp_path / "out" / name).is_symlink()
    for name in [*left, ".git", "vocab.txt", "folder"]:
        assert not (tmp_path / "out" / name).exists()


def test_one_file_beside_an_index(made, folds, tmp_path):
    """transformers takes the one file; the index and its shards are left, and that is said."""
    base = tmp_path / "base"
    shutil.copytree(made / "base", base)
    save_file(folds.load(base).state_dict(), base / "model.safetensors", metadata={"format": "pt"})
    folded = fold_model(base, [made / "adapter"], tmp_path / "out")
    names = [path.name for path in base.iterdir() if path.name.startswith("model") and path.name != "model.safetensors"]
    assert folded.left == dict.fromkeys(names, "weights that are not folded")
    assert not list((tmp_path / "out").glob("*.index.json"))


def test_a_base_without_the_heads_prefix(made, folds, tmp_path):
    """A checkpoint of the bare model, whose names lack "model.", and an adapter of the model with a head."""
    folds.load(made / "base").model.save_pretrained(tmp_path / "bare")
    fold_model(tmp_path / "bare", [made / "adapter"], tmp_path / "out")
    fold_model(made / "base", [made / "adapter"], tmp_path / "whole")
    bare, whole = folds.load(tmp_path / "out").state_dict(), folds.load(tmp_path / "whole").model.state_dict()
    assert bare.keys() == whole.keys()
    assert all(torch.equal(bare[name], whole[name]) for name in bare)


def test_experts_as_transformers_holds_them(folds, tmp_path):
    """save_original_format=False stores (E, out, in); the result is the same."""
    options = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    apart = folds.save_base("mixtral", tmp_path / "apart", shard="1MB")
    packed = folds.save_base("mixtral", tmp_path / "packed", shard="1MB", save_original_format=False)
    assert "model.layers.0.mlp.experts.down_proj" in load_file(packed / "model.safetensors")
    adapter = folds.save_lora("mixtral", tmp_path / "adapter", **options)
    fold_model(apart, [adapter], tmp_path / "one")
    fold_model(packed, [adapter], tmp_path / "two")
    one, two = folds.load(tmp_path / "one").state_dict(), folds.load(tmp_path / "two").state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
