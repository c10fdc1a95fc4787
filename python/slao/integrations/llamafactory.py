"""LLaMA-Factory: a callback for its launcher, `run_exp(args, callbacks=[...])`, and a kernel plugin for its v1 engine.

Neither loads LLaMA-Factory before it is used. LLaMA-Factory 0.9.5 asks for an older PEFT (0.18) than this library does
(0.20): install it with `--no-deps` and set DISABLE_VERSION_CHECK=1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..callback import SlaoCallback
from ..methods import check_method, make_method


class LlamaFactoryCallback(SlaoCallback):
    """SlaoCallback for a launcher that builds the model itself: patches it, and makes the method, when the Trainer is
    there, which is before accelerate prepares the model.

    task: its name. state: the folder with the state that the task before left (its output_dir); None for the first
    task. method, options: of `slao.make_method`. patch: arguments of `slao_kernels.patch`; None leaves PEFT's layers.
    `report` and `method` are there from then on. ValueError for a model without LoRA layers (finetuning_type: lora),
    and for a method with a penalty: its Trainer is out of reach.
    """

    def __init__(
        self,
        task: str | None = None,
        *,
        state: str | Path | None = None,
        method: str = "slao",
        patch: dict[str, Any] | None = {},  # noqa: B006 (read only)
        **options: Any,
    ) -> None:
        check_method(method)
        self.report: Any = None
        self._task, self._state, self._name, self._patch, self._options = task, state, method, patch, options

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not hasattr(model, "peft_config"):
            raise ValueError("the model has no LoRA adapter: set finetuning_type: lora and lora_target: all")
        if self._patch is not None:
            from slao_kernels import patch

            self.report = patch(model, **self._patch)
            if args.local_process_index == 0:
                print(self.report)
        super().__init__(make_method(self._name, model, **self._options), self._task)
        if self._state is not None:
            self.method.load(self._state)


def register_kernel(name: str = "slao") -> None:
    """Make `kernel_config: {name: slao}` patch the model in LLaMA-Factory's v1 engine, which applies kernels after the
    LoRA. Call it before the engine is built."""
    from llamafactory.v1.plugins.model_plugins.kernels.interface import KernelPlugin

    KernelPlugin(name).register()(_apply)


def _apply(model: Any, include_kernels: Any = None, **options: Any) -> Any:
    """include_kernels: LLaMA-Factory's own field, which has no meaning here."""
    from slao_kernels import patch

    if not hasattr(model, "peft_config"):
        raise ValueError("the model has no LoRA adapter: set peft_config: {name: lora}")
    print(patch(model, **options))
    return model
