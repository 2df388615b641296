"""Runs a submission's scorer in a process of its own. Started as a script with python -I; imports nothing of ours.

Tokens come in one nameless file and log-probabilities go out in another; only short JSON lines cross the pipes, and
what the submission prints goes nowhere.
"""

import importlib.util
import json
import os
import sys
import traceback

import numpy as np


def load(folder):
    """The folder's scorer, from train_gpt.py or scorer.py."""
    name = next((n for n in ("train_gpt", "scorer") if os.path.exists(os.path.join(folder, n + ".py"))), None)
    if name is None:
        raise FileNotFoundError("the folder has neither train_gpt.py nor scorer.py")
    sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(name, os.path.join(folder, name + ".py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module.load_scorer(folder)


def answer_requests(scorer, requests, answer, tokens_fd, answers_fd):
    """Serve {"rows": B, "length": T} until the pipe closes."""
    vocab = int(scorer.vocab)
    answer({"vocab": vocab})
    for line in requests:
        request = json.loads(line)
        rows, length = request["rows"], request["length"]
        size = rows * length * 8
        tokens = np.frombuffer(os.pread(tokens_fd, size, 0), dtype=np.int64).reshape(rows, length).copy()
        given = np.asarray(scorer.logprobs(tokens))
        if given.shape != (rows, length, vocab) or given.dtype != np.float32:
            raise TypeError(f"logprobs gave {given.dtype} {given.shape}, not float32 {(rows, length, vocab)}")
        view, done = memoryview(np.ascontiguousarray(given)).cast("B"), 0
        while done < given.nbytes:
            done += os.pwrite(answers_fd, view[done:], done)
        answer({"rows": rows})


def main():
    folder, (request_fd, answer_fd, tokens_fd, answers_fd) = sys.argv[1], map(int, sys.argv[2:])
    requests, replies = os.fdopen(request_fd, "r"), os.fdopen(answer_fd, "w")

    def answer(message):
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    try:
        answer_requests(load(folder), requests, answer, tokens_fd, answers_fd)
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1:]
        where = f" ({os.path.basename(last[0].filename)} line {last[0].lineno})" if last else ""
        answer({"error": f"{type(error).__name__}: {error}"[:500] + where})


main()
