"""The machine a rank computes on: its device and number type, the ranks beside it, compilation and warm-up."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from golf.config import Config
from golf.errors import UsageError
from golf.loss import part_loss
from golf.model import RecurrentGPT
from golf.muon import Optimizers
from golf.objective import Objective
from golf.recipe import kinds_of_steps


@dataclass(frozen=True)
class Machine:
    """Where this rank computes, and how."""

    device: torch.device
    dtype: torch.dtype
    compile: str
    rank: int = 0
    world: int = 1
    notes: tuple[str, ...] = ()

    def now(self) -> float:
        """Seconds, once the device has done all it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def largest(self, value: float) -> float:
        """The largest of all ranks' values, the same on each."""
        if self.world == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.item()

    def from_rank_0(self, text: str) -> str:
        """Rank 0's text, on every rank."""
        if self.world == 1:
            return text
        said = [text]
        dist.broadcast_object_list(said, device=self.device)
        return said[0]

    def total(self, values: list[float]) -> list[float]:
        """Sums over all ranks."""
        if self.world == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def given(self, array: np.ndarray) -> Tensor:
        """The array as a tensor of its type on the device; a copy to a GPU waits for nothing that the GPU is doing."""
        tensor = torch.from_numpy(array)
        return (tensor.pin_memory() if self.device.type == "cuda" else tensor).to(self.device, non_blocking=True)

    def add_up(self, tensor: Tensor) -> None:
        """Make a tensor the sum of all ranks', in place."""
        if self.world > 1:
            dist.all_reduce(tensor)


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: allocated on a CUDA device, or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def keep_memory() -> None:
    """Have glibc keep freed blocks instead of handing them back and faulting every page in again.

    Activations are allocated and freed at every layer; eager steps took 1.48 times as long without this on 2 cores.
    """
    try:
        libc = ctypes.CDLL(None)
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, 2**31 - 1)
    except (OSError, AttributeError):
        pass  # another C library


def bfloat16_gain(device: torch.device) -> float:
    """Rate of bfloat16 matrix products over float32's, measured here: below 1 where they are emulated."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(1024, 512, device=device).to(dtype) for _ in range(2))
        taken = []
        for _ in range(8):
            began = time.perf_counter()
            for _ in range(4):
                a @ b.mT
            taken.append(time.perf_counter() - began)
        seconds[dtype] = min(taken)
    return seconds[torch.float32] / seconds[torch.bfloat16]


def missing_for_compile() -> str:
    """What torch.compile needs for a CPU and does not find here: a C++ compiler or Python's headers."""
    if not shutil.which(os.environ.get("CXX", "g++")):
        return "C++ compiler"
    return "" if (Path(sysconfig.get_path("include")) / "Python.h").exists() else "Python.h (python3-dev)"


def set_up(config: Config) -> Machine:
    """Choose device, type and compilation, and join the other ranks. Raises UsageError for what is not there."""
    run, notes = config.run, []
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    kind = run.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}[kind]
    if not available:
        raise UsageError(f"--run.device {kind}: this machine has none, give cpu or auto.")
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
    if kind == "mps":
        notes.append(f"{kind}: written for it, not yet tested on it")
    if run.threads:
        torch.set_num_threads(run.threads)
    keep_memory()
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(run.dtype)
    if dtype is None and kind == "cuda":
        dtype = torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
        notes.append(f"{str(dtype)[6:]}: by the device's capability")
    elif dtype is None:
        gain = Machine(device, torch.float32, "none", rank, world).largest(bfloat16_gain(device))  # one answer for all
        dtype = torch.bfloat16 if gain > 1.2 else torch.float32
        notes.append(f"{str(dtype)[6:]}: bfloat16 products run at {gain:.1f} times float32's rate here")
    mode = run.compile
    if mode != "none" and kind == "cpu" and (missing := missing_for_compile()):
        if mode != "auto":
            raise UsageError(f"--run.compile {mode}: there is no {missing}, install it or give none.")
        mode = "none"
        notes.append(f"compile: none, there is no {missing}")
    if mode == "auto":
        plain = config.recipe.depth_loss == "last" and config.shape.exit_gate != "act"  # one call of the model
        mode = "model" if kind == "cuda" and plain else "block"
    return Machine(device, dtype, mode, rank, world, tuple(notes))


def compile_model(model: RecurrentGPT, mode: str) -> None:
    """Compile in place: each block, the norms beside them and the head (`block`, one graph whatever the loops), or the
    whole (`model`)."""
    if mode == "none":
        return
    torch._dynamo.config.recompile_limit = 64  # one code object serves every block
    if mode == "model":
        model.compile()
        return
    for block in model.blocks:
        block.compile()
    model.loss_part, model.normalize = torch.compile(part_loss, dynamic=False), torch.compile(model.normalize)


def accumulate(model: RecurrentGPT, micro: list, machine: Machine, loops: int, objective: Objective) -> Tensor:
    """Gradients of the mean loss over a rank's micro-batches, added to .grad; returns that loss."""
    total = torch.zeros((), device=machine.device)
    for inputs, targets in micro:
        tokens, wanted = machine.given(inputs), machine.given(targets)
        loss = objective.loss(model, tokens, wanted, machine.dtype, loops) / len(micro)
        loss.backward()
        total += loss.detach()
    for p in model.parameters():
        if p.grad is None:  # of a part that does nothing before the repeats are on
            p.grad = torch.zeros_like(p)
    return total


def warm_up(model: RecurrentGPT, optimizers: Optimizers, config: Config, machine: Machine, micro_rows: int) -> bool:
    """Compile every graph that training will use, on synthetic tokens; weights and optimiser state are restored.

    Returns False, on every rank, when memory ran out on any: nothing that ranks do together is begun before all of
    them have been through a backward pass.
    """
    recipe, shape, objective = config.recipe, config.shape, Objective(config)
    saved = [p.detach().clone() for p in model.parameters()]
    row = np.arange(micro_rows * recipe.sequence_length, dtype=np.int64).reshape(micro_rows, -1) % shape.vocab_size
    failed = 0.0
    for loops in kinds_of_steps(shape, recipe):
        for _ in range(2):
            try:
                optimizers.zero_grad()
                accumulate(model, [(row, row)], machine, loops, objective)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                failed = 1.0
            if failed := machine.largest(failed):
                break
            optimizers.reduce_gradients()
            optimizers.gradient_norm()
            optimizers.step(0.0)
        if failed:
            break
    with torch.no_grad():
        for p, before in zip(model.parameters(), saved, strict=True):
            p.copy_(before)
    optimizers.zero_grad()
    optimizers.reset()
    if failed and machine.device.type == "cuda":
        torch.cuda.empty_cache()
    return not failed


def is_out_of_memory(error: Exception) -> bool:
    named = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return named or "can't allocate memory" in str(error) or "bad_alloc" in str(error)


def warm_up_in_memory(
    model: RecurrentGPT, optimizers: Optimizers, config: Config, machine: Machine, report: Callable[[dict], None]
) -> int:
    """Warm up, with half the micro-batch if memory runs out once. Returns the rows that fit. Raises UsageError."""
    rows = config.recipe.batch_tokens // config.recipe.sequence_length // machine.world
    micro = config.run.micro_rows or rows
    half = next(n for n in range(max(1, micro // 2), 0, -1) if rows % n == 0)
    for attempt in (micro, half):
        if warm_up(model, optimizers, config, machine, attempt):
            return attempt
        report({"event": "memory", "message": f"{attempt} rows at a time do not fit in memory"})
    raise UsageError(f"--run.micro-rows {micro}: neither {micro} nor {half} rows fit in memory, give fewer.")
