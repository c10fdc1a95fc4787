"""A small image model that no download is needed for: a ViT trained on letters (never on digits)."""

from .pretrained import digits_vit

__all__ = ["digits_vit"]
