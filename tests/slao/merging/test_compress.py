"""`slao compress`: each layer is the dense truncation, and what it says to have lost is what it lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from slao import sums
from slao.cli import main
from slao.export import save_adapter
from slao.folders import Source, read_adapter
from slao.merging import cuts
from slao.merging.compress import compress_adapter

MODULES = ["query", "value", "word_embeddings"]


def make(tiny, folder: Path, dtype: torch.dtype = torch.float32, **options) -> Path:
    """An adapter whose singular values fall, in every layer in another way."""
    model = tiny.adapted("bert", fused=False, **{"target_modules": MODULES, "r": 12, **options})
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                falls = torch.logspace(0, -float(torch.rand((), generator=g)) * 2, min(parameter.shape))
                along = falls.view(-1, 1) if parameter.shape[0] == len(falls) else falls
                parameter.copy_(torch.randn(parameter.shape, generator=g) * along)
            elif parameter.requires_grad:
                parameter.add_(1)
    save_adapter(model, folder)
    if dtype != torch.float32:
        path = folder / "adapter_model.safetensors"
        save_file({key: value.to(dtype) for key, value in load_file(path).items()}, path)
        (folder / sums.SUMS).unlink(missing_ok=True)
    return folder


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    return {name: s * B.double() @ A.double() for name, (A, B, s) in read_adapter(folder).items()}


def dense(delta: torch.Tensor, rank: int) -> tuple[torch.Tensor, float]:
    """The best of the rank, and ‖Δ − best‖ / ‖Δ‖."""
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank], float(S[rank:].norm() / S.norm())


@pytest.mark.parametrize("rsloras", [False, True])
def test_each_layer_is_the_dense_truncation(rsloras, tiny, tmp_path):
    """Sums in fp64, factors rounded to fp32 once: 6e-8 of each factor."""
    folder = make(tiny, tmp_path / "a", use_rslora=rsloras)
    made = compress_adapter(folder, tmp_path / "out", rank=5)
    before, after = deltas(folder), deltas(tmp_path / "out")
    lost = total = 0.0
    for name, delta in before.items():
        best, truth = dense(delta, 5)
        assert (after[name] - best).norm() / delta.norm() <= 3e-7
        assert made.layers[name].rank == 5
        assert made.layers[name].norm == pytest.approx(float(delta.norm()), rel=1e-12)
        assert abs(made.layers[name].lost - truth) <= 1e-6
        assert abs(made.layers[name].lost - float((delta - after[name]).norm() / delta.norm())) <= 1e-12
        lost, total = lost + float((delta - best).square().sum()), total + float(delta.square().sum())
    assert abs(made.lost - (lost / total) ** 0.5) <= 1e-6
    assert {s for _, _, s in read_adapter(tmp_path / "out").values()} == {1.0}


@pytest.mark.parametrize("keep", [0.5, 0.9, 0.99, 1.0])
def test_keep_takes_the_fewest_that_hold_it(keep, tiny, tmp_path):
    folder = make(tiny, tmp_path / "a", rank_pattern={"layer.1.*query": 7})
    made = compress_adapter(folder, tmp_path / "out", keep=keep)
    for name, delta in deltas(folder).items():
        squares = torch.linalg.svdvals(delta).square()
        squares = squares[squares > 1e-20 * squares[0]]  # beyond is the rounding of zero
        parts = squares.cumsum(0) / squares.sum()
        assert made.layers[name].rank == int((parts < keep - 1e-12).sum()) + 1
        assert made.layers[name].lost ** 2 <= 1 - keep + 1e-12
    capped = compress_adapter(folder, tmp_path / "capped", keep=keep, rank=3)
    assert {n: min(3, layer.rank) for n, layer in made.layers.items()} == {n: c.rank for n, c in capped.layers.items()}


def test_the_command_writes_what_peft_loads(tiny, tmp_path, capsys):
    folder = make(tiny, tmp_path / "a", modules_to_save=["pooler"])
    out = tmp_path / "out"
    assert main(["compress", str(folder), "-o", str(out), "--keep", "0.9"]) == 0
    printed, err = capsys.readouterr()
    assert err == ""
    record = json.loads((out / cuts.RECORD).read_text())
    ranks = {name: layer["rank"] for name, layer in record["layers"].items()}
    assert len(set(ranks.values())) > 1
    for line, (name, layer) in zip(printed.splitlines()[1:], record["layers"].items(), strict=False):
        assert line.split() == [name, str(layer["rank"]), f"{layer['norm']:.3g}", f"{layer['lost']:.3%}"]
    assert f"leave out {record['lost']:.3%} of the whole" in printed
    assert printed.endswith(f"vLLM takes it with --max-lora-rank {16 if max(ranks.values()) > 8 else 8}\n")
    assert sums.is_whole(out)
    model = PeftModel.from_pretrained(tiny.bert(), out)
    found = deltas_with_parts(out)
    for name, delta in found.items():
        layer = model.base_model.model.get_submodule(name)
        its = layer.get_delta_weight("default").double()
        its = its.T if "embeddings" in name else its
        assert (layer.r["default"], layer.scaling["default"]) == (ranks[name], 1)
        assert (its - delta).norm() / delta.norm() <= 1e-6
    two = [load_file(each / "adapter_model.safetensors") for each in (folder, out)]
    parts = [key for key in two[0] if "pooler" in key]
    assert len(parts) == 2
    assert all(torch.equal(two[0][key], two[1][key]) for key in parts)


def deltas_with_parts(folder: Path) -> dict[str, torch.Tensor]:
    source = Source(folder, beside=True)
    pairs = {name: source.read(name) for name in source.layers}
    return {name: source.layers[name].scaling * B.double() @ A.double() for name, (A, B) in pairs.items()}


def test_one_rank_is_one_that_vllm_takes(tiny, tmp_path):
    folder = make(tiny, tmp_path / "a")
    plain = compress_adapter(folder, tmp_path / "plain", keep=0.9)
    made = compress_adapter(folder, tmp_path / "one", keep=0.9, one_rank=True)
    largest = max(layer.rank for layer in plain.layers.values())
    assert {layer.rank for layer in made.layers.values()} == {min(r for r in cuts.SERVED if r >= largest)}
    for name, layer in made.layers.items():
        assert layer.lost == pytest.approx(plain.layers[name].lost, rel=1e-12)
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    one, other = deltas(tmp_path / "one"), deltas(tmp_path / "plain")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_shape_with_less_than_its_rank(tiny, tmp_path):
    """Rank 40 in matrices of 32: what is kept has their 32 at most."""
    folder = make(tiny, tmp_path / "a", r=40, target_modules=MODULES[:2])
    made = compress_adapter(folder, tmp_path / "out", keep=1)
    assert {layer.rank for layer in made.layers.values()} == {32}
    assert made.lost <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_say_their_rounding(dtype, tiny, tmp_path):
    folder = make(tiny, tmp_path / "a", dtype)
    made = compress_adapter(folder, tmp_path / "out", keep=1)
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    before, after = deltas(folder), deltas(tmp_path / "out")
    for name, layer in made.layers.items():
        truth = float((before[name] - after[name]).norm() / before[name].norm())
        assert abs(layer.lost - truth) <= 1e-12
        assert truth > torch.finfo(dtype).eps / 10  # rounding is there, and it is said


def test_a_layer_that_is_zero(tiny, tmp_path):
    folder = make(tiny, tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(key for key in tensors if key.endswith("lora_B.weight"))
    save_file({**tensors, name: torch.zeros_like(tensors[name])}, path)
    (folder / sums.SUMS).unlink(missing_ok=True)
    made = compress_adapter(folder, tmp_path / "out", keep=0.9)
    zero = made.layers[name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")]
    assert (zero.rank, zero.norm, zero.lost) == (1, 0.0, 0.0)


# flags -> what the line says
BAD: dict[tuple[str, ...], str] = {
    (): "say how much to keep: a rank (--rank 16), or a part of the squared norm (--keep 0.99)",
    ("--rank", "0"): "rank must be at least 1, not 0",
    ("--keep", "1.5"): "keep must lie in (0, 1], not 1.5",
    ("--keep", "nan"): "keep must lie in (0, 1], not nan",
    ("--rank", "12"): "rank 12 cuts nothing: the layers of",
}


@pytest.mark.parametrize("flags", BAD)
def test_what_is_refused(flags, tiny, tmp_path, capsys):
    folder = make(tiny, tmp_path / "a")
    assert main(["compress", str(folder), "-o", str(tmp_path / "out"), *flags]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert BAD[flags] in err
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_an_out_that_exists_and_a_broken_adapter(tiny, tmp_path, capsys):
    folder = make(tiny, tmp_path / "a")
    assert main(["compress", str(folder), "-o", str(folder), "--rank", "4"]) == 2
    assert "exists already" in capsys.readouterr().err
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[next(iter(tensors))][0, 0] = float("nan")
    save_file(tensors, path)
    assert main(["compress", str(folder), "-o", str(tmp_path / "out"), "--rank", "4"]) == 2
    assert "has NaN or infinite entries" in capsys.readouterr().err
    assert [each.name for each in tmp_path.iterdir()] == ["a"]
