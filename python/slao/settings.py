"""The settings of `slao run`: a tree of plain values, from a preset or a YAML file, changed by flags, checked whole."""

from __future__ import annotations

import contextlib
import copy
import inspect
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any

from .methods import METHODS, check_method
from .objectives import OBJECTIVES, check_objective
from .streams import STREAMS
from .train import TrainConfig

# Everything that can be set, with its default. The one open section is `methods`: a name -> its options, which are
# those of the method, `method` (its kind, where the name is another) and `learning_rate` (else that of `train`).
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
    "dtype": "float32",
    "device": "auto",
    "train": {},
}
DTYPES = ("float32", "bfloat16", "float16")
# What a plain setting must be, in the words of an annotation.
_PLAIN = {
    "name": "str",
    "model": "str",
    "shuffle_tasks": "bool",
    "similarity": "bool",
    "train_rows": "int | None",
    "train_fraction": "float | None",
    "test_rows": "int | None",
    "lora.r": "int",
    "lora.lora_alpha": "float",
    "lora.lora_dropout": "float",
    "lora.target_modules": "str | list",
    "patch": "bool",
    "device": "str",
}
_KINDS = {"str": str, "bool": bool, "int": int, "float": int | float, "list": list, "dict": dict, "None": type(None)}
_WORDS = {
    "str": "a text",
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "list": "a list",
    "dict": "a section",
}


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
    if not path.is_file():
        raise ValueError(f"no settings file at {path}")
    return _parse(path.read_text(encoding="utf-8"), str(path))


def _parse(text: str, where: str) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where} must be a mapping of settings, not a {type(content).__name__}")
    return content


def assign(settings: dict[str, Any], key: str, value: Any) -> None:
    """settings["a"]["b"] = value for the key "a.b"; sections on the way are made."""
    *sections, last = key.split(".")
    for section in sections:
        settings = settings.setdefault(section, {})
        if not isinstance(settings, dict):
            raise ValueError(f"cannot set {key}: {section} is a value, not a section")
    settings[last] = value


def complete(given: dict[str, Any]) -> dict[str, Any]:
    """`given` over the defaults, checked as far as that is possible without a model or data.

    Raises ValueError that names the setting, what is wrong and what would be right.
    """
    unknown = sorted(set(given) - set(DEFAULTS))
    if unknown:
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
            settings[key] = value
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
    if isinstance(value, list):
        value = dict.fromkeys(value)
    if not isinstance(value, dict) or not value:
        raise ValueError(f"methods must name at least one of {', '.join(sorted(METHODS))}")
    return {str(name): dict(_section(f"methods.{name}", options or {})) for name, options in value.items()}


def _typed(key: str, value: Any, kind: str) -> Any:
    """`value` if it is of `kind`, the text of an annotation, or one of its alternatives."""
    kinds = [part.strip().partition("[")[0] for part in kind.split("|")]
    if "float" in kinds and isinstance(value, str):
        with contextlib.suppress(ValueError):  # YAML 1.1 reads "1e-3" as text
            value = float(value)
    for name in kinds:
        if isinstance(value, _KINDS[name]) and (name == "bool" or not isinstance(value, bool)):
            return value
    wanted = " or ".join(_WORDS[name] for name in kinds if name != "None")
    raise ValueError(f"{key} must be {wanted}, not {value!r}")


def _check_types(settings: dict[str, Any]) -> None:
    for key, kind in _PLAIN.items():
        section, _, last = key.rpartition(".")
        place = settings[section] if section else settings
        place[last] = _typed(key, place[last], kind)
    for field in fields(TrainConfig):
        if field.name in settings["train"]:
            settings["train"][field.name] = _typed(
                f"train.{field.name}", settings["train"][field.name], str(field.type)
            )
    options = settings["objective"]
    for objective in OBJECTIVES.values():
        for name, parameter in inspect.signature(objective).parameters.items():
            if name in options and parameter.kind is parameter.KEYWORD_ONLY:
                options[name] = _typed(f"objective.{name}", options[name], str(parameter.annotation))


def _check(settings: dict[str, Any]) -> None:
    from slao_kernels.dispatch import check_backend
    from slao_kernels.ops.lora_linear import PRECISIONS

    _check_types(settings)
    for label, options in settings["methods"].items():
        check_method(options.get("method", label))
        if "learning_rate" in options:
            options["learning_rate"] = _typed(f"methods.{label}.learning_rate", options["learning_rate"], "float")
    stream = settings["stream"].get("name")
    if stream not in STREAMS:
        raise ValueError(f"unknown stream {stream!r}; choose one of {', '.join(sorted(STREAMS))}")
    name = settings["objective"].get("name", "auto")
    if name != "auto":
        check_objective(name, {key: value for key, value in settings["objective"].items() if key != "name"})
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
    train_config(settings)
    _section("sweep", settings["sweep"])  # what it names is checked variant by variant: sweep.py


def _check_numbers(what: str, numbers: Any) -> None:
    if not isinstance(numbers, list) or not numbers or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError(f"{what}s must be whole numbers from 0, such as 0,1; got {numbers!r}")
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"{'an' if what == 'order' else 'a'} {what} stands twice in {numbers}")


def train_config(settings: dict[str, Any]) -> TrainConfig:
    """The `train` section as a TrainConfig. ValueError for unknown fields."""
    section = dict(settings["train"])
    known = [field.name for field in fields(TrainConfig)]
    unknown = sorted(set(section) - set(known))
    if unknown:
        raise ValueError(f"unknown setting 'train.{unknown[0]}'; train has {', '.join(known)}")
    return TrainConfig(**section)
