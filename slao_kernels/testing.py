"""For tests, benches and the self-test: one error measure, tolerances with their reasons, tiny models of each kind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# RMS(x - ref) / RMS(ref) allowed against an fp64 reference on the same (rounded) inputs.
TOLERANCE = {
    torch.float64: 1e-13,  # 450 ulp: sums of up to 10^4 products
    torch.float32: 2e-6,  # 16 ulp: the same sums, blocked by the GEMM
    torch.bfloat16: 8e-3,  # 2 ulp of 2^-8: operands exact, t and y rounded once each
    torch.float16: 1e-3,  # 2 ulp of 2^-11, likewise
}
# The same where a result of fp32 or wider is rounded once into its dtype, uniform in half a unit either way: RMS 0.29
# units. fp32 and fp64 add their sums' rounding.
ONCE = {torch.float64: 2e-15, torch.float32: 4e-7, torch.bfloat16: 0.3 * 2**-7, torch.float16: 0.3 * 2**-10}
# ‖A Aᵀ − I‖₂ of an orthonormal A (r, n), over √r: half a unit of the storage dtype on entries of size 1/√n, times the
# worst case of r rows adding up.
STORAGE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def error_ratio(actual: Tensor, reference: Tensor) -> float:
    """RMS(actual - reference) / RMS(reference) in fp64; the absolute RMS where the reference is zero."""
    if actual.shape != reference.shape:
        raise AssertionError(f"shapes differ: {tuple(actual.shape)} and {tuple(reference.shape)}")
    if actual.numel() == 0:
        return 0.0
    difference = actual.detach().double() - reference.detach().double()
    norm = reference.detach().double().square().mean().sqrt().item()
    error = difference.square().mean().sqrt().item()
    return error / norm if norm > 0 else error


def tiny_model(kind: str, seed: int = 0, **overrides: Any) -> nn.Module:
    """A random transformers model of a few thousand parameters: llama, qwen3, gpt2, bert, t5, vit (a classifier of
    16 x 16 images, 4 labels), or with experts mixtral, qwen3_moe, gpt_oss or deepseek (shared experts), in eval mode.

    vocabulary 128, width 32, 2 layers, 4 heads unless `overrides` (keyword arguments of its config) say otherwise.
    """
    import transformers as hf

    decoder: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    encoder = {key: value for key, value in decoder.items() if key != "num_key_value_heads"}
    gpt2: dict[str, Any] = {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    gpt2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}
    t5: dict[str, Any] = {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    t5 |= {"dropout_rate": 0.0, "decoder_start_token_id": 0, "pad_token_id": 0}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    vit = {key: value for key, value in encoder.items() if key not in ("vocab_size", "max_position_embeddings")}
    vit |= {"image_size": 16, "patch_size": 8, "num_labels": 4}
    del vit["pad_token_id"]
    head, few, chosen = {"head_dim": 8}, {"moe_intermediate_size": 24}, {"num_experts_per_tok": 2}
    deepseek: dict[str, Any] = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 0}
    deepseek |= {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
    deepseek |= {"head_dim": 4, "num_key_value_heads": 4}
    qwen = {**decoder, **head, **few, **chosen, "num_experts": 4}
    builders: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "llama": (hf.LlamaConfig, hf.LlamaForCausalLM, decoder),
        "mixtral": (hf.MixtralConfig, hf.MixtralForCausalLM, {**decoder, "num_local_experts": 4}),
        "qwen3_moe": (hf.Qwen3MoeConfig, hf.Qwen3MoeForCausalLM, qwen),
        "gpt_oss": (hf.GptOssConfig, hf.GptOssForCausalLM, {**decoder, **head, "num_local_experts": 4, **chosen}),
        "deepseek": (hf.DeepseekV2Config, hf.DeepseekV2ForCausalLM, {**decoder, **deepseek, **few, **chosen}),
        "qwen3": (hf.Qwen3Config, hf.Qwen3ForCausalLM, {**decoder, "head_dim": 8}),
        "gpt2": (hf.GPT2Config, hf.GPT2LMHeadModel, gpt2),
        "bert": (hf.BertConfig, hf.BertForMaskedLM, {**encoder, **still}),
        "t5": (hf.T5Config, hf.T5ForConditionalGeneration, t5),
        "vit": (hf.ViTConfig, hf.ViTForImageClassification, {**vit, **still}),
    }
    if kind not in builders:
        raise ValueError(f"unknown tiny model {kind!r}; choose one of {', '.join(builders)}")
    config_class, model_class, settings = builders[kind]
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        return model_class(config_class(**{**settings, **overrides})).eval()
    finally:
        torch.random.set_rng_state(state)
