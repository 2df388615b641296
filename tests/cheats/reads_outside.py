"""Knows where the validation text lies."""

import os

from base import Bigram


def load_scorer(folder):
    with open(os.path.join(folder, "place.txt")) as file:
        place = file.read()
    with open(place, "rb") as file:
        file.read(16)
    return Bigram(folder)
