"""The layers of real models, so that a bench moves the bytes that a user's model has."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Geometry:
    """A decoder or encoder by its sizes. layers: (name, out_features, in_features) of one block's linear layers."""

    blocks: int
    layers: tuple[tuple[str, int, int], ...]

    def all_layers(self) -> list[tuple[int, int]]:
        """(out_features, in_features) of every linear layer of the model, in order."""
        return [(n, k) for _ in range(self.blocks) for _, n, k in self.layers]


def _decoder(blocks: int, hidden: int, heads: int, kv: int, mlp: int) -> Geometry:
    return Geometry(
        blocks,
        (
            ("q_proj", heads, hidden),
            ("k_proj", kv, hidden),
            ("v_proj", kv, hidden),
            ("o_proj", hidden, heads),
            ("gate_proj", mlp, hidden),
            ("up_proj", mlp, hidden),
            ("down_proj", hidden, mlp),
        ),
    )


# From the models' published configurations.
GEOMETRIES = {
    "llama-3-8b": _decoder(32, 4096, 4096, 1024, 14336),
    "llama-3.2-1b": _decoder(16, 2048, 2048, 512, 8192),
    "qwen3-4b": _decoder(36, 2560, 4096, 1024, 9728),
    "minilm": Geometry(
        6,
        (
            ("query", 384, 384),
            ("key", 384, 384),
            ("value", 384, 384),
            ("dense", 384, 384),
            ("intermediate", 1536, 384),
            ("output", 384, 1536),
        ),
    ),
}
