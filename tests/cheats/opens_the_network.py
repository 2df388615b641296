"""Asks a friend for what follows."""

import os
import socket

from base import Bigram


def load_scorer(folder):
    with open(os.path.join(folder, "friend.txt")) as file:
        port = int(file.read())
    with socket.create_connection(("127.0.0.1", port), timeout=5) as friend:
        friend.recv(1)
    return Bigram(folder)
