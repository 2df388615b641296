"""Many pieces, by frequency of rank."""

import numpy as np


class Zipf:
    def __init__(self, vocab):
        self.vocab = vocab
        p = 1 / (10 + np.arange(vocab))
        self.row = np.log(p / p.sum()).astype(np.float32)

    def logprobs(self, tokens):
        return np.broadcast_to(self.row, (*tokens.shape, self.vocab)).copy()


def load_scorer(folder):
    import sentencepiece

    return Zipf(sentencepiece.SentencePieceProcessor(model_file=folder + "/tokenizer.model").vocab_size())
