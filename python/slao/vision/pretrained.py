"""The model "digits-vit": a ViT of 0.1 M parameters, trained once on letters and kept in a folder of this machine."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ..checkpoint import umask
from ..objectives.image_matching import embed, normalised
from ..objectives.simplex import simplex_directions
from . import letters

if TYPE_CHECKING:
    from transformers import ViTModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """How it is trained: to point a letter's embedding along the letter's own of `simplex_directions`.

    1,200 steps of 128 images take a minute on one core.
    """

    steps: int = 1200
    batch_size: int = 128
    learning_rate: float = 2e-3
    temperature: float = 0.1
    hidden: int = 64
    layers: int = 4
    heads: int = 4
    seed: int = 0


def cache_folder() -> Path:
    """$SLAO_CACHE, else ~/.cache/slao."""
    return Path(os.environ.get("SLAO_CACHE") or Path.home() / ".cache" / "slao")


def digits_vit(recipe: Recipe | None = None) -> Path:
    """The model's folder; trains it where this machine has none of this recipe yet. ValueError if it cannot be kept."""
    recipe = recipe or Recipe()
    # The code belongs to the recipe: a changed glyph is another model.
    sources = "".join(Path(file).read_text(encoding="utf-8") for file in (__file__, letters.__file__))
    key = hashlib.sha256(f"{asdict(recipe)}{sources}".encode()).hexdigest()[:12]
    folder = cache_folder() / f"digits-vit-{key}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent))
    except OSError as error:
        raise ValueError(
            f"digits-vit cannot be kept in {folder.parent} ({error}): name a folder by SLAO_CACHE"
        ) from error
    logger.warning("training digits-vit on letters, once (about a minute); it is kept in %s", folder)
    try:
        model, accuracy = pretrain(recipe)
        logger.warning("digits-vit names %.1f %% of newly bent letters right", 100 * accuracy)
        model.save_pretrained(temporary)
        temporary.chmod(0o777 & ~umask())  # mkdtemp makes folders private
        try:
            os.replace(temporary, folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, with the same model
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def pretrain(recipe: Recipe) -> tuple[ViTModel, float]:
    """The trained model, and its accuracy on freshly bent glyphs. Draws from `recipe.seed` alone."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        image_size=letters.SIDE // letters.BLOCK,
        patch_size=2,
        num_channels=1,
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        intermediate_size=2 * recipe.hidden,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = ViTModel(config)  # with a pooler that nothing reads: AutoModel expects it in the folder
    generator = torch.Generator().manual_seed(recipe.seed)
    directions = simplex_directions(len(letters.CHARACTERS), recipe.hidden, recipe.seed)
    ink, targets = letters.glyphs()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
    )
    model.train()
    for _ in range(recipe.steps):
        chosen = torch.randint(len(ink), (recipe.batch_size,), generator=generator)
        embedded = embed(model, normalised(letters.bent(ink[chosen], generator)))
        loss = F.cross_entropy(embedded @ directions.T / recipe.temperature, targets[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        guesses = (embed(model, normalised(letters.bent(ink, generator))) @ directions.T).argmax(1)
    return model, float((guesses == targets).float().mean())
