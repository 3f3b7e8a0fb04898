"""Guesses: where they come from, how many are worth it, and that those that never come true cost next to nothing."""

import pytest

from lexmill.inference.native.speculation import MOST_GUESSES, Pace, PromptLookup, Speculation


def test_lookup_finds_what_stood_behind_the_same_tokens():
    lookup = PromptLookup()
    text = [1, 2, 3, 4, 5, 6, 9, 9]
    assert lookup.propose(text, 4) == []
    assert lookup.propose([*text, 3, 4, 5], 3) == [6, 9, 9]
    assert lookup.propose([*text, 3, 4, 5, 6], 99) == [9, 9, 3, 4, 5, 6]
    # the longest match counts, and of equal ones the last
    again = PromptLookup()
    assert again.propose([7, 1, 2, 8, 0, 1, 2, 5, 7, 1, 2], 1) == [8]
    assert PromptLookup().propose([1, 2, 8, 1, 2, 5, 1, 2], 1) == [5]


def paced(fixed, each):
    pace = Pace()
    for number in range(60):
        tokens = 1 + number % 4
        pace.measured(tokens, fixed + each * tokens)
    return pace


def test_costs_are_found_from_steps_of_different_sizes():
    assert paced(0.004, 0.001).costs == pytest.approx((0.004, 0.001), rel=0.01)
    pace = paced(0.004, 0.001)
    pace.measured(1, 10.0)  # somebody else's moment
    assert pace.costs[0] < 0.01


def test_how_many_guesses_pay():
    cheap, dear = paced(0.01, 0.0001), paced(0.0001, 0.01)
    assert cheap.best(0.9, 1, MOST_GUESSES) == MOST_GUESSES
    assert dear.best(0.9, 1, MOST_GUESSES) == 0
    assert dear.best(0.0, 1, MOST_GUESSES) == cheap.best(0.0, 1, MOST_GUESSES) == 0
    middle = paced(0.004, 0.002)
    counts = [middle.best(rate / 10, 1, MOST_GUESSES) for rate in range(10)]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] > 1
    # with many texts in a step, what it costs is shared already
    assert middle.best(0.8, 16, MOST_GUESSES) <= middle.best(0.8, 1, MOST_GUESSES)


class Always:
    """Guesses all the time."""

    def propose(self, ids, most):
        return [1] * most

    def close(self):
        pass


@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize(("fixed", "each"), [(0.004, 0.001), (0.0001, 0.003)])
def test_guesses_pay_or_are_left(right, fixed, each):
    """A clock of our own: a thousand tokens with guesses against a thousand without."""
    speculation = Speculation(Always(), paced(fixed, each))
    taken, written = 0.0, 0
    while written < 1000:
        guesses = speculation.propose([1] * (written + 1), 1000 - written, 1)
        taken += fixed + each * (1 + len(guesses))
        kept = len(guesses) if right else 0
        if guesses:
            speculation.learn(kept)
        written += 1 + kept
    plain = written * (fixed + each)
    assert taken < 1.04 * plain
    if right and fixed > each:
        assert taken < 0.5 * plain
