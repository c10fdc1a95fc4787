"""The one walk over a model: where its LoRA pairs are. Knows layers and tensors, never tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

Slot = tuple[nn.Module, str]  # a module and the attribute under which it keeps a parameter
# What the wrappers of torch put between a module's name and its children's.
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


@dataclass(frozen=True)
class LoraPair:
    """One adapted layer of one adapter.

    name: the layer's dotted name in the model, as it was before anything wrapped its modules (FSDP, torch.compile).
    layer: PEFT's LoRA layer. parameters: the nn.Parameters of A and B.
    scaling: PEFT's factor (alpha/r, or alpha/√r for rsLoRA).
    A mixture's experts (PEFT's target_parameters) have one A (experts · r, n) and one B (m, r · experts) together:
    whatever takes them for matrices asks for each expert's own with `split`, what goes entry by entry need not.
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

    @property
    def experts(self) -> int:
        """How many experts share A and B; 1 for a layer of its own."""
        return int(self.layer.num_experts) if hasattr(self.layer, "parameter_name") else 1

    @property
    def rank(self) -> int:
        """r, of experts each one's."""
        return self.parameters[0].shape[0] // self.experts

    @property
    def names(self) -> list[str]:
        """The layer's name, or one for each of its experts."""
        return expert_names(self.name, self.experts)

    def split(self, factor: str, packed: Tensor) -> list[Tensor]:
        """Each expert's own matrix, (r, n) of "A" or (m, r) of "B", as views of a tensor that is laid out as PEFT lays
        them out: an expert's rows of A together, its columns of B r steps of `experts` apart."""
        return split_experts(self.experts, factor, packed)

    def join(self, factor: str, parts: Sequence[Tensor]) -> Tensor:
        """What `split` takes apart, of whatever rank: parts, (r, n) or (m, r) each, laid out as PEFT lays them out."""
        return join_experts(factor, parts)

    def with_weights(self, A: Tensor | None, B: Tensor | None) -> LoraPair:
        """The same layer with other tensors in place of its parameters; None keeps one."""
        old = self.parameters
        new = [was if now is None else now.view(was.shape) for was, now in zip(old, (A, B), strict=True)]
        return replace(self, parameters=(new[0], new[1]))


def expert_names(name: str, experts: int) -> list[str]:
    """What a layer's experts are called; the layer's name where it has none."""
    return [name] if experts == 1 else [f"{name}[{index}]" for index in range(experts)]


def split_experts(experts: int, factor: str, packed: Tensor) -> list[Tensor]:
    """`LoraPair.split` of tensors that no pair holds."""
    if experts == 1:
        return [packed]
    if factor == "A":
        return list(packed.view(experts, len(packed) // experts, packed.shape[1]).unbind(0))
    return list(packed.view(len(packed), packed.shape[1] // experts, experts).unbind(2))


def join_experts(factor: str, parts: Sequence[Tensor]) -> Tensor:
    """`LoraPair.join` without a pair."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat(list(parts)) if factor == "A" else torch.stack(list(parts), 2).flatten(1)


def stack(experts: int, factor: str, first: Tensor, second: Tensor) -> Tensor:
    """Both, as PEFT lays them out, in one of the sum of their ranks: of experts each one's."""
    both = first, second
    if experts == 1:  # within every forward
        return torch.cat(both, 0 if factor == "A" else 1)
    if factor == "A":
        return torch.cat([one.reshape(experts, len(one) // experts, one.shape[1]) for one in both], 1).flatten(0, 1)
    return torch.cat([one.reshape(len(one), one.shape[1] // experts, experts) for one in both], 1).flatten(1)


def through(B: Tensor, core: Tensor) -> Tensor:
    """B core: B (m, r) and core (r, r), or of experts B (m, r experts) and core (experts, r, r)."""
    if core.dim() == 2:
        return B @ core
    each = B.view(len(B), -1, len(core)).permute(2, 0, 1) @ core
    return each.permute(1, 2, 0).flatten(1)


def scales_of_columns(scale: Tensor, experts: int, columns: int) -> Tensor:
    """(columns,): for each of a stacked B's columns the factor of its pair; scale: (pairs experts,), a pair's experts
    together."""
    return scale.view(-1, experts).repeat_interleave(columns // len(scale), 0).flatten()


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


def find_pairs(
    model: nn.Module, adapter: str = "default", read: Callable[[list[Slot]], list[Tensor]] | None = None
) -> tuple[list[LoraPair], dict[str, str]]:
    """(pairs, left_out): every LoRA pair of `adapter`, and by layer name why a layer has none that can be used.

    read: what to take for the parameters (sharding.py gathers them); None takes those that the layers have.
    Raises ValueError when the model has no such adapter, listing those it has.
    """
    left_out: dict[str, str] = {}
    found: list[tuple[str, nn.Module, tuple[Slot, Slot]]] = []
    for name, layer in lora_layers(model):
        if adapter not in layer.lora_A and adapter not in layer.lora_embedding_A:
            continue
        both = slots(layer, adapter)
        if isinstance(both, str):
            left_out[plain_name(name)] = both
        else:
            found.append((plain_name(name), layer, both))
    flat = [slot for _, _, both in found for slot in both]
    live = [getattr(*slot) for slot in flat]
    values = live if read is None else read(flat)
    pairs: list[LoraPair] = []
    owners: dict[int, str] = {}  # address of a weight -> the layer that it was first met in
    for i, (name, layer, _) in enumerate(found):
        A, B = values[2 * i : 2 * i + 2]
        reason = _misfit(A, B)
        addresses = _addresses(*live[2 * i : 2 * i + 2])
        owner = next((owners[address] for address in addresses if address in owners), None)
        if reason is not None:
            left_out[name] = reason
        elif owner is not None:
            left_out[name] = f"shares its weights with {owner} (tied adapters)"
        else:
            owners.update(dict.fromkeys(addresses, name))
            pairs.append(LoraPair(name, layer, (A, B), float(layer.scaling[adapter])))
    if not pairs and not left_out:
        names = adapter_names(model)
        hint = f"it has {', '.join(map(repr, names))}" if names else "it has no LoRA layers; add some, or call patch"
        raise ValueError(f"the model has no LoRA adapter {adapter!r}: {hint}")
    return pairs, left_out


def plain_name(name: str) -> str:
    """A module's or parameter's dotted name without what wrappers put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
        if name.endswith("." + wrapper[:-1]):
            name = name[: -len(wrapper)]
    return name


def slots(layer: nn.Module, adapter: str) -> tuple[Slot, Slot] | str:
    """Where A and B of one layer are kept; else why it has no pair that can be used."""
    variants = getattr(layer, "lora_variant", {})
    if adapter in variants:
        return f"{type(variants[adapter]).__name__} trains more than A and B"
    if adapter in layer.lora_embedding_A:
        both = (layer.lora_embedding_A, adapter), (layer.lora_embedding_B, adapter)
    else:
        down, up = layer.lora_A[adapter], layer.lora_B[adapter]
        if getattr(up, "bias", None) is not None:
            return "lora_bias trains more than A and B"
        if any(isinstance(part, nn.Module) and parametrize.is_parametrized(part) for part in (down, up)):
            return "lora_A or lora_B is parametrized: its weight is computed, not kept"
        both = (down, "weight"), (up, "weight")
    if not all(isinstance(getattr(*slot, None), Tensor) for slot in both):
        return f"{type(layer).__name__} keeps no plain A and B"
    return both


def live(pair: LoraPair, adapter: str = "default") -> LoraPair:
    """The pair with the parameters that its layer has now: a wrapper (FSDP) may have replaced them."""
    if _unchanged(pair, adapter):
        return pair
    both = slots(pair.layer, adapter)
    if isinstance(both, str):
        raise ValueError(f"{pair.name} has changed since its A and B were found: {both}")
    A, B = getattr(*both[0]), getattr(*both[1])
    if A is pair.parameters[0] and B is pair.parameters[1]:
        return pair
    return replace(pair, parameters=(A, B))


def _unchanged(pair: LoraPair, adapter: str) -> bool:
    """The common case by dictionaries alone: asked of hundreds of layers, four times between two tasks."""
    for name, parameter in zip(("lora_A", "lora_B"), pair.parameters, strict=True):
        part: Any = pair.layer._modules[name]
        own = part._modules.get(adapter)
        if own is None or own._parameters.get("weight") is not parameter:
            return False
    return True


def _misfit(A: Tensor, B: Tensor) -> str | None:
    if A.dim() > 2 and not (A.is_contiguous() and B.is_contiguous()):
        return "a convolution's A and B that are not contiguous have no 2-D view"
    if A.dim() < 2 or B.dim() < 2 or A.shape[0] != _flat(B).shape[1]:
        return f"A {tuple(A.shape)} and B {tuple(B.shape)} are not (r, n) and (m, r)"
    return None


def _addresses(*parameters: Tensor) -> list[int]:
    """Where weights begin in memory; nothing for those that are elsewhere (sharded, meta, empty)."""
    plain = [p for p in parameters if type(p) in (nn.Parameter, Tensor) and p.numel() > 0]
    return [p.data_ptr() for p in plain if p.device.type != "meta" and p.untyped_storage().nbytes() > 0]


def _flat(parameter: Tensor) -> Tensor:
    """(rows, everything else): a view that shares the memory and carries no graph."""
    detached = parameter.detach()
    return detached if detached.dim() == 2 else detached.view(detached.shape[0], -1)
