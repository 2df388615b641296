"""Presets, limits and the sentences for options that cannot work."""

import json
from dataclasses import asdict, fields, replace

import pytest

from golf.checks import check_shape
from golf.config import RETIRED, TRACKS, Config, shape_from_dict
from golf.errors import UsageError
from golf.model import RecurrentGPT
from golf.presets import PRESETS, flags_of, parse_command_line
from golf.recipe import Recipe, Run
from golf.shape import Shape


def test_baseline_has_the_published_number_of_parameters():
    assert PRESETS["baseline"].shape.parameter_count == 17_059_912


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_builds(name):
    config = PRESETS[name].check()
    assert config.preset == name
    model = RecurrentGPT(config.shape)
    assert sum(p.numel() for p in model.parameters()) == config.shape.parameter_count


def test_the_proposals_shapes():
    expected = {
        "3x3-768": (768, 3, 9), "3x4-768": (768, 3, 12), "3x3-1024": (1024, 3, 9), "4x3-768": (768, 4, 12),
        "2x6-1024": (1024, 2, 12), "4x3-640": (640, 4, 12),
    }  # fmt: skip
    for name, (width, unique, effective) in expected.items():
        shape = PRESETS[name].shape
        assert (shape.width, shape.unique_layers, shape.effective_layers) == (width, unique, effective)
        assert (shape.head_size, shape.kv_heads * 2, shape.mlp_width, shape.vocab_size) == (
            64, shape.heads, 2 * width, 1024,
        )  # fmt: skip


def test_record_runs_layers_three_to_five_three_times():
    shape = PRESETS["record"].shape
    assert shape.order() == (0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10)
    assert shape.order(1) == tuple(range(11))
    # The record's split: the first 8 effective layers push, 8 of the last 9 pop.
    assert shape.skip_layers() == range(8, 16)


def test_baseline_schedules_are_the_steps_of_the_real_run():
    recipe = PRESETS["baseline"].recipe
    assert recipe.rate_scale((13_780 - 1200) / 13_780) == pytest.approx(1)
    assert recipe.rate_scale((13_780 - 600) / 13_780) == pytest.approx(0.5)
    assert recipe.momentum_at(0) == 0.85
    assert recipe.momentum_at(250 / 13_780) == pytest.approx(0.90)
    assert recipe.momentum_at(500 / 13_780) == recipe.momentum_at(1) == 0.95
    assert (recipe.matrix_rate, recipe.embed_rate, recipe.scalar_rate) == (0.04, 0.05, 0.04)


def test_tracks():
    limits = {name: (t.train_seconds, t.eval_seconds, t.bytes_cap) for name, t in TRACKS.items()}
    assert limits == {
        "contest": (600, 600, 16_000_000), "laptop": (600, 600, 400_000), "smoke": (60, 120, 400_000),
        "unlimited": (float("inf"), 600, 16_000_000),
    }  # fmt: skip


def test_a_track_without_a_clock_wants_a_number_of_steps():
    config = parse_command_line(["baseline", "--track", "unlimited", "--run.cap", "0"])
    with pytest.raises(UsageError, match="give --run.max-steps"):
        config.check()
    assert replace(config, run=Run(max_steps=5)).check().train_seconds == float("inf")
    assert replace(config, run=Run(cap=3600.0)).check().train_seconds == 3600


def test_fingerprint_is_of_the_configuration_and_not_of_the_seed():
    config = PRESETS["smoke"]
    assert replace(config, run=Run(seed=7, data="elsewhere")).fingerprint == config.fingerprint
    assert replace(config, recipe=replace(config.recipe, matrix_rate=0.5)).fingerprint != config.fingerprint


@pytest.mark.parametrize(
    ("change", "option"),
    [
        ({"width": 130, "heads": 8}, "--shape.width 130"),
        ({"kv_heads": 3}, "--shape.kv-heads 3"),
        ({"loops": 0}, "--shape.loops 0"),
        ({"vocab_size": 70_000}, "--shape.vocab-size 70000"),
        ({"width": 24, "heads": 8}, "--shape.heads 8"),
        ({"softcap": 0.0}, "--shape.softcap 0.0"),
    ],
)
def test_shapes_that_cannot_be_are_named(change, option):
    with pytest.raises(UsageError, match=option):
        check_shape(replace(Shape(), **change))


@pytest.mark.parametrize(
    ("recipe", "run", "world", "option"),
    [
        ({"batch_tokens": 1000}, {}, 1, "--recipe.batch-tokens 1000"),
        ({"batch_tokens": 3 * 1024}, {}, 2, "2 ranks"),
        ({"warmdown": 1.5}, {}, 1, "--recipe.warmdown 1.5"),
        ({"matrix_rate": float("nan")}, {}, 1, "--recipe.matrix-rate nan"),
        ({}, {"micro_rows": 7}, 1, "--run.micro-rows 7"),
        ({}, {"cap": 1e6}, 1, "--run.cap"),
        ({}, {"seed": -1}, 1, "--run.seed -1"),
        ({}, {"seed": 10**20}, 1, "--run.seed 1"),
    ],
)
def test_recipes_that_cannot_be_are_named(recipe, run, world, option):
    with pytest.raises(UsageError, match=option):
        Config(recipe=replace(Recipe(), **recipe), run=replace(Run(), **run)).check(world)


def test_shape_survives_json_and_refuses_strangers():
    shape = PRESETS["record"].shape
    assert shape_from_dict(json.loads(json.dumps(asdict(shape)))) == shape
    for bad in (
        {"widht": 3}, {"width": "512"}, {"width": True}, {"loops": 1e12}, {"mlp_ratio": float("nan")}, {"core": 10**9},
        [], None, {"skips": 1}, {"width": -8},
    ):  # fmt: skip
        with pytest.raises(UsageError):
            shape_from_dict(bad)


def test_every_option_of_shape_and_recipe_has_a_reason_or_a_plain_name():
    plain = {"adam_beta1", "adam_beta2", "adam_epsilon"}
    import inspect

    for kind in (Shape, Recipe):
        source = inspect.getsource(kind)
        for f in fields(kind):
            after = source.split(f"    {f.name}:", 1)[1].split("\n", 2)[1]
            assert f.name in plain or after.strip().startswith('"""'), f"{kind.__name__}.{f.name} is not explained"


def test_flags_give_the_configuration_back():
    words = "--shape.skips --shape.width 96 --shape.pass-scalars --recipe.loader sequential"
    packing = "--run.seed 3 --run.name x --pack.matrix-step 0.4 --pack.embed-step 0.2 --scoring.stride 64"
    config = parse_command_line(["laptop", *words.split(), *packing.split()], "test")
    flags = flags_of(config)
    assert parse_command_line(["laptop", *flags], "test") == config
    assert "--shape.pass-scalars" not in flags and "--shape.skips" in flags  # the first is the preset's own
    assert flags_of(PRESETS["baseline"]) == []


def test_options_that_are_gone_change_no_fingerprint():
    assert Config().fingerprint == "721817ea86f80720"  # of the program that had them


def test_a_record_may_name_an_option_that_is_gone_as_if_it_had_not_been_used():
    told = asdict(Shape()) | RETIRED["shape"]
    assert shape_from_dict(told) == Shape()
    with pytest.raises(UsageError, match="unknown field 'value_blocks'"):
        shape_from_dict(told | {"value_blocks": 2})
    with pytest.raises(UsageError, match="unknown field 'nothing'"):
        shape_from_dict(told | {"nothing": ""})
