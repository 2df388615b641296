"""Gates that learn when to stop: gradients, their start, ACT that freezes, and the same depths however computed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from golf import exits, halting
from golf.config import Config
from golf.errors import UsageError
from golf.exits import run_exits
from golf.model import RecurrentGPT, role_of
from golf.objective import Objective, pass_statistics
from golf.recipe import Recipe, Scoring
from golf.shape import Shape, tensor_class
from tests import naive_halting
from tests.conftest import TINY, run
from tests.test_exits import model_of, tokens_of

SHAPE = Shape(vocab_size=64, width=32, heads=4, kv_heads=2, prelude=1, core=2, coda=1, loops=4, skips=False)
LOOPS = 4


def config_of(gate: str = "hazard", **recipe: object) -> Config:
    return Config(shape=replace(SHAPE, exit_gate=gate), recipe=Recipe(depth_loss="gate", **recipe))


def fresh(gate: str, **recipe: object) -> RecurrentGPT:
    return RecurrentGPT(replace(SHAPE, exit_gate=gate)).initialize(Recipe(**recipe), 1)


@pytest.mark.parametrize("gate", ["hazard", "act"])
def test_no_matrix_optimizer_touches_a_gate_and_it_is_stored(gate):
    names = [n for n, _ in fresh(gate).named_parameters() if n.startswith("exit_")]
    assert names == ["exit_weight", "exit_bias"]
    assert all(role_of(n).optimizer == "scalar" and tensor_class(n) == "control" for n in names)


def test_gates_start_at_their_prior_or_go_on():
    tokens = tokens_of()
    model = fresh("hazard")
    hazards = torch.stack([model.gate(x, t) for t, x in enumerate(model.each(tokens)[0][:-1], 1)])
    torch.testing.assert_close(halting.exit_logprobs(hazards).exp(), torch.full((LOOPS, 3, 40), 0.25))
    geometric = torch.tensor(fresh("hazard", prior_hazard=0.3).exit_bias[0].tolist())[:, None]
    torch.testing.assert_close(halting.exit_logprobs(geometric)[:, 0], halting.prior_logprobs(LOOPS, 0.3))
    act = fresh("act")
    torch.testing.assert_close(torch.sigmoid(act.exit_bias), torch.full((1, 3), 0.04743), rtol=1e-3, atol=0)
    assert (act.pondered(tokens).passes == LOOPS).all()
    keeps = fresh("hazard", gate_bias=-2.0)
    assert (keeps.exit_bias == model.exit_bias - 2).all()


def test_the_gates_loss_is_the_sum_over_exits_and_reaches_gate_and_model():
    """Defect 1: returning the last state leaves the gate without a gradient from the model's loss."""
    tokens = tokens_of()
    targets, config = tokens.roll(-1, 1), config_of(prior_weight=0.1, prior_hazard=0.3)
    model = model_of(exit_gate="hazard").requires_grad_()
    states, final = model.each(tokens, torch.float64)
    hazards = torch.stack([model.gate(x, t) for t, x in enumerate(states[:-1], 1)])
    stop = torch.sigmoid(hazards)
    chances = torch.stack([stop[0], stop[1] * (1 - stop[0]), stop[2] * (1 - stop[1]) * (1 - stop[0]),
                           (1 - stop).prod(0)])  # fmt: skip
    losses = torch.stack([
        F.cross_entropy(model.head(f).flatten(0, 1), targets.flatten(), reduction="none").view(3, 40) for f in final
    ])  # fmt: skip
    prior = torch.tensor([0.3, 0.3 * 0.7, 0.3 * 0.49, 0.3 * 0.343])
    prior = (prior / prior.sum())[:, None, None]
    wanted = (chances * losses).sum(0).mean() + 0.1 * (chances * (chances / prior).log()).sum(0).mean()
    objective = Objective(config)
    objective.begin(1.0)
    found = objective.loss(model, tokens, targets, torch.float64, LOOPS)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    named = dict(model.named_parameters())
    ours = torch.autograd.grad(found, list(named.values()))
    theirs = torch.autograd.grad(wanted, list(named.values()))
    for name, a, b in zip(named, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6, msg=name)
    assert dict(zip(named, ours, strict=True))["exit_weight"].abs().min() > 0
    last_only = torch.autograd.grad(model(tokens, targets, torch.float64), model.exit_weight, allow_unused=True)
    assert last_only[0] is None  # the planted mistake


@pytest.mark.parametrize("gate", ["hazard", "act"])
def test_the_penalty_reaches_the_gate_and_asks_for_less_depth(gate):
    """Defect 7: a count of steps as the penalty has no gradient, whatever its weight."""
    tokens, model = tokens_of(), fresh(gate, gate_bias=2.0 if gate == "act" else 0.0)
    found = []
    for penalty in (0.0, 0.5):
        objective = Objective(config_of(gate, halt_penalty=penalty, halt_warmup=0.0, prior_weight=0.0))
        objective.begin(1.0)
        loss = objective.loss(model, tokens, tokens.roll(-1, 1), torch.float32, LOOPS)
        found.append(torch.autograd.grad(loss, model.exit_bias)[0])
    assert (found[1][0, 0] < found[0][0, 0]).all()  # a step against it raises the first logit: an earlier stop
    counted = model.pondered(tokens).passes.float().mean()
    assert not counted.requires_grad  # the planted mistake


def test_the_penalty_rises_and_is_steered():
    objective = Objective(config_of(halt_penalty=0.4, halt_warmup=0.2, target_depth=2.0, loops_from=0.5))
    for progress, penalty in ((0.1, 0.0), (0.5, 0.0), (0.6, 0.2), (0.8, 0.4)):
        objective.begin(progress)
        assert objective.penalty == pytest.approx(penalty)
    for _ in range(10):
        objective.steer(3.0)
    objective.begin(1.0)
    assert objective.penalty == pytest.approx(0.4 + 10 * 0.02 / 4)
    for _ in range(100):
        objective.steer(1.0)
    objective.begin(1.0)
    assert objective.penalty < 0  # depth is paid for when there is too little


@pytest.mark.parametrize("bias", [-1.0, 0.5, 3.0])
def test_act_is_what_its_definition_says_of_states_that_froze(bias):
    """Against a slow version, token by token and pass by pass, whose stopped tokens are never touched again."""
    model, tokens = model_of(exit_gate="act"), tokens_of(2, 24)
    with torch.no_grad():
        model.exit_bias.fill_(bias)
        model.exit_weight.mul_(0.3)
    found = model.pondered(tokens, torch.float64)
    given = model.enter(tokens, torch.float64)
    x = model.prelude(given)
    running, kept = torch.ones(2, 24, dtype=torch.bool), model.nothing_kept(x)
    states, stops = [], []
    for passed in range(1, LOOPS + 1):
        for bank in kept:
            bank.moves = running
        x = torch.where(running[..., None], model.core_pass(x, given, passed, kept), x)
        states.append(x)
        stops.append(torch.sigmoid(model.gate(x, passed)) if passed < LOOPS else torch.ones(2, 24))
        weights, passes, _ = naive_halting.act(torch.stack(stops))
        running = running & (torch.stack(stops).sum(0) < 1 - halting.EPSILON)
    mixed = (weights[..., None] * torch.stack(states)).sum(0)
    torch.testing.assert_close(found.states, model.coda(mixed, given))
    assert torch.equal(found.passes, passes.long())
    torch.testing.assert_close(weights.sum(0), torch.ones(2, 24, dtype=torch.float64))


@pytest.mark.parametrize("quantile", [0.1, 0.4, 0.6, 0.9])
def test_a_threshold_is_a_quantile_of_the_exits_at_every_pass(quantile):
    """Of a model without attention, where no token's hazards depend on who has stopped."""
    model, tokens = model_of(exit_gate="hazard"), tokens_of()
    with torch.no_grad():
        for block in model.blocks:
            block.out.zero_()
    states, _ = model.each(tokens, torch.float64)
    hazards = torch.stack([model.gate(x, t) for t, x in enumerate(states[:-1], 1)])
    wanted = naive_halting.quantile_exit(halting.exit_logprobs(hazards), quantile)
    found = run_exits(model, tokens, exits.Gate(quantile), torch.float64).depths
    assert torch.equal(found, wanted) and (len(wanted.unique()) > 1 or quantile == 0.1)


@pytest.mark.parametrize(("gate", "threshold"), [("hazard", 0.3), ("hazard", 0.6), ("act", 0.99), ("act", 0.6)])
def test_gated_tokens_stop_alike_gathered_or_not_alone_or_not_and_whatever_follows(gate, threshold):
    model, tokens, rule = model_of(exit_gate=gate), tokens_of(), exits.Gate(threshold)
    if gate == "act":
        model.exit_bias += 4.0
    whole, some = (run_exits(model, tokens, rule, torch.float64, gather) for gather in (False, True))
    assert torch.equal(whole.depths, some.depths) and len(whole.depths.unique()) > 1
    torch.testing.assert_close(whole.states, some.states)
    assert sum(some.computed) < sum(whole.computed)
    for row in range(3):
        alone = run_exits(model, tokens[row : row + 1], rule, torch.float64)
        assert torch.equal(alone.depths[0], some.depths[row])
        torch.testing.assert_close(alone.states[0], some.states[row])
    for at in (1, 13, 39):
        prefix = run_exits(model, tokens[:, :at], rule, torch.float64)
        assert torch.equal(prefix.depths, some.depths[:, :at])
        torch.testing.assert_close(prefix.states, some.states[:, :at])
    if gate == "hazard":
        states = model.each(tokens, torch.float64)[0]
        first = torch.sigmoid(model.gate(states[0], 1)) >= threshold
        assert torch.equal(first, some.depths == 1)


def test_an_act_model_scores_as_it_trains():
    model, tokens = model_of(exit_gate="act"), tokens_of()
    model.exit_bias += 4.0
    for gather in (False, True):
        found = run_exits(model, tokens, exits.Gate(1 - halting.EPSILON), torch.float64, gather)
        torch.testing.assert_close(found.states, model.hidden(tokens, torch.float64))
        assert torch.equal(found.depths, model.pondered(tokens, torch.float64).passes)


def test_residual_scaling_divides_what_passes_add():
    model, tokens = model_of(loop_scale=True), tokens_of()
    states = model.each(tokens, torch.float64)[0]
    other = model_of()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.attn_scale[1:3] /= LOOPS
        other.mlp_scale[1:3] /= LOOPS
    torch.testing.assert_close(states, other.each(tokens, torch.float64)[0])


def test_passes_are_watched():
    model, tokens = model_of(), tokens_of()
    found = pass_statistics(model, tokens.numpy(), torch.float64, LOOPS)
    states = model.each(tokens, torch.float64)[0]
    assert found["state_norms"] == pytest.approx(states.square().mean(-1).sqrt().mean((1, 2)).tolist(), abs=1e-3)
    cosine = F.cosine_similarity(states[1], states[0], dim=-1).mean().item()
    assert len(found["state_cosines"]) == 3 and found["state_cosines"][0] == pytest.approx(cosine, abs=1e-4)


@pytest.mark.parametrize(("change", "said"), [
    ({"recipe": Recipe(depth_loss="gate")}, "--shape.exit-gate"),
    ({"shape": replace(SHAPE, exit_gate="act")}, "--recipe.depth-loss gate"),
    ({"shape": replace(SHAPE, exit_gate="hazard", skips=True)}, "no-skips"),
    ({"recipe": Recipe(halt_penalty=0.1)}, "halt-penalty 0.1: it needs --recipe.depth-loss gate"),
    ({"shape": replace(SHAPE, exit_gate="hazard"), "recipe": Recipe(depth_loss="gate", target_depth=5)}, "1 to 4"),
    ({"scoring": Scoring(exit="gate", exit_threshold=0.5)}, "has no gate"),
    ({"shape": replace(SHAPE, exit_gate="act"), "recipe": Recipe(depth_loss="gate"),
      "scoring": Scoring(exit="entropy", exit_threshold=1.0)}, "give gate"),
])  # fmt: skip
def test_what_cannot_be_trained_or_asked_is_refused(change, said):
    with pytest.raises(UsageError, match=said):
        replace(Config(shape=SHAPE), **change).check()


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["hazard", "act"])
def test_a_gate_trains_is_packed_and_stops_tokens(gate, corpus, tmp_path):
    words = ["train_gpt.py", "smoke", *TINY, "--run.data", corpus, "--run.runs", tmp_path, "--run.max-steps", 12,
             "--run.name", "gate", "--run.log-every", 4, "--shape.no-skips", "--shape.exit-gate", gate,
             "--recipe.depth-loss", "gate", "--recipe.loops-from", "0.3", "--recipe.halt-penalty", "0.1",
             "--recipe.target-depth", "2", "--run.no-judge", "--pack.calibration-batches", 0]  # fmt: skip
    done = run(*words)
    assert done.returncode == 0, done.stderr
    folder = next(tmp_path.glob("*-gate"))
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = [r for r in rows if r["event"] == "step"]
    assert steps[0]["mean_depth"] == 1 and steps[-1]["mean_depth"] > 1 and steps[-1]["gate_gradient_norm"] > 0
    if gate == "hazard":
        assert len(steps[-1]["pass_losses"]) == 3
    watched = [r for r in rows if r["event"] == "passes"]
    assert watched and len(watched[-1]["state_norms"]) == 3 and len(watched[-1]["state_cosines"]) == 2
    out = tmp_path / "rescored"
    done = run("artifact.py", "rescore", folder, out, "--exit", "gate", "--exit-threshold", "0.5")
    assert done.returncode == 0, done.stderr
    done = run("eval_bpb.py", out, "--data", corpus, "--json")
    assert json.loads(done.stdout)["valid"], done.stdout + done.stderr


@pytest.mark.slow
def test_the_adaptive_model_of_100_m_weights_takes_three_steps_on_a_processor():
    from golf.machine import Machine, accumulate
    from golf.muon import Optimizers
    from golf.presets import PRESETS

    preset = PRESETS["adaptive100m"]
    recipe = replace(preset.recipe, sequence_length=128, batch_tokens=128, newton_schulz_steps=3)
    config = replace(preset, recipe=recipe)
    machine = Machine(torch.device("cpu"), torch.float32, "none")
    model = RecurrentGPT(config.shape).initialize(config.recipe, 1)
    optimizers, objective = Optimizers(model, config.recipe), Objective(config)
    row = torch.randint(2, 8192, (1, 129), generator=torch.Generator().manual_seed(0)).numpy()
    losses = []
    for step in range(3):
        optimizers.zero_grad()
        objective.begin(step / 3)
        losses.append(float(accumulate(model, [(row[:, :-1], row[:, 1:])], machine, 4, objective)))
        optimizers.step(step / 3)
    assert losses[2] < losses[0] and objective.told(model)["mean_depth"] > 1
