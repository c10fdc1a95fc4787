"""A model without its weights: built from its config by transformers on the meta device, for the names of its parts."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..models import from_pretrained
from ..reading import inside


class Skeleton:
    """The model of the config.json in `folder`. modules: by name. shapes: of all that a checkpoint holds of it, by the
    model's names. parameters: those of these names that are parameters.

    Raises ValueError where transformers does not have the architecture. No code of the model's own is run.
    """

    def __init__(self, folder: Path) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.model = _on_meta(folder)
        self.modules: dict[str, nn.Module] = dict(self.model.named_modules())
        self._state: dict[str, Any] = self.model.state_dict(keep_vars=True)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._state.items()}
        self.parameters = [name for name, tensor in self._state.items() if isinstance(tensor, nn.Parameter)]
        transforms = get_model_conversion_mapping(self.model)
        self.converters: Any = [each for each in transforms if isinstance(each, WeightConverter)]
        self._renamings: Any = [each for each in transforms if isinstance(each, WeightRenaming)]
        self._tied: dict[int, list[str]] = {}
        for name, tensor in self._state.items():
            self._tied.setdefault(id(tensor), []).append(name)

    @property
    def prefix(self) -> str:
        """Of the names in the model with a head, where the one without has none."""
        return str(self.model.base_model_prefix or "")

    @property
    def causal(self) -> bool:
        return type(self.model).__name__.endswith(("ForCausalLM", "LMHeadModel"))

    @property
    def groups(self) -> list[list[str]]:
        """The names of parameters that are one, tied to each other."""
        return [names for names in self._tied.values() if len(names) > 1]

    def tied(self, name: str) -> list[str]:
        """All names of the one tensor that is `name`'s."""
        return self._tied[id(self._state[name])]

    def renamed(self, key: str) -> tuple[str, str | None]:
        """The model's name of what a checkpoint has under `key`, as transformers finds it when it loads one, which the
        model need not have; the pattern of the converter that takes it in, where a parameter is joined of several."""
        from transformers.core_model_loading import rename_source_key

        name, pattern = rename_source_key(key, self._renamings, self.converters, self.prefix, self._state)
        return str(name), pattern

    def embeddings(self) -> tuple[str | None, str | None]:
        """The names of the weights of the input embedding and of the head that tells tokens apart."""
        found: list[str | None] = []
        for get in (self.model.get_input_embeddings, self.model.get_output_embeddings):
            try:
                module = get()
            except (NotImplementedError, AttributeError):
                module = None
            names = (name for name, each in self.modules.items() if each is module and module is not None)
            name = next(names, None)
            found.append(f"{name}.weight" if name is not None and f"{name}.weight" in self.shapes else None)
        return found[0], found[1]

    def weight_of(self, layer: str) -> str:
        """The name of a layer's weight, also where an adapter was trained on the model without its head, or on one with
        a head where this one has none; the plain name if there is none."""
        plain, prefix = f"{layer}.weight", f"{self.prefix}."
        found = (name for name in (plain, prefix + plain, plain.removeprefix(prefix)) if name in self.shapes)
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
        return [name for name in self.shapes if name.startswith(f"{module}.")]

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


def _on_meta(folder: Path) -> Any:
    import transformers as hf

    inside(folder / "config.json", folder)
    config = from_pretrained(hf.AutoConfig, str(folder), local_files_only=True)
    names = getattr(config, "architectures", None) or []
    kind: Any = getattr(hf, str(names[0]), None) if names else None
    if names and not hasattr(kind, "from_pretrained"):
        raise ValueError(f"transformers {hf.__version__} has no {names[0]}, which {folder} is; update transformers")
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = kind(config) if names else hf.AutoModel.from_config(config)
    model.tie_weights()
    return model
