"""`slao merge` on folders: what it writes loads in PEFT and does what PEFT's own merge, or the formula, does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import slao.folders
from slao import sums
from slao.cli import main
from slao.export import save_adapter
from slao.folders import read_adapter
from slao.merging import METHODS, factors, merge_adapters
from slao.merging.output import whole_folder
from slao.methods import SLAO

MODULES = ["query", "value", "word_embeddings"]
WEIGHTS = [0.5, -0.3, 0.8]


def make(tiny, folder: Path, seed: int, **options) -> Path:
    model = tiny.adapted("bert", fused=False, **{"target_modules": MODULES, **options})
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=g))
    model.config._name_or_path = "tiny/bert"
    save_adapter(model, folder)
    return folder


@pytest.fixture(scope="module")
def three(tiny, tmp_path_factory) -> list[Path]:
    parent = tmp_path_factory.mktemp("adapters")
    return [make(tiny, parent / name, seed) for seed, name in enumerate("abc")]


def outputs(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(12).view(2, 6) % 30).last_hidden_state


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    return {name: s * B.double() @ A.double() for name, (A, B, s) in read_adapter(folder).items()}


def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected)


@pytest.mark.parametrize("method", METHODS)
def test_the_command_writes_what_peft_loads(method, tiny, three, tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    assert main(["merge", *map(str, three), "-o", str(out), "--method", method]) == 0
    printed, err = capsys.readouterr()
    assert err == ""
    assert printed.startswith(f"{out}: {method} of 5 layers, rank 4")
    assert sorted(path.name for path in out.iterdir()) == [
        "SHA256SUMS",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert sums.is_whole(out)
    assert [path.name for path in out.parent.iterdir()] == ["out"], "something was left beside it"
    before = outputs(tiny.bert())
    model = PeftModel.from_pretrained(tiny.bert(), out)
    changed = outputs(model)
    assert (changed - before).norm() / before.norm() > 0.01
    # And PEFT's layers compute what the folder says.
    for name, delta in deltas(out).items():
        layer = model.base_model.model.get_submodule(name)
        its = layer.get_delta_weight("default").double()
        its = its.T if "embeddings" in name else its
        assert (its - delta).norm() / delta.norm() <= 1e-6


@pytest.mark.parametrize("method", ["linear", "svd", "ties", "dare_ties"])
def test_the_same_as_pefts_own_merge(method, tiny, three, tmp_path):
    """To the rounding of fp32: sums of three in one order or another, an SVD in fp32 in PEFT."""
    density = {"density": 0.6} if "ties" in method else {}
    merge_adapters(three, tmp_path / "out", method, weights=WEIGHTS, **density)
    model = PeftModel.from_pretrained(tiny.bert(), three[0], adapter_name="a")
    for folder in three[1:]:
        model.load_adapter(folder, adapter_name=folder.name)
    names = ["a", "b", "c"]
    if method != "dare_ties":
        model.add_weighted_adapter(names, WEIGHTS, "merged", method, **density)
    expected = {}
    for name in read_adapter(three[0]):
        layer = model.base_model.model.get_submodule(name)
        if method == "dare_ties":  # a layer at a time: PEFT draws for all layers from one stream
            torch.manual_seed(factors.layer_seed(0, name))
            draw = model.base_model._generalized_task_arithmetic_weighted_adapter
            expected[name] = draw(method, names, WEIGHTS, layer, density["density"], "total")
        elif "embeddings" in name:
            expected[name] = layer.lora_embedding_A["merged"].detach(), layer.lora_embedding_B["merged"].detach()
        else:
            expected[name] = layer.lora_A["merged"].weight.detach(), layer.lora_B["merged"].weight.detach()
    read = read_adapter(tmp_path / "out")
    for name, (A, B) in expected.items():
        found = read[name]
        assert found[2] == 1
        if method == "svd":  # its factors are unique up to signs
            assert (found[1] @ found[0] - B @ A).norm() / (B @ A).norm() <= 1e-5
        else:
            assert (found[0] - A).norm() / A.norm() <= 1e-6
            assert (found[1] - B).norm() / B.norm() <= 1e-6


@pytest.mark.parametrize("schedule", ["inv_sqrt", "adaptive"])
def test_slao_is_bitwise_what_training_merges(schedule, tiny, tmp_path):
    model = tiny.adapted("bert", target_modules=MODULES[:2])
    method = SLAO(model, schedule=schedule)
    folders = []
    for task in range(3):
        method.begin_task(f"task {task}")
        with torch.no_grad():
            for pair in method.pairs:
                pair.A.add_(torch.randn_like(pair.A))
                pair.B.add_(torch.randn_like(pair.B))
        folders.append(tmp_path / f"task {task}")
        save_adapter(model, folders[-1])
        method.end_task()
    method.save_pretrained(tmp_path / "trained")
    flags = ["-o", str(tmp_path / "merged"), "--lambda-schedule", schedule]
    assert main(["merge", *map(str, folders), *flags]) == 0
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("merged", "trained"))
    assert tiny.differing(found, expected) == []
    assert read_adapter(tmp_path / "merged").keys() == read_adapter(tmp_path / "trained").keys()
    assert all(s == 2.0 for _, _, s in read_adapter(tmp_path / "merged").values())
    merge_adapters(folders, tmp_path / "last", schedule=1.0)
    last = load_file(folders[-1] / "adapter_model.safetensors")
    assert tiny.differing(load_file(tmp_path / "last" / "adapter_model.safetensors"), last) == []


def test_opcm_has_the_mean_norm_of_its_tasks(three, tmp_path):
    merge_adapters(three, tmp_path / "out", "opcm", rank=12)
    whole = lambda folder: torch.stack([d.norm() for d in deltas(folder).values()]).norm()  # noqa: E731
    mean = torch.stack([whole(folder) for folder in three]).mean()
    assert float(whole(tmp_path / "out") / mean) == pytest.approx(1, abs=1e-6)


def test_ranks_alphas_and_rslora_that_differ(tiny, tmp_path):
    folders = [
        make(tiny, tmp_path / "a", 0, r=2, lora_alpha=3),
        make(tiny, tmp_path / "b", 1, r=5, use_rslora=True),
        make(tiny, tmp_path / "c", 2, rank_pattern={"layer.1.*query": 7}, alpha_pattern={"value": 5}),
    ]
    merged = merge_adapters(folders, tmp_path / "out", "svd", weights=[1, 1, 1])
    assert sorted(set(merged.ranks.values())) == [5, 7]
    sums = [sum(parts) for parts in zip(*(deltas(folder).values() for folder in folders), strict=True)]
    best = {}
    for (name, r), total in zip(merged.ranks.items(), sums, strict=True):
        U, S, Vh = torch.linalg.svd(total, full_matrices=False)
        best[name] = (U[:, :r] * S[:r]) @ Vh[:r]
    assert worst(deltas(tmp_path / "out"), best) <= 1e-6
    lost = sum(float((t - b).square().sum()) for t, b in zip(sums, best.values(), strict=True))
    assert merged.lost == pytest.approx((lost / sum(float(t.square().sum()) for t in sums)) ** 0.5, rel=1e-5)
    model = PeftModel.from_pretrained(tiny.bert(), tmp_path / "out")  # rank_pattern: load_state_dict is strict on sizes
    for name, r in merged.ranks.items():
        layer = model.base_model.model.get_submodule(name)
        assert (layer.r["default"], layer.scaling["default"]) == (r, 1)


def test_bf16_stays_bf16(three, tmp_path):
    folders = []
    for folder in three:
        folders.append(tmp_path / folder.name)
        shutil.copytree(folder, folders[-1])
        path = folders[-1] / "adapter_model.safetensors"
        save_file({key: value.bfloat16() for key, value in load_file(path).items()}, path)
    for method in METHODS:
        merge_adapters(folders, tmp_path / method, method)
        with safe_open(tmp_path / method / "adapter_model.safetensors", "pt") as file:
            assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16"}  # noqa: SIM118
            assert json.loads(file.metadata()["slao_merge"])["method"] == method
        merge_adapters(folders, tmp_path / f"{method} again", method)
        first, again = (load_file(tmp_path / n / "adapter_model.safetensors") for n in (method, f"{method} again"))
        assert all(torch.equal(first[key], again[key]) for key in first)


def test_a_file_is_opened_anew_as_it_is_read(three, tmp_path, monkeypatch):
    merge_adapters(three, tmp_path / "whole", "linear")
    monkeypatch.setattr(slao.folders, "_MAPPED_BYTES", 0)
    merge_adapters(three, tmp_path / "often", "linear")
    whole, often = ((tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("whole", "often"))
    assert whole == often


def test_killed_while_it_writes(three, tmp_path):
    """Stopped by SIGKILL in the midst of the layers: there is no `out`; the next run makes it."""
    code = (
        "import sys, time\n"
        "from slao.merging import factors, merge_adapters\n"
        "done, usual = [], factors.linear\n"
        "def slow(*given):\n"
        "    if done: print('midst', flush=True); time.sleep(60)\n"
        "    done.append(1)\n"
        "    return usual(*given)\n"
        "factors.linear = slow\n"
        "merge_adapters(sys.argv[1:-1], sys.argv[-1], 'linear')\n"
    )
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, three), str(out)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"midst\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not out.exists()
    (left,) = tmp_path.iterdir()
    others = [".out.tmp", ".out.b.merge-abcdefgh.tmp", ".b.merge-abcdefgh.tmp", ".out.merge-abcdefg.tmp"]
    for name in others:  # which only look alike
        (tmp_path / name).mkdir()
    merge_adapters(three, out, "linear")
    assert read_adapter(out).keys() == read_adapter(three[0]).keys()
    assert not left.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, "out"])


def test_what_a_live_merge_writes_stays(three, tmp_path):
    with whole_folder(tmp_path / "out") as scratch:
        (scratch / "file").write_text("x")
        merge_adapters(three, tmp_path / "out", "linear")
        assert (scratch / "file").is_file()
        shutil.rmtree(tmp_path / "out")  # the first one has its place again
    assert sums.is_whole(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_damaged_merge_is_refused(three, tmp_path, capsys):
    merge_adapters(three, tmp_path / "out", "linear")
    path = tmp_path / "out" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    for command in (["merge", "-o", str(tmp_path / "again")], ["interference"]):
        assert main([*command, str(three[0]), str(tmp_path / "out")]) == 2
        assert f"{path} is damaged: its checksum in SHA256SUMS does not match" in capsys.readouterr().err
