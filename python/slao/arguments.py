"""`train.arguments`: which of transformers' TrainingArguments, or TRL's SFTConfig, a run takes."""

from __future__ import annotations

from typing import Any

from .typed import options, parameters

_EVALUATES = "scores come from the objective, not from the Trainer's evaluation"
_SAVES = "the whole state is saved after every task, and the Trainer saves nothing"
# TrainingArguments that could be set, and would be ignored in silence or end the run after it began.
_NO_EFFECT = {
    **dict.fromkeys(
        ("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "eval_accumulation_steps", "do_eval",
         "do_predict", "do_train", "per_device_eval_batch_size", "prediction_loss_only",
         "include_for_metrics", "batch_eval_metrics",
         "eval_do_concat_batches", "eval_use_gather_object", "metric_for_best_model", "greater_is_better",
         "label_names", "load_best_model_at_end", "bf16_full_eval", "fp16_full_eval"), _EVALUATES),
    **dict.fromkeys(
        ("save_steps", "save_total_limit", "save_only_model", "save_on_each_node", "resume_from_checkpoint",
         "ignore_data_skip", "restore_callback_states_from_checkpoint", "push_to_hub", "hub_model_id", "hub_token",
         "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision", "enable_jit_checkpoint"), _SAVES),
    "auto_find_batch_size": "it starts the training anew within a task; set train.batch_size",
    "length_column_name": "the rows have no such column",
    "disable_tqdm": "a run has one progress bar of its own",
}  # fmt: skip


def check_arguments(given: dict[str, Any], trainer: str) -> dict[str, Any]:
    """`given`, typed as the trainer's own annotations say. ValueError for what is unknown, or would do nothing."""
    if ignored := next((name for name in given if name in _NO_EFFECT), None):
        raise ValueError(f"train.arguments.{ignored} would do nothing: {_NO_EFFECT[ignored]}; leave it out")
    return options("train.arguments", "train.arguments", given, parameters(_arguments_of(trainer)))


def _arguments_of(trainer: str) -> Any:
    if trainer == "trl":
        from .integrations.trl import require_trl

        return require_trl().SFTConfig
    from transformers import TrainingArguments

    return TrainingArguments
