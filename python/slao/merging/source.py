"""Saved adapters, opened for reading layer by layer and checked against each other before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from slao_kernels.inventory import changes_base
from slao_kernels.ops.checks import Problems

from ..folders import FACTORS, read_config, scaling

# A file is mapped, and what was read of it stays in memory until it is opened anew. Ten adapters of Llama-3-8B at
# r = 16 (1.6 GB): at most 0.27 GB at a time, of which 0.11 GB is no file (bench/disk_merge.py), instead of all.
_MAPPED_BYTES = 16 << 20

_SAME = ("base_model_name_or_path", "revision", "layer_replication", "fan_in_fan_out")


@dataclass(frozen=True)
class Layer:
    """One layer of one adapter. keys: of A and B in the file; shapes: there, a convolution's with its kernel."""

    name: str
    keys: tuple[str, str]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    dtypes: tuple[str, str]
    scaling: float

    @property
    def rank(self) -> int:
        return self.shapes[0][0]


class Source:
    """A folder with an adapter: its config, its layers in the file's order, and their tensors on demand.

    Raises ValueError when the folder holds no adapter in safetensors, or one that adds more than B A to its base.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config: dict[str, Any] = read_config(self.folder)
        self.path = self.folder / "adapter_model.safetensors"
        init = changes_base(self.config.get("init_lora_weights"))
        if init is not None:
            raise ValueError(
                f"{self.folder} was made with init_lora_weights={init!r}, which changes the base: its A and B are no "
                "difference to the base that others have; save it with path_initial_model_for_weight_conversion"
            )
        if not self.path.is_file():
            raise ValueError(
                f"{self.folder} has no adapter_model.safetensors; save the adapter with safe_serialization=True"
            )
        self._file: Any = None
        self._read = 0
        self.layers = {layer.name: layer for layer in self._layers()}

    def _open(self) -> Any:
        from safetensors import safe_open

        try:
            return safe_open(self.path, framework="pt")
        except Exception as error:
            raise ValueError(f"{self.path} cannot be read: {error}") from error

    def _layers(self) -> list[Layer]:
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
                name = key[: -len(down) - 1].removeprefix("base_model.model.")
                dtypes = (slices[0].get_dtype(), slices[1].get_dtype())
                found.append(
                    Layer(name, pair, (shapes[0], shapes[1]), dtypes, scaling(self.config, name, shapes[0][0]))
                )
        if rest:
            raise ValueError(f"{self.path} holds more than A and B, which are merged: {', '.join(sorted(rest)[:3])}")
        if not found:
            raise ValueError(f"{self.path} holds no LoRA layers")
        return found

    def read(self, name: str) -> tuple[Tensor, Tensor]:
        """A (r, n) and B (m, r) of a layer, a convolution's flattened. Not to be written into."""
        if self._file is None or self._read > _MAPPED_BYTES:
            self._file, self._read = self._open(), 0
        A, B = (self._file.get_tensor(key).flatten(1) for key in self.layers[name].keys)
        self._read += A.nbytes + B.nbytes
        return A, B


def check(sources: Sequence[Source], same_rank: bool, same_scaling: bool, method: str) -> None:
    """That the adapters belong to one base and have the same layers, of ranks and scalings that `method` can take.

    Raises ValueError that names every offender.
    """
    problems = Problems("merge")
    first = sources[0]
    for source in sources[1:]:
        for key in _SAME:
            mine, other = (_plain(each.config.get(key)) for each in (source, first))
            if mine != other:
                problems.add(str(source.folder), f"{key} is {mine!r}, that of {first.folder} {other!r}")
        apart = sorted(source.layers.keys() ^ first.layers.keys())
        if apart:
            owner = source if apart[0] in source.layers else first
            problems.add(
                str(source.folder),
                f"does not have the layers of {first.folder}: {len(apart)} are in one only, such as {apart[0]} in "
                f"{owner.folder}",
            )
        for name in source.layers.keys() & first.layers.keys():
            _compare(problems, source, first, name, same_rank, same_scaling, method)
    for source in sources:
        for name, layer in source.layers.items():
            A, B = layer.shapes
            if len(A) < 2 or len(B) < 2 or B[1] != A[0] or A[0] == 0:
                problems.add(str(source.folder), f"{name}: A {A} and B {B} are not (r, n) and (m, r)")
            strange = [dtype for dtype in layer.dtypes if dtype not in ("F64", "F32", "BF16", "F16")]
            if strange:
                problems.add(str(source.folder), f"{name} is stored as {strange[0]}, expected F64, F32, BF16 or F16")
    problems.raise_if_any()


def _plain(value: Any) -> Any:
    """Unset, None and False say the same; a folder's name may end with a slash."""
    return value.rstrip("/") if isinstance(value, str) else value or None


def _compare(
    problems: Problems, source: Source, first: Source, name: str, same_rank: bool, same_scaling: bool, method: str
) -> None:
    mine, other = source.layers[name], first.layers[name]
    if mine.shapes[0][1:] != other.shapes[0][1:] or mine.shapes[1][:1] != other.shapes[1][:1]:
        problems.add(str(source.folder), f"{name}: A and B are {mine.shapes}, those of {first.folder} {other.shapes}")
    elif same_rank and mine.rank != other.rank:
        problems.add(
            str(source.folder),
            f"{name} has rank {mine.rank}, in {first.folder} {other.rank}: {method} combines A with A and B with B, "
            "which takes one rank; svd takes any",
        )
    elif same_scaling and mine.scaling != other.scaling:
        problems.add(
            str(source.folder),
            f"{name} has scaling {mine.scaling:g}, in {first.folder} {other.scaling:g}: {method} merges the B of one "
            "adapter through time, which has one alpha; svd takes any",
        )
