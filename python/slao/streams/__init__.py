"""Streams: named sequences of tasks (texts, or images) to train on one after another.

`make_stream("python_docs")`, "digits" and "icd10cm" need no network; "jsonl" reads a folder; the others read one or
download.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

# The modules import the standard library only; what is heavy loads when a stream is built.
from slao.streams import clinc150, digits, icd10cm, jsonl, python_docs, standard_cl, superni, trace
from slao.streams.base import ImageRow, Row, Stream, Task
from slao.typed import known

__all__ = ["STREAMS", "ImageRow", "Row", "Stream", "Task", "make_stream"]

STREAMS: dict[str, Callable[..., Stream]] = {
    "python_docs": python_docs.python_docs,
    "clinc150": clinc150.clinc150,
    "icd10cm": icd10cm.icd10cm,
    "jsonl": jsonl.jsonl,
    "digits": digits.digits,
    "standard_cl": standard_cl.standard_cl,
    "long_sequence": standard_cl.long_sequence,
    "superni": superni.superni,
    "trace": trace.trace,
    "hub": standard_cl.standard_cl,  # its older name
}


def make_stream(name: str, **options: Any) -> Stream:
    """The stream `name` built with `options`, the keyword arguments of its builder (see `STREAMS`).

    ValueError: an unknown stream or option (the valid ones are listed), a required option that is missing, or
    whatever the builder finds wrong with its data.
    """
    if name not in STREAMS:
        raise ValueError(f"no stream {name!r}; the streams are {', '.join(sorted(STREAMS))}")
    builder = STREAMS[name]
    parameters = inspect.signature(builder).parameters
    known(f"stream {name!r}", options, parameters)
    for option, parameter in parameters.items():
        if parameter.default is parameter.empty and option not in options:
            raise ValueError(f"stream {name!r} needs the option {option!r}")
    return builder(**options)
