"""A plain PyTorch transformer as a submission: its weights are an .npz of float16."""

import numpy as np
import torch
from torch import nn

VOCAB, WIDTH, HEADS, LAYERS, CONTEXT = 1024, 64, 2, 2, 128


class Model(nn.Module):
    def __init__(self, vocab=VOCAB):
        super().__init__()
        self.pieces = nn.Embedding(vocab, WIDTH)
        self.places = nn.Embedding(CONTEXT, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, tokens):
        """tokens (B, T) -> logits (B, T, V)."""
        length = tokens.size(1)
        x = self.pieces(tokens) + self.places(torch.arange(length))
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        return self.norm(self.layers(x, mask=mask, is_causal=True)) @ self.pieces.weight.T


class Scorer:
    def __init__(self, folder):
        with np.load(f"{folder}/weights.bin", allow_pickle=False) as stored:
            weights = {name: torch.from_numpy(stored[name].astype(np.float32)) for name in stored.files}
        self.vocab = weights["pieces.weight"].shape[0]
        self.model = Model(self.vocab)
        self.model.load_state_dict(weights)
        self.model.eval()

    @torch.no_grad()
    def logprobs(self, tokens):
        """tokens (B, T) int64 -> natural-log probabilities (B, T, V) float32 of the piece after each position."""
        return torch.log_softmax(self.model(torch.from_numpy(np.ascontiguousarray(tokens))), dim=-1).numpy()


def load_scorer(folder):
    return Scorer(folder)
