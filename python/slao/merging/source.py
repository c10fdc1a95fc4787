"""Saved adapters, opened for reading layer by layer and checked against each other before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from slao_kernels.ops import checks
from slao_kernels.ops.checks import Problems

from .. import sums
from ..folders import FACTORS, read_config, scaling
from ..reading import inside

# A file is mapped, and what was read of it stays in memory until it is opened anew. Ten adapters of Llama-3-8B at
# r = 16 (1.6 GB): at most 0.27 GB at a time, of which 0.11 GB is no file (bench/disk_merge.py), instead of all.
_MAPPED_BYTES = 16 << 20

# Settings under which the file's A and B are not, or not all of, what the adapter adds to its base.
_MORE = (
    "modules_to_save", "trainable_token_indices", "target_parameters", "alora_invocation_tokens", "arrow_config",
    "use_qalora", "use_bdlora", "velora_config", "monteclora_config", "kasa_config",
)  # fmt: skip
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
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
        more = [key for key in _MORE if self.config.get(key)]
        if self.config.get("bias", "none") != "none":
            more.append("bias")
        if more:
            raise ValueError(f"{self.folder} has {', '.join(more)} in its config: more than A and B, which are merged")
        init = str(self.config.get("init_lora_weights")).lower()
        if init.startswith(_CHANGES_BASE):
            raise ValueError(
                f"{self.folder} was made with init_lora_weights={init!r}, which changes the base: its A and B are no "
                "difference to the base that others have; save it with path_initial_model_for_weight_conversion"
            )
        if not inside(self.path, self.folder).is_file():
            raise ValueError(
                f"{self.folder} has no adapter_model.safetensors; save the adapter with safe_serialization=True"
            )
        sums.check(self.folder, ("adapter_config.json", self.path.name))
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
                self._check(name, shapes[0], shapes[1], dtypes)
                found.append(
                    Layer(name, pair, (shapes[0], shapes[1]), dtypes, scaling(self.config, name, shapes[0][0]))
                )
        if not found:
            raise ValueError(f"{self.path} holds no LoRA layers")
        if rest:
            raise ValueError(f"{self.path} holds more than A and B, which are merged: {', '.join(sorted(rest)[:3])}")
        return found

    def _check(self, name: str, A: tuple[int, ...], B: tuple[int, ...], dtypes: tuple[str, str]) -> None:
        if len(A) < 2 or len(B) < 2 or B[1] != A[0] or 0 in (*A, *B):
            raise ValueError(f"{self.path}: {name}: A {A} and B {B} are not (r, n) and (m, r)")
        strange = [dtype for dtype in dtypes if dtype not in ("F64", "F32", "BF16", "F16")]
        if strange:
            raise ValueError(f"{self.path}: {name} is stored as {strange[0]}, expected F64, F32, BF16 or F16")

    def read(self, name: str) -> tuple[Tensor, Tensor]:
        """A (r, n) and B (m, r) of a layer, a convolution's flattened. Not to be written into. ValueError for NaN."""
        if self._file is None or self._read > _MAPPED_BYTES:
            self._file, self._read = self._open(), 0
        A, B = (self._file.get_tensor(key).flatten(1) for key in self.layers[name].keys)
        self._read += A.nbytes + B.nbytes
        for index in checks.not_finite([A, B]):
            raise ValueError(f"{self.folder}: {'AB'[index]} of {name} has NaN or infinite entries")
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
