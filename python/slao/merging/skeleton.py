"""What a checkpoint's tensors are in the model: built from its config without memory, by transformers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..models import from_pretrained

_FLOATS = ("F64", "F32", "BF16", "F16")


class Skeleton:
    """The model of `folder`'s config on the meta device. names: of all that its state dict holds. modules: by name.

    Raises ValueError for a config that transformers does not know, and for a quantised model.
    """

    def __init__(self, folder: Path) -> None:
        import transformers
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        config = from_pretrained(transformers.AutoConfig, str(folder))
        if getattr(config, "quantization_config", None):
            raise ValueError(
                f"{folder} is quantised ({_scheme(config)}), and the difference of such weights is mostly rounding: "
                "take the model that it was quantised from, or dequantise it and save that"
            )
        architecture = next(iter(getattr(config, "architectures", None) or []), None)
        maker: Any = getattr(transformers, architecture or "", None)
        if maker is None:
            raise ValueError(f"{folder}: transformers {transformers.__version__} has no architecture {architecture!r}")
        with torch.device("meta"):
            model: Any = maker(config)
        model.tie_weights()
        self.causal = str(architecture).endswith(("ForCausalLM", "LMHeadModel"))
        self.modules: dict[str, nn.Module] = dict(model.named_modules())
        self._prefix = str(model.base_model_prefix or "")
        transforms = get_model_conversion_mapping(model)
        self._renamings: Any = [each for each in transforms if isinstance(each, WeightRenaming)]
        self._converters: Any = [each for each in transforms if isinstance(each, WeightConverter)]
        self._state: dict[str, Any] = model.state_dict(keep_vars=True)
        self._tied: dict[int, list[str]] = {}
        for name, tensor in self._state.items():
            self._tied.setdefault(id(tensor), []).append(name)

    @property
    def names(self) -> list[str]:
        return list(self._state)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._state[name].shape)

    def name_of(self, key: str) -> tuple[str | None, bool]:
        """The model's name of what a checkpoint has under `key`, as transformers finds it when it loads one; whether
        the parameter is joined of several such tensors. None: transformers passes over it."""
        from transformers.core_model_loading import rename_source_key

        name, pattern = rename_source_key(key, self._renamings, self._converters, self._prefix, self._state)
        return (str(name) if name in self._state else None), pattern is not None

    def tied(self, name: str) -> list[str]:
        """The names of the one tensor that is `name`'s."""
        return self._tied[id(self._state[name])]

    def keys_of(self, stored: Mapping[str, tuple[tuple[int, ...], str]], what: Path) -> dict[str, str]:
        """Name -> key of a checkpoint with these tensors. A tied one has the key of the one that is stored; one that is
        joined of several tensors is not among them.

        Raises ValueError that names parameters that are absent, have another shape, or are no floating-point numbers.
        """
        keys: dict[str, str] = {}
        joined: set[str] = set()
        for key in stored:
            name, parts = self.name_of(key)
            if name is not None and parts:
                joined.add(name)
            elif name is not None:
                keys[name] = key
        for name in self.names:
            partner = next((other for other in self.tied(name) if other in keys), None)
            if name not in keys and partner is not None:
                keys[name] = keys[partner]
        parameters = [name for name, tensor in self._state.items() if isinstance(tensor, nn.Parameter)]
        absent = [name for name in parameters if name not in keys and name not in joined]
        if absent:
            raise ValueError(
                f"{what} lacks {len(absent)} weights of its model, such as {absent[0]}: the checkpoint is not whole, "
                "or has other names than transformers' (load it, and save it with save_pretrained)"
            )
        for name in parameters:
            shape, dtype = stored[keys[name]] if name in keys else (self.shape(name), _FLOATS[0])
            if dtype not in _FLOATS:
                raise ValueError(f"{what}: {name} is stored as {dtype}, quantised: expected {', '.join(_FLOATS)}")
            if shape != self.shape(name):
                raise ValueError(f"{what}: {name} is {shape}, its config says {self.shape(name)}")
        return keys

    def weight_of(self, layer: str) -> str:
        """The name of a layer's weight, also where an adapter has been trained on the model without its head, or on one
        with a head where this one has none; the plain name if there is none."""
        plain, prefix = f"{layer}.weight", f"{self._prefix}."
        found = (name for name in (plain, prefix + plain, plain.removeprefix(prefix)) if name in self._state)
        return next(found, plain)

    def linear(self, name: str) -> bool | None:
        """Whether `name` is the weight of a linear layer of its own: False for one (m, n), True for one that is stored
        transposed (`Conv1D`); None for anything else, and for a weight that is tied to another."""
        from transformers.pytorch_utils import Conv1D

        owner, _, attribute = name.rpartition(".")
        kind = type(self.modules[owner])
        if attribute != "weight" or kind not in (nn.Linear, Conv1D) or len(self.tied(name)) > 1:
            return None
        return kind is Conv1D

    def below(self, module: str) -> list[str]:
        """The names of all that a module's state dict holds."""
        return [name for name in self.names if name.startswith(f"{module}.")]

    def saved(self, modules: Collection[str]) -> list[str]:
        """What PEFT makes of modules_to_save=`modules`, which it compares with the ends of names; outermost ones."""
        matched = [name for name in self.modules if name and any(name.endswith(each) for each in modules)]
        return [name for name in matched if not any(name.startswith(f"{other}.") for other in matched)]

    def targets(self, layers: Iterable[str]) -> list[str]:
        """target_modules that mean these layers: the last parts of their names where no other module has such, else
        whole names."""
        wanted = set(layers)
        by_end: dict[str, set[str]] = {}
        for name in self.modules:
            by_end.setdefault(name.rpartition(".")[2], set()).add(name)
        exact = {end for end, names in by_end.items() if names <= wanted}
        rest = {name for name in wanted if name.rpartition(".")[2] not in exact}
        for name in rest:
            if any(other.endswith(f".{name}") and other not in wanted for other in self.modules):
                raise ValueError(f"no target_modules mean {name} alone: another module's name ends with it")
        return sorted(exact | rest)


def _scheme(config: Any) -> str:
    given = config.quantization_config
    method = given.get("quant_method") if isinstance(given, dict) else getattr(given, "quant_method", None)
    return str(getattr(method, "value", method))
