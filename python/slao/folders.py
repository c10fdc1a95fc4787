"""Adapters as PEFT saves them, read without their model: what compares or merges several of them needs no base."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from slao_kernels.inventory import more_than_pairs

Triple = tuple[Tensor, Tensor, float]
FACTORS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))


def read_adapter(folder: str | Path) -> dict[str, Triple]:
    """Layer name -> (A, B, scaling) of a folder that PEFT's or this library's save_pretrained wrote, in the file's
    order: A (r, n), B (m, r), a convolution's flattened; scaling as PEFT computes it.

    Raises ValueError when the folder holds no LoRA adapter in safetensors, or one that adds more than B A to its base.
    """
    from .merging.source import Source

    source = Source(folder)
    return {name: (*source.read(name), layer.scaling) for name, layer in source.layers.items()}


def scaling(config: Mapping[str, Any], name: str, r: int) -> float:
    """alpha / r, or alpha / √r, of the layer `name` as PEFT computes it."""
    from peft.utils.other import get_pattern_key

    alphas = config.get("alpha_pattern") or {}
    alpha = float(alphas.get(get_pattern_key(list(alphas), name), config["lora_alpha"]))
    return alpha / (r**0.5 if config.get("use_rslora") else r)


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a LoRA that trains A and B only; else ValueError."""
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"{folder} holds no adapter: there is no adapter_config.json") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA" or "lora_alpha" not in config:
        raise ValueError(f"{path} does not describe a LoRA adapter")
    more = more_than_pairs(config)
    if more:
        raise ValueError(f"{path} has {', '.join(more)}: more than A and B, which alone are compared or merged")
    return config


def aligned(adapters: Sequence[Mapping[str, Triple]]) -> tuple[list[str], list[list[Triple]]]:
    """(names of the layers that any adapter has, sorted; each adapter over all of them, rank 0 where it has none)."""
    names = sorted(set().union(*adapters))
    first = {name: triple for adapter in reversed(adapters) for name, triple in adapter.items()}
    empty = {name: (A[:0], B[:, :0], 1.0) for name, (A, B, _) in first.items()}
    return names, [[adapter.get(name, empty[name]) for name in names] for adapter in adapters]


def interference_table(folders: Sequence[str | Path]) -> str:
    """The cosines of the folders' task vectors, over all layers together, and their norms, as lines of text."""
    from slao_kernels import interference

    _, adapters = aligned([read_adapter(folder) for folder in folders])
    whole = interference(adapters).whole()
    names = [Path(folder).resolve().name for folder in folders]
    width = max(map(len, names))
    head = " ".join(f"{index + 1:>6}" for index in range(len(names)))
    lines = [f"{'':{width + 4}} {head}    norm"]
    for index, name in enumerate(names):
        cells = " ".join(f"{value:6.3f}" for value in whole.cosines[0, index].tolist())
        lines.append(f"{index + 1:>3} {name:<{width}} {cells} {whole.norms[0, index].item():7.4g}")
    return "\n".join(lines)
