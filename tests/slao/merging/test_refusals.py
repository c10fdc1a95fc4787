"""Every set of adapters that cannot be merged: one line that says why, exit code 2, and nothing on the disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from slao.cli import main
from slao.export import save_adapter

# name -> (change of the second adapter: of its config, of its LoraConfig, or of its tensors; flags; what the line says)
BAD: dict[str, tuple[dict, dict, str, list[str], list[str]]] = {
    "base": ({"base_model_name_or_path": "tiny/other"}, {}, "", [], ["base_model_name_or_path is 'tiny/other'"]),
    "revision": ({"revision": "v2"}, {}, "", [], ["revision is 'v2'", "None"]),
    "layers": ({}, {"target_modules": ["query"]}, "", [], ["does not have the layers of", "2 are in one only"]),
    "rank": ({}, {"r": 3}, "", [], ["has rank 3, in", "4: slao combines", "svd takes any"]),
    "rank of ties": ({}, {"r": 3}, "", ["--method", "ties"], ["has rank 3", "ties combines A with A"]),
    "alpha": ({}, {"lora_alpha": 1}, "", [], ["has scaling 0.25, in", "2: slao merges"]),
    "dora": ({}, {"use_dora": True}, "", [], ["has use_dora: more than A and B"]),
    "lora_bias": ({}, {"lora_bias": True}, "", [], ["has lora_bias: more"]),
    "bias": ({"bias": "all"}, {}, "", [], ["has bias: more than A and B; merge it with --beside keep (the last"]),
    "beside": ({}, {}, "", ["--beside", "drop"], ["unknown beside 'drop'; choose one of keep, merge, first"]),
    "nothing beside": ({}, {}, "", ["--beside", "keep"], ["beside='keep' would do nothing: no adapter has anything"]),
    "beside in one": ({"modules_to_save": ["pooler"]}, {}, "more", ["--beside", "keep"],
                      ["modules_to_save is None, that of", "['pooler']", "pooler.weight is in", "b only"]),
    "modules_to_save": ({"modules_to_save": ["pooler"]}, {}, "", [], ["has modules_to_save: more"]),
    "pissa": ({"init_lora_weights": "pissa"}, {}, "", [], ["init_lora_weights='pissa'", "changes the base"]),
    "other tensors": ({}, {}, "more", [], ["holds more than A and B", "pooler.weight"]),
    "shape": ({}, {}, "wide", [], ["query: A and B are ((4, 33), (32, 4)), those of"]),
    "NaN": ({}, {}, "nan", [], ["B of", "query has NaN or infinite entries"]),
    "infinity": ({}, {}, "inf", ["--method", "svd"], ["query has NaN or infinite entries"]),
    "int8": ({}, {}, "int8", [], ["is stored as I8, expected F64, F32, BF16 or F16"]),
    "overflow": ({}, {}, "", ["--method", "linear", "--weights", "1e300,1"], ["overflows torch.float32"]),
    "method": ({}, {}, "", ["--method", "mean"], ["unknown method 'mean'; choose one of slao, linear, svd"]),
    "weights": ({}, {}, "", ["--method", "svd", "--weights", "1,2,3"], ["weights are 3 numbers for 2 adapters"]),
    "no weights": ({}, {}, "", ["--method", "svd", "--weights", "1;2"], ["--weights takes numbers", "'1;2'"]),
    "NaN weight": ({}, {}, "", ["--method", "svd", "--weights", "1,nan"], ["weights must be finite"]),
    "weights of slao": ({}, {}, "", ["--weights", "1,2"], ["slao takes no weights, which linear, svd, "]),
    "rank of linear": ({}, {}, "", ["--method", "linear", "--rank", "2"], ["linear takes no rank"]),
    "rank too large": ({}, {}, "", ["--method", "svd", "--rank", "33"], ["rank 33 is too large", "at most 32"]),
    "rank 0": ({}, {}, "", ["--method", "svd", "--rank", "0"], ["rank must be at least 1, not 0"]),
    "density": ({}, {}, "", ["--method", "ties", "--density", "0"], ["density must lie in (0, 1], not 0.0"]),
    "schedule": ({}, {}, "", ["--lambda-schedule", "cubic"], ["unknown schedule 'cubic'; choose one of inv_sqrt"]),
    "lambda": ({}, {}, "", ["--lambda-schedule", "1.5"], ["a constant schedule must lie in [0, 1], not 1.5"]),
}  # fmt: skip


def make(tiny, folder: Path, **options) -> Path:
    save_adapter(
        tiny.adapted(
            "bert", fused=False, **{"target_modules": ["query", "value"], "init_lora_weights": False, **options}
        ),
        folder,
    )
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "tiny/bert"}))
    return folder


def change(folder: Path, how: str) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in sorted(tensors) if "query.lora_B" in key)
    down = key.replace("lora_B", "lora_A")
    if how == "more":
        tensors["base_model.model.pooler.weight"] = torch.ones(2)
    elif how == "wide":
        tensors[down] = torch.ones(4, 33)
    elif how == "int8":
        tensors[key] = tensors[key].to(torch.int8)
    elif how == "scalar":
        tensors[down] = torch.tensor(1.0)
    elif how == "empty":
        tensors[down] = torch.ones(0, 32)
    else:
        tensors[key][0, 0] = float(how)
    save_file(tensors, path)


@pytest.mark.parametrize("case", BAD)
def test_one_line_and_nothing_written(case, tiny, tmp_path, capsys):
    config, lora, tensors, flags, parts = BAD[case]
    first, second = make(tiny, tmp_path / "in" / "a"), make(tiny, tmp_path / "in" / "b", **lora)
    path = second / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    if tensors:
        change(second, tensors)
    capsys.readouterr()
    assert main(["merge", str(first), str(second), "-o", str(tmp_path / "out" / "x"), *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("slao: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err
    if config or lora or tensors:
        assert str(second) in err
    left = [str(path) for path in (tmp_path / "out").rglob("*")] if (tmp_path / "out").exists() else []
    assert left == []


def test_what_is_there_stays(tiny, tmp_path, capsys):
    a, b = make(tiny, tmp_path / "a"), make(tiny, tmp_path / "b")
    before = {path.name: path.read_bytes() for path in b.iterdir()}
    assert main(["merge", str(a), str(b), "-o", str(b)]) == 2
    assert "exists already: choose another -o" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in b.iterdir()} == before
    (tmp_path / "empty").mkdir()
    assert main(["merge", str(a), str(b), "-o", str(tmp_path / "empty")]) == 0
    assert (tmp_path / "empty" / "adapter_model.safetensors").exists()


def test_one_adapter_is_cut_by_svd_only(tiny, tmp_path, capsys):
    a = make(tiny, tmp_path / "a")
    assert main(["merge", str(a), "-o", str(tmp_path / "out")]) == 2
    assert "slao merges two adapters or more; got 1" in capsys.readouterr().err
    assert main(["merge", str(a), "-o", str(tmp_path / "out"), "--method", "svd", "--rank", "2"]) == 0
    assert "rank 2, which leaves out" in capsys.readouterr().out


def test_no_place_for_the_folder(tiny, tmp_path, capsys):
    a, b = make(tiny, tmp_path / "a"), make(tiny, tmp_path / "b")
    (tmp_path / "file").write_text("x")
    assert main(["merge", str(a), str(b), "-o", str(tmp_path / "file" / "out")]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"slao: {tmp_path / 'file'}: ")
    assert err.count("\n") == 1


# name -> (change of the config, or of the tensors; what both commands say)
FOLDERS: dict[str, tuple[dict, str, str]] = {
    "alpha is a text": ({"lora_alpha": "much"}, "", "adapter_config.json: lora_alpha must be a number, not 'much'"),
    "alpha is nothing": ({"lora_alpha": None}, "", "adapter_config.json: lora_alpha must be a number, not None"),
    "alpha is NaN": ({"lora_alpha": float("nan")}, "", "lora_alpha must be a finite number, not nan"),
    "a pattern's alpha": ({"alpha_pattern": {"query": "x"}}, "", "alpha_pattern.query must be a number, not 'x'"),
    "patterns are a list": ({"alpha_pattern": ["query"]}, "", "alpha_pattern must be a section, not ['query']"),
    "no regular expression": ({"alpha_pattern": {"(": 1}}, "", "alpha_pattern has '(', no regular expression"),
    "rank 0": ({"r": 0}, "", "a rank of 0; ranks are at least 1"),
    "rsLoRA": ({"use_rslora": "yes"}, "", "use_rslora must be true or false, not 'yes'"),
    "base is a number": ({"base_model_name_or_path": 3}, "", "base_model_name_or_path must be a text, not 3"),
    "another kind": ({"peft_type": "IA3"}, "", "does not describe a LoRA adapter"),
    "modules to save": ({"modules_to_save": "pooler"}, "", "modules_to_save must be a list, not 'pooler'"),
    "pissa": ({"init_lora_weights": "pissa"}, "", "changes the base"),
    "NaN": ({}, "nan", "query has NaN or infinite entries"),
    "int8": ({}, "int8", "is stored as I8, expected F64, F32, BF16 or F16"),
    "other tensors": ({}, "more", "holds more than A and B"),
    "scalars": ({}, "scalar", "A () and B (32, 4) are not (r, n) and (m, r)"),
    "no A": ({}, "empty", "A (0, 32) and B (32, 4) are not (r, n) and (m, r)"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_merge_and_interference_refuse_a_folder_in_the_same_words(case, tiny, tmp_path, capsys):
    config, tensors, message = FOLDERS[case]
    first, second = make(tiny, tmp_path / "a"), make(tiny, tmp_path / "b")
    path = second / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    (second / "SHA256SUMS").unlink(missing_ok=True)
    if tensors:
        change(second, tensors)
    capsys.readouterr()
    lines = []
    for command in (["merge", "-o", str(tmp_path / "out"), "--method", "svd"], ["interference"]):
        assert main([*command, str(first), str(second)]) == 2
        lines.append(capsys.readouterr().err)
    assert message in lines[0]
    assert str(second) in lines[0]
    assert lines[0] == lines[1]
    assert not (tmp_path / "out").exists()


def test_adapters_lead_nowhere_else(tiny, tmp_path, capsys):
    """A pickle is not read, and no link out of the folder is followed, but the hub's own cache may have links."""
    a, b = make(tiny, tmp_path / "a"), make(tiny, tmp_path / "b")
    weights = b / "adapter_model.safetensors"
    hub = tmp_path / "models--x" / "snapshots" / "1"
    (hub.parents[1] / "blobs").mkdir(parents=True)
    hub.mkdir(parents=True)
    for path in b.iterdir():
        (hub.parents[1] / "blobs" / path.name).write_bytes(path.read_bytes())
        (hub / path.name).symlink_to(f"../../blobs/{path.name}")
    assert main(["interference", str(a), str(hub)]) == 0
    weights.rename(tmp_path / "elsewhere.safetensors")
    for link in (tmp_path / "elsewhere.safetensors", Path("..") / "elsewhere.safetensors"):
        weights.symlink_to(link)
        capsys.readouterr()
        assert main(["interference", str(a), str(b)]) == 2
        assert f"{weights} leads out of its folder" in capsys.readouterr().err
        weights.unlink()
    trap = tmp_path / "trap"
    torch.save({"x": Trap(trap)}, b / "adapter_model.bin")
    assert main(["interference", str(a), str(b)]) == 2
    assert "adapter_model.bin is no pickle of tensors alone, and nothing else is unpickled" in capsys.readouterr().err
    (b / "adapter_model.bin").rename(tmp_path / "adapter_model.bin")
    assert main(["interference", str(a), str(b)]) == 2
    assert "has no adapter_model.safetensors and no adapter_model.bin" in capsys.readouterr().err
    weights.write_bytes((tmp_path / "adapter_model.bin").read_bytes())
    assert main(["merge", str(a), str(b), "-o", str(tmp_path / "out")]) == 2
    assert f"{weights} cannot be read" in capsys.readouterr().err
    assert not trap.exists()


class Trap:
    """What makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)
