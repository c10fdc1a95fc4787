"""A LoRA out of a full fine-tune: the difference of two checkpoints, tensor by tensor, cut to a rank."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from slao_kernels.ops import checks

from ..folders import PREFIX
from . import dense
from .cuts import CutAdapter, CutLayer, Limit
from .factors import Pair
from .growing import GrowingFile
from .output import dtype_of, whole_folder, write_config
from .skeleton import Skeleton
from .weights import Weights, keys_of

BESIDE = ("save", "leave")


def extract_adapter(
    tuned: str | Path,
    base: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    keep: float | None = None,
    beside: str = "save",
    dtype: str = "float32",
    progress: bool = False,
) -> CutAdapter:
    """Write the difference of two models' weights into a new folder `out` as a LoRA that PEFT loads onto `base`.

    tuned, base: folders with safetensors (one file, or shards and an index), or the one file itself beside its
    config.json. A linear layer whose weight differs gets A and B of `rank`, or of the fewest singular values that hold
    the part `keep` of its squared norm (both: at most `rank`), with alpha = r. What else differs (embeddings, norms,
    biases, layers that PEFT has no plain LoRA for, a head that is tied to the embeddings) is written whole, as PEFT's
    modules_to_save and bias; beside="leave" leaves it out and names it. dtype: of A and B. A tensor is read at a time.
    Returns what each layer lost; that is in layers.json of the folder, too. The residuals are within 1 % of the dense
    SVD's (`product.leading`).
    Raises ValueError, with nothing written, for weights that are missing, renamed or of other shapes in one of both
    (resized vocabularies too), quantised models, NaN, no linear layer that differs, `out` that exists.
    Source: Eckart and Young 1936; Musco and Musco 2015.
    """
    limit, target = Limit(rank, keep), Path(out)
    if beside not in BESIDE:
        raise ValueError(f"unknown beside {beside!r}; choose one of {', '.join(BESIDE)}")
    to = dtype_of(dtype)
    two = _Two(Weights(tuned), Weights(base))
    linear = [name for name in two.skeleton.shapes if two.skeleton.linear(name) is not None]
    rest = _Rest(two, beside)
    for name in two.skeleton.shapes:
        if name in two.keys and two.skeleton.linear(name) is None:
            rest.look_at(name)
    layers = [name for name in linear if not rest.holds(name)]
    names = [key for name in layers for key in _factor_keys(name)] + rest.keys()
    note = {"method": "extract", "tuned": str(tuned), "base": str(base), "rank": rank, "keep": keep}
    with whole_folder(target) as scratch, torch.no_grad():
        file = GrowingFile(scratch / "adapter_model.safetensors", names, json.dumps(note))
        try:
            found = _write_layers(file, two, layers, limit, to, progress)
            rest.write(file)
        finally:
            file.close()
        made = CutAdapter(target, found, rest.notes())
        _write_config(scratch, two, made, rest, str(base))
        made.record(scratch)
    return made


class _Two:
    """The two checkpoints by the base model's names. keys: name -> (key in tuned, key in base)."""

    def __init__(self, tuned: Weights, base: Weights) -> None:
        self.tuned, self.base = tuned, base
        self.skeleton = Skeleton(base.folder)
        other = Skeleton(tuned.folder) if (tuned.folder / "config.json").is_file() else self.skeleton
        mine, its = keys_of(other, tuned), keys_of(self.skeleton, base)
        problems = checks.Problems("extract")
        self._compare_others(problems, {key for key in {*tuned.tensors, *base.tensors} if not self._plain(other, key)})
        for name in sorted(mine.keys() ^ its.keys()):
            problems.add(name, f"is in {tuned.path if name in mine else base.path} only")
        for name in sorted(mine.keys() & its.keys()):
            shapes = tuned.tensors[mine[name]].shape, base.tensors[its[name]].shape
            if shapes[0] != shapes[1]:
                problems.add(
                    name, f"is {shapes[0]} in {tuned.path}, {shapes[1]} in {base.path}{_advice(name, *shapes)}"
                )
        problems.raise_if_any()
        self.keys = {name: (mine[name], its[name]) for name in self.skeleton.shapes if name in its}

    def _plain(self, other: Skeleton, key: str) -> bool:
        """Whether the tensor is a weight by itself in each model whose checkpoint has it."""
        sides = [side for side, one in ((other, self.tuned), (self.skeleton, self.base)) if key in one.tensors]
        return all(name in side.shapes and pattern is None for side in sides for name, pattern in [side.renamed(key)])

    def _compare_others(self, problems: checks.Problems, keys: set[str]) -> None:
        """What is no weight by itself has to be the same in both."""
        for key in sorted(keys):
            here = [one for one in (self.tuned, self.base) if key in one.tensors]
            joined = self.skeleton.renamed(key)[1] is not None
            what = "is one of several tensors that a weight is joined of" if joined else "is no weight of the model"
            if len(here) == 1:
                problems.add(key, f"{what}, and is in {here[0].path} only")
            elif not _equal(*(one.finite(key) for one in here)):
                problems.add(key, f"{what}, and differs: it can go into no LoRA")

    def read(self, name: str) -> Pair | None:
        """(tuned, base), or None where they are equal."""
        mine, its = self.keys[name]
        pair = self.tuned.finite(mine), self.base.finite(its)
        return None if _equal(*pair) else pair


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _advice(name: str, mine: tuple[int, ...], its: tuple[int, ...]) -> str:
    if len(mine) == len(its) == 2 and mine[1] == its[1]:
        return (
            " (if tokens were added: a LoRA keeps its base's shapes, so extract against a base with as many, by "
            f"resize_token_embeddings({mine[0]}) and save_pretrained)"
        )
    return ""


@dataclass
class _Saved:
    norm: float
    base: float  # ‖W‖


class _Rest:
    """What differs and is no linear layer's weight: whole modules and biases that are saved, or left out."""

    def __init__(self, two: _Two, beside: str) -> None:
        self._two, self._beside = two, beside
        self._found: dict[str, _Saved] = {}
        self.modules: list[str] = []
        self.biases: list[str] = []

    def look_at(self, name: str) -> None:
        pair = self._two.read(name)
        if pair is None or not (size := dense.norm(*pair)):
            return
        self._found[name] = _Saved(size, dense.norm(pair[1]))
        skeleton = self._two.skeleton
        owner, _, attribute = name.rpartition(".")
        if self._beside == "leave":
            return
        if not owner:
            raise ValueError(
                f"{name} differs, and no module of the model holds it: pass --beside leave to leave it out"
            )
        weight = f"{owner}.weight"
        if attribute == "bias" and weight in skeleton.shapes and skeleton.linear(weight) is not None:
            self.biases.append(name)
        else:
            # A tied tensor changes in all of its modules: PEFT's copy of one is not tied to the others.
            owners = [other.rpartition(".")[0] for other in skeleton.tied(name)]
            self.modules = skeleton.saved([*self.modules, *owners])

    def holds(self, name: str) -> bool:
        """Whether a module that is saved whole has it."""
        return any(name.startswith(f"{module}.") for module in self.modules)

    def _names(self) -> list[str]:
        inside = [name for module in self.modules for name in self._two.skeleton.below(module)]
        return [*inside, *(name for name in self.biases if not self.holds(name))]

    def keys(self) -> list[str]:
        """All that `write` may write."""
        return [f"{PREFIX}{name}" for name in self._names()] + [_bias_key(name, True) for name in self.biases]

    def write(self, file: GrowingFile) -> None:
        for name in self._names():
            if name in self._two.keys:
                key = f"{PREFIX}{name}"
                if name in self.biases and f"{PREFIX}{name.rpartition('.')[0]}.lora_A.weight" in file.names:
                    key = _bias_key(name, True)
                file.write(key, self._two.tuned.finite(self._two.keys[name][0]))

    def notes(self) -> tuple[str, ...]:
        if not self._found:
            return ()
        what = "left out, though it differs" if self._beside == "leave" else "saved whole"
        return tuple(
            f"{what}: {name}, by {found.norm:.3g}"
            + (f" ({found.norm / found.base:.2%} of its norm)" if found.base else "")
            for name, found in self._found.items()
        )


def _bias_key(name: str, adapted: bool) -> str:
    owner, _, attribute = name.rpartition(".")
    return f"{PREFIX}{owner}.base_layer.{attribute}" if adapted else f"{PREFIX}{name}"


def _factor_keys(name: str) -> tuple[str, str]:
    layer = name.removesuffix(".weight")
    return f"{PREFIX}{layer}.lora_A.weight", f"{PREFIX}{layer}.lora_B.weight"


def _write_layers(
    file: GrowingFile, two: _Two, names: list[str], limit: Limit, dtype: torch.dtype, progress: bool
) -> dict[str, CutLayer]:
    from tqdm.auto import tqdm

    found: dict[str, CutLayer] = {}
    for name in tqdm(names, unit="layer", leave=False, disable=None if progress else True):
        pair = two.read(name)
        if pair is None:
            continue
        wide = torch.float64 if torch.float64 in (pair[0].dtype, pair[1].dtype) else torch.float32
        delta = pair[0].to(wide) - pair[1].to(wide)
        del pair
        norm = dense.norm(delta)
        if not norm:
            continue
        if two.skeleton.linear(name):
            delta = delta.T
        A, B = (part.to(dtype) for part in dense.cut(delta, limit))
        if checks.not_finite([A, B]):
            raise ValueError(f"A or B of {name} overflows {dtype}: pass a wider --dtype. Nothing was written.")
        for key, tensor in zip(_factor_keys(name), (A, B), strict=True):
            file.write(key, tensor)
        found[name.removesuffix(".weight")] = CutLayer(len(A), norm, dense.residual(delta, A, B) / norm)
    if not found:
        raise ValueError(f"no linear layer of {two.tuned.path} differs from {two.base.path}: there is no LoRA to make")
    return found


def _write_config(folder: Path, two: _Two, made: CutAdapter, rest: _Rest, base: str) -> None:
    from peft import LoraConfig

    skeleton = two.skeleton
    outside = [name for name in rest.biases if name.rpartition(".")[0] not in made.layers and not rest.holds(name)]
    config = LoraConfig(
        base_model_name_or_path=base,
        task_type="CAUSAL_LM" if skeleton.causal else None,
        modules_to_save=sorted(rest.modules) or None,
        bias="none" if not rest.biases else "all" if outside else "lora_only",
        fan_in_fan_out=all(skeleton.linear(f"{name}.weight") for name in made.layers),
    )
    content = {**config.to_dict(), "target_modules": skeleton.targets(made.layers)}
    write_config(folder / "adapter_config.json", content, {name: layer.rank for name, layer in made.layers.items()})
