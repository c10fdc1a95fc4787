"""The `slao` command. Bad input ends with one line on standard error and exit code 2, before anything is written.

`main` turns arguments into an exit code; app.py has the commands, which training.py, adapters.py and machine.py
implement; output.py prints. Nothing here loads torch before a command needs it.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from .. import stopping
from ..failures import explain


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code (`slao --help` lists them): 128 and the signal's number where Ctrl-C or
    SIGTERM ended it."""
    try:
        with stopping.listening():
            return _command(argv)
    except stopping.Stopped as stop:
        print(f"slao: {stop}", file=sys.stderr)
        return stop.exit_code


def _command(argv: Sequence[str] | None) -> int:
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
    # A run reads local folders first; what it has to fetch it may fetch, but it should not phone home on its own.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        from .app import invoke
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        print(f'slao: {error.name} is not installed: pip install "slao_kernels[train]"', file=sys.stderr)
        return 2
    try:
        return invoke(sys.argv[1:] if argv is None else list(argv))
    except BrokenPipeError:  # who read the output has gone
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for what Python still flushes)
        return 1
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        print(
            "slao: " + "\n  ".join(" ".join(each.split()) for each in getattr(error, "lines", [line])), file=sys.stderr
        )
        return 2
