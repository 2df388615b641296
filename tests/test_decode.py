"""Writing one token at a time: each step is what the whole row at once says of its last position."""

from __future__ import annotations

import pytest
import torch
from test_exits import OPTIONS, RULES, model_of, tokens_of

from golf import exits
from golf.decode import Decoder, write
from golf.exits import run_exits

WHOLE = OPTIONS | {
    "skips": {"skips": True}, "lanes": {"lanes": True}, "one loop": {"loops": 1, "skips": True},
}  # fmt: skip


def steps(decoder: Decoder, row: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    found = [decoder.step(int(token)) for token in row]
    return torch.stack([logprobs for logprobs, _ in found]), [loops for _, loops in found]


@pytest.mark.parametrize("name", WHOLE)
def test_all_loops_step_by_step_are_the_row_at_once(name):
    model, tokens = model_of(**WHOLE[name]), tokens_of(1)
    one, loops = steps(Decoder(model, 48, dtype=torch.float64), tokens[0])
    whole = torch.log_softmax(model(tokens, dtype=torch.float64), dim=-1)[0]
    torch.testing.assert_close(one, whole)
    assert set(loops) == {model.shape.loops}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_tokens_that_stop_step_by_step_are_the_row_at_once(name, rule):
    model, tokens = model_of(**OPTIONS[name]), tokens_of(1)
    one, loops = steps(Decoder(model, 40, rule, torch.float64), tokens[0])
    whole = run_exits(model, tokens, rule, torch.float64)
    assert loops == whole.depths[0].tolist()
    torch.testing.assert_close(one, torch.log_softmax(model.head(whole.states), dim=-1)[0])
    assert type(rule) in (exits.FixedDepth, exits.Difference) or len(set(loops)) > 1


@pytest.mark.parametrize("gate", ["hazard", "act"])
def test_a_gate_stops_the_same_tokens_step_by_step(gate):
    model, tokens = model_of(exit_gate=gate), tokens_of(1)
    model.exit_bias.add_(1.0)
    rule = exits.Gate(0.7)
    one, loops = steps(Decoder(model, 40, rule, torch.float64), tokens[0])
    whole = run_exits(model, tokens, rule, torch.float64)
    assert loops == whole.depths[0].tolist() and len(set(loops)) > 1
    torch.testing.assert_close(one, torch.log_softmax(model.head(whole.states), dim=-1)[0])


def test_a_full_row_goes_on_from_its_last_half():
    model = model_of()
    short, prompt = Decoder(model, 16, dtype=torch.float64), [1, 5, 9]
    found = list(write(short, prompt, 40, 0, seed=1))
    assert [w.token for w in found[:2]] == [5, 9] and len(short.row) <= 16
    row = [1, *(w.token for w in found)]
    assert short.row == row[-len(short.row) - 1 : -1]
    again = Decoder(model, 16, dtype=torch.float64)
    last, _ = steps(again, torch.tensor(short.row))
    assert found[-1].token == int(last[-1].argmax())


def test_a_drawn_text_repeats_with_its_seed_and_ends_at_a_document():
    model = model_of()
    once, same, other = (
        [w.token for w in write(Decoder(model, 64, dtype=torch.float64), [1], 30, 1.0, seed)] for seed in (1, 1, 2)
    )
    assert once == same != other and len(once) <= 30 and 1 not in once
