"""Real geometries with random weights, and the training steps that they are timed in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import nn


def minilm(dtype: torch.dtype) -> nn.Module:
    """The geometry of all-MiniLM-L6-v2."""
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}
    config = hf.BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return hf.AutoModel.from_config(config, dtype=dtype, attn_implementation="sdpa")


def llama(dtype: torch.dtype, **sizes: Any) -> nn.Module:
    """Four blocks in a Llama's proportions; a small vocabulary, so that the head does not hide them."""
    small = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 16}
    config = hf.LlamaConfig(**{**small, "num_key_value_heads": 4, "vocab_size": 4096, "use_cache": False, **sizes})
    return hf.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")


# From the models' published configurations; the frequencies of the rotary embedding change no figure.
_LLAMA_3: dict[str, Any] = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}


def llama_3_2_1b(dtype: torch.dtype) -> nn.Module:
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True}
    return llama(dtype, **_LLAMA_3, **sizes)


def llama_3_8b(dtype: torch.dtype) -> nn.Module:
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "tie_word_embeddings": False}
    return llama(dtype, **_LLAMA_3, **sizes)


def gemma_3_270m(dtype: torch.dtype) -> nn.Module:
    """168 of its 268 M parameters are the embeddings, which are also the head."""
    sizes: dict[str, Any] = {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18, "head_dim": 256}
    config = hf.Gemma3TextConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=1, vocab_size=262144, sliding_window=512
    )
    return hf.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")


@dataclass(frozen=True)
class Case:
    """A model and a batch of it. for_a_gpu: the weights alone would fill a small machine, and a step takes minutes."""

    build: Callable[[torch.dtype], nn.Module]
    batch: int
    length: int
    rounds: int
    iterations: int = 1
    for_a_gpu: bool = False
    checkpointing: bool = False


CASES = {
    "minilm-16x64": Case(minilm, 16, 64, 11),
    "minilm-2x16": Case(minilm, 2, 16, 31, 4),
    "llama-2x256": Case(llama, 2, 256, 7),
    "llama-3.2-1b-4x2048": Case(llama_3_2_1b, 4, 2048, 9, for_a_gpu=True),
    "llama-3.2-1b-4x2048-checkpointing": Case(llama_3_2_1b, 4, 2048, 9, for_a_gpu=True, checkpointing=True),
    "llama-3-8b-1x2048": Case(llama_3_8b, 1, 2048, 9, for_a_gpu=True),
    "llama-3-8b-2x2048-checkpointing": Case(llama_3_8b, 2, 2048, 7, for_a_gpu=True, checkpointing=True),
}


def on_device(build: Callable[[torch.dtype], nn.Module], dtype: torch.dtype, device: str, in_place: bool) -> nn.Module:
    """The same random model each time; in_place: made where it will live, without a copy of it in the host's memory."""
    torch.manual_seed(0)
    if not in_place:
        return build(dtype).to(device)
    with torch.device(device):
        return build(dtype)
