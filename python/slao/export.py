"""A model's adapter as a plain PEFT folder, whoever injected it."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import nn


def save_adapter(model: nn.Module, folder: str | Path, adapter: str = "default") -> None:
    """Write adapter_config.json and adapter_model.safetensors of `adapter` into `folder`.

    The files are written beside `folder` first and moved in when complete, the weights last. Loads with
    `PeftModel.from_pretrained` where this library is not installed.
    Raises ValueError when the model carries no PEFT config of that adapter.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import save_file

    configs: dict[str, Any] = getattr(model, "peft_config", {})
    if adapter not in configs:
        raise ValueError(f"the model has no PEFT config for adapter {adapter!r}; it has {sorted(configs)}")
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        if isinstance(model, PeftModel):
            model.save_pretrained(str(scratch), selected_adapters=[adapter])
            source = scratch if (scratch / "adapter_config.json").exists() else scratch / adapter
        else:  # injected into a bare model: PEFT's keys are then those of a model inside a PeftModel
            state = get_peft_model_state_dict(model, adapter_name=adapter)
            tensors = {f"base_model.model.{key}": value.contiguous() for key, value in state.items()}
            save_file(tensors, scratch / "adapter_model.safetensors", metadata={"format": "pt"})
            _save_config(model, configs[adapter], scratch)
            source = scratch
        names = sorted(path.name for path in source.iterdir() if path.is_file())
        for name in sorted(names, key=lambda name: name.startswith("adapter_model")):
            with open(source / name, "rb") as file:
                os.fsync(file.fileno())
            os.replace(source / name, target / name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _save_config(model: nn.Module, config: Any, folder: Path) -> None:
    before = config.inference_mode, config.base_model_name_or_path
    # As PeftModel.save_pretrained does: a loaded adapter starts frozen and knows its base.
    config.inference_mode = True
    config.base_model_name_or_path = before[1] or getattr(getattr(model, "config", None), "_name_or_path", None)
    try:
        config.save_pretrained(str(folder))
    finally:
        config.inference_mode, config.base_model_name_or_path = before
