"""reasoning-gym's scorers as they are, holes included, and without what would stop an evaluation."""

import pytest

from helpers.stock import stock_score
from helpers.tasks import Example, load_task

SYLLOGISM = load_task("syllogism", "test", 4)
LOGIC = load_task("propositional_logic", "test", 8)


@pytest.mark.parametrize(
    ("answer", "score"), [("Yes", 1.0), ("Yes.", 0.75), ("yes", 0.0), ("No", 0.0), (None, 0.0), ("", 0.0)]
)
def test_syllogisms_are_scored_by_the_stock_label(answer, score):
    example = Example("", "No", SYLLOGISM[0].metadata | {"stock_label": "Yes"})
    assert stock_score(answer, example, SYLLOGISM) == score


def test_a_copied_premise_wins_there_and_not_here():
    won = [stock_score(example.metadata["premises"][0], example, LOGIC) for example in LOGIC]
    assert max(won) == 1.0
    assert all(LOGIC.score(example.metadata["premises"][0], example) == 0.0 for example in LOGIC)


@pytest.mark.parametrize(
    "answer", ["a ∨ b", "¬" * 5000 + "P", "∨".join(f"x{i}" for i in range(40)), "P ∧", "\x00", "hello"]
)
def test_what_would_hang_or_raise_there_is_0(answer):
    assert stock_score(answer, LOGIC[0], LOGIC) == 0.0


def test_a_formula_that_does_not_follow_still_earns_something():
    example = Example("", "Q", {"premises": ["(P → Q)", "P"], "variables": ["P", "Q"]})
    assert stock_score("(P ∧ ¬Q)", example, LOGIC) == 0.05 and stock_score("(P ∧ Q)", example, LOGIC) == 1.0
    assert stock_score("Q", example, LOGIC) == 0.25  # right and earned, but it is a bare variable
