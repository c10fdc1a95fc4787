"""Outside values against annotations: the one check of everything that settings and config files say."""

from __future__ import annotations

import contextlib
import enum
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

_WORDS: dict[Any, str] = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "a section",
}
_LISTED = 24  # names; of more than these only similar ones help


def parameters(builder: Callable[..., Any]) -> dict[str, Any]:
    """Name -> annotation of what a function or class takes that plain values can say: no `self`, nothing whose only
    annotation is a function."""
    source = builder.__init__ if inspect.isclass(builder) and not is_dataclass(builder) else builder
    try:
        hints = typing.get_type_hints(source)
    except (NameError, TypeError):  # another library's annotations, which this Python cannot resolve
        hints = {}
    found = {
        name: hints.get(name, Any)
        for name, parameter in inspect.signature(builder).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    nothing = type(None)
    return {name: h for name, h in found.items() if any(_sayable(k) for k in _alternatives(h) if k is not nothing)}


def known(what: str, given: Iterable[Any], names: Iterable[str]) -> None:
    """ValueError for an option that is none of `names`; it lists them, or what is spelt alike."""
    names = list(names)
    for option in given:
        if option not in names:
            near = [] if len(names) <= _LISTED else get_close_matches(str(option), names, 5)
            lead = "similar ones are" if near else "its options are"
            raise ValueError(f"{what} has no option {option!r}; {lead} {', '.join(near or names) or 'none'}")


def options(what: str, where: str, given: Mapping[str, Any], hints: Mapping[str, Any]) -> dict[str, Any]:
    """`given` with each value as its hint says. `what` names the owner in messages, `where` the section."""
    known(what, given, hints)
    return {name: typed(f"{where}.{name}", value, hints[name]) for name, value in given.items()}


def typed(key: str, value: Any, hint: Any) -> Any:
    """`value` as the annotation `hint` says, or as one of its alternatives; else ValueError that names `key`.

    Where a number is expected, a text that is one ("1e-8", which YAML 1.1 reads as text) becomes it. NaN and
    infinities are no numbers.
    """
    kinds = _alternatives(hint)
    if isinstance(value, str) and float in kinds:
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, float) and not math.isfinite(value) and Any not in kinds:
        raise ValueError(f"{key} must be a finite number, not {value}")
    for kind in kinds:
        fitting, found = _fit(key, value, kind)
        if fitting:
            return found
    wanted = " or ".join(dict.fromkeys(_word(kind) for kind in kinds if kind is not type(None) and _sayable(kind)))
    raise ValueError(f"{key} must be {wanted}, not {value!r:.100}")


def plain(key: str, value: Any) -> Any:
    """A value of an open section, where nothing says what it must be: number-like texts in it stay, NaN is refused."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key} must be a finite number, not {value}")
    if isinstance(value, dict):
        return {name: plain(f"{key}.{name}", each) for name, each in value.items()}
    if isinstance(value, list):
        return [plain(f"{key}[{index}]", each) for index, each in enumerate(value)]
    return value


def _alternatives(hint: Any) -> list[Any]:
    """The members of a union, each reduced to what `_fit` knows."""
    origin = typing.get_origin(hint)
    if origin is typing.Union or origin is types.UnionType:
        return [kind for part in typing.get_args(hint) for kind in _alternatives(part)]
    if origin is typing.Literal:  # PEFT's are examples ("pissa_niter_[number of iters]"): their types count
        return list(dict.fromkeys(type(value) for value in typing.get_args(hint)))
    return [type(None) if hint is None else hint]


def _sayable(kind: Any) -> bool:
    """Whether plain values can be of this kind."""
    return (typing.get_origin(kind) or kind) is not Callable


def _word(kind: Any) -> str:
    kind = typing.get_origin(kind) or kind
    if kind in (Sequence, tuple):
        kind = list
    if kind is Path or (inspect.isclass(kind) and issubclass(kind, enum.Enum)):
        kind = str
    return _WORDS.get(kind, "a section")


def _fit(key: str, value: Any, kind: Any) -> tuple[bool, Any]:
    """Whether `value` is of the kind, and the value then."""
    inner, kind = typing.get_args(kind), typing.get_origin(kind) or kind
    if kind is Any:
        return True, plain(key, value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool), value
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if kind in (list, tuple, Sequence):
        if not isinstance(value, list):
            return False, value
        hint = inner[0] if inner else Any
        return True, [typed(f"{key}[{index}]", each, hint) for index, each in enumerate(value)]
    if kind in (bool, str, type(None)):
        return isinstance(value, kind), value
    if kind is Path or (inspect.isclass(kind) and issubclass(kind, enum.Enum)):
        return isinstance(value, str), value
    if not isinstance(value, dict) or not _sayable(kind):  # a mapping, or an object that is made of one
        return False, value
    hint = inner[1] if kind is dict and inner else Any
    return True, {name: typed(f"{key}.{name}", each, hint) for name, each in value.items()}
