"""Tiny causal language models: capped, scaled and tied heads, a router, windows, no cache of keys."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

WORDS = 97
SIZES: dict[str, Any] = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
USUAL = SIZES | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "embd_pdrop": 0, "attn_pdrop": 0, "resid_pdrop": 0}
CONFIGS: dict[str, Any] = {
    "llama": lambda: hf.LlamaConfig(**USUAL),
    "qwen3": lambda: hf.Qwen3Config(**USUAL, head_dim=8),
    "gemma2, capped": lambda: hf.Gemma2Config(**USUAL, head_dim=8, final_logit_softcapping=2.0),
    "gemma3, tied": lambda: hf.Gemma3TextConfig(**USUAL, head_dim=8, tie_word_embeddings=True),
    "gpt2": lambda: hf.GPT2Config(vocab_size=WORDS, bos_token_id=0, eos_token_id=0, **GPT2),
    "mixtral, router's loss": lambda: hf.MixtralConfig(**USUAL, num_local_experts=4, output_router_logits=True),
    "granite, scaled": lambda: hf.GraniteConfig(**USUAL, logits_scaling=3.0),
    "opt, a decoder within": lambda: hf.OPTConfig(
        **SIZES, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.0, layerdrop=0.0
    ),
}
# Those that only scoring tells apart.
WINDOWED: dict[str, Any] = {
    "gemma3, windows": lambda: hf.Gemma3TextConfig(**USUAL, head_dim=8, sliding_window=6),
    "mistral, windows": lambda: hf.MistralConfig(**USUAL, sliding_window=5),
    "bloom, no positions": lambda: hf.BloomConfig(vocab_size=WORDS, hidden_size=32, n_layer=2, n_head=4),
    "mamba, no cache of keys": lambda: hf.MambaConfig(vocab_size=WORDS, hidden_size=32, num_hidden_layers=2),
}
# No prompt's cache serves several answers: positions that cannot be given or count the padding, a state, no decoder.
UNSHARED: dict[str, Any] = {
    "bart's decoder": lambda: hf.BartConfig(
        vocab_size=WORDS, d_model=16, decoder_layers=1, decoder_attention_heads=2, is_decoder=True,
        is_encoder_decoder=False, dropout=0.0,
    ),
    "roberta": lambda: hf.RobertaConfig(
        **SIZES, intermediate_size=16, is_decoder=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    ),
    "rwkv": lambda: hf.RwkvConfig(vocab_size=WORDS, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32),
}  # fmt: skip


def causal(kind: str) -> Any:
    """In training mode, drawn from one seed."""
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config((CONFIGS | WINDOWED | UNSHARED)[kind]()).train()
