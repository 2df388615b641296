"""The model's architecture, from which the artifact's tensors follow. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MOST_LOGITS = 1 << 27  # that exist at most on a GPU, whatever the batch
BOS = 1  # the piece that opens a document, in shards and in rows

# How the artifact stores a parameter, by the last part of its name.
TENSOR_CLASSES = {
    "embedding": "embed", "query": "matrix", "key": "matrix", "value": "matrix", "out": "matrix", "up": "matrix",
    "down": "matrix", "attn_scale": "control", "mlp_scale": "control", "resid_mix": "control", "qk_gain": "control",
    "skip_weight": "control", "attn_gate": "control", "smear": "control", "lane_mix": "control",
    "exit_weight": "control", "exit_bias": "control",
}  # fmt: skip


def tensor_class(name: str) -> str:
    """Which codec rule a parameter has: embed, matrix or control. Raises ValueError with its name when none."""
    kind = TENSOR_CLASSES.get(name.rsplit(".", 1)[-1])
    if kind is None:
        raise ValueError(f"parameter {name!r} has no codec rule")
    return kind


GATE_CHANNELS = 12  # of a block's input, that open and close gates


@dataclass(frozen=True)
class Shape:
    """The model's architecture; together with the grid widths it decides the artifact's bytes."""

    vocab_size: int = 1024
    """Pieces of the tokenizer."""
    width: int = 512
    """Channels of the residual stream."""
    heads: int = 8
    """Query heads; width / heads is the head size."""
    kv_heads: int = 4
    """Key and value heads, shared by groups of query heads."""
    mlp_ratio: float = 2.0
    """Hidden width of the MLP over the model's width."""
    prelude: int = 0
    """Unique blocks before the core."""
    core: int = 9
    """Unique blocks that run `loops` times in a row."""
    coda: int = 0
    """Unique blocks after the core."""
    loops: int = 1
    """Passes through the core."""
    rope_base: float = 10000.0
    """Base of the rotary position angles."""
    softcap: float = 30.0
    """Logits are softcap * tanh(logits / softcap)."""
    skips: bool = True
    """U-Net skips over the effective layers: the first half pushes, the second half pops."""
    pass_scalars: bool = False
    """Give every pass of a shared block its own scales, mixes, gains and skip weights (a few kB)."""
    activation: Literal["relu2", "leaky-relu2"] = "relu2"
    """The MLP's: squared ReLU, or the same with half the slope below zero."""
    exclusive: bool = False
    """Take out of each head's output what lies along the position's own value (exclusive self-attention)."""
    attn_gate: bool = False
    """Gate each head's output by a few channels of the block's input."""
    smear: bool = False
    """Add a gated share of the previous piece's embedding, but not across the start of a document."""
    lanes: bool = False
    """In the second half of the effective layers keep two residual streams, one read by attention, one by the MLP."""
    loop_scale: bool = False
    """Divide what a shared block adds by the number of its passes, also while repeats are not switched on yet."""
    exit_gate: Literal["none", "hazard", "act"] = "none"
    """A gate that reads each token's state after a pass: none, the chance to stop if it has not (hazard), or shares
    that add up to one and weigh the passes' states (adaptive computation time)."""

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_size

    @property
    def mlp_width(self) -> int:
        """Hidden channels."""
        return round(self.mlp_ratio * self.width)

    @property
    def unique_layers(self) -> int:
        return self.prelude + self.core + self.coda

    def order(self, loops: int | None = None) -> tuple[int, ...]:
        """Index of the unique block that runs at each effective layer, the core repeated `loops` times."""
        middle = tuple(range(self.prelude, self.prelude + self.core)) * (self.loops if loops is None else loops)
        return (*range(self.prelude), *middle, *range(self.prelude + self.core, self.unique_layers))

    @property
    def effective_layers(self) -> int:
        return len(self.order())

    def passes(self, block: int) -> int:
        """How many times unique block `block` runs."""
        return self.order().count(block)

    @property
    def control_rows(self) -> int:
        """Rows of each bank of control vectors: one a unique block, or one a block and pass."""
        return self.effective_layers if self.pass_scalars else self.unique_layers

    def layers(self, loops: int | None = None) -> list[tuple[int, int]]:
        """(unique block, its row in the banks of control vectors) of each effective layer.

        With pass_scalars a row belongs to a block and a pass, whatever the number of loops; passes beyond the shape's
        own share the last one's row.
        """
        passes = [0] * self.unique_layers
        out = []
        for block in self.order(loops):
            row = block
            if self.pass_scalars and block >= self.prelude:
                inside = block < self.prelude + self.core
                done = min(passes[block], self.loops - 1) if inside else self.loops - 1
                row = block + done * self.core
            passes[block] += 1
            out.append((block, row))
        return out

    def skip_layers(self, loops: int | None = None) -> range:
        """Effective layers that pop a skip: the second half, one pop for each push of the first half."""
        depth = len(self.order(loops))
        pushes = depth // 2
        return range(pushes, 2 * pushes) if self.skips else range(0)

    @property
    def skip_rows(self) -> dict[int, int]:
        """Row of the skip bank by the control row of the layer that pops.

        A looped shape has a row for every core and coda block, whether or not it pops at this number of loops: the
        artifact's size does not move with the loops, and loops can be switched on during training.
        """
        if not self.skips:
            return {}
        keys = {self.layers(1)[layer][1] for layer in self.skip_layers(1)}
        if self.loops > 1:
            keys |= set(range(self.prelude, self.control_rows))
        return {key: row for row, key in enumerate(sorted(keys))}

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every stored tensor, in storage order; the last part of a name is its role."""
        width, hidden = self.width, self.mlp_width
        table: dict[str, tuple[int, ...]] = {"embedding": (self.vocab_size, width)}
        for block in range(self.unique_layers):
            table[f"blocks.{block}.query"] = (width, width)
            table[f"blocks.{block}.key"] = (self.kv_width, width)
            table[f"blocks.{block}.value"] = (self.kv_width, width)
            table[f"blocks.{block}.out"] = (width, width)
            table[f"blocks.{block}.up"] = (hidden, width)
            table[f"blocks.{block}.down"] = (width, hidden)
        rows = self.control_rows
        table["attn_scale"] = table["mlp_scale"] = (rows, width)
        table["resid_mix"] = (rows, 2, width)
        table["qk_gain"] = (rows, self.heads)
        if self.skip_rows:
            table["skip_weight"] = (len(self.skip_rows), width)
        if self.attn_gate:
            table["attn_gate"] = (rows, self.heads, GATE_CHANNELS)
        if self.smear:
            table["smear"] = (1, GATE_CHANNELS + 1)
        if self.lanes:
            table["lane_mix"] = (rows, 2, 3)
        if self.exit_gate != "none":
            table["exit_weight"], table["exit_bias"] = (1, width), (1, self.loops - 1)
        return table

    @property
    def parameter_count(self) -> int:
        total = 0
        for shape in self.parameters().values():
            size = 1
            for n in shape:
                size *= n
            total += size
        return total
