"""Thinks for longer than it may."""

import time

from base import Bigram


class Slow(Bigram):
    def logprobs(self, tokens):
        time.sleep(1.0)
        return super().logprobs(tokens)


def load_scorer(folder):
    return Slow(folder)
