"""TRL's SFTTrainer as the trainer of `slao.train` (TrainConfig(trainer="trl")). Importing this loads transformers.

Outside `slao.train` an SFTTrainer takes `slao.SlaoCallback` like any Trainer, one SFTTrainer a task, all over one
PeftModel and without `peft_config`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..objectives import Objective


def require_trl() -> Any:
    """The package, else a ValueError that says how to get it."""
    try:
        import trl
    except ImportError as error:
        raise ValueError(f'trainer "trl" needs TRL ({error}): pip install trl') from error
    return trl


def make_sft_trainer(
    ours: type,
    model: nn.Module,
    objective: Objective,
    args: Any,
    features: list[dict[str, Any]],
    callbacks: list[Any],
) -> Any:
    """An SFTTrainer over tokenised `features`, with the penalty and a count of tokens, like `ours`, the TaskTrainer.

    objective: one with the model's own loss (causal_lm), else ValueError. args: an SFTConfig (see `sft_arguments`).
    """
    SFTTrainer = require_trl().SFTTrainer
    from datasets import Dataset

    if objective.own_loss:
        raise ValueError(f'trainer "trl" trains causal language models; objective {objective.name!r} has its own loss')
    # Ours come first among the bases and extend TRL's loss as they extend the Trainer's.
    joined = type("SFTTaskTrainer", (ours, SFTTrainer), {"__doc__": ours.__doc__})
    return joined(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(features),
        data_collator=objective.collate,
        processing_class=objective.tokenizer,
        callbacks=callbacks,
    )


def sft_arguments(settings: dict[str, Any], gradient_checkpointing: bool) -> Any:
    """SFTConfig from TrainingArguments' `settings`, for rows that are tokenised and cut already.

    TRL's own defaults of bf16 and of checkpointing, both on, give way to what the settings say.
    """
    prepared: dict[str, Any] = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None}
    prepared["gradient_checkpointing"] = gradient_checkpointing
    return require_trl().SFTConfig(**{**prepared, **settings})
