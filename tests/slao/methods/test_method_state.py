"""Saved state: exact, checked, and whole whenever the process dies. Exported adapters: plain PEFT."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import slao_kernels
from slao import SLAO, SeqLoRA
from slao.methods.base import STATE_FILE, Method
from slao_kernels.testing import tiny_model


def make(seed: int = 0, **lora) -> nn.Module:
    torch.manual_seed(seed)
    return get_peft_model(tiny_model("llama"), LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **lora}))


def train(method: Method, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for pair in method.pairs:
            pair.A.add_(torch.randn(pair.A.shape, generator=g) * 0.1)
            pair.B.add_(torch.randn(pair.B.shape, generator=g) * 0.2)


def task(method: Method, index: int) -> None:
    method.begin_task(str(index))
    train(method, index)
    method.end_task()


def weights(method: Method) -> list[torch.Tensor]:
    found = [tensor.detach().clone() for pair in method.pairs for tensor in (pair.A, pair.B)]
    with method.merged():
        return found + [tensor.detach().clone() for pair in method.pairs for tensor in pair.parameters]


def equal(left: Method, right: Method) -> bool:
    same = all(torch.equal(a, b) for a, b in zip(weights(left), weights(right), strict=True))
    return same and (left.names, left.lambdas) == (right.names, right.lambdas)


@pytest.mark.parametrize("merge", ["B", "A", "AB"])
@pytest.mark.parametrize("mid_task", [False, True])
def test_a_loaded_state_goes_on_bit_identically(tmp_path, merge, mid_task):
    method = SLAO(make(), merge=merge)
    task(method, 0)
    task(method, 1)
    if mid_task:
        method.begin_task("2")
        train(method, 2)
    method.save(tmp_path, {"note": [1, 2.5, None]})
    other = SLAO(make(seed=5), merge=merge)
    assert other.load(tmp_path) == {"note": [1, 2.5, None]}
    assert equal(method, other)
    for each in (method, other):
        if mid_task:
            each.end_task()
        task(each, 3)
    assert equal(method, other)


def test_seqlora_keeps_its_weights(tmp_path):
    method = SeqLoRA(make())
    task(method, 0)
    task(method, 1)
    assert method.lambdas == [1.0, 1.0]
    method.save(tmp_path)
    other = SeqLoRA(make(seed=5))
    other.load(tmp_path)
    assert equal(method, other)
    with method.merged():
        assert all(
            torch.equal(a, b)
            for a, b in zip(
                weights(other)[: 2 * len(other.pairs)],
                [t.detach() for pair in method.pairs for t in (pair.A, pair.B)],
                strict=True,
            )
        )


def test_what_does_not_fit_is_refused_and_nothing_changes(tmp_path):
    method = SLAO(make())
    task(method, 0)
    method.save(tmp_path)
    cases = [
        (SeqLoRA(make()), "was saved with method 'slao', this is 'seqlora'"),
        (SLAO(make(), schedule=0.5), "was saved with options"),
        (SLAO(make(r=5)), r"is \(4, 32\) torch.float32, the model has \(5, 32\)"),
        (SLAO(make(target_modules=["q_proj"])), "holds layers that the model has not: .*v_proj"),
        (SLAO(make(target_modules=["q_proj", "v_proj", "o_proj"])), "o_proj.A is absent"),
        (SLAO(make().to(torch.bfloat16)), "the model has .* torch.bfloat16"),
    ]
    for other, message in cases:
        before = weights(other)
        with pytest.raises(ValueError, match=message):
            other.load(tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(weights(other), before, strict=True))
        assert other.task == 0


def test_damage_is_noticed(tmp_path):
    method = SLAO(make())
    task(method, 0)
    method.save(tmp_path)
    path = tmp_path / STATE_FILE
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[-5] ^= 1
    for content, message in (
        (bytes(flipped), "is damaged: its checksum does not match"),
        (good[: len(good) // 2], "is damaged"),
        (b"", "is damaged"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            SLAO(make()).load(tmp_path)
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="is not a state that this library wrote"):
        SLAO(make()).load(tmp_path)
    with pytest.raises(ValueError, match="no saved state at"):
        SLAO(make()).load(tmp_path / "nowhere")


WRITER = """
import sys, torch
from safetensors.torch import load_file
from pathlib import Path
from slao.checkpoint import write_state
path = Path(sys.argv[1])
print("ready", flush=True)
for i in range(10**9):
    write_state(path, {f"t{k}": torch.full((50_000,), float(i)) for k in range(8)}, {"i": i})
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is POSIX")
def test_a_kill_at_any_moment_leaves_a_whole_state(tmp_path):
    from slao.checkpoint import read_state

    path, last = tmp_path / "state.safetensors", -1
    for round_ in range(3):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        while not path.exists():  # the first of all
            time.sleep(0.02)
        time.sleep(0.074 * (1 + round_))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if path.exists():
            tensors, meta = read_state(path)  # raises if torn
            assert all((t == meta["i"]).all() for t in tensors.values())
            last = max(last, meta["i"])
    assert last > 0


def test_a_failed_write_leaves_the_old_state_and_no_litter(tmp_path):
    method = SLAO(make())
    task(method, 0)
    method.save(tmp_path)
    before = (tmp_path / STATE_FILE).read_bytes()
    with pytest.raises(TypeError):
        method.save(tmp_path, {"not JSON": object()})
    with pytest.raises(ValueError, match="JSON"):
        method.save(tmp_path, {"nan": float("nan")})
    assert (tmp_path / STATE_FILE).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]


PLAIN = """
import importlib.abc, json, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("slao_kernels", "slao"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model = PeftModel.from_pretrained(base, sys.argv[2]).eval()
with torch.no_grad():
    torch.save(model(torch.arange(3, 19)[None]).logits, sys.argv[3])
assert not any(name.split(".")[0] in ("slao_kernels", "slao") for name in sys.modules)
"""


@pytest.mark.parametrize("injected", [False, True], ids=["PeftModel", "injected"])
def test_exported_adapter_gives_the_same_logits_without_this_library(tmp_path, injected):
    base = tiny_model("llama")
    base.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    model = base if injected else get_peft_model(base, config)
    slao_kernels.patch(model, config if injected else None)
    method = SLAO(model.eval())
    for index in range(3):
        task(method, index)
    method.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        tuned = model(ids).logits
        with method.merged():
            merged = model(ids).logits
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir() if p.suffix != ".md") == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["inference_mode"] is True
    assert all("merged" not in key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    command = [sys.executable, "-c", PLAIN, str(tmp_path / "base"), str(tmp_path / "adapter"), str(tmp_path / "out")]
    subprocess.run(command, check=True, cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    loaded = torch.load(tmp_path / "out")
    assert (loaded - merged).abs().max() <= 1e-6
    assert (tuned - merged).abs().max() > 1e-4  # it is the merge that was exported


def test_export_of_a_named_adapter_and_of_an_unknown_one(tmp_path):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj"])
    model = get_peft_model(tiny_model("llama"), config, adapter_name="mine")
    method = SLAO(model, adapter="mine")
    task(method, 0)
    method.save_pretrained(tmp_path / "out")
    again = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / "out"))
    for pair, fresh in zip(method.pairs, SLAO(again).pairs, strict=True):
        assert torch.equal(pair.B, fresh.B)
    from slao.export import save_adapter

    with pytest.raises(ValueError, match=r"no PEFT config for adapter 'x'; it has \['mine'\]"):
        save_adapter(model, Path(tmp_path), "x")
