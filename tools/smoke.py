"""What an installed slao_kernels must do, in seconds: patch a tiny Llama, learn for a step, merge, save and load.

python tools/smoke.py [--no-core]      (--no-core: the compiled core is absent, and that is said)
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import slao_kernels
from slao import SLAO
from slao_kernels import native

missing = native.why_not("cpu")
expected = "the extension was not built (no C++ compiler at install, or SLAO_KERNELS_BUILD=0)"
if missing != (expected if "--no-core" in sys.argv else None):
    sys.exit(f"compiled core: {missing or 'it is there'}")

torch.manual_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
model = LlamaForCausalLM(config)
base = LlamaForCausalLM(config)
base.load_state_dict(model.state_dict())
model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
report = slao_kernels.patch(model, strict=True)
method = SLAO(model)
ids = torch.arange(16).reshape(2, 8)
losses = []
for task in ("first", "second"):
    method.begin_task(task)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    method.end_task()
with tempfile.TemporaryDirectory() as folder:
    method.save_pretrained(folder)
    size = (Path(folder) / "adapter_model.safetensors").stat().st_size
    loaded = peft.PeftModel.from_pretrained(base, folder)
    with torch.no_grad(), method.merged():
        error = (loaded(input_ids=ids).logits - model(input_ids=ids).logits).abs().max().item()
if not (losses[-1] < losses[0] and error < 1e-5):
    sys.exit(f"losses {losses}, merged against loaded {error:.1e}")
print(f"{len(report.patched)} layers, loss {losses[0]:.3f} -> {losses[-1]:.3f}, adapter of {size} bytes, {error:.0e}")
