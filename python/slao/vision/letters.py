"""Letters in many hands: glyphs of the fonts that matplotlib carries, bent and thickened, as 8×8 grey images.

They look like scikit-learn's digits do (a 32×32 bitmap whose 4×4 blocks are counted), and no digit is among them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Capitals, and the small letters that are no smaller capitals (the classes of EMNIST "balanced" without its digits).
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ" + "abdefghnqrt"
FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmb10", "cmmi10", "cmr10", "cmss10", "cmti10", "cmtt10"),
)
SIDE, BLOCK = 32, 4  # of the bitmap, and of what becomes one pixel
_DRAWN = 96  # pixels of the glyph before it is cut out


def glyphs(characters: str = CHARACTERS) -> tuple[Tensor, Tensor]:
    """((N, SIDE, SIDE) ink in [0, 1], (N,) index into `characters`): all of them in one font after the other, filling
    the square from top to bottom. ImportError without matplotlib (which brings Pillow)."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    images = []
    for name in FONTS:
        font = ImageFont.truetype(str(folder / f"{name}.ttf"), _DRAWN)
        for character in characters:
            sheet = Image.new("L", (3 * _DRAWN, 3 * _DRAWN))
            ImageDraw.Draw(sheet).text((_DRAWN, _DRAWN), character, fill=255, font=font)
            ink = sheet.crop(sheet.getbbox())
            width = min(SIDE, max(4, round(SIDE * ink.width / ink.height)))
            square = Image.new("L", (SIDE, SIDE))
            square.paste(ink.resize((width, SIDE), Image.Resampling.BILINEAR), ((SIDE - width) // 2, 0))
            images.append(torch.from_numpy(np.asarray(square, dtype=np.float32) / 255))
    return torch.stack(images), torch.arange(len(characters)).repeat(len(FONTS))


def bent(ink: Tensor, generator: torch.Generator) -> Tensor:
    """(N, 1, SIDE / BLOCK, same), in [0, 1], of (N, SIDE, SIDE): each image turned, slanted, stretched, shifted, its
    strokes made thicker or thinner, all drawn from `generator`, then counted in blocks."""
    count = len(ink)

    def draw(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    angle, slant = draw(-0.3, 0.3), draw(-0.3, 0.3)
    # From the result's coordinates back to the glyph's: what is divided by a factor below 1 shrinks.
    across, down = 1 / draw(0.5, 0.95), 1 / draw(0.85, 1.0)
    cos, sin = torch.cos(angle), torch.sin(angle)
    rows = [across * (cos + slant * sin), across * (slant * cos - sin), draw(-0.15, 0.15)]
    rows += [down * sin, down * cos, draw(-0.08, 0.08)]
    grid = F.affine_grid(torch.stack(rows, 1).view(count, 2, 3), [count, 1, SIDE, SIDE], align_corners=False)
    turned = F.grid_sample(ink.unsqueeze(1), grid, align_corners=False)
    wide = F.avg_pool2d(turned, 5, 1, 2)  # a blur: where it is cut decides how thick a stroke is
    edge = draw(0.15, 0.5).view(-1, 1, 1, 1)
    return F.avg_pool2d((wide > edge).float(), BLOCK)
