"""The settings of `slao run`: a tree of plain values, from a preset or a YAML file, changed by flags, checked whole."""

from __future__ import annotations

import copy
from importlib import resources
from pathlib import Path
from typing import Any

from .arguments import check_arguments
from .methods import METHODS, check_method
from .objectives import OBJECTIVES, check_objective
from .objectives.prompts import template_text
from .reading import parse_yaml, read_text
from .streams import STREAMS
from .train import TrainConfig
from .typed import options, parameters, plain, typed

# What a method may have of its own, in place of what `train` says.
TRAINS = ("learning_rate", "replay_rows", "replay_fraction", "replay_from")
# Everything that can be set, with its default. The one open section is `methods`: a name -> its options, which are
# those of the method, `method` (its kind, where the name is another) and those in TRAINS.
DEFAULTS: dict[str, Any] = {
    "name": "",
    "model": "minilm",
    "stream": {"name": "python_docs"},
    "shuffle_tasks": True,
    "train_rows": None,
    "train_fraction": None,
    "test_rows": None,
    "objective": {"name": "auto"},
    "methods": {"seqlora": {}, "slao": {}},
    "seeds": [0, 1],
    "orders": None,
    "sweep": {},
    "similarity": False,
    "lora": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear"},
    "patch": True,
    "backend": "auto",
    "precision": "base",
    "dtype": "auto",
    "device": "auto",
    "train": {},
}
DTYPES = ("auto", "float32", "bfloat16", "float16")
# What a plain setting must be.
_PLAIN: dict[str, Any] = {
    "name": str,
    "model": str,
    "stream.name": str,
    "shuffle_tasks": bool,
    "similarity": bool,
    "train_rows": int | None,
    "train_fraction": float | None,
    "test_rows": int | None,
    "objective.name": str,
    "seeds": list[int],
    "orders": list[int] | None,
    "lora.r": int,
    "lora.lora_alpha": float,
    "lora.lora_dropout": float,
    "lora.target_modules": str | list[str],
    "patch": bool,
    "backend": str,
    "precision": str,
    "dtype": str,
    "device": str,
}
_GIVEN = ("model", "tokenizer", "stream", "adapter")  # a run's own, for objectives and methods
# What `train` and `lora` need beside a type: the least value, and whether that itself is allowed.
_LEAST = {
    "train.learning_rate": (0, True),
    "train.weight_decay": (0, True),
    "train.gradient_accumulation": (1, True),
    "lora.lora_alpha": (0, False),
}
LARGEST_SEED = 400_000  # 10,007 generators are seeded for each, by numbers of 32 bits


def presets() -> list[str]:
    """Names that `--preset` takes."""
    folder = resources.files("slao") / "presets"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_preset(name: str) -> dict[str, Any]:
    """The settings of a preset. ValueError that lists the valid names."""
    if name not in presets():
        raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(presets())}")
    return _parse((resources.files("slao") / "presets" / f"{name}.yaml").read_text(encoding="utf-8"), f"preset {name}")


def load_file(path: Path) -> dict[str, Any]:
    """The settings of a YAML file. ValueError when it is absent or no mapping."""
    if not path.exists():
        raise ValueError(f"no settings file at {path}")
    return _parse(read_text(path), str(path))


def _parse(text: str, where: str) -> dict[str, Any]:
    content = parse_yaml(text, where)
    if not isinstance(content, dict):
        what = "an empty file" if content is None else f"a {type(content).__name__}"
        raise ValueError(f"{where} must be a mapping of settings, not {what}")
    return content


def assign(settings: dict[str, Any], key: str, value: Any) -> None:
    """settings["a"]["b"] = value for the key "a.b"; sections on the way are made."""
    *sections, last = ["sweep", key.removeprefix("sweep.")] if key.startswith("sweep.") else key.split(".")
    if not all(part.strip() for part in (*sections, last)):
        raise ValueError(f"cannot set {key!r}: the name of a setting, or a part of it, is empty")
    for section in sections:
        settings = settings.setdefault(section, {})
        if not isinstance(settings, dict):
            raise ValueError(f"cannot set {key}: {section} is a value, not a section")
    settings[last] = value


def complete(given: dict[str, Any]) -> dict[str, Any]:
    """`given` over the defaults, checked as far as that is possible without a model or data.

    Raises ValueError that names the setting, what is wrong and what would be right.
    """
    if unknown := [key for key in given if key not in DEFAULTS]:
        raise ValueError(f"unknown setting {unknown[0]!r}; the settings are {', '.join(DEFAULTS)}")
    settings = copy.deepcopy(DEFAULTS)
    for key, value in given.items():
        if key == "methods":
            settings[key] = methods_section(value)
        elif key == "lora":
            settings[key] |= _section(key, value)
        elif isinstance(DEFAULTS[key], dict):
            settings[key] = dict(_section(key, {"name": value} if isinstance(value, str) else value))
        else:
            settings[key] = plain(key, value)
    _check(settings)
    return settings


def _section(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"setting {key!r} must be a section, not {value!r}")
    return value


def methods_section(value: Any) -> dict[str, dict[str, Any]]:
    """From a name, a comma-separated text, a list of names, or a mapping name -> options."""
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",") if name.strip()]
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        if twice := next((name for name in value if value.count(name) > 1), None):
            raise ValueError(f"methods names {twice!r} twice: give one a label of its own (label: {{method: {twice}}})")
        value = dict.fromkeys(value)
    if not isinstance(value, dict) or not value:
        raise ValueError(f"methods must name at least one of {', '.join(sorted(METHODS))}")
    empty: dict[str, Any] = {}  # "slao:" without options
    return {
        str(name): dict(_section(f"methods.{name}", empty if given is None else given)) for name, given in value.items()
    }


def _check_types(settings: dict[str, Any]) -> None:
    """Every section by one rule: names that its owner knows, and values as the owner's annotations say."""
    for key, kind in _PLAIN.items():
        section, _, last = key.rpartition(".")
        place = settings[section] if section else settings
        if last in place:
            place[last] = typed(key, place[last], kind)
    stream, objective = settings["stream"].get("name"), settings["objective"].get("name", "auto")
    if stream not in STREAMS:
        raise ValueError(f"unknown stream {stream!r}; choose one of {', '.join(sorted(STREAMS))}")
    _check_section(settings, "stream", f"stream {stream!r}", parameters(STREAMS[stream]) | {"name": str})
    kinds = OBJECTIVES.values() if objective == "auto" else [check_objective(objective, {})]
    taken = {key: hint for kind in kinds for key, hint in parameters(kind).items()}  # of "auto": what any takes
    _check_section(settings, "objective", f"objective {objective!r}", taken | {"name": str})
    for key in ("template", "chat_template"):  # the text of a file, so that another one in it is another run
        if key in settings["objective"]:
            settings["objective"][key] = template_text(key, settings["objective"][key])
    for label, given in settings["methods"].items():
        name = typed(f"methods.{label}.method", given.get("method", label), str)
        own = {key: hint for key, hint in parameters(TrainConfig).items() if key in TRAINS}
        taken = parameters(check_method(name)) | {"method": str} | own
        _check_section(settings["methods"], label, f"method {name!r}", taken, "methods.")
    _check_section(settings, "train", "train", parameters(TrainConfig))
    if arguments := settings["train"].get("arguments"):
        trainer = settings["train"].get("trainer", "transformers")
        settings["train"]["arguments"] = check_arguments(arguments, trainer)
    if any(f"lora.{key}" not in _PLAIN for key in settings["lora"]):
        from peft import LoraConfig

        _check_section(settings, "lora", "lora", parameters(LoraConfig) | {"lora_alpha": float})


def _check_section(place: dict[str, Any], section: str, what: str, hints: dict[str, Any], where: str = "") -> None:
    named = {key: hint for key, hint in hints.items() if key not in _GIVEN}
    place[section] = options(what, f"{where}{section}", place[section], named)


def _check(settings: dict[str, Any]) -> None:
    from slao_kernels.dispatch import check_backend
    from slao_kernels.ops.lora_linear import PRECISIONS

    _check_types(settings)
    check_backend(settings["backend"])
    if settings["precision"] not in PRECISIONS:
        raise ValueError(f"unknown precision {settings['precision']!r}; choose one of {', '.join(PRECISIONS)}")
    if settings["dtype"] not in DTYPES:
        raise ValueError(f"unknown dtype {settings['dtype']!r}; choose one of {', '.join(DTYPES)}")
    if not settings["patch"] and (settings["backend"] != "auto" or settings["precision"] != "base"):
        raise ValueError("backend and precision choose the fused layers, which --no-patch turns off: drop one of them")
    if settings["train_rows"] is not None and settings["train_fraction"] is not None:
        raise ValueError("train_rows and train_fraction both limit the training rows: drop one of them")
    _check_numbers("seed", settings["seeds"])
    if settings["orders"] is not None:
        _check_numbers("order", settings["orders"])
        if not settings["shuffle_tasks"]:
            raise ValueError("orders choose task orders, which shuffle_tasks: false (--no-shuffle) forbids: drop one")
    _check_least(settings)
    _check_trains(settings)
    _section("sweep", settings["sweep"])  # what it names is checked variant by variant: sweep.py


def _check_trains(settings: dict[str, Any]) -> None:
    """How each method is trained, and that what is said of replay does something."""
    replays = False
    for label, given in settings["methods"].items():
        try:
            config = train_config(settings, label)
        except ValueError as error:
            raise ValueError(f"methods.{label}: {error}" if any(key in given for key in TRAINS) else error) from None
        joint = METHODS[given.get("method", label)].together
        if joint and (given.get("replay_rows") or given.get("replay_fraction")):
            raise ValueError(f"methods.{label}: replay would do nothing, since all tasks are trained at once")
        if given.get("replay_from") and config.replay is None:
            raise ValueError(f"methods.{label}.replay_from would do nothing without replay_rows")
        replays = replays or config.replay is not None
    if settings["train"].get("replay_from") and not replays:
        raise ValueError("train.replay_from would do nothing without replay_rows; give it, or leave both out")


def _check_numbers(what: str, numbers: list[int]) -> None:
    if not numbers or not all(0 <= number <= LARGEST_SEED for number in numbers):
        raise ValueError(f"{what}s must be whole numbers from 0 to {LARGEST_SEED}, such as 0,1; got {numbers!r:.100}")
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"{'an' if what == 'order' else 'a'} {what} stands twice in {numbers}")


def _check_least(settings: dict[str, Any]) -> None:
    given = {f"methods.{label}.learning_rate": own.get("learning_rate") for label, own in settings["methods"].items()}
    limits = _LEAST | dict.fromkeys(given, _LEAST["train.learning_rate"])
    given |= {f"{section}.{key}": value for section in ("train", "lora") for key, value in settings[section].items()}
    for key, (least, itself) in limits.items():
        value = given.get(key)
        if value is not None and (value < least or (value == least and not itself)):
            raise ValueError(f"{key} must be {'at least' if itself else 'above'} {least}, not {value}")
    if not 0 <= settings["lora"]["lora_dropout"] < 1:
        raise ValueError(f"lora.lora_dropout must lie in [0, 1), not {settings['lora']['lora_dropout']}")
    if settings["lora"].get("inference_mode"):
        raise ValueError("lora.inference_mode would freeze the adapter, so that nothing is trained; leave it out")


def train_config(settings: dict[str, Any], label: str | None = None) -> TrainConfig:
    """The `train` section as a TrainConfig; label: with what the method under that label has of its own."""
    given = {} if label is None else settings["methods"][label]
    return TrainConfig(**settings["train"] | {key: given[key] for key in TRAINS if key in given})
