"""The one walk over a model: where its LoRA pairs are. Knows layers and tensors, never tasks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


@dataclass(frozen=True)
class LoraPair:
    """One adapted layer of one adapter.

    name: the layer's dotted name in the model. layer: PEFT's LoRA layer. parameters: the nn.Parameters of A and B.
    scaling: PEFT's factor (alpha/r, or alpha/√r for rsLoRA).
    """

    name: str
    layer: nn.Module
    parameters: tuple[Tensor, Tensor]
    scaling: float

    @property
    def A(self) -> Tensor:
        """(r, n), without a graph: writing into it writes the adapter. A convolution's is a 2-D view."""
        return _flat(self.parameters[0])

    @property
    def B(self) -> Tensor:
        """(m, r), likewise."""
        return _flat(self.parameters[1])


def lora_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(dotted name, module) of every PEFT LoRA layer in `model`, wrappers of experts included."""
    from peft.tuners.lora.layer import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def adapter_names(model: nn.Module) -> list[str]:
    """The names of all LoRA adapters in `model`, sorted."""
    found: set[str] = set()
    for _, layer in lora_layers(model):
        for attribute in ("lora_A", "lora_embedding_A"):
            found.update(getattr(layer, attribute, {}).keys())
    return sorted(found)


def find_pairs(model: nn.Module, adapter: str = "default") -> tuple[list[LoraPair], dict[str, str]]:
    """(pairs, left_out): every LoRA pair of `adapter`, and by layer name why a layer has none that can be used.

    Raises ValueError when the model has no such adapter, listing those it has.
    """
    pairs: list[LoraPair] = []
    left_out: dict[str, str] = {}
    owners: dict[int, str] = {}  # address of a weight -> the layer that it was first met in
    for name, layer in lora_layers(model):
        if adapter not in layer.lora_A and adapter not in layer.lora_embedding_A:
            continue
        pair = _pair(name, layer, adapter)
        if isinstance(pair, str):
            left_out[name] = pair
            continue
        addresses = _addresses(pair)
        owner = next((owners[address] for address in addresses if address in owners), None)
        if owner is None:
            owners.update(dict.fromkeys(addresses, name))
            pairs.append(pair)
        else:
            left_out[name] = f"shares its weights with {owner} (tied adapters)"
    if not pairs and not left_out:
        names = adapter_names(model)
        hint = f"it has {', '.join(map(repr, names))}" if names else "it has no LoRA layers; add some, or call patch"
        raise ValueError(f"the model has no LoRA adapter {adapter!r}: {hint}")
    return pairs, left_out


def _pair(name: str, layer: nn.Module, adapter: str) -> LoraPair | str:
    variants = getattr(layer, "lora_variant", {})
    if adapter in variants:
        return f"{type(variants[adapter]).__name__} trains more than A and B"
    if hasattr(layer, "parameter_name"):
        return f"{type(layer).__name__} packs several experts into one A and B"
    if adapter in layer.lora_embedding_A:
        A, B = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    else:
        down, up = layer.lora_A[adapter], layer.lora_B[adapter]
        A, B = getattr(down, "weight", None), getattr(up, "weight", None)
        if getattr(up, "bias", None) is not None:
            return "lora_bias trains more than A and B"
        if any(isinstance(part, nn.Module) and parametrize.is_parametrized(part) for part in (down, up)):
            return "lora_A or lora_B is parametrized: its weight is computed, not kept"
    if not isinstance(A, Tensor) or not isinstance(B, Tensor):
        return f"{type(layer).__name__} keeps no plain A and B"
    if A.dim() > 2 and not (A.is_contiguous() and B.is_contiguous()):
        return "a convolution's A and B that are not contiguous have no 2-D view"
    if A.dim() < 2 or B.dim() < 2 or A.shape[0] != _flat(B).shape[1]:
        return f"A {tuple(A.shape)} and B {tuple(B.shape)} are not (r, n) and (m, r)"
    return LoraPair(name, layer, (A, B), float(layer.scaling[adapter]))


def _addresses(pair: LoraPair) -> list[int]:
    """Where the pair's weights begin in memory; nothing for those that are elsewhere (sharded, meta, empty)."""
    plain = [p for p in pair.parameters if type(p) in (nn.Parameter, Tensor) and p.numel() > 0]
    return [p.data_ptr() for p in plain if p.device.type != "meta"]


def _flat(parameter: Tensor) -> Tensor:
    """(rows, everything else): a view that shares the memory and carries no graph."""
    detached = parameter.detach()
    return detached if detached.dim() == 2 else detached.view(detached.shape[0], -1)


def group_by_shape(
    pairs: list[LoraPair],
) -> dict[tuple[torch.Size, torch.Size, torch.dtype, torch.dtype], list[LoraPair]]:
    """Pairs that one batched kernel can take together: same shapes and dtypes of A and B, order kept."""
    groups: dict[tuple[torch.Size, torch.Size, torch.dtype, torch.dtype], list[LoraPair]] = {}
    for pair in pairs:
        groups.setdefault((pair.A.shape, pair.B.shape, pair.A.dtype, pair.B.dtype), []).append(pair)
    return groups
