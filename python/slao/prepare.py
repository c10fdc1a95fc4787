"""From settings to what `train` takes: the stream in an order, a fresh model with its adapter, method and objective."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from .identity import fingerprint
from .methods import Method, make_method
from .models import check_device, check_tokens, default_objective, load_model, load_tokenizer, model_path
from .objectives import OBJECTIVES, check_objective, make_objective
from .retention import windows
from .settings import TRAINS, train_config
from .streams import Stream, make_stream
from .train import TrainConfig, check_objective_takes, seed_everything


def check_settings(settings: dict[str, Any]) -> None:
    """ValueError for what the settings alone say is wrong, before data or a model are loaded: the values of methods'
    options, tried on a layer of their own, the adapter's config, the device, the trainer's arguments."""
    from peft import LoraConfig, inject_adapter_in_model

    from .trainer import training_arguments

    training_arguments(train_config(settings))  # raises what transformers objects to
    check_device(settings["device"])
    rank = lora_config(settings).r
    for label in settings["methods"]:
        layer = nn.Sequential(nn.Linear(max(rank, 1), max(rank, 1)))
        make_labelled(settings, label, inject_adapter_in_model(LoraConfig(r=rank, target_modules=["0"]), layer))


def lora_config(settings: dict[str, Any]) -> Any:
    """The `lora` section as PEFT's config."""
    from peft import LoraConfig

    try:
        return LoraConfig(**settings["lora"])
    except TypeError as error:
        raise ValueError(f"lora: {error}") from error


def make_labelled(settings: dict[str, Any], label: str, model: nn.Module) -> Method:
    """The method that stands under `label` in the settings."""
    options = dict(settings["methods"][label])
    for key in TRAINS:
        options.pop(key, None)
    return make_method(options.pop("method", label), model, **options)


class Prepared:
    """The data and tokenizer of one setting of everything, loaded once; models and methods are made from it.

    settings: those of `settings.complete`, without a sweep. ValueError for what is wrong with them, data or model.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.config = train_config(settings)
        options = dict(settings["stream"])
        stream = make_stream(options.pop("name"), **options)
        self.stream = stream.limited(settings["train_rows"], settings["train_fraction"], test=settings["test_rows"])
        self.path = model_path(settings["model"])
        options = dict(settings["objective"])
        name = options.pop("name", "auto")
        self.objective_name = default_objective(self.path) if name == "auto" else name
        self.objective_options = options
        check_objective(self.objective_name, options).check(self.stream, **options)
        self.tokenizer = load_tokenizer(self.path)
        self.report = ""
        self.base = ""  # the base model's fingerprint, once `build` has loaded it
        check_objective_takes(self.config, OBJECTIVES[self.objective_name])
        if self.config.retention:
            windows(self.config.retention, self.tokenizer)  # raises what is wrong with the text
        if OBJECTIVES[self.objective_name].own_loss and self.config.arguments.get("label_smoothing_factor"):
            raise ValueError(
                f"train.arguments.label_smoothing_factor would do nothing: {self.objective_name} has a loss of its "
                "own; leave it out"
            )

    def ordered(self, seed: int, order: int | None) -> Stream:
        """The stream in order number `order` (0 is its own), or, with None, as the seed and `shuffle_tasks` say."""
        if order is None:
            return self.stream.shuffled(seed) if self.settings["shuffle_tasks"] else self.stream
        return self.stream.shuffled(order) if order else self.stream

    def config_of(self, label: str) -> TrainConfig:
        """How the method under `label` is trained: as all, but with a learning rate and replay of its own where it has
        them."""
        return train_config(self.settings, label)

    def build(
        self, label: str, seed: int, order: int | None, others: Sequence[str] = ()
    ) -> tuple[nn.Module, Method, Any]:
        """A fresh model with its adapter, the method and the objective; the model is the same for all of a seed.

        others: labels of methods that are tried on the model first, for what they object to in it.
        """
        from slao_kernels import extension, patch, unpatch

        settings = self.settings
        seed_everything(seed)  # the adapter's first A is drawn here
        model = load_model(self.path, self.objective_name, settings["dtype"], settings["device"])
        if not self.base:
            check_tokens(model, self.tokenizer, self.path)
            self.base = fingerprint(model)
        report = patch(model, lora_config(settings), backend=settings["backend"], precision=settings["precision"])
        if not settings["patch"]:
            unpatch(model)
            self.report = "fused layers are off (--no-patch)"
        else:
            self.report = str(report)
        for other in others:
            for pair in make_labelled(settings, other, model).pairs:
                extension.retract(pair.layer)  # the next one finds the layers as they were
        method = make_labelled(settings, label, model)  # before the objective runs the model: it may have to refuse it
        stream = self.ordered(seed, order)
        objective = make_objective(self.objective_name, model, self.tokenizer, stream, **self.objective_options)
        return model, method, objective
