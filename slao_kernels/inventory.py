"""The one list of what an adapter consists of, and the one place that says why it may not be touched now.

A layer's own parts are A and B (`adapters.find_pairs`, which says by layer what a pair cannot hold: lora_bias, DoRA's
magnitude), their scaling, and what a method added (`extension.py`: a core, frozen pairs).
Beside them a LoraConfig may train biases of the base, whole modules and single tokens: `beside` finds those. Every
operation asks `refuse_now` before it reads, writes or runs an adapter; docs/adapter_parts.md has the table.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import LoraPair, Slot, plain_name

# Fields of a LoraConfig under which a layer's part is more than A and B, and those that train something beside them.
_MORE = (
    "target_parameters", "use_dora", "lora_bias", "alora_invocation_tokens", "arrow_config", "use_qalora", "use_bdlora",
    "velora_config", "monteclora_config", "kasa_config",
)  # fmt: skip
BESIDE = ("modules_to_save", "trainable_token_indices", "bias")
# Starts that take B A out of the base weight. PEFT repeats the first two to the last bit, given the same base and rank.
_REPEATED_INITS = ("pissa", "olora")
_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Part:
    """What trains beside A and B. name: as in the base model, without the adapter's. key: in the file that PEFT writes.

    kind: "bias", "module" (of modules_to_save, buffers included), "token", or "other": trains, but no LoraConfig
    names it, so that PEFT does not save it. slot: where the tensor is kept.
    """

    name: str
    kind: str
    key: str
    slot: Slot

    @property
    def tensor(self) -> Tensor:
        """The parameter or buffer, as the model has it now (it may be a shard)."""
        found: Tensor = getattr(*self.slot)
        return found


def beside(model: nn.Module, adapter: str = "default") -> list[Part]:
    """Everything that `adapter` trains beside its LoRA layers' A and B, in the model's order; tied tensors once.

    model: not wrapped as a whole (`sharding.unwrap`).
    """
    from peft.tuners.lora.layer import LoraLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    config = getattr(model, "peft_config", {}).get(adapter)
    biases = str(getattr(config, "bias", "none") or "none")
    layers: set[str] = set()  # prefixes; a layer comes before what is in it
    parts: list[Part] = []
    rest: list[Part] = []
    inside: list[str] = []  # prefixes of what PEFT's own layers keep for their adapters
    for owner, module in model.named_modules():
        if isinstance(module, LoraLayer):
            layers.add(f"{owner}.")
        elif isinstance(module, AuxiliaryTrainingWrapper):
            parts += _of_wrapper(owner, module, adapter)
            inside.append(f"{owner}.")
        for attribute, parameter in module._parameters.items():
            if parameter is None or attribute == "_flat_param":
                continue
            of_layer = owner.endswith("base_layer") and (owner[:-10] or ".") in layers
            is_bias = attribute == "bias" and (biases == "all" or (biases != "none" and of_layer))
            # On the meta device nothing trains that no config names; what a config names is refused there by its use.
            if not is_bias and (not parameter.requires_grad or parameter.device.type == "meta"):
                continue
            name = f"{owner}.{attribute}" if owner else attribute
            if not _under(name, inside) and not _in_adapter(name, layers):
                rest.append(Part(plain_name(name), "bias" if is_bias else "other", name, (module, attribute)))
    parts += rest  # what is tied to a saved module counts as that
    seen: dict[int, Part] = {}
    for part in parts:
        seen.setdefault(id(part.tensor), part)
    return list(seen.values())


def _of_wrapper(name: str, wrapper: Any, adapter: str) -> list[Part]:
    """What one of PEFT's wrappers (modules_to_save, trainable tokens) keeps for `adapter`, by the names PEFT saves."""
    from peft.utils.other import ModulesToSaveWrapper

    if isinstance(wrapper, ModulesToSaveWrapper):
        if adapter not in wrapper.modules_to_save:
            return []
        whole = wrapper.modules_to_save[adapter]
        own = dict(whole.named_modules())
        parts = []
        for inner, _ in (*whole.named_parameters(), *whole.named_buffers()):
            owner, _, attribute = inner.rpartition(".")
            if attribute not in own[owner]._non_persistent_buffers_set:
                key = f"{name}.{inner}"
                parts.append(Part(plain_name(key), "module", key, (own[owner], attribute)))
        return parts
    tokens = wrapper.token_adapter
    if tokens.tied_adapter or adapter not in tokens.trainable_tokens_delta:
        return []
    key = f"{name}.token_adapter.trainable_tokens_delta"
    return [Part(plain_name(key), "token", key, (tokens.trainable_tokens_delta, adapter))]


def _under(name: str, prefixes: Iterable[str]) -> bool:
    return any(name.startswith(prefix) for prefix in prefixes)


def _in_adapter(name: str, layers: set[str]) -> bool:
    """Whether a parameter is A, B, or another of a LoRA layer's own, of whatever adapter."""
    parts = name.split(".")
    starts = (".".join(parts[:count]) + "." for count in range(len(parts)))
    return any(start in layers and part != "base_layer" for start, part in zip(starts, parts, strict=True))


def more_than_pairs(config: Mapping[str, Any]) -> list[str]:
    """The fields of a saved config under which its layers' part is more than A and B."""
    return [key for key in _MORE if config.get(key)]


def trains_beside(config: Mapping[str, Any]) -> list[str]:
    """The fields of a saved config under which its file holds something beside A and B."""
    return [key for key in BESIDE if config.get(key) not in (None, [], {}, "none")]


def is_beside(key: str, config: Mapping[str, Any]) -> bool:
    """Whether `key`, of a file that PEFT wrote, is what that config trains beside A and B."""
    fields = trains_beside(config)
    return (
        ("bias" in fields and key.endswith(".bias"))
        or ("trainable_token_indices" in fields and ".trainable_tokens_delta" in key)
        or ("modules_to_save" in fields and any(f".{module}." in key for module in config["modules_to_save"]))
    )


def is_embedding(key: str) -> bool:
    """Whether `key`, of a file that PEFT wrote, is a whole embedding or head: PEFT saves those with an adapter that
    targets them, or after their vocabulary has changed, and no config names them (`save_embedding_layers`)."""
    from peft.utils.constants import EMBEDDING_LAYER_NAMES

    parts = [part for part in key.split(".") if part != "base_layer"]
    return len(parts) > 1 and parts[-2] in EMBEDDING_LAYER_NAMES and parts[-1] in ("weight", "bias")


def changes_base(init: object) -> str | None:
    """The name of an init (`init_lora_weights`) that changes the base weight; None for one that does not."""
    name = str(init).lower()
    return name if name.startswith(_CHANGING_INITS) else None


def base_mark(pairs: Iterable[LoraPair], config: Any) -> str | None:
    """What a saved state must agree on where an init changed the base: its name, and unless PEFT repeats it to the
    last bit a digest of the pairs' base weights (those that are whole and on a device)."""
    init = changes_base(getattr(config, "init_lora_weights", None))
    if init is None or init in _REPEATED_INITS:
        return init
    digest = hashlib.sha256()
    for pair in pairs:
        weight: Any = getattr(pair.layer.get_base_layer(), "weight", None)
        if type(weight) in (nn.Parameter, Tensor) and weight.device.type != "meta" and not hasattr(weight, "ds_id"):
            digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return f"{init}, {digest.hexdigest()[:16]}"


def check_exportable(config: Any, stacked: int) -> None:
    """ValueError where PEFT, loading what is written with this config, would not get the same base weights again.

    stacked: how many times the rank of the config is written.
    """
    init = changes_base(config.init_lora_weights)
    if init is not None and (init not in _REPEATED_INITS or stacked != 1):
        why = f"at {stacked} times its rank" if init in _REPEATED_INITS else "from its name alone"
        raise ValueError(
            f"init_lora_weights={init!r} changed the base weights, which PEFT cannot repeat {why}: the adapter would "
            "load onto another base; keep it with save(), or merge it into the base and save that"
        )


# What an operation does with A and B: "read" them, "write" into them, or have the model "run" with them.
def why_not_now(layer: Any, adapter: str, use: str) -> str | None:
    """Why this LoRA layer's A and B may not be read, written, or counted on in a forward now; None if they may."""
    parts = layer.lora_embedding_A if adapter in layer.lora_embedding_A else layer.lora_A
    if adapter not in parts:
        return f"adapter {adapter!r} was deleted from it"
    if any(p.device.type == "meta" for p in _weights(layer, adapter)):
        return "A and B are on the meta device (offloaded, or not loaded yet): load them onto a device first"
    if use == "read":
        return None
    if layer.merged_adapters:
        return f"adapters {list(layer.merged_adapters)} are merged into the base: call unmerge_adapter() first"
    if use == "write":
        return None
    if layer.disable_adapters:
        return "its adapters are disabled: enable them, or leave disable_adapter(), first"
    if adapter not in layer.active_adapters:
        return f"adapter {adapter!r} is not active ({list(layer.active_adapters)}): call set_adapter({adapter!r}) first"
    return None


def refuse_now(what: str, model: nn.Module, pairs: Sequence[LoraPair], adapter: str, use: str) -> None:
    """ValueError, naming the first layer, where `why_not_now` has a reason or the layer has left the model."""
    gone = _gone(model, pairs)
    for pair in pairs:
        if id(pair.layer) in gone:
            why: str | None = "it is no longer in the model (merge_and_unload?): make a new adapter and a new method"
        else:
            why = why_not_now(pair.layer, adapter, use)
        if why is not None:
            raise ValueError(f"{what}: {pair.name}: {why}")


def unmerge(model: nn.Module, pairs: Sequence[LoraPair]) -> int:
    """Take merged adapters out of the base of the pairs' layers, as long as these are in the model; returns how many
    layers that were."""
    merged = [layer for layer in present(model, pairs) if getattr(layer, "merged_adapters", [])]
    for layer in merged:
        layer.unmerge()
    return len(merged)


def present(model: nn.Module, pairs: Sequence[LoraPair]) -> list[Any]:
    """Those of the pairs' layers that are still in the model."""
    gone = _gone(model, pairs)
    return [pair.layer for pair in pairs if id(pair.layer) not in gone]


def _gone(model: nn.Module, pairs: Sequence[LoraPair]) -> set[int]:
    """The ids of the layers that are no longer in the model. They are looked up by name; only what is not found there
    (a wrapper stands between) takes a walk over all modules."""
    by_id = {id(pair.layer): pair.name for pair in pairs}
    lost = {layer for layer, name in by_id.items() if id(_at(model, name)) != layer}
    return lost - {id(module) for module in model.modules()} if lost else lost


def _at(model: nn.Module, name: str) -> nn.Module | None:
    found: nn.Module | None = model
    for part in name.split("."):
        found = None if found is None else found._modules.get(part)
    return found


def added(pair: LoraPair, adapter: str) -> tuple[Tensor, Tensor]:
    """(A, B), without a graph, whose B A times the scaling is all that the adapter adds to the layer's base."""
    layer: Any = pair.layer
    if getattr(layer, "slao_adapter", None) != adapter:
        return pair.A, pair.B
    A, B = layer.slao_product()
    return A.to(pair.A.dtype), B.to(pair.B.dtype)


def _weights(layer: Any, adapter: str) -> list[Tensor]:
    if adapter in layer.lora_embedding_A:
        return [layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]]
    found = [getattr(part[adapter], "weight", None) for part in (layer.lora_A, layer.lora_B)]
    return [weight for weight in found if isinstance(weight, Tensor)]
