"""Named configurations, and the command line that changes one."""

from __future__ import annotations

import os
from dataclasses import fields, replace

from golf.config import Config
from golf.console import parse
from golf.errors import require
from golf.recipe import Pack, Recipe, Run
from golf.shape import Shape

BASELINE = Config("baseline", "contest", Shape(), Recipe())


def seed_table(name: str, width: int, unique: int, loops: int) -> Config:
    """A row of the looping proposal: `unique` blocks run `loops` times, head size 64, half as many KV heads."""
    heads = width // 64
    shape = Shape(width=width, heads=heads, kv_heads=heads // 2, core=unique, loops=loops)
    return Config(name, "contest", shape, Recipe())


LAPTOP_SHAPE = Shape(
    vocab_size=4096, width=128, heads=2, kv_heads=1, prelude=1, core=1, coda=1, loops=3, skips=False,
    pass_scalars=True,
)  # fmt: skip
LAPTOP_RECIPE = Recipe(
    sequence_length=256, batch_tokens=4096, loader="strided", matrix_rate=0.03, embed_rate=0.05, scalar_rate=0.03,
    momentum_warmup=0.1, warmdown=1.0, loops_from=0.6,
)  # fmt: skip

PRESETS = {
    config.preset: config
    for config in (
        BASELINE,
        seed_table("3x3-768", 768, 3, 3),
        seed_table("3x4-768", 768, 3, 4),
        seed_table("3x3-1024", 1024, 3, 3),
        seed_table("4x3-768", 768, 4, 3),
        seed_table("2x6-1024", 1024, 2, 6),
        seed_table("4x3-640", 640, 4, 3),
        Config(
            "record",
            "contest",
            Shape(vocab_size=8192, mlp_ratio=4.0, prelude=3, core=3, coda=5, loops=3),
            Recipe(
                sequence_length=2048, batch_tokens=786_432, matrix_rate=0.026, embed_rate=0.03, scalar_rate=0.02,
                loops_from=0.35, momentum=0.97, momentum_start=0.92, momentum_warmup=0.3,
                newton_schulz="polar-express", row_normalize=True, matrix_decay=0.095, embed_decay=0.085,
                adam_beta2=0.99, warmdown=0.85, rate_floor=0.1, clip_norm=0.3, qk_gain=5.0,
            ),
        ),
        Config(
            "gpu24gb",
            "contest",
            Shape(width=640, heads=10, kv_heads=5, prelude=2, core=2, coda=2, loops=3, mlp_ratio=3.0),
            Recipe(
                sequence_length=1024, batch_tokens=131_072, matrix_rate=0.03, newton_schulz="polar-express",
                row_normalize=True, loops_from=0.35, warmdown=0.6, clip_norm=1.0,
            ),
            run=Run(micro_rows=32),
        ),
        # The proposal to let tokens decide how long to think: 6 blocks of 16.8 M weights, far beyond any contest's cap.
        Config(
            "adaptive100m", "contest",
            Shape(
                vocab_size=8192, width=1024, heads=8, kv_heads=8, mlp_ratio=6.0, core=6, loops=4, skips=False,
                exit_gate="hazard",
            ),
            Recipe(
                sequence_length=512, batch_tokens=4096, matrix_rate=0.01, embed_rate=0.005, scalar_rate=0.01,
                newton_schulz="polar-express", row_normalize=True, warmdown=0.6, clip_norm=1.0, depth_loss="gate",
                halt_penalty=0.01,
            ),
            Pack(0.1, 0.1),
            Run(allow_over_cap=True),
        ),
        Config("laptop", "laptop", LAPTOP_SHAPE, replace(LAPTOP_RECIPE, matrix_rate=0.015)),
        Config("laptop_flat", "laptop", replace(LAPTOP_SHAPE, loops=1), LAPTOP_RECIPE),
        Config(
            "laptop_naive", "laptop", Shape(width=96, heads=4, kv_heads=2, core=4),
            replace(BASELINE.recipe, sequence_length=256, batch_tokens=8192),  # best of three pairs (LAB.md)
            # int8 at 127 steps to a row's largest weight.
            Pack(
                1 / 40, 1 / 40, rounding="nearest", quantizer="scalar", column_steps=False, row_power=1.0,
                coder="static", calibration_batches=0,
            ),
            Run(dtype="float32"),  # as the contest's trainer ported to a CPU: compiled, in float32
        ),
        Config(
            "smoke", "smoke",
            replace(LAPTOP_SHAPE, vocab_size=1024, width=96),
            LAPTOP_RECIPE,
            Pack(calibration_batches=2),  # 16 took 5 of its 60 seconds, and its artifact has room
        ),
    )
}  # fmt: skip


def parse_command_line(arguments: list[str], program: str = "train_gpt.py") -> Config:
    """PRESET [flags] as a Config; SEED and DATA_PATH give defaults. Raises UsageError in one sentence."""
    import tyro

    def with_environment(config: Config) -> Config:
        run = config.run
        seed = os.environ.get("SEED")
        if seed:
            require(seed.isdecimal(), "run.seed", f"{seed} (from SEED)", "give a whole number")
            run = replace(run, seed=int(seed))
        if os.environ.get("DATA_PATH"):
            run = replace(run, data=os.environ["DATA_PATH"])
        return replace(config, run=run)

    # Only the preset asked for: building a parser for all of them takes a second.
    names = arguments[:1] if arguments[:1] and arguments[0] in PRESETS else PRESETS
    choices = {name: (about(PRESETS[name]), with_environment(PRESETS[name])) for name in names}
    return parse(tyro.extras.overridable_config_cli, choices, prog=program, args=arguments)


def about(config: Config) -> str:
    """One line on a preset."""
    shape = config.shape
    return (
        f"{config.track}: {shape.unique_layers} unique, {shape.effective_layers} effective layers, "
        f"width {shape.width}, vocabulary {shape.vocab_size}"
    )


def flags_of(config: Config) -> list[str]:
    """The command-line flags that turn the configuration's preset into it."""
    flags = ["--track", config.track] if config.track != PRESETS[config.preset].track else []
    for part in ("shape", "recipe", "pack", "scoring", "run"):
        ours, usual = getattr(config, part), getattr(PRESETS[config.preset], part)
        for field in fields(ours):
            value, name = getattr(ours, field.name), field.name.replace("_", "-")
            if value != getattr(usual, field.name):
                plain = [f"--{part}.{name}", str(value)]
                flags += [f"--{part}.{'' if value else 'no-'}{name}"] if isinstance(value, bool) else plain
    return flags
