"""A plain PyTorch trainer of the same model, to be compared with: a module for each block, float32, nothing compiled,
every matrix orthogonalised by itself, batches read when they are wanted. Nothing of the product's model or optimiser.
"""

from __future__ import annotations

import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golf.config import Config
from golf.data import TokenStream
from golf.shape import Shape


class Attention(nn.Module):
    def __init__(self, shape: Shape, gain: float):
        super().__init__()
        self.heads, self.kv_heads, self.size = shape.heads, shape.kv_heads, shape.head_size
        self.query = nn.Linear(shape.width, shape.width, bias=False)
        self.key = nn.Linear(shape.width, shape.kv_width, bias=False)
        self.value = nn.Linear(shape.width, shape.kv_width, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)
        self.gain = nn.Parameter(torch.full((shape.heads,), gain))
        frequency = shape.rope_base ** (-torch.arange(0, self.size, 2) / self.size)
        self.register_buffer("frequency", frequency, persistent=False)

    def rotate(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.size(2))[:, None] * self.frequency
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q = self.query(x).view(batch, length, self.heads, self.size).transpose(1, 2)
        k = self.key(x).view(batch, length, self.kv_heads, self.size).transpose(1, 2)
        v = self.value(x).view(batch, length, self.kv_heads, self.size).transpose(1, 2)
        q = self.rotate(F.rms_norm(q, (self.size,))) * self.gain[:, None, None]
        k = self.rotate(F.rms_norm(k, (self.size,)))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    def __init__(self, shape: Shape, gain: float):
        super().__init__()
        self.attention = Attention(shape, gain)
        self.up = nn.Linear(shape.width, shape.mlp_width, bias=False)
        self.down = nn.Linear(shape.mlp_width, shape.width, bias=False)
        self.attn_scale, self.mlp_scale = (nn.Parameter(torch.ones(shape.width)) for _ in range(2))
        self.mix = nn.Parameter(torch.stack((torch.ones(shape.width), torch.zeros(shape.width))))

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        width = (x.size(-1),)
        x = self.mix[0] * x + self.mix[1] * x0
        x = x + self.attn_scale * self.attention(F.rms_norm(x, width))
        return x + self.mlp_scale * self.down(F.relu(self.up(F.rms_norm(x, width))).square())


class Model(nn.Module):
    def __init__(self, shape: Shape, gain: float):
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocab_size, shape.width)
        self.blocks = nn.ModuleList(Block(shape, gain) for _ in range(shape.unique_layers))
        self.skips = nn.Parameter(torch.ones(shape.effective_layers, shape.width))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        shape, width = self.shape, (self.shape.width,)
        x = x0 = F.rms_norm(self.embedding(tokens), width)
        pushed, pops = [], shape.skip_layers()
        for layer, block in enumerate(shape.order()):
            if layer in pops:
                x = x + self.skips[layer] * pushed.pop()
            x = self.blocks[block](x, x0)
            if layer < pops.start:
                pushed.append(x)
        logits = F.rms_norm(x, width) @ self.embedding.weight.mT
        logits = shape.softcap * torch.tanh(logits / shape.softcap)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class PlainMuon:
    """Muon as Keller Jordan (2024) published it, a matrix at a time."""

    def __init__(self, matrices: list[nn.Parameter], momentum: float):
        self.matrices, self.momentum = matrices, momentum
        self.buffers = [torch.zeros_like(p) for p in matrices]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for p, buffer in zip(self.matrices, self.buffers, strict=True):
            buffer.mul_(self.momentum).add_(p.grad)
            x = p.grad.add(buffer, alpha=self.momentum)
            x = x / (x.norm() + 1e-7)
            wide = x if x.size(0) <= x.size(1) else x.mT
            for _ in range(5):
                gram = wide @ wide.mT
                wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
            update = wide if x.size(0) <= x.size(1) else wide.mT
            p.add_(update, alpha=-rate * max(1, x.size(0) / x.size(1)) ** 0.5)


class PlainTrainer:
    """Steps of that trainer on a stream of tokens."""

    def __init__(self, config: Config, stream: TokenStream):
        torch.manual_seed(1)
        self.config, self.stream, self.at = config, stream, 0
        self.model = Model(config.shape, config.recipe.qk_gain)
        matrices = [
            p for n, p in self.model.named_parameters() if p.ndim == 2 and n.startswith("blocks") and min(p.shape) > 2
        ]
        inside = {id(p) for p in matrices}
        self.muon = PlainMuon(matrices, config.recipe.momentum)
        rest = [p for p in self.model.parameters() if id(p) not in inside]
        self.adam = torch.optim.Adam(rest, lr=config.recipe.embed_rate, betas=(0.9, 0.95))

    def step(self) -> float:
        """Seconds of one step, its batch read included."""
        began = time.perf_counter()
        recipe = self.config.recipe
        length, rows = recipe.sequence_length, recipe.batch_tokens // recipe.sequence_length
        tokens = np.stack([self.stream.read(self.at + r * length, length + 1) for r in range(rows)])
        self.at += rows * length
        given = torch.from_numpy(tokens)
        self.model.zero_grad()
        loss = self.model(given[:, :-1], given[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_norm or 1e9)
        self.adam.step()
        self.muon.step(recipe.matrix_rate)
        self.last_loss = float(loss.detach())
        return time.perf_counter() - began
