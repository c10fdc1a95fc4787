"""The commands of `slao` in their groups, and how one is called."""

from __future__ import annotations

import os
from importlib import metadata
from itertools import pairwise, takewhile, zip_longest
from typing import Annotated, Any

import typer

from . import adapters, machine, training

app = typer.Typer(
    name="slao",
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
for group, examples, command in (
    ("Train", training.RUN, training.run),
    ("Train", training.REPORT, training.report),
    ("Adapters on disk", adapters.INTERFERENCE, adapters.interference),
    ("Adapters on disk", adapters.MERGE, adapters.merge),
    ("Adapters on disk", adapters.FOLD, adapters.fold),
    ("Adapters on disk", adapters.COMPRESS, adapters.compress),
    ("Adapters on disk", adapters.EXTRACT, adapters.extract),
    ("This machine", machine.DOCTOR, machine.doctor),
):
    app.command(rich_help_panel=group, epilog=f"Examples:\n{examples.rstrip()}")(command)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"slao {metadata.version('slao_kernels')}")
        raise typer.Exit


@app.callback(
    epilog="""Exit codes:
  0         all is well
  1         the work failed: a training diverged, a folded model does not
            answer as its parts do, a kernel is wrong, a pipe was closed
  2         bad input, no room on the disk or in memory, a package that is
            missing: one line on standard error says what to do
  130, 143  stopped by Ctrl-C, by SIGTERM

--json prints one document on standard output when the work is done; with
exit code 2 there is none."""
)
def top(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Continual learning with one LoRA: train methods over tasks, merge adapters, check the kernels."""


def invoke(arguments: list[str]) -> int:
    """Run the command that the arguments name; its exit code. ValueError of one line for arguments that it does not
    take. Not through typer's own main, which makes Ctrl-C, errors and exit codes its own."""
    command: Any = typer.main.get_command(app)
    if "_SLAO_COMPLETE" in os.environ:  # a shell asks for completions: answered, and the process left
        command.main(arguments, prog_name="slao")
    _refuse_swallowed(command.commands.get(next(iter(arguments), "")), arguments)
    try:
        with command.make_context("slao", arguments) as context:
            return int(command.invoke(context) or 0)
    except typer.Exit as done:
        return done.exit_code
    except typer.TyperException as error:
        where = getattr(error, "ctx", None)
        said = error.format_message().rstrip(".")
        for option in getattr(getattr(error, "param", None), "opts", ()):
            if "unable to parse" in said and (value := _value(arguments, option)) is not None:
                said = f"{option} takes a {'whole ' if 'integer' in said else ''}number; got {value!r}"
        raise ValueError(f"{said} (see {where.command_path if where else 'slao'} --help)") from None


def _refuse_swallowed(command: Any, arguments: list[str]) -> None:
    """ValueError where an option's value is missing and the next option would be taken for it."""
    options = [parameter for parameter in getattr(command, "params", ()) if hasattr(parameter, "is_flag")]
    names = {name for option in options for name in option.opts}
    valued = {name for option in options if not option.is_flag for name in option.opts}
    for word, following in pairwise(takewhile(lambda word: word != "--", arguments)):
        if word in valued and following in names:
            raise ValueError(f"{word} needs a value, and {following} follows it (see slao {command.name} --help)")


def _value(arguments: list[str], option: str) -> str | None:
    """What is given for an option, as in `--rank x` or `--rank=x`."""
    for word, following in zip_longest(arguments, arguments[1:]):
        if word == option:
            return following
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return None
