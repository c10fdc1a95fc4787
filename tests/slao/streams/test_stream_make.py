"""`make_stream`: the table of streams, and errors that list what there is."""

import subprocess
import sys
from pathlib import Path

import pytest

from slao import streams
from slao.streams import STREAMS, make_stream


def test_the_streams():
    assert sorted(STREAMS) == [
        "clinc150",
        "digits",
        "hub",
        "icd10cm",
        "jsonl",
        "long_sequence",
        "python_docs",
        "standard_cl",
        "superni",
        "trace",
    ]


def test_an_unknown_stream_lists_the_valid_ones():
    with pytest.raises(ValueError, match="no stream 'nope'; the streams are clinc150, digits, hub, icd10cm, jsonl, "):
        make_stream("nope")


def test_an_unknown_option_lists_the_valid_ones():
    with pytest.raises(ValueError, match="stream 'python_docs' has no option 'task'; its options are tasks, "):
        make_stream("python_docs", task=4)


def test_a_required_option_is_named():
    with pytest.raises(ValueError, match="stream 'jsonl' needs the option 'path'"):
        make_stream("jsonl")


def test_the_import_is_light():
    # A bare parent package, so that only what the streams themselves import counts.
    code = (
        "import sys, types; parent = sys.modules['slao'] = types.ModuleType('slao'); parent.__path__ = [sys.argv[1]]; "
        "import slao.streams; "
        "heavy = ('torch', 'datasets', 'transformers', 'numpy', 'pydoc_data', 'simple_icd_10_cm'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    parent = str(Path(streams.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code, parent], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
