"""The clock stops before the cap whatever the steps take, uses nearly all of it, and leaves pauses out."""

import statistics
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from golf.clock import Clock, StepCounter


class Time:
    """A time that moves only when told to: the clock's `now` is a parameter."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def simulate(cap: float, durations, reserve: float = 0.0, update_share: float = 0.1) -> tuple[list[float], Time, Clock]:
    """Train with steps of the given durations; returns when each update that stays in the weights ended."""
    time = Time()
    clock = Clock(cap, reserve, now=time)
    updates = []
    for duration in durations:
        if clock.begin_step() is None:
            break
        time.seconds += duration * (1 - update_share)
        if not clock.may_update():
            break
        time.seconds += duration * update_share
        clock.end_step()
        if clock.late:
            break  # taken back
        updates.append(clock.elapsed())
    else:
        raise AssertionError("the clock never stopped")
    return updates, time, clock


def endless(values):
    while True:
        yield from values


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.floats(0.001, 5.0), min_size=1, max_size=60),
    st.floats(0.0, 3.0),
    st.integers(0, 40),
    st.floats(0.0, 1.0),
)
def test_no_update_that_ends_after_the_cap_stays_under_hostile_steps(durations, stall, every, share):
    def steps():
        for n, d in enumerate(endless(durations)):
            yield d + (stall * 20 if every and n % (every + 1) == every else 0)

    updates, _, clock = simulate(60.0, steps(), update_share=share)
    assert all(u <= clock.limit for u in updates)


def test_an_update_that_ends_late_is_known_for_late():
    time = Time()
    clock = Clock(10.0, now=time)
    assert clock.begin_step() == 0.0
    time.seconds += 9.9
    assert clock.may_update()
    time.seconds += 0.2
    clock.end_step()
    assert clock.late and clock.begin_step() is None


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.01, 2.0), st.floats(0.01, 2.0)), min_size=1, max_size=40),
    st.floats(0.0, 0.9),
)
def test_two_ranks_decide_alike(durations, share):
    """Two clocks whose answers meet in a barrier, as an all-reduce makes them; a difference would hang real ranks."""
    barrier = threading.Barrier(2, timeout=5)
    values = [0.0, 0.0]
    decisions: list[list] = [[], []]

    def rank(me: int) -> None:
        time = Time()

        def agree(mine: float) -> float:
            values[me] = mine
            barrier.wait()
            both = max(values)
            barrier.wait()
            return both

        clock = Clock(20.0, agree=agree, now=time)
        for pair in endless(durations):
            progress = clock.begin_step()
            decisions[me].append(progress)
            if progress is None:
                return
            time.seconds += pair[me] * (1 - share)
            decisions[me].append(clock.may_update())
            if not decisions[me][-1]:
                return
            time.seconds += pair[me] * share
            clock.end_step()

    threads = [threading.Thread(target=rank, args=(me,)) for me in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(30)
    assert decisions[0] == decisions[1] and decisions[0][-1] in (None, False)


def test_median_use_of_the_cap_is_at_least_97_percent():
    import random

    shares = []
    for seed in range(200):
        rng = random.Random(seed)
        base = rng.uniform(0.02, 1.0)
        kind = seed % 4

        def duration(rng=rng, base=base, kind=kind):
            if kind == 0:
                return base
            if kind == 1:
                return base * rng.lognormvariate(0, 0.3)
            if kind == 2:
                return base * (5 if rng.random() < 0.02 else 1)
            return base * (1 + 0.5 * rng.random())

        updates, _, _ = simulate(600.0, iter(duration, None))
        assert updates[-1] <= 600.0
        shares.append(updates[-1] / 600.0)
    assert statistics.median(shares) >= 0.97


def test_pauses_are_left_out_even_when_they_raise():
    time = Time()
    clock = Clock(10.0, now=time)
    time.seconds += 2
    with clock.paused():
        time.seconds += 100
    with pytest.raises(RuntimeError), clock.paused():
        time.seconds += 50
        raise RuntimeError
    assert clock.elapsed() == 2
    assert clock.begin_step() == 0.2
    assert clock.left_out == 150


def test_all_ranks_hear_the_slowest():
    time = Time()
    clock = Clock(10.0, agree=lambda mine: max(mine, 9.5), now=time)
    assert clock.begin_step() == 0.95
    clock.steps.append(0.6)
    assert clock.begin_step() is None


def test_reserve_is_kept_and_must_leave_something():
    updates, _, _ = simulate(10.0, endless([0.5]), reserve=4.0)
    assert 5.0 < updates[-1] <= 6.0
    with pytest.raises(ValueError, match="reserve"):
        Clock(10.0, 10.0)


def test_step_counter_reads_no_time():
    counter = StepCounter(4)
    seen = []
    while (progress := counter.begin_step()) is not None:
        assert counter.may_update()
        counter.end_step()
        seen.append(progress)
    assert seen == [0.0, 0.25, 0.5, 0.75]
