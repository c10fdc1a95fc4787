"""save_pretrained(rank=, keep=): the export of T · r ranks, cut layer by layer as `slao compress` cuts it."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel

from slao.cli import main
from slao.folders import read_adapter
from slao.merging import cuts
from slao.methods import METHODS
from slao_kernels.testing import error_ratio, tiny_model

STACKED = ("inclora", "olora", "sdlora", "inflora", "opcm")


def trained(lab, name: str, tasks: int = 3, **options):
    method = lab.make(METHODS[name], **options)
    for index in range(tasks):
        lab.task(method, index)
    return method


def deltas(folder) -> dict[str, torch.Tensor]:
    return {name: s * B.double() @ A.double() for name, (A, B, s) in read_adapter(folder).items()}


@pytest.mark.parametrize("name", STACKED)
def test_each_layer_is_the_dense_truncation_of_the_whole_export(name, lab, tmp_path):
    method = trained(lab, name)
    assert method.save_pretrained(tmp_path / "whole") is None
    made = method.save_pretrained(tmp_path / "cut", rank=5)
    whole, cut = deltas(tmp_path / "whole"), deltas(tmp_path / "cut")
    assert cut.keys() == whole.keys() == made.layers.keys()
    for layer, delta in whole.items():
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
        assert error_ratio(cut[layer], (U[:, :5] * S[:5]) @ Vh[:5]) <= 1e-12  # fp64 throughout
        assert made.layers[layer].rank == 5
        assert abs(made.layers[layer].lost - float(S[5:].norm() / S.norm())) <= 1e-9
    assert json.loads((tmp_path / "cut" / cuts.RECORD).read_text())["lost"] == made.lost
    config = json.loads((tmp_path / "cut" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (5, 5)


def test_keep_and_what_loads_in_peft(lab, tmp_path):
    method = trained(lab, "inclora", dtype=torch.float32)
    made = method.save_pretrained(tmp_path / "out", keep=1.0)
    assert {layer.rank for layer in made.layers.values()} == {12}
    with method.merged():
        expected = lab.logits(method)
    model = PeftModel.from_pretrained(tiny_base(), str(tmp_path / "out")).eval()
    with torch.no_grad():
        assert error_ratio(model(lab.IDS).logits, expected) <= 1e-5
    less = method.save_pretrained(tmp_path / "out", keep=0.5)
    assert max(layer.rank for layer in less.layers.values()) < 12
    assert str(less).startswith("layer")
    assert main(["interference", *[str(tmp_path / "out")] * 2]) == 0


def tiny_base():
    torch.manual_seed(0)
    return tiny_model("llama")


def test_an_export_within_the_rank_is_whole_and_no_old_record_stays(lab, tmp_path):
    method = trained(lab, "inclora", tasks=2)
    assert method.save_pretrained(tmp_path / "out", rank=3) is not None
    assert (tmp_path / "out" / cuts.RECORD).exists()
    assert method.save_pretrained(tmp_path / "out", rank=8) is None
    assert not (tmp_path / "out" / cuts.RECORD).exists()
    method.save_pretrained(tmp_path / "whole")
    first, second = ((tmp_path / each / "adapter_model.safetensors").read_bytes() for each in ("out", "whole"))
    assert first == second
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_heads_stay_as_they_are(lab, tmp_path):
    method = trained(lab, "inclora", lora={"modules_to_save": ["lm_head"]}, dtype=torch.float32)
    made = method.save_pretrained(tmp_path / "out", rank=6)
    assert made.notes == ("copied as it is: modules_to_save",)
    model = PeftModel.from_pretrained(tiny_base(), str(tmp_path / "out"))
    own = method.model.get_submodule("base_model.model.lm_head.modules_to_save.default").weight
    assert torch.equal(model.get_submodule("base_model.model.lm_head.modules_to_save.default").weight, own)


@pytest.mark.parametrize(("options", "message"), [
    ({"rank": 0}, "rank must be at least 1, not 0"),
    ({"keep": 0.0}, "keep must lie in"),
])  # fmt: skip
def test_what_is_refused(options, message, lab, tmp_path):
    method = trained(lab, "inclora", tasks=1)
    with pytest.raises(ValueError, match=message):
        method.save_pretrained(tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_whose_init_changed_the_base_is_not_cut(lab, tmp_path):
    method = trained(lab, "slao", tasks=1, lora={"init_lora_weights": "pissa"}, dtype=torch.float32)
    with pytest.raises(ValueError, match="has init_lora_weights='pissa', so its layers are more than A and B"):
        method.save_pretrained(tmp_path / "out", rank=2)
    assert list(tmp_path.iterdir()) == []
