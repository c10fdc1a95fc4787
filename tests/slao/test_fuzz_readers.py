"""Readers of outside data on whatever hypothesis can think of: what they take is right, all else is a ValueError that
says something. SLAO_FUZZ=1000 makes a thousand examples a test (`make fuzz`); 200 are the default."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import save

from slao import settings as run_settings
from slao import sums
from slao.folders import read_adapter
from slao.interference import compare
from slao.merging import merge_adapters
from slao.merging.fold.base import Base
from slao.merging.weights import INDEX, SINGLE
from slao.reading import parse_json, parse_yaml
from slao.streams.jsonl import jsonl
from slao.sweep import jobs, variants

EXAMPLES = int(os.environ.get("SLAO_FUZZ", "200"))
fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="SLAO_FUZZ" not in os.environ,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)

TEXTS = st.text(st.characters(codec=None, exclude_categories=()), max_size=12) | st.sampled_from(
    ["", " ", "a", "\ud83d", "\0", "é", "1e-8", "nan", ".inf", "null", "../x", "/etc/passwd", "\u2028", "x" * 300]
)
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, -1, 1, 10**30, 2**64, float("nan"), float("inf"), -0.0])
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXTS, v, max_size=3), max_leaves=6)


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """A ValueError with a text may end the block; anything else is a fault."""
    try:
        yield
    except ValueError as error:
        if not str(error).strip():  # the command makes one line of whatever there is
            raise AssertionError(f"no line: {error!r}") from error


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def damaged(draw: Any, data: bytes) -> bytes:
    """`data` cut, with a byte changed, or with something put in."""
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(data)))
        how = draw(st.sampled_from(["cut", "change", "insert"]))
        more = draw(st.binary(min_size=1, max_size=9))
        data = {"cut": data[:place], "change": data[:place] + more + data[place + len(more) :]}.get(
            how, data[:place] + more + data[place:]
        )
    return data


# Rows.

KEYS = st.sampled_from(["text", "label", "prompt", "answer", "input", "output", "sentence"]) | TEXTS
ROWS = st.dictionaries(KEYS, TEXTS | VALUES, max_size=4) | VALUES
USUAL = st.fixed_dictionaries({"text": TEXTS, "label": st.sampled_from("ab")})


@st.composite
def files(draw: Any) -> dict[str, bytes]:
    """Some of a task's files; most of them as they should be."""
    found = {}
    for name in ("train.jsonl", "test.jsonl", "dev.jsonl", "train.json", "test.json", "labels.json", "instruction.txt"):
        if draw(st.booleans()) or name in ("train.jsonl", "test.jsonl"):
            rows = draw(st.lists(USUAL | ROWS if draw(st.booleans()) else USUAL, min_size=1, max_size=3))
            whole = {"Instances": rows, "Definition": draw(VALUES)} if draw(st.booleans()) else rows
            lines = "\n".join(map(json.dumps, rows))
            text = lines if name.endswith("l") else json.dumps(draw(VALUES) if name == "labels.json" else whole)
            found[name] = damaged(draw, text.encode("utf-8", "surrogatepass"))
    return found


@given(files(), st.floats(0, 0.9))
@fuzzed
def test_rows(content, fraction):
    with folder() as root:
        (root / "task").mkdir()
        for name, data in content.items():
            (root / "task" / name).write_bytes(data)
        with one_line():
            stream = jsonl(root, validation_fraction=fraction)
            for task in stream.tasks:
                for row in (*task.train, *task.validation, *task.test):
                    for text in (row.prompt, row.answer, *row.references):
                        text.encode()
                assert not task.labels or all(label.strip() for label in task.labels)


# Settings.

KNOWN = [
    *run_settings.DEFAULTS, "train.arguments", "train.max_steps", "train.arguments.adam_epsilon", "methods.slao",
    "methods.slao.schedule", "methods.ewc.weight", "stream.path", "objective.max_length", "objective.temperature",
    "lora.rank_pattern", "lora.modules_to_save", "sweep.train.learning_rate", "train.learning_rate", "stream.order",
]  # fmt: skip


@given(st.dictionaries(st.sampled_from(KNOWN) | TEXTS, VALUES, max_size=4))
@fuzzed
def test_settings(content):
    given_settings: dict[str, Any] = {}
    with one_line():
        for key, value in content.items():
            run_settings.assign(given_settings, key, value)
        found = run_settings.complete(given_settings)
        assert json.loads(json.dumps(found, allow_nan=False)) is not None
        assert run_settings.complete(found) == found, "checked twice it is another"
        run_settings.train_config(found)
        variants(found)
        list(jobs(found))


@given(st.dictionaries(TEXTS, VALUES, max_size=3))
@fuzzed
def test_yaml_that_was_written_is_read(content):
    """What another YAML library wrote is what we read, where keys are texts."""
    with one_line():
        text = yaml.safe_dump(content, allow_unicode=True)
        found = parse_yaml(text, "x.yaml")
        assert repr(found) == repr(yaml.safe_load(text))


MARKS = [*"abc:-[]{},&*!|>'\"#%@? \n\t0123~.<=", "<<: *a", "&a ", "*a", "!!set ", "!!binary ", "\n  ", "---\n", "a: "]
YAML = st.lists(st.sampled_from(MARKS), max_size=25).map("".join)


@given(YAML | TEXTS)
@fuzzed
def test_yaml_and_json_texts(text):
    for parse in (parse_yaml, parse_json):
        with one_line():
            json.dumps(parse(text, "x"))


# Adapters.

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "base_model_name_or_path": "x"}
FIELDS = st.sampled_from([*CONFIG, *LoraConfig.__dataclass_fields__, "peft_version"])
PATTERNS = st.dictionaries(TEXTS | st.sampled_from(["(", "q", ".*", "[", "q|v"]), NUMBERS | TEXTS, max_size=2)


def tensors(rank: int = 2) -> dict[str, torch.Tensor]:
    prefix = "base_model.model.layer.q.lora_"
    return {f"{prefix}A.weight": torch.ones(rank, 3), f"{prefix}B.weight": torch.ones(4, rank)}


def written(root: Path, name: str, config: bytes, weights: bytes) -> Path:
    (root / name).mkdir()
    (root / name / "adapter_config.json").write_bytes(config)
    (root / name / "adapter_model.safetensors").write_bytes(weights)
    return root / name


def used(root: Path, config: bytes, weights: bytes) -> None:
    """Everything that reads an adapter, on it and a good one."""
    good = written(root, "good", json.dumps(CONFIG).encode(), save(tensors()))
    other = written(root, "other", config, weights)
    with one_line():
        for A, B, scaling in read_adapter(other).values():
            assert torch.isfinite(A).all()
            assert torch.isfinite(B).all()
            assert scaling == scaling
    with one_line():
        compare([good, other])
    for method in ("slao", "svd"):
        with one_line():
            merge_adapters([good, other], root / f"out_{method}", method)
    made = sorted(path.name for path in root.iterdir())
    assert made in (
        ["good", "other"],
        ["good", "other", "out_svd"],
        ["good", "other", "out_slao", "out_svd"],
        ["good", "other", "out_slao"],
    )


@st.composite
def configs(draw: Any) -> bytes:
    changes = draw(st.dictionaries(FIELDS, VALUES | PATTERNS, max_size=2))
    return damaged(draw, json.dumps({**CONFIG, **changes}).encode())


@given(configs())
@fuzzed
def test_adapter_configs(config):
    with folder() as root:
        used(root, config, save(tensors()))


@st.composite
def headers(draw: Any) -> bytes:
    """A safetensors file with a changed header, or damaged anywhere."""
    data = save(tensors())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(sorted(header)) | TEXTS)
        field = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        value = draw(
            VALUES
            | st.lists(st.integers(0, 2**63), max_size=3)
            | st.sampled_from(["F64", "F16", "BF16", "I8", "F8_E4M3", "BOOL", "C64"])
        )
        if isinstance(header.get(name), dict) and draw(st.booleans()):
            header[name] = {**header[name], field: value}
        elif draw(st.booleans()):
            header[name] = value
        else:
            header.pop(name, None)
    text = json.dumps(header).encode()
    return damaged(draw, len(text).to_bytes(8, "little") + text + data[8 + length :])


@given(headers())
@fuzzed
def test_safetensors_headers(weights):
    with folder() as root:
        used(root, json.dumps(CONFIG).encode(), weights)


@given(headers(), st.none() | VALUES | st.dictionaries(TEXTS, st.just("part.safetensors") | VALUES, max_size=3))
@fuzzed
def test_a_bases_headers_and_index(weights, places):
    """What is read of a tensor has the shape that its header says, and nothing is read but of the folder's files."""
    with folder() as root:
        (root / "config.json").write_text("{}")
        (root / (SINGLE if places is None else "part.safetensors")).write_bytes(weights)
        if places is not None:
            (root / INDEX).write_text(json.dumps({"weight_map": places}))
        with one_line():
            base = Base(root)
            for stored in base.tensors.values():
                assert base.read(stored.key).shape == stored.shape
                assert sum(map(len, base.blocks(stored.key))) == stored.size


@given(st.lists(st.tuples(st.text("0123456789abcdef", min_size=60, max_size=66), TEXTS), max_size=3), st.data())
@fuzzed
def test_lists_of_checksums(entries, data):
    """A SHA256SUMS of any content: the adapter beside it is refused or read, and no other file is looked at."""
    with folder() as root:
        good = written(root, "a", json.dumps(CONFIG).encode(), save(tensors()))
        sums.write_sums(good)
        text = (good / sums.SUMS).read_bytes()
        more = "".join(f"{digest}  {name}\n" for digest, name in entries).encode("utf-8", "surrogatepass")
        (good / sums.SUMS).write_bytes(damaged(data.draw, text) + more)
        with one_line():
            read_adapter(good)
        assert sums.is_whole(good) in (True, False)


@pytest.mark.parametrize("nest", ["[", '{"a":', '[{"a":'])
def test_deep_nests(nest):
    for parse in (parse_json, parse_yaml):
        with pytest.raises(ValueError):
            parse(nest * 50_000, "x")
