"""The commands of `slao` in their groups, and how one is called."""

from __future__ import annotations

import os
from importlib import metadata
from typing import Annotated

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
    command = typer.main.get_command(app)
    if "_SLAO_COMPLETE" in os.environ:  # a shell asks for completions: answered, and the process left
        command.main(arguments, prog_name="slao")
    try:
        with command.make_context("slao", arguments) as context:
            return int(command.invoke(context) or 0)
    except typer.Exit as done:
        return done.exit_code
    except typer.TyperException as error:
        where = getattr(error, "ctx", None)
        said = error.format_message().rstrip(".")
        raise ValueError(f"{said} (see {where.command_path if where else 'slao'} --help)") from None
