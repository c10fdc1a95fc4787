"""One task of a continual-learning method as a callback of transformers' Trainer, or of any Trainer built on it."""

from __future__ import annotations

import logging
import weakref
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from slao_kernels import deepspeed_masters

from . import checkpoint, observing
from .methods import Method
from .methods.base import STATE_FILE
from .watching import Watch

logger = logging.getLogger("slao")


class SlaoCallback(TrainerCallback):
    """Begins a task of `method` when the Trainer begins to train, and ends it when it has trained.

    method: made on the model that the Trainer gets (patched before, if at all). task: its name; None numbers the
    tasks. One Trainer a task; the callback may go on to the next one where `task` is None or set anew.
    Checkpoints get the method's state beside the Trainer's own files, and `train(resume_from_checkpoint=...)` goes on
    from it: bit-identical to an uninterrupted run, in a fresh process too. (The Trainer itself loads the
    checkpoints of a PeftModel only, not of a bare model with an adapter in it.) When the task has ended the state is in
    `output_dir` itself, for `method.load`. Nothing is written under save_strategy="no". Under load_best_model_at_end
    the task ends with the state that lies beside the best checkpoint.
    A method that observes gets all rows of the Trainer's data set before and after training (InfLoRA).
    Metrics, all named "slao/...": the task, LoRA layers and how many are patched, at the beginning; λ (a mean where
    each layer has its own), the mean cosine of the new task vector with the merge so far where the method kept it
    (`SLAO(keep_cosines=True)`), and patched layers that fell back, at the end. They go through `trainer.log` after
    `attach(trainer)`, otherwise into the Trainer's log_history and the logger "slao" alone.
    While training raises ValueError: for a task that is still running, a Trainer of another model, a method with a
    penalty but no `attach`, or with new parameters for each task (SD-LoRA), auto_find_batch_size, a checkpoint without
    the state that belongs to it, and, at the next log, weights that became NaN or infinite.
    """

    def __init__(self, method: Method, task: str | None = None) -> None:
        self.method, self.task = method, task
        self._trainer: weakref.ref[Any] | None = None
        self._watch = Watch(method)

    def attach(self, trainer: Any) -> Any:
        """Add the callback to `trainer` (if it is not there) and log through it; a method's penalty joins its loss.

        The instance gets a subclass of its class for it. While it trains, a causal language model whose loss is the
        Trainer's own computes logits at labelled positions alone, and returns none (`slao.logits.labelled_only`); why
        not is logged. Returns `trainer`.
        """
        from .trainer import Attached, WithPenalty

        if not any(callback is self for callback in trainer.callback_handler.callbacks):
            trainer.add_callback(self)
        theirs, wanted = type(trainer), [Attached]
        if _has_penalty(self.method):
            wanted.append(WithPenalty)
            trainer.method = self.method
        if new := [kind for kind in wanted if not isinstance(trainer, kind)]:
            trainer.__class__ = type(theirs.__name__, (*new, theirs), {"__module__": theirs.__module__})
        self._trainer = weakref.ref(trainer)
        return trainer

    @property
    def trainer(self) -> Any:
        """The Trainer that it is attached to, not kept alive: with it goes its optimizer."""
        return None if self._trainer is None else self._trainer()

    def fallbacks(self) -> dict[str, str]:
        """Name -> why a patched layer of the method runs, or ran in some call, PEFT's own forward."""
        found: dict[str, str] = {}
        for pair in self.method.pairs:
            options = getattr(pair.layer, "slao_options", None)
            if options is not None and options.name in options.fallbacks:
                found[options.name] = options.fallbacks[options.name]
        return found

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._check(args, state, model)
        deepspeed_masters.refuse_unreachable(kwargs.get("optimizer"))
        if state.global_step > 0:
            self._resume(args, state)
            return
        self._observe(args, kwargs)
        self.method.begin_task(self.task or f"task{self.method.task + 1}")
        layers = [pair.layer for pair in self.method.pairs]
        if args.save_strategy != "no" and _bare(model):
            logger.warning(
                "checkpoints of this run cannot be resumed: transformers' Trainer does not load those of a bare model "
                "with an adapter in it; wrap the model with peft.get_peft_model, then patch it"
            )
        patched = sum(hasattr(layer, "slao_options") for layer in layers)
        self._log(state, {"task": self.method.task, "lora_layers": len(layers), "patched": patched})

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._watch.on_log(args, state, control)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.method.save(_folder(args, state), {"step": state.global_step})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.method.load(state.best_model_checkpoint)  # of which the Trainer has loaded what PEFT saves
        self._observe(args, kwargs)
        self.method.end_task()
        lam, cosines = self.method.lambdas[-1], self.method.cosines[-1]
        metrics: dict[str, float] = {"task": self.method.task, "fallbacks": len(self.fallbacks())}
        metrics["lambda"] = fmean(lam) if isinstance(lam, list) else lam
        if cosines is not None:
            metrics["cosine"] = fmean(cosines)
        self._log(state, metrics)
        if args.save_strategy != "no":
            self.method.save(args.output_dir, {"step": state.global_step})

    def _observe(self, args: Any, given: dict[str, Any]) -> None:
        if self.method.observes:
            device = self.method.pairs[0].A.device
            self.method.observe(observing.batches(given["train_dataloader"], args.per_device_train_batch_size, device))

    def _log(self, state: Any, metrics: dict[str, float]) -> None:
        named = {f"slao/{key}": value for key, value in metrics.items()}
        if self._attached(state):
            self.trainer.log(named)
            return
        state.log_history.append({**named, "step": state.global_step})
        logger.info("%s: %s", self.method.names[-1], ", ".join(f"{key} {value:.4g}" for key, value in named.items()))

    def _attached(self, state: Any) -> bool:
        """Whether it is the attached Trainer that calls, and not one of a later task."""
        return self.trainer is not None and self.trainer.state is state

    def _check(self, args: Any, state: Any, model: Any) -> None:
        if args.auto_find_batch_size:
            raise ValueError("auto_find_batch_size starts the training anew within a task: set a batch size instead")
        if self.method.adds_parameters:
            raise ValueError(
                f"{self.method.name} begins a task with new parameters, which the Trainer's optimizer, made before, "
                "would not train: call begin_task() before the Trainer is made and end_task() after train(), without "
                "this callback (slao.train does)"
            )
        if _has_penalty(self.method) and not self._attached(state):
            raise ValueError(
                f"{self.method.name} adds a penalty to the loss: call attach(trainer) on this callback before train()"
            )
        first = self.method.pairs[0]
        if not any(module is first.layer for module in model.modules()):
            raise ValueError(
                f"the Trainer's model does not hold the method's layer {first.name}: give the Trainer the model that "
                "the method was made on, and no peft_config"
            )

    def _resume(self, args: Any, state: Any) -> None:
        """Everything is compared before anything is written."""
        given = args.resume_from_checkpoint
        folder = Path(given) if isinstance(given, str) else _folder(args, state)
        path = folder / STATE_FILE
        if not path.is_file():
            raise ValueError(
                f"resumed at step {state.global_step}, but {folder} holds no {STATE_FILE}: the checkpoint was saved "
                "without this callback, lies elsewhere (put its path into the arguments' resume_from_checkpoint), or "
                "the process died while it was written: take an earlier one"
            )
        tensors, meta = checkpoint.read_state(path)
        if self.task is not None and meta["names"][-1:] != [self.task]:
            raise ValueError(f"{path} was saved in task {meta['names'][-1]!r}, this is {self.task!r}")
        if meta["extra"].get("step") != state.global_step:
            raise ValueError(f"{path} was saved at step {meta['extra'].get('step')}, not at {state.global_step}")
        for pair in self.method.pairs:
            for key, live in (("A", pair.A), ("B", pair.B)):
                saved = tensors.get(f"{pair.name}.{key}")
                # Shards are not compared; what does not fit is refused by `load`.
                plain = saved is not None and saved.shape == live.shape and not hasattr(live, "full_tensor")
                if plain and not torch.equal(live.detach().cpu(), saved):
                    raise ValueError(
                        f"{path} is not of the checkpoint that the Trainer loaded ({pair.name}.{key} differs): put the "
                        "path of that one into the arguments' resume_from_checkpoint"
                    )
        self.method.load(folder)


def _has_penalty(method: Method) -> bool:
    return type(method).penalty is not Method.penalty


def _bare(model: Any) -> bool:
    from peft import PeftModel

    return getattr(model, "_hf_peft_config_loaded", False) and not isinstance(model, PeftModel)


def _folder(args: Any, state: Any) -> Path:
    """The checkpoint that is being written, or that was just loaded: a callback is not told which it is."""
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
