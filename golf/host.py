"""Runs a submission's scorer in a process of its own. Started as a script with python -I; imports nothing of ours.

Tokens come in one nameless file and numbers go out in another; only short JSON lines cross the pipes, and what the
submission prints goes nowhere.
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


def watch(allowed):
    """Refuse sockets, and files outside `allowed`, as far as Python itself can see. Native code is not watched."""
    allowed = tuple(os.path.realpath(p) for p in allowed)
    told = ("/dev/", "/proc/self/", "/proc/cpuinfo", "/proc/meminfo", "/sys/")

    def hook(event, arguments):
        if event.startswith("socket.") and event != "socket.__new__":
            raise PermissionError(f"{event}: a scorer has no network")
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if not path.startswith(told) and not any(path == a or path.startswith(a + "/") for a in allowed):
                raise PermissionError(f"{path}: outside what a scorer may open")

    sys.addaudithook(hook)


class Server:
    """Serves requests until the pipe closes."""

    def __init__(self, scorer, tokens_fd, answers_fd):
        self.scorer, self.tokens_fd, self.answers_fd = scorer, tokens_fd, answers_fd
        self.vocab = int(scorer.vocab)

    def able(self):
        """What the scorer offers beside logprobs."""
        return {name: callable(getattr(self.scorer, name, None)) for name in ("score", "adapt", "reset")}

    def array(self, offset, *dims):
        """int64 from the file of tokens."""
        size = 8 * int(np.prod(dims))
        return np.frombuffer(os.pread(self.tokens_fd, size, offset), dtype=np.int64).reshape(dims).copy()

    def give(self, found, dims):
        """Write float32 numbers of these dimensions."""
        given = np.asarray(found)
        if given.shape != dims or given.dtype != np.float32:
            raise TypeError(f"the scorer gave {given.dtype} {given.shape}, not float32 {dims}")
        view, done = memoryview(np.ascontiguousarray(given)).cast("B"), 0
        while done < given.nbytes:
            done += os.pwrite(self.answers_fd, view[done:], done)

    def answer(self, request):
        kind, rows, length = request["ask"], request.get("rows", 0), request.get("length", 0)
        if kind == "logprobs":
            self.give(self.scorer.logprobs(self.array(0, rows, length)), (rows, length, self.vocab))
        elif kind == "score":
            self.give(self.scorer.score(self.array(0, rows, length + 1)), (rows, length))
        elif kind == "adapt":
            self.scorer.adapt(self.array(0, length), self.array(8 * length, length))
        else:
            self.scorer.reset()
        return {"rows": max(1, rows)}


def main():
    folder, allowed = sys.argv[1], json.loads(sys.argv[2])
    request_fd, answer_fd, tokens_fd, answers_fd = map(int, sys.argv[3:])
    requests, replies = os.fdopen(request_fd, "r"), os.fdopen(answer_fd, "w")

    def tell(message):
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    try:
        if allowed:
            watch(allowed)
        server = Server(load(folder), tokens_fd, answers_fd)
        tell({"vocab": server.vocab, **server.able()})
        for line in requests:
            tell(server.answer(json.loads(line)))
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1:]
        where = f" ({os.path.basename(last[0].filename)} line {last[0].lineno})" if last else ""
        tell({"error": f"{type(error).__name__}: {error}"[:500] + where})


main()
