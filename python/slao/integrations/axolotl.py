"""Axolotl: a plugin that patches the model and, if asked, runs the job as one task of a method.

In the YAML: `plugins: [slao.integrations.axolotl.SlaoPlugin]`, and the fields of `SlaoArgs`. Axolotl's own LoRA kernels
go around the layers' forward and are on by default: the plugin turns them off, and refuses them where the YAML asks
for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")


class SlaoArgs(BaseModel):
    """Fields for the YAML. slao_backend, slao_precision: of `slao_kernels.patch`. slao_method: with it the run is one
    task ("slao", "clora", ...; slao_options: its options), named slao_task; slao_state: the folder with the state
    that the run before it left (its output_dir)."""

    slao_backend: str = "auto"
    slao_precision: str = "base"
    slao_method: str | None = None
    slao_options: dict[str, Any] | None = None
    slao_task: str | None = None
    slao_state: str | None = None


class SlaoPlugin(BasePlugin):
    """See the module. Raises ValueError for LoRA kernels that were asked for, a model without LoRA layers, and what
    `make_method` and `Method.load` refuse."""

    def __init__(self) -> None:
        super().__init__()
        self.report: Any = None
        self.callback: Any = None

    def register(self, cfg: Any) -> None:
        """Before Axolotl validates the YAML, which is when it would turn its kernels on."""
        asked = [name for name in KERNELS if cfg.get(name)]
        if asked:
            raise ValueError(f"{', '.join(asked)} bypass the LoRA layers that this plugin fuses: set them to false")
        for name in KERNELS:
            cfg[name] = False

    def get_input_args(self) -> str:
        return f"{__name__}.{SlaoArgs.__name__}"

    def post_lora_load(self, cfg: Any, model: Any) -> None:
        from slao_kernels import patch

        on = [name for name in KERNELS if cfg.get(name)]
        if on:
            raise ValueError(f"{', '.join(on)} were turned on after this plugin had turned them off: set them to false")
        given = {name: cfg.get(name) for name in SlaoArgs.model_fields if cfg.get(name) is not None}
        chosen = SlaoArgs(**given)
        if not hasattr(model, "peft_config"):
            raise ValueError("the model has no LoRA adapter: set adapter: lora (or qlora) and lora_target_modules")
        self.report = patch(model, backend=chosen.slao_backend, precision=chosen.slao_precision)
        print(self.report)
        if chosen.slao_method is None:
            return
        from slao import SlaoCallback, make_method

        method = make_method(chosen.slao_method, model, **(chosen.slao_options or {}))
        if chosen.slao_state is not None:
            method.load(Path(chosen.slao_state))
        self.callback = SlaoCallback(method, chosen.slao_task)

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        if self.callback is not None:
            self.callback.attach(trainer)
