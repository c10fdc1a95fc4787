"""A model's adapter as a plain PEFT folder, whoever injected it."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from slao_kernels import inventory, sharding
from slao_kernels.adapters import LoraPair

from . import checkpoint, sums
from .folders import PREFIX
from .reading import read_json

if TYPE_CHECKING:
    from .merging.cuts import CutAdapter, Limit

_CUT = "cut"
_USE = "A LoRA adapter for PEFT: `PeftModel.from_pretrained(base, folder)`, base as in adapter_config.json."


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    adapter: str = "default",
    *,
    stacked: int = 1,
    limit: Limit | None = None,
) -> CutAdapter | None:
    """Write adapter_config.json and adapter_model.safetensors of `adapter` into `folder`.

    stacked: the weights, as they are now, have that many times the configured rank in every layer (pairs stacked on
    one another); rank and alpha are then written such that the scaling stays what it is. limit: how far every layer is
    cut (`compress_adapter`); what that lost is returned, on the rank that writes, and is in layers.json.

    The files are written beside `folder` first and moved in when complete, the weights last. Loads with
    `PeftModel.from_pretrained` where this library is not installed.
    With several processes every rank calls it and rank 0 writes. Of a sharded model A and B are written.
    Raises ValueError, with nothing written, when the model carries no PEFT config of that adapter, trains what PEFT
    does not save, has an init whose change of the base PEFT cannot repeat, or is sharded and has more in it than A and
    B; an error on one rank is raised on all.
    """
    model, outer = sharding.unwrap(model), model
    made = None
    with sharding.together():
        _check(model, adapter, outer, stacked)
        if limit is not None:
            _check_cut(model, adapter)
    whole = _gathered(outer, adapter) if sharding.is_sharded(outer) else None
    with sharding.together():
        if sharding.is_first():
            made = _write(model, Path(folder), adapter, whole, stacked, limit)
    return made


def _check(model: nn.Module, adapter: str, outer: nn.Module, stacked: int) -> None:
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    if adapter not in configs:
        raise ValueError(f"the model has no PEFT config for adapter {adapter!r}; it has {sorted(configs)}")
    inventory.check_exportable(configs[adapter], stacked)
    parts = inventory.beside(model, adapter)
    foreign = [part.name for part in parts if part.kind == "other"]
    if foreign:
        raise ValueError(
            f"{foreign[0]} trains too ({len(foreign)} of its kind), and PEFT would not save it with the adapter: name "
            "its module in modules_to_save, or freeze it"
        )
    if parts and sharding.is_sharded(outer):
        names = ", ".join(part.name for part in parts[:4])
        raise ValueError(f"the model is sharded and its adapter has {names}: only A and B can be exported then")


def _check_cut(model: nn.Module, adapter: str) -> None:
    config: Any = model.peft_config
    given = config[adapter].to_dict()
    init = inventory.changes_base(given.get("init_lora_weights"))
    why = inventory.more_than_pairs(given) + ([f"init_lora_weights={init!r}"] if init is not None else [])
    if why:
        raise ValueError(f"the adapter has {', '.join(why)}, so its layers are more than A and B, which alone are cut")


def _gathered(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """A and B by PEFT's names within the bare model."""
    with sharding.whole(model, adapter, write=False) as (pairs, left_out):
        if left_out:
            name, why = next(iter(left_out.items()))
            raise ValueError(f"the model is sharded, and of {name} A and B cannot be gathered: {why}")
        return {
            key: tensor.detach().cpu()
            for pair in pairs
            for key, tensor in zip(_keys(pair, adapter), pair.parameters, strict=True)
        }


def _keys(pair: LoraPair, adapter: str) -> list[str]:
    embedding = adapter in getattr(pair.layer, "lora_embedding_A", {})
    return [f"{pair.name}.lora_embedding_{f}" if embedding else f"{pair.name}.lora_{f}.weight" for f in "AB"]


def _write(
    model: nn.Module,
    target: Path,
    adapter: str,
    whole: dict[str, Tensor] | None,
    stacked: int,
    limit: Limit | None,
) -> CutAdapter | None:
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from .merging.cuts import RECORD

    configs: dict[str, Any] = model.peft_config
    target.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=checkpoint.TEMPORARY, dir=target.parent))
    try:
        with _at_rank(configs[adapter], stacked):
            if isinstance(model, PeftModel) and whole is None:
                model.save_pretrained(str(scratch), selected_adapters=[adapter])
                source = scratch if (scratch / "adapter_config.json").exists() else scratch / adapter
                _fill_in(source / "README.md")
            else:  # injected into a bare model: PEFT's keys are then those of a model inside a PeftModel
                state = get_peft_model_state_dict(model, adapter_name=adapter) if whole is None else whole
                tensors = {PREFIX + key.removeprefix(PREFIX): value.contiguous() for key, value in state.items()}
                save_file(tensors, scratch / "adapter_model.safetensors", metadata={"format": "pt"})
                _save_config(model, configs[adapter], scratch)
                source = scratch
        _complete(source / "adapter_model.safetensors", inventory.beside(model, adapter))
        made = None if limit is None else _cut(source, target, limit)
        source = source if made is None else source / _CUT
        names = sorted(path.name for path in source.iterdir() if path.is_file() and path.name != sums.SUMS)
        for stale in (sums.SUMS, RECORD):
            (target / stale).unlink(missing_ok=True)
        for name in sorted(names, key=lambda name: name.startswith("adapter_model")):
            with open(source / name, "rb") as file:
                os.fsync(file.fileno())
            os.chmod(source / name, 0o666 & ~checkpoint.umask())  # safetensors makes files private
            os.replace(source / name, target / name)
        checkpoint.sync_folder(target)
        return made
    except (OSError, SafetensorError) as error:
        raise checkpoint.cannot_write(target, error) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _cut(source: Path, target: Path, limit: Limit) -> CutAdapter | None:
    """The adapter in `source`, cut, in a folder in there. None where its ranks are within the limit as they are."""
    from .merging.compress import compress_adapter

    config = read_json(source / "adapter_config.json")
    largest = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    if limit.keep is None and limit.rank is not None and largest <= limit.rank:
        return None
    made = compress_adapter(source, source / _CUT, rank=limit.rank, keep=limit.keep)
    return replace(made, folder=target)


def _complete(path: Path, parts: list[inventory.Part]) -> None:
    """Add to a file what trains beside A and B and is not in it: PEFT 0.20 leaves out the biases of "lora_only"."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    wanted = {PREFIX + part.key.removeprefix(PREFIX): part for part in parts}
    with safe_open(path, framework="pt") as file:
        missing = sorted(wanted.keys() - set(file.keys()))
    if missing:
        tensors = load_file(path) | {key: wanted[key].tensor.detach().cpu().contiguous() for key in missing}
        save_file(tensors, path, metadata={"format": "pt"})


def _fill_in(card: Path) -> None:
    """PEFT's model card keeps its head, which the hub reads; in place of a form that nobody filled in a line of use."""
    parts = card.read_text(encoding="utf-8").split("---\n", 2) if card.is_file() else []
    if len(parts) == 3:
        card.write_text(f"---\n{parts[1]}---\n\n{_USE}\n", encoding="utf-8")


def _save_config(model: nn.Module, config: Any, folder: Path) -> None:
    from peft import PeftModel

    before = config.inference_mode, config.base_model_name_or_path
    # As PeftModel.save_pretrained does: a loaded adapter starts frozen and knows its base, and its class where no task
    # tells AutoPeftModel.
    classes = type(model.get_base_model() if isinstance(model, PeftModel) else model).__mro__
    named = (kind for kind in classes if getattr(sys.modules.get(kind.__module__), kind.__name__, None) is kind)
    found = next((kind for kind in named if hasattr(kind, "from_pretrained")), None)
    kind = None if found is None else {"base_model_class": found.__name__, "parent_library": found.__module__}
    config.inference_mode = True
    config.base_model_name_or_path = before[1] or getattr(getattr(model, "config", None), "_name_or_path", None)
    try:
        config.save_pretrained(str(folder), auto_mapping_dict=None if config.task_type else kind)
    finally:
        config.inference_mode, config.base_model_name_or_path = before


@contextlib.contextmanager
def _at_rank(config: Any, factor: int) -> Iterator[None]:
    """Within the block the config says `factor` times its ranks, and alphas that leave every scaling as it was."""
    names = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
    before = {name: getattr(config, name) for name in names}
    alphas = factor**0.5 if config.use_rslora else factor  # scaling is alpha/√r or alpha/r
    try:
        if factor != 1:
            config.r, config.lora_alpha = factor * config.r, alphas * config.lora_alpha
            config.rank_pattern = {key: factor * r for key, r in config.rank_pattern.items()}
            config.alpha_pattern = {key: alphas * alpha for key, alpha in config.alpha_pattern.items()}
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)
