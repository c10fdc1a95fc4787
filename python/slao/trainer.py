"""transformers' Trainer for one task. Importing this module loads transformers."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from .logits import labelled_only
from .methods import Method
from .objectives import Objective

if TYPE_CHECKING:
    from .train import TrainConfig

logger = logging.getLogger("slao")


class WithPenalty(Trainer):
    """A Trainer whose training loss has `method.penalty()` added, once an optimiser step. Put it before another
    Trainer class among the bases, and it extends that one."""

    method: Method

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        found = super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        penalty = self.method.penalty() if model.training else None
        if penalty is None:
            return found
        # A loss that is already divided by the items of all accumulated batches is summed over them; how many
        # these are may differ in the last step of an epoch.
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = counted or self.compute_loss_func is not None
        if scaled:
            penalty = penalty / self.current_gradient_accumulation_steps
        return (found[0] + penalty, found[1]) if return_outputs else found + penalty


class Attached(Trainer):
    """A Trainer that computes logits at labelled positions alone while it trains, where that is the same."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        own = own_loss(self)
        with contextlib.nullcontext(own) if own else labelled_only(self.model) as reason:
            if reason is not None:
                logger.info("logits are computed at every position: %s", reason)
            return super().train(*args, **kwargs)


def own_loss(trainer: Any) -> str | None:
    """Whose loss the trainer computes from the model's output, if not transformers' from the model's own."""
    for step in ("compute_loss", "training_step"):
        owner = next(kind for kind in type(trainer).__mro__ if step in vars(kind) and kind is not WithPenalty)
        if owner is not Trainer or step in vars(trainer):
            return f"{type(trainer).__name__} has a {step} of its own"
    if trainer.compute_loss_func is not None or trainer.label_smoother is not None:
        return "the Trainer computes the loss from them"
    return None


class WithObjective(Trainer):
    """A Trainer with the objective's own loss, where it has one, and a count of tokens."""

    objective: Objective
    _tokens: Tensor | None = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        count = self.objective.tokens(inputs)  # stays on the device: no sync in a step
        self._tokens = count if self._tokens is None else self._tokens + count
        if self.objective.own_loss:
            return self.objective.loss(model, inputs)
        return super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)

    def tokens(self) -> int:
        return 0 if self._tokens is None else int(self._tokens)


class TaskTrainer(WithPenalty, WithObjective):
    """transformers' Trainer with the objective's loss, the method's penalty, and a count of tokens."""


def make_trainer(
    model: nn.Module,
    method: Method,
    objective: Objective,
    config: TrainConfig,
    features: list[dict[str, Any]],
    seed: int,
    callbacks: Sequence[Any],
) -> TaskTrainer:
    """A Trainer over `features`, with a fresh optimiser and schedule."""
    if "input_ids" not in features[0]:
        config = replace(config, group_by_length=False)  # images are of one length
    args = training_arguments(config, seed, next(model.parameters()).device.type)
    if config.trainer == "trl":
        from .integrations.trl import make_sft_trainer

        trainer = make_sft_trainer(TaskTrainer, model, objective, args, features, list(callbacks))
    else:
        trainer = TaskTrainer(
            model=model,
            args=args,
            train_dataset=features,  # a list of dicts is a map-style data set
            data_collator=objective.collate,
            callbacks=list(callbacks),
        )
    trainer.objective, trainer.method = objective, method
    if objective.own_loss:
        # A mean over the batch: the Trainer divides it by the accumulation steps.
        trainer.model_accepts_loss_kwargs = False
        trainer.loss_is_scaled_for_ga = False
    if callbacks:
        # Whoever brings a progress display of their own does not want the Trainer's per-task one as well.
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
    return trainer


def _renamed(arguments: Any, config: TrainConfig) -> dict[str, Any]:
    """Settings that TrainingArguments took other names for in the course of transformers 5."""
    known = {field.name for field in fields(arguments)}
    chosen: dict[str, Any] = {}
    if config.gradient_checkpointing:
        chosen["activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"] = True
    if config.group_by_length and "train_sampling_strategy" in known:
        chosen["train_sampling_strategy"] = "group_by_length"
    elif config.group_by_length:
        chosen["group_by_length"] = True
    return chosen


def training_arguments(config: TrainConfig, seed: int = 0, device: str = "cpu") -> Any:
    """transformers' TrainingArguments for one task. ValueError for what transformers does not take."""
    with tempfile.TemporaryDirectory() as nowhere:  # nothing is saved by the Trainer itself
        ours = {
            "output_dir": nowhere,
            "save_strategy": "no",
            "seed": seed,
            "data_seed": seed,
            "num_train_epochs": config.epochs,
            "max_steps": config.max_steps,
            "per_device_train_batch_size": config.batch_size,
            "learning_rate": config.learning_rate,
            "lr_scheduler_type": config.lr_scheduler,
            "weight_decay": config.weight_decay,
            "gradient_accumulation_steps": config.gradient_accumulation,
            "bf16": config.bf16,
            "report_to": config.report_to,
            "logging_steps": 10,
            "remove_unused_columns": False,
            "dataloader_pin_memory": torch.cuda.is_available(),
            "use_cpu": device == "cpu",  # else the Trainer moves the model to whatever accelerator it finds
        }
        try:
            if config.trainer == "trl":
                from .integrations.trl import sft_arguments

                lengths = _renamed(TrainingArguments, replace(config, gradient_checkpointing=False))
                arguments = sft_arguments({**ours, **lengths, **config.arguments}, config.gradient_checkpointing)
            else:
                arguments = TrainingArguments(**{**ours, **_renamed(TrainingArguments, config), **config.arguments})
            get_reporting_integration_callbacks(arguments.report_to)  # names the trackers there are
            return arguments
        except (TypeError, ValueError) as error:
            raise ValueError(f"train: {error}") from error


@contextlib.contextmanager
def own_forward(model: nn.Module) -> Iterator[None]:
    """Take back the autocast that accelerate wraps around `model.forward` for good.

    Every score, the zero-shot row included, is then computed in the model's own precision.
    """
    names = ("forward", "_original_forward", "_is_accelerate_prepared")
    before = {name: vars(model)[name] for name in names if name in vars(model)}
    try:
        yield
    finally:
        for name in names:
            vars(model).pop(name, None)
        vars(model).update(before)
