"""Adapters as PEFT saves them, read without their model: what compares or merges several of them needs no base."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from slao_kernels.adapters import expert_names, split_experts
from slao_kernels.inventory import changes_base, is_beside, is_embedding, more_than_pairs, trains_beside
from slao_kernels.ops import checks

from . import sums
from .pickled import PickledFile
from .reading import inside, read_json
from .typed import typed

Triple = tuple[Tensor, Tensor, float]
# What is read of a config, as PEFT's annotations have it (alpha is a number there in all but name).
_READ: dict[str, Any] = {
    "r": int,
    "lora_alpha": float,
    "use_rslora": bool | None,
    "rank_pattern": dict[str, int] | None,
    "alpha_pattern": dict[str, float] | None,
    "base_model_name_or_path": str | None,
    "revision": str | None,
    "init_lora_weights": bool | str | None,
}
# A saved LoraConfig's fields of what trains beside A and B.
_BESIDE: dict[str, Any] = {
    "modules_to_save": list[str],
    "trainable_token_indices": list[int] | dict[str, list[int]],
    "bias": str,
}
_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."  # of every key in a file of PEFT's
MAGNITUDES = (".lora_magnitude_vector", ".lora_magnitude_vector.weight")  # DoRA's, the ends of their keys
FACTORS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))


# A file is mapped, and what was read of it stays in memory until it is opened anew. Ten adapters of Llama-3-8B at
# r = 16 (1.6 GB): at most 0.27 GB at a time, of which 0.11 GB is no file (bench/disk_merge.py), instead of all.
_MAPPED_BYTES = 16 << 20


@dataclass(frozen=True)
class Layer:
    """One layer of one adapter. keys: of A and B in the file; shapes: there, a convolution's with its kernel.

    experts: how many experts share the two, each of `rank` (`LoraPair.split`); the scaling is that of each.
    """

    name: str
    keys: tuple[str, str]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    dtypes: tuple[str, str]
    scaling: float
    experts: int = 1

    @property
    def rank(self) -> int:
        return self.shapes[0][0] // self.experts

    @property
    def names(self) -> list[str]:
        """The layer's, or of each of its experts."""
        return expert_names(self.name, self.experts)


class Source:
    """A folder with an adapter: its config, its layers in the file's order, and their tensors on demand.

    A mixture's experts (target_parameters) are layers of `Layer.experts`, as many as their rows are times the config's
    r. beside: take one that trains heads, biases or tokens beside A and B; `parts` has their shapes and dtypes by the
    keys of the file. more: fields of a config under which a layer is more than A and B that are taken as well; `parts`
    then has whatever else the file holds.
    The weights are adapter_model.safetensors, or, where there is none, adapter_model.bin, read as in `PickledFile`.
    Raises ValueError when the folder holds no adapter in one of these, or one that adds more than B A to its base.
    """

    def __init__(self, folder: str | Path, beside: bool = False, more: Collection[str] = ()) -> None:
        self.folder = Path(folder)
        self.config: dict[str, Any] = read_config(self.folder, beside, more)
        self.path = self.folder / _WEIGHTS[0]
        if not self.path.is_file() and (self.folder / _WEIGHTS[1]).is_file():
            self.path = self.folder / _WEIGHTS[1]
        init = changes_base(self.config.get("init_lora_weights"))
        if init is not None:
            raise ValueError(
                f"{self.folder} was made with init_lora_weights={init!r}, which changes the base: its A and B are no "
                "difference to the base that others have; convert it: load it, and save it by PEFT's save_pretrained "
                "with path_initial_model_for_weight_conversion"
            )
        if not inside(self.path, self.folder).is_file():
            raise ValueError(
                f"{self.folder} has no {_WEIGHTS[0]} and no {_WEIGHTS[1]}; save the adapter with PEFT's save_pretrained"
            )
        sums.check(self.folder, ("adapter_config.json", self.path.name))
        self._file: Any = None
        self._read = 0
        self.parts: dict[str, tuple[tuple[int, ...], str]] = {}
        self._by_experts = bool(self.config.get("target_parameters")) and "target_parameters" not in more
        if self._by_experts and (self.config.get("rank_pattern") or self.config.get("alpha_pattern")):
            raise ValueError(
                f"{self.folder} has target_parameters with a rank_pattern or an alpha_pattern: which layer is which "
                "parameter's stands in its base alone; slao fold takes it"
            )
        self.layers = {layer.name: layer for layer in self._layers(bool(more), beside)}

    def _open(self) -> Any:
        if self.path.suffix == ".bin":
            return PickledFile(self.path)
        from safetensors import safe_open

        try:
            return safe_open(self.path, framework="pt")
        except Exception as error:
            raise ValueError(f"{self.path} cannot be read: {error}") from error

    def _layers(self, anything: bool, beside: bool) -> list[Layer]:
        file = self._file = self._open()
        keys = list(file.keys())
        rest = set(keys)
        found = []
        for key in keys:
            for down, up in FACTORS:
                if not key.endswith(f".{down}"):
                    continue
                pair = key, key[: -len(down)] + up
                if pair[1] not in rest:
                    raise ValueError(f"{self.path} holds {key} without its {up}")
                rest -= set(pair)
                slices = [file.get_slice(each) for each in pair]
                shapes = tuple(tuple(piece.get_shape()) for piece in slices)
                name = key[: -len(down) - 1].removeprefix(PREFIX)
                dtypes = (slices[0].get_dtype(), slices[1].get_dtype())
                self._check(name, shapes[0], shapes[1], dtypes)
                experts = self._experts(name, shapes[0][0])
                factor = scaling(self.config, name, shapes[0][0] // experts)
                found.append(Layer(name, pair, (shapes[0], shapes[1]), dtypes, factor, experts))
        if not found:
            raise ValueError(f"{self.path} holds no LoRA layers")
        extra = [key for key in rest if not (anything or is_beside(key, self.config))]
        if foreign := sorted(key for key in extra if not (beside and is_embedding(key))):
            hint = " (pass --beside keep, merge or first)" if all(map(is_embedding, extra)) else ""
            raise ValueError(f"{self.path} holds more than A and B, which are merged: {', '.join(foreign[:3])}{hint}")
        for key in sorted(rest):
            piece = file.get_slice(key)
            self.parts[key] = tuple(piece.get_shape()), piece.get_dtype()
        return found

    def _experts(self, name: str, rows: int) -> int:
        r = self.config.get("r")
        if not self._by_experts or r is None:
            return 1
        if rows % r:
            raise ValueError(f"{self.path}: A of {name} has {rows} rows, for experts of rank {r} (adapter_config.json)")
        return int(rows // r)

    def _check(self, name: str, A: tuple[int, ...], B: tuple[int, ...], dtypes: tuple[str, str]) -> None:
        if len(A) < 2 or len(B) < 2 or B[1] != A[0] or 0 in (*A, *B):
            raise ValueError(f"{self.path}: {name}: A {A} and B {B} are not (r, n) and (m, r)")
        strange = [dtype for dtype in dtypes if dtype not in ("F64", "F32", "BF16", "F16")]
        if strange:
            raise ValueError(f"{self.path}: {name} is stored as {strange[0]}, expected F64, F32, BF16 or F16")

    @property
    def beside(self) -> list[str]:
        """What there is beside A and B: fields of the config, and "embeddings" that PEFT saved along."""
        along = any(is_embedding(key) and not is_beside(key, self.config) for key in self.parts)
        return [*trains_beside(self.config), *(["embeddings"] if along else [])]

    def read(self, name: str) -> tuple[Tensor, Tensor]:
        """A (r, n) and B (m, r) of a layer, a convolution's flattened. Not to be written into. ValueError for NaN."""
        if self._file is None or self._read > _MAPPED_BYTES:
            self._file, self._read = self._open(), 0
        A, B = (self._file.get_tensor(key).flatten(1) for key in self.layers[name].keys)
        self._read += A.nbytes + B.nbytes
        for index in checks.not_finite([A, B]):
            raise ValueError(f"{self.folder}: {'AB'[index]} of {name} has NaN or infinite entries")
        return A, B

    def part(self, key: str) -> Tensor:
        """What trains beside A and B under `key`. Not to be written into. ValueError for NaN."""
        self._file, self._read = self._open(), 0
        tensor: Tensor = self._file.get_tensor(key)
        if tensor.is_floating_point() and checks.not_finite([tensor]):
            raise ValueError(f"{self.folder}: {key} has NaN or infinite entries")
        return tensor


def read_adapter(folder: str | Path) -> dict[str, Triple]:
    """Layer name -> (A, B, scaling) of a folder that PEFT's or this library's save_pretrained wrote, in the file's
    order: A (r, n), B (m, r), a convolution's flattened; scaling as PEFT computes it.

    Raises ValueError when the folder holds no LoRA adapter in safetensors, or one that adds more than B A to its base.
    """
    return triples(Source(folder))


def triples(source: Source) -> dict[str, Triple]:
    """As `read_adapter`, an expert a layer."""
    found: dict[str, Triple] = {}
    for name, layer in source.layers.items():
        each = (split_experts(layer.experts, *one) for one in zip("AB", source.read(name), strict=True))
        for own, A, B in zip(layer.names, *each, strict=True):
            found[own] = A, B, layer.scaling
    return found


def scaling(config: Mapping[str, Any], name: str, r: int) -> float:
    """alpha / r, or alpha / √r, of the layer `name` as PEFT computes it."""
    from peft.utils.other import get_pattern_key

    alphas = config.get("alpha_pattern") or {}
    alpha = float(alphas.get(get_pattern_key(list(alphas), name), config["lora_alpha"]))
    return alpha / (r**0.5 if config.get("use_rslora") else r)


def read_config(folder: Path, beside: bool = False, taken: Collection[str] = ()) -> dict[str, Any]:
    """adapter_config.json of a LoRA that trains A and B only (and, with `beside`, something beside them; what the
    fields `taken` stand for, too); else ValueError."""
    path = folder / "adapter_config.json"
    if not path.exists():
        reason = "there is no adapter_config.json" if folder.is_dir() else "there is no such folder"
        raise ValueError(f"{folder} holds no adapter: {reason}")
    config = read_json(inside(path, folder))
    if not isinstance(config, dict) or config.get("peft_type") != "LORA" or "lora_alpha" not in config:
        raise ValueError(f"{path} does not describe a LoRA adapter")
    for key, hint in _READ.items():
        if key in config:
            typed(f"{path}: {key}", config[key], hint)
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in config.get(key) or ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{path}: {key} has {pattern!r}, no regular expression ({error})") from None
    ranks = [config.get("r", 1), *(config.get("rank_pattern") or {}).values()]
    if min(ranks) < 1:
        raise ValueError(f"{path}: a rank of {min(ranks)}; ranks are at least 1")
    # Experts are pairs like any other, once they are taken apart (`Layer.experts`).
    more = [field for field in more_than_pairs(config) if field not in (*taken, "target_parameters")]
    if more:
        what = "which is not folded or merged" if taken else "which alone are compared or merged"
        hint = " (slao merge takes a DoRA by --method svd --base FOLDER)" if more == ["use_dora"] else ""
        raise ValueError(f"{path} has {', '.join(more)}: more than A and B, {what}{hint}")
    for key in trains_beside(config):
        typed(f"{path}: {key}", config[key], _BESIDE[key])
        if not beside:
            raise ValueError(
                f"{path} has {key}: more than A and B; merge it with --beside keep (the last adapter's is kept), "
                "--beside first, or --beside merge (it is averaged)"
            )
    return config


def aligned(adapters: Sequence[Mapping[str, Triple]]) -> tuple[list[str], list[list[Triple]]]:
    """(names of the layers that any adapter has, sorted; each adapter over all of them, rank 0 where it has none)."""
    names = sorted(set().union(*adapters))
    first = {name: triple for adapter in reversed(adapters) for name, triple in adapter.items()}
    empty = {name: (A[:0], B[:, :0], 1.0) for name, (A, B, _) in first.items()}
    return names, [[adapter.get(name, empty[name]) for name in names] for adapter in adapters]
