"""The logic against plainer ways to settle it, and the parser against mangled formulas."""

import re
from itertools import combinations, permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import logic
from helpers.logic import Formula, FormulaError, Statement, parse_formula, parse_statement, truth_table

QUANTIFIERS = ("All", "No", "Some", "Some not")
STATEMENTS = [Statement(q, *pair) for q in QUANTIFIERS for pair in permutations("ABC", 2)]


# --- syllogisms ---


def models(size=4):
    """Another way to mean the same: A, B and C as every triple of sets over a universe of `size` things.

    Returns (statement -> bool per triple, kind -> bool per triple: it has members).
    """
    sets = np.arange(2**size)
    a, b, c = (grid.ravel() for grid in np.meshgrid(sets, sets, sets))
    kinds = {"A": a, "B": b, "C": c}
    means = {
        "All": lambda s, p: s & ~p == 0,
        "No": lambda s, p: s & p == 0,
        "Some": lambda s, p: s & p != 0,
        "Some not": lambda s, p: s & ~p != 0,
    }
    holds = {s: means[s.quantifier](kinds[s.subject], kinds[s.predicate]) for s in STATEMENTS}
    return holds, {kind: members != 0 for kind, members in kinds.items()}


def test_every_form_agrees_with_sets_over_a_small_universe():
    holds, populated = models()
    for p1, p2, claim in product(STATEMENTS, repeat=3):
        named = {kind for s in (p1, p2, claim) for kind in (s.subject, s.predicate)}
        counterexample = holds[p1] & holds[p2] & ~holds[claim]
        for kind in named:
            counterexample &= populated[kind]
        assert logic.follows([p1, p2], claim) == (not counterexample.any()), (p1, p2, claim)


def test_fewer_premises_and_kinds_work_too():
    all_a, some_a = Statement("All", "a", "b"), Statement("Some", "a", "b")
    converse = Statement("Some", "b", "a")
    assert logic.follows([all_a], some_a) and logic.follows([some_a], converse)
    assert not logic.follows([some_a], all_a) and not logic.follows([], some_a)
    with pytest.raises(ValueError, match="at most three kinds"):
        logic.follows([all_a, Statement("All", "c", "d")], some_a)


@pytest.mark.parametrize("text", [
    "All dogs are not cats", "Every dog is a cat", "All dogs are dogs", "all dogs are cats", "Some are cats",
    "", "All dogs are cats and mice", "No" * 20_000,
])  # fmt: skip
def test_what_is_no_statement_is_refused(text):
    with pytest.raises(ValueError, match="is no statement"):
        parse_statement(text)


@pytest.mark.parametrize("statement", STATEMENTS, ids=str)
def test_statements_read_back(statement):
    assert parse_statement(str(statement)) == statement
    assert parse_statement(f"  {statement} .\n".replace(" ", "  ")) == statement


# --- propositional formulas ---

VARIABLES = ("P", "Q", "R")
formulas = st.recursive(
    st.sampled_from([Formula(v) for v in VARIABLES]),
    lambda inner: st.one_of(
        inner.map(lambda a: logic.combine("¬", a)),
        st.tuples(st.sampled_from("∧∨→↔"), inner, inner).map(lambda t: logic.combine(*t)),
    ),
    max_leaves=12,
)


def true_in(formula, world):
    """A formula's truth the plain way, one world at a time."""
    values = [true_in(arg, world) for arg in formula.args]
    match formula.op:
        case "¬":
            return not values[0]
        case "∧":
            return all(values)
        case "∨":
            return any(values)
        case "→":
            return values[1] if values[0] else True
        case "↔":
            return values[0] is values[1]
    return world[formula.op]


def worlds(variables=VARIABLES):
    rows = product([False, True], repeat=len(variables))
    return [dict(zip(variables, reversed(row), strict=True)) for row in rows]


@settings(deadline=None)
@given(formulas)
def test_formulas_read_back_and_their_tables_agree_with_one_world_at_a_time(formula):
    assert parse_formula(str(formula), VARIABLES) == formula
    table = truth_table(formula, VARIABLES)
    assert [bool(table >> w & 1) for w in range(8)] == [true_in(formula, world) for world in worlds()]
    assert table < 2**8


@settings(deadline=None)
@given(formulas)
def test_ascii_spellings_are_the_same_operators(formula):
    for spelling in (("~", "&", "|", "->", "<->"), ("!", "&&", "||", "=>", "<=>")):
        text = str(formula).translate(dict(zip(map(ord, "¬∧∨→↔"), spelling, strict=True)))
        assert parse_formula(text, VARIABLES) == parse_formula(text.replace(" ", ""), VARIABLES) == formula


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("¬P ∧ Q", "(¬P ∧ Q)"),
        ("P ∧ Q ∨ R", "((P ∧ Q) ∨ R)"),
        ("P ∨ Q ∧ R", "(P ∨ (Q ∧ R))"),
        ("P ∨ Q → R", "((P ∨ Q) → R)"),
        ("P → Q ↔ R", "((P → Q) ↔ R)"),
        ("P ↔ Q → R", "(P ↔ (Q → R))"),
        ("P ∧ Q ∧ R", "((P ∧ Q) ∧ R)"),
        ("P ∨ Q ∨ R", "((P ∨ Q) ∨ R)"),
        ("P ↔ Q ↔ R", "((P ↔ Q) ↔ R)"),
        ("P → Q → R", "(P → (Q → R))"),
        ("((P))", "P"),
        ("¬(P)", "¬P"),
    ],
)
def test_what_binds_tighter(text, meaning):
    assert str(parse_formula(text, VARIABLES)) == meaning


@pytest.mark.parametrize("text", [
    "", " ", "()", "P Q", "PQ", "P ∧", "∧ P", "P ∧ ∧ Q", "(P", "P)", "(P))", "P¬", "P¬Q", "(P)(Q)", "S", "p",
    "P - Q", "P <- Q", "P = Q", "P ⇒ Q", "1", "P.", "P ∧ the end", "¬" * 33 + "P", "(" * 33 + "P" + ")" * 33,
    "P ∧ " * 33 + "P", "P → " * 33 + "P", "(" * 10_000, "P" + " " * 200,
])  # fmt: skip
def test_what_is_no_formula_within_the_bounds_is_refused(text):
    with pytest.raises(FormulaError):
        parse_formula(text, VARIABLES)


@settings(deadline=None)
@given(formulas, st.integers(0, 60), st.sampled_from(list("()¬∧→PS x")), st.sampled_from([0, 1]))
def test_mangled_formulas_are_refused_or_read(formula, at, put, cut):
    """A character put in or put in place of another: FormulaError, or a formula that reads back as itself."""
    text = str(formula)
    text = text[:at] + put + text[at + cut :]
    try:
        found = parse_formula(text, VARIABLES)
    except FormulaError:
        return
    assert found.height <= logic.MAX_DEPTH and parse_formula(str(found), VARIABLES) == found


def test_deep_is_allowed_up_to_the_bound():
    assert parse_formula("¬" * 32 + "P", VARIABLES).height == 32
    assert parse_formula("(" * 32 + "P" + ")" * 32, VARIABLES) == Formula("P")
    with pytest.raises(FormulaError):
        parse_formula("(" + "P∧" * 20 + "P)" + "∧P" * 20, VARIABLES)  # one bracket deep, but 40 high


@settings(deadline=None)
@given(st.lists(formulas, min_size=1, max_size=3), formulas)
def test_conclusions_are_what_the_plain_way_says(premises, answer):
    texts = [str(p) for p in premises]
    used = logic.variables_of(texts)
    rows = worlds(used)
    columns = [[true_in(p, world) for world in rows] for p in premises]
    expected = set(re.findall("[A-Z]", str(answer))) <= set(used) and len(str(answer)) <= logic.MAX_LENGTH
    if expected and all(len(text) <= logic.MAX_LENGTH for text in texts):
        claim = [true_in(answer, world) for world in rows]
        given_true = [all(column) for column in zip(*columns, strict=True)]
        joined = [
            [all(column[i] for column in chosen) for i in range(len(rows))]
            for n in range(1, len(columns) + 1) for chosen in combinations(columns, n)
        ]  # fmt: skip
        follows = all(c for g, c in zip(given_true, claim, strict=True) if g)
        expected = follows and any(claim) and not all(claim) and claim not in joined
    assert logic.is_conclusion(str(answer), texts) == expected
    assert logic.consistent(texts) == any(all(column) for column in zip(*columns, strict=True))


def test_too_many_variables_are_refused():
    with pytest.raises(ValueError, match="at most 6"):
        logic.variables_of(list("ABCDEFG"))
