"""Tiny bases and adapters of every kind for the tests of `slao fold`; conftest.py hands it out as a fixture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from slao.export import save_adapter
from slao_kernels.testing import tiny_model

TOKENS = torch.tensor([[5, 9, 100, 7, 3, 77], [1, 2, 90, 4, 5, 6]])


def base(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A random model: one of `tiny_model`'s, qwen3_moe, gemma (tied, with one eps more) or resnet."""
    moe = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    small = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
    torch.manual_seed(seed)
    if kind == "qwen3_moe":
        model: Any = hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**small, **moe))
    elif kind == "gemma":
        model = hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**small, head_dim=8))
    elif kind == "resnet":
        sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "bottleneck"}
        model = hf.ResNetModel(hf.ResNetConfig(num_channels=3, **sizes))
    else:
        model = tiny_model(kind, seed)
    with torch.no_grad():  # transformers draws 0.02, biases of 0 and norms of 1, which hide mistakes
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.to(dtype).eval()


def save_base(kind: str, folder: Path, dtype: torch.dtype = torch.float32, shard: str = "20KB", **options: Any) -> Path:
    """In several shards."""
    base(kind, dtype).save_pretrained(folder, max_shard_size=shard, **options)
    return folder


def save_lora(
    kind: str, folder: Path, seed: int = 1, dtype: torch.dtype = torch.float32, rows: int = 0, **options: Any
) -> Path:
    """An adapter as PEFT saves it, everything in it drawn at random. rows: what the vocabulary is resized to."""
    model = base(kind)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    given: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], **options}
    adapted = get_peft_model(model, LoraConfig(**given))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                if "magnitude" in name:
                    parameter.mul_(1 + 0.3 * noise)
                else:
                    parameter.add_(0.3 * noise)
    if given.get("bias", "none") == "none":
        adapted.save_pretrained(folder, save_embedding_layers="auto" if not rows else True)
    else:  # PEFT leaves out the biases of "lora_only"
        save_adapter(adapted, folder)
    if dtype != torch.float32:
        path = folder / "adapter_model.safetensors"
        save_file({key: tensor.to(dtype) for key, tensor in load_file(path).items()}, path)
    return folder


def load(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """By plain transformers, which may miss nothing and find nothing that it does not know."""
    kind = getattr(hf, json.loads((folder / "config.json").read_text())["architectures"][0])
    model, told = kind.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not any(told[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    return model.to(dtype).eval()


def adapted(base_folder: Path, adapter: Path, rows: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """PEFT's model of both."""
    model = load(base_folder, dtype)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return PeftModel.from_pretrained(model, adapter).eval()


def answer(model: Any) -> torch.Tensor:
    kind = type(getattr(model, "base_model", model)).__name__ + type(model).__name__ + str(model.config.model_type)
    with torch.no_grad():
        if "vit" in kind or "resnet" in kind:
            size = 16 if "vit" in kind else 32
            pixels = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
            given = {"pixel_values": pixels.to(next(model.parameters()).dtype)}
        else:
            given = {"input_ids": TOKENS, **({"decoder_input_ids": TOKENS[:, :3]} if "t5" in kind else {})}
        told = model(**given)
        return (told["logits"] if "logits" in told else told[0]).float()
