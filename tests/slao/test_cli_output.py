"""How the commands of `slao` print: documents of JSON, plain lines into a pipe, tables and help that fit a terminal."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import typer

import slao
from slao.cli import main, output
from slao.cli.app import app
from slao.report import table

COMMANDS = ("run", "report", "interference", "merge", "fold", "compress", "extract", "doctor")


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """A process of its own, with a pipe for an output."""
    given = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    return subprocess.run([sys.executable, *arguments], env=given, capture_output=True, text=True, timeout=300)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def on_terminal(monkeypatch) -> Callable[[Callable[[], object]], str]:
    """What a call prints where standard output is a terminal of 80 columns that has colours."""

    def run(call: Callable[[], object], **environment: str) -> str:
        with monkeypatch.context() as change:
            for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
                change.delenv(name, raising=False)
            for name, value in {"TERM": "xterm-256color", "COLUMNS": "80", **environment}.items():
                change.setenv(name, value)
            shown = Terminal()
            change.setattr(sys, "stdout", shown)
            call()
        return shown.getvalue()

    return run


def bare(shown: str) -> str:
    """Without its colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", shown)


def lines_of(shown: str) -> list[str]:
    """None is wider than the terminal."""
    lines = bare(shown).splitlines()
    assert max(map(len, lines)) <= 80, max(lines, key=len)
    return lines


def document(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What a command with --json has on standard output: JSON alone, in which no number is NaN."""
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    return found


# The document


@pytest.fixture(scope="module")
def arguments(saved_bert, stream_folder, tmp_path_factory) -> list[str]:
    runs = tmp_path_factory.mktemp("runs")
    source = ["--model", str(saved_bert), "--stream", "jsonl", "--stream-path", str(stream_folder), "--no-shuffle"]
    small = ["--rank", "2", "--set", "train.max_steps=1", "--methods", "seqlora,slao", "--seeds", "0"]
    return ["run", *source, *small, "--runs", str(runs), "--name", "x"]


def test_a_run_and_its_report_as_documents(arguments, capsys):
    folder = Path(arguments[arguments.index("--runs") + 1]) / "x"
    dry = document([*arguments, "--dry-run"], capsys)
    assert not folder.exists()
    assert dry.keys() == {"folder", "settings", "trainings", "notes", "about"}
    assert (dry["folder"], dry["trainings"]) == (str(folder), ["seqlora seed 0", "slao seed 0"])
    assert dry["settings"]["train"] == {"max_steps": 1}
    assert any(line.startswith("rows      trained + scored (test): first 8 + 6") for line in dry["about"])
    found = document(arguments, capsys)
    assert found.keys() == {"folder", "results", "adapters", "report", "methods", "unfinished", "failed"}
    assert (found["folder"], found["unfinished"], found["failed"]) == (str(folder), {}, {})
    assert Path(found["report"]).read_text().lower().startswith("<!doctype html>")
    content = json.loads(Path(found["results"]).read_text())["methods"]
    assert list(found["methods"]) == ["seqlora", "slao"]
    for name, method in found["methods"].items():
        assert method["runs"] == ["0"]
        for key in ("AA", "BWT", "forgetting", "tokens_per_second", "train_seconds", "peak_memory_mb"):
            assert method[key] == content[name][key], key
        matrix = content[name]["matrix"][0]
        assert method["AA"] == [pytest.approx(sum(matrix[1]) / 2)]
        assert method["inc_acc"] == [pytest.approx((matrix[0][0] + sum(matrix[1]) / 2) / 2)]
        assert method["MOPD"] == []
        assert method["CE_rise"] == [None]
        assert method["state_mb"] == [[content[name]["state_mb"][0][0], content[name]["state_mb"][0][-1]]]
    again = document(["report", str(folder)], capsys)
    assert again == {key: value for key, value in found.items() if key not in ("folder", "adapters")} | {
        "results": [found["results"]]
    }
    assert main(["report", str(folder), "--json", "--markdown"]) == 2
    assert "--markdown and --json exclude each other" in capsys.readouterr().err


def test_what_goes_wrong_leaves_standard_output_empty(capsys):
    for wrong in (["run", "--preset", "no"], ["report", "/no/such"], ["merge", "/no/such", "-o", "x"]):
        assert main([*wrong, "--json"]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("slao: ")


# The help


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)], ids=" ".join)
def test_every_help_fits_80_columns_and_is_plain_in_a_pipe(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*command, "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 80
    if not command:
        groups = re.findall(r"─ ([A-Z][\w ]+) ─", out)
        assert groups == ["Options", "Train", "Adapters on disk", "This machine"]
        assert [name for name in COMMANDS if re.search(rf"^│ {name} ", out, re.M)] == list(COMMANDS)
        assert re.findall(r"^   (\d[\d, ]*?)  ", out, re.M) == ["0", "1", "2", "130, 143"]
        assert "--install-completion" in out
    else:
        assert "--json" in out
        assert "Examples:" in out
        # Every example is a command that its parser takes.
        parser = typer.main.get_command(app).commands[command[0]]
        examples = re.findall(r"^ slao (\S+) ?(.*?)(?: \| .*)?$", out[out.index("Examples:") :], re.M)
        assert examples
        for name, rest in examples:
            assert name == command[0]
            parser.make_context(name, shlex.split(rest))


def test_no_line_of_a_help_text_is_broken_by_the_width(capsys, monkeypatch):
    """Paragraphs after the first keep their line breaks: each line has to fit 78 columns as it stands."""
    monkeypatch.setenv("COLUMNS", "200")
    for command in ((), *((name,) for name in COMMANDS)):
        assert main([*command, "--help"]) == 0
        text = [line.rstrip() for line in capsys.readouterr().out.splitlines() if not line.startswith(("│", "╭", "╰"))]
        first = next(index for index, line in enumerate(text) if "Usage:" in line) + 2  # this one is reflowed
        assert max(map(len, text[first + 1 :])) <= 79, command


def test_colours_only_on_a_terminal_and_without_no_color(on_terminal):
    coloured = re.compile(r"\x1b\[(\d+;)*3[0-7][;m]")  # a foreground
    assert coloured.search(on_terminal(lambda: main(["run", "--help"])))
    without = on_terminal(lambda: main(["run", "--help"]), NO_COLOR="1")
    assert "--methods" in bare(without)
    assert not coloured.search(without)


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"slao {metadata.version('slao_kernels')}\n"


LAZY = """
import sys
from slao.cli import main
code = main(["--help"])
print([name for name in ("torch", "numpy", "peft", "yaml") if name in sys.modules], code, file=sys.stderr)
"""


def test_the_help_loads_no_torch():
    done = python("-c", LAZY)
    assert done.stderr == "[] 0\n"


def test_every_name_of_the_package_is_found_when_it_is_asked_for():
    assert {name for name in slao.__all__ if getattr(slao, name).__name__ != name} == set()
    assert set(slao.__all__) <= set(dir(slao))
    with pytest.raises(AttributeError, match="module 'slao' has no attribute 'SLA0'"):
        slao.SLA0  # noqa: B018


def test_where_typer_is_missing_one_line_says_what_to_install(tmp_path):
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError('No module named typer', name='typer')")
    done = python("-m", "slao.cli", "doctor", PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == 'slao: typer is not installed: pip install "slao_kernels[train]"\n'


def test_a_shell_gets_completions():
    done = python("-m", "slao.cli", _SLAO_COMPLETE="complete_bash", COMP_WORDS="slao comp", COMP_CWORD="1")
    assert (done.returncode, done.stdout.split()) == (0, ["compress"])
    done = python("-m", "slao.cli", _SLAO_COMPLETE="complete_bash", COMP_WORDS="slao run --tr", COMP_CWORD="2")
    assert done.stdout.split() == ["--train-candidates", "--train-rows", "--train-fraction"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "slao: Missing command (see slao --help)"),
        (["train"], "slao: No such command 'train' (see slao --help)"),
        (["merge", "a"], "slao: Missing option '--out' / '-o' (see slao merge --help)"),
        (["compress", "a", "b", "-o", "c"], "slao: Got unexpected extra argument(s) (b) (see slao compress --help)"),
        (["compress", "a", "-o", "c", "--rank", "x"], "slao: --rank takes a whole number; got 'x'"),
    ],
)
def test_arguments_that_a_command_does_not_take(arguments, line, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(line), err
    assert err.count("\n") == 1


# Tables


def test_a_wide_table_is_cut_into_blocks(on_terminal):
    header = ["name", *(f"column {index}" for index in range(12))]
    rows = [[f"row {index}" * 9, *(f"{index}.{column:07}" for column in range(12))] for index in range(2)]
    shown = on_terminal(lambda: output.print_table(output.terminal(), header, rows))
    lines = lines_of(shown)
    assert "\x1b[1m" in shown  # the header is bold
    assert sum(line.startswith("name") for line in lines) > 1
    words = " ".join(lines).split()
    for _, *cells in rows:
        assert [words.count(cell) for cell in cells] == [1] * 12
    assert [words.count(str(index)) for index in range(2, 12)] == [1] * 10  # "column 2", ...
    folded = "".join(line.split("  ")[0] for line in lines if line.startswith(("row 0", "0row", "w 0", "row")))
    assert folded.count("row") > 9  # a name that is too long goes on below


def test_results_on_a_terminal(arguments, on_terminal, capsys):
    """The cells of the table that a pipe gets, at most 80 columns wide."""
    folder = Path(arguments[arguments.index("--runs") + 1]) / "x"
    shown = on_terminal(lambda: main([*arguments, *(["--resume"] if folder.exists() else [])]))
    lines = bare(shown).splitlines()
    lines = lines[next(i for i, line in enumerate(lines) if line.startswith("method ")) :]
    assert lines[-1].startswith("report: ")
    assert lines[-2] == f"adapters: {folder / 'adapters'}"
    end = next(i for i, line in enumerate(lines) if line.startswith("slao ends at "))  # the finding, after the table
    lines = lines[:end]
    assert max(map(len, lines)) <= 80
    content = json.loads((folder / "results.json").read_text())
    plain = [re.split(r"  +", line) for line in table(content).splitlines()[2:]]
    cells = {cell for line in lines for cell in re.split(r"  +", line.strip()) if cell}
    assert cells == {cell for line in (plain[0], *plain[2:]) for cell in line}


def test_every_option_that_is_a_setting_is_taken_as_one():
    """On every Python: annotations are read without get_type_hints, which before 3.11 wraps a default of None."""
    import inspect

    from slao.cli import training

    options = {name: "1" for name, each in inspect.signature(training.run).parameters.items() if each.default is None}
    given = training._given(options)
    assert given.keys() >= {"model", "stream.name", "stream.path", "methods", "lora.r", "train.learning_rate", "dtype"}
    assert len(given) >= 18


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--preset", "demo", "--name", "--resume"], "--name needs a value, and --resume follows it"),
        (["merge", "a", "b", "-o", "--json"], "-o needs a value, and --json follows it"),
        (["merge", "a", "b", "-o", "c", "--rank", "x"], "--rank takes a whole number; got 'x'"),
        (["merge", "a", "b", "-o", "c", "--density=half"], "--density takes a number; got 'half'"),
    ],
)
def test_values_that_are_missing_or_no_numbers(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"slao: {said}")
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_is_no_terminal_whatever_force_color_says(monkeypatch):
    from slao.cli import output

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert output.terminal() is None


def test_names_that_were_always_there_still_are():
    code = "import slao; print(slao.methods.METHODS['slao'].__name__, slao.schedules.make_schedule('inverse').__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == "SLAO"
