"""How much memory a fold takes: less than one shard, whatever the model's size."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import transformers as hf

SCRIPT = """
import json, sys
from slao.merging import fold_model

def peak():
    # Not ru_maxrss, which a new process has from the one that started it.
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))

small, base, adapter, small_adapter, out = sys.argv[1:]
fold_model(small, [small_adapter], out + "-small")  # loads every library that the next line needs
before = peak()
fold_model(base, [adapter], out)
print(json.dumps([before, peak()]))
"""


@pytest.mark.exhaustive
def test_peak_memory_is_below_a_shard(folds, tmp_path):
    config = hf.LlamaConfig(vocab_size=512, hidden_size=1024, intermediate_size=2816, num_hidden_layers=6,
                            num_attention_heads=8, num_key_value_heads=8)  # fmt: skip
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(config).bfloat16()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    model.save_pretrained(tmp_path / "base", max_shard_size="50MB")
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    shards = sorted((tmp_path / "base").glob("*.safetensors"))
    sizes = [path.stat().st_size for path in shards]
    assert len(shards) >= 3
    folds.save_base("llama", tmp_path / "small")
    folds.save_lora("llama", tmp_path / "small_adapter")
    words = [str(tmp_path / name) for name in ("small", "base", "adapter", "small_adapter", "out")]
    told = subprocess.run([sys.executable, "-c", SCRIPT, *words], capture_output=True, text=True, check=True)
    before, after = json.loads(told.stdout.splitlines()[-1])
    assert sum(sizes) > 140e6
    assert after - before < max(sizes), (before, after, sizes)
