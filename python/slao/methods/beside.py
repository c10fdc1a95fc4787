"""What an adapter trains beside A and B (heads, biases, tokens), and what becomes of it from task to task."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

from slao_kernels import scaled_merge_, sharding
from slao_kernels.inventory import Part, beside

logger = logging.getLogger("slao")

KINDS = ("keep", "merge", "freeze")
_LIVE, _MERGED = "beside/", "beside_merged/"  # before the parts' names in a saved state


class Beside:
    """The parts of one adapter beside its layers (`slao_kernels.inventory.beside`).

    how: "keep": they go on training, and answers come from them as they are now. "merge": as B is averaged,
    P <- P + λ (P_live - P), λ the task's (its mean where each layer has its own); buffers that are no floating-point
    numbers are kept. "freeze": they train in the first task alone.
    Every method here is collective where parameters are sharded.
    """

    def __init__(self, model: nn.Module, adapter: str, how: str) -> None:
        if how not in KINDS:
            raise ValueError(f"unknown beside {how!r}; choose one of {', '.join(KINDS)}")
        self.model, self.adapter, self.how = model, adapter, how
        self.parts: list[Part] = []
        self._frozen: list[Tensor] = []
        self._merged: dict[str, Tensor] = {}
        self.find()

    def find(self) -> None:
        """Look the parts up anew; those that are frozen for now stay what they are."""
        if not self._frozen:
            found = beside(sharding.unwrap(self.model), self.adapter)
            names = {part.name for part in found}
            lost = [part.name for part in self.parts if part.kind != "other" and part.name not in names]
            if lost:
                raise ValueError(
                    f"{lost[0]} trained when the method was made and is no parameter of its module any more (FSDP with "
                    "use_orig_params=False, or other PEFT modules): it could not be saved"
                )
            self.parts = found
        buffers = [part.name for part in self.parts if part.slot[1] in part.slot[0]._buffers]
        if self.how == "freeze" and buffers:
            raise ValueError(f"beside='freeze' cannot hold {buffers[0]}, which a forward changes: use 'keep'")
        sharded = [part.name for part in self.parts if not _is_whole(part)]
        if self.how == "merge" and sharded:
            raise ValueError(f"beside='merge' cannot average {sharded[0]}, which is sharded: use 'keep' or 'freeze'")

    def live(self) -> dict[str, Tensor]:
        """Name -> the part, whole, without a graph."""
        if all(map(_is_whole, self.parts)):
            return {part.name: part.tensor.detach() for part in self.parts}
        values = sharding.Shards(self.model).gather([part.slot for part in self.parts])
        return {part.name: value.detach() for part, value in zip(self.parts, values, strict=True)}

    def begin(self, task: int) -> None:
        """The task's training is about to start."""
        if self.how == "freeze" and task > 1:
            self._frozen = [part.tensor for part in self.parts if part.tensor.requires_grad]
            for tensor in self._frozen:
                tensor.requires_grad_(False)

    def end(self, task: int, lam: float | list[float]) -> None:
        """It was trained and merged with `lam`. Frozen parts train again until the next one begins, so that every
        optimizer that is made between tasks holds the same parameters."""
        if any(tensor.requires_grad for tensor in self._frozen):
            logger.warning("what beside='freeze' holds trained in this task: set_adapter() turns gradients on")
        self._thaw()
        if self.how != "merge":
            return
        live = self.live()
        if task == 1:
            self._merged = {name: tensor.clone() for name, tensor in live.items()}
            return
        averaged = [name for name in self._merged if live[name].is_floating_point()]
        self._merged |= {name: self._merged[name].to(live[name].device) for name in averaged}
        factor = fmean(lam) if isinstance(lam, list) else lam
        scaled_merge_([self._merged[name] for name in averaged], [live[name] for name in averaged], factor)
        self._merged |= {name: tensor.clone() for name, tensor in live.items() if name not in averaged}

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Within the block the model has the merged parts, if any are merged."""
        trained = [(part.tensor, part.tensor.data) for part in self.parts if part.name in self._merged]
        names = [part.name for part in self.parts if part.name in self._merged]
        try:
            for (tensor, _), name in zip(trained, names, strict=True):
                tensor.data = self._merged[name].to(tensor.device, tensor.dtype)  # the model may have changed since
            yield
        finally:
            for tensor, data in trained:
                tensor.data = data

    def state(self) -> dict[str, Tensor]:
        """What `load` takes: the parts as trained, and their merge."""
        self.find()
        live = {_LIVE + name: tensor for name, tensor in self.live().items()}
        return live | {_MERGED + name: tensor for name, tensor in self._merged.items()}

    def taken_from(self, path: Path, tensors: dict[str, Tensor], live: dict[str, Tensor]) -> dict[str, Tensor]:
        """Remove from `tensors`, a saved state, what is `state`'s, and return it. ValueError: it is not `live`'s."""
        mine = {key: tensors.pop(key) for key in list(tensors) if key.startswith((_LIVE, _MERGED))}
        here = {_LIVE + name: tensor for name, tensor in live.items()}
        lacking = [key for key in here if key not in mine]
        if lacking:
            raise ValueError(
                f"{path} holds no {lacking[0].removeprefix(_LIVE)}, which the model trains beside A and B"
                f"{' (it is of a version that saved A and B only)' if not mine else ''}; begin anew from task 1"
            )
        foreign = [key for key in mine if key.startswith(_LIVE) and key not in here]
        if foreign:
            raise ValueError(
                f"{path} holds {foreign[0].removeprefix(_LIVE)}, which this model does not train: give its LoraConfig "
                "the bias, modules_to_save and trainable_token_indices of the saved one"
            )
        for key, saved in mine.items():
            tensor = here.get(key.replace(_MERGED, _LIVE))
            # A merge has the dtype of when it was made: half() since then leaves it as exact as it was.
            free = key.startswith(_MERGED) and saved.is_floating_point()
            if tensor is None or saved.shape != tensor.shape or (saved.dtype != tensor.dtype and not free):
                what = "absent" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
                raise ValueError(f"{path}: {key} is {tuple(saved.shape)} {saved.dtype}, in the model {what}")
        return mine

    def load(self, saved: dict[str, Tensor], task: int, in_task: bool) -> None:
        """Put what `taken_from` returned into the model; `task` is running, or the last one that has."""
        self._thaw()
        tensors = [saved[_LIVE + part.name] for part in self.parts]
        if all(map(_is_whole, self.parts)):
            with torch.no_grad():
                for part, tensor in zip(self.parts, tensors, strict=True):
                    part.tensor.detach().copy_(tensor)
        else:
            on = [tensor.to(part.tensor.device) for part, tensor in zip(self.parts, tensors, strict=True)]
            sharding.Shards(self.model).scatter([part.slot for part in self.parts], on)
        devices = {part.name: part.tensor.device for part in self.parts}
        names = [key.removeprefix(_MERGED) for key in saved if key.startswith(_MERGED)]
        self._merged = {name: saved[_MERGED + name].to(devices[name]) for name in names}
        if in_task:
            self.begin(task)

    def _thaw(self) -> None:
        for tensor in self._frozen:
            tensor.requires_grad_(True)
        self._frozen = []


def _is_whole(part: Part) -> bool:
    return part.slot[1] in part.slot[0]._buffers or sharding.is_plain(part.tensor)
