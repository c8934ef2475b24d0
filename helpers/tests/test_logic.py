"""The logic against plainer ways to settle it, the parser against mangled formulas, the teacher's steps."""

import re
from itertools import combinations, permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import logic
from helpers.logic import Formula, FormulaError, Statement, parse_formula, parse_statement, truth_table
from helpers.tasks import load_task

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


def test_premises_on_two_pairs_leave_one_strongest_statement_at_most():
    forms = 0
    for p1, p2 in product(STATEMENTS, repeat=2):
        pairs = [frozenset((s.subject, s.predicate)) for s in (p1, p2)]
        strongest = logic.strongest((p1, p2), "A", "C")
        for claim in STATEMENTS:
            if {claim.subject, claim.predicate} == {"A", "C"}:  # the claim can be read off them alone
                assert logic.follows([p1, p2], claim) == any(logic.follows([s], claim) for s in strongest)
        if len(set(pairs)) == 2:
            forms += 1
            assert len(strongest) <= 1
    assert forms == 384
    assert len(logic.strongest((STATEMENTS[1], Statement("All", "C", "A")), "A", "C")) == 2  # on one pair


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


def test_the_teacher_s_syllogism_word_for_word():
    premises = ("All dogs are mammals", "All mammals are animals")
    assert logic.syllogism_derivation(*premises, "Some dogs are animals") == (
        "A = dogs, B = mammals, C = animals. A and B: All A are B. B and C: All B are C. "
        "So A and C: All A are C. Claim: Some A are C. It follows."
    )
    assert logic.syllogism_derivation("Some cats are birds", "No birds are ants", "All ants are cats") == (
        "A = ants, B = birds, C = cats. A and B: No B are A. B and C: Some C are B. "
        "So A and C: Some C are not A. Claim: All A are C. It does not follow."
    )
    inversion = ("No cats are birds", "Some birds are not ants", "No birds are cats")
    assert logic.syllogism_derivation(*inversion) == (
        "A = birds, B = ants, C = cats. A and B: Some A are not B. A and C: No C are A. "
        "So A and C: No A are C. Claim: No A are C. It follows."
    )
    assert "So A and C: nothing." in logic.syllogism_derivation(
        "Some cats are birds", "Some birds are ants", "All cats are ants"
    )


def respaced(text):
    """The text as a word-level tokenizer prints it: a blank around every mark."""
    return " ".join(re.findall(r"\w+|[^\w\s]", text))


def test_right_syllogism_steps_pass_in_any_spacing_and_order_of_the_terms():
    question = ("No cats are birds", "Some birds are ants", "Some ants are not cats")
    right = logic.syllogism_derivation(*question)
    assert right.startswith("A = ants, B = birds, C = cats. A and B: Some B are A. B and C: No C are B.")
    converted = right.replace("Some B are A", "Some A are B").replace("No C are B", "No B are C")
    for text in (right, respaced(right), right.replace(" ", "\n  "), converted):
        assert logic.check_syllogism_derivation(text, *question)


def test_wrong_syllogism_steps_fail():
    swaps = {"All": "No", "No": "Some", "Some": "All", "A": "C", "B": "A", "C": "B", "not": "",
             "nothing": "All A are C", "=": ":", ":": "=", ",": ".", ".": ",", "So": "Claim"}  # fmt: skip
    tried = 0
    for e in load_task("syllogism", "test", 200):
        question = [e.metadata[part] for part in ("premise1", "premise2", "conclusion")]
        right = logic.syllogism_derivation(*question)
        tokens = re.findall(r"\w+|[^\w\s]", right)
        steps, _, verdict = right.rpartition(" It ")
        other = "follows." if verdict == "does not follow." else "does not follow."
        assert not logic.check_syllogism_derivation(f"{steps} It {other}", *question)
        for i, token in enumerate(tokens):
            wrong = " ".join([*tokens[:i], swaps.get(token, "x"), *tokens[i + 1 :]])
            tried += 1
            assert not logic.check_syllogism_derivation(wrong, *question), wrong
            assert not logic.check_syllogism_derivation(" ".join(tokens[:i]), *question)
    assert tried > 5000


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


@pytest.mark.parametrize(
    ("premises", "thinking"),
    [
        (["(P → Q)", "P"], "From 1: (P → Q). From 2: P. So Q."),
        (["¬Q", "(P → Q)"], "From 2: (P → Q). From 1: ¬Q. So ¬P."),
        (["(P ∨ Q)", "¬Q"], "From 1: (P ∨ Q). From 2: ¬Q. So P."),
        (["(P ↔ Q)", "¬Q"], "From 1: (P ↔ Q). From 2: ¬Q. So ¬P."),
        (["(P → Q)", "(Q → R)"], "From 1: (P → Q). From 2: (Q → R). So (P → R)."),
        (["(P ∧ Q)", "(R → P)"], "From 1: (P ∧ Q). So P."),
        (["¬(P ∨ Q)", "(P → Q)"], "From 1: ¬(P ∨ Q). So ¬P."),
        (["¬(P → Q)", "(P ∨ Q)"], "From 1: ¬(P → Q). So P."),
        (["(P ↔ Q)"], "From 1: (P ↔ Q). So (P → Q)."),
        (["¬¬P", "(P → Q)"], "From 2: (P → Q). From 1: ¬¬P. So Q."),
        (["P", "R"], "From 1: P. So (P ∨ R)."),
    ],
)
def test_the_teacher_s_rules(premises, thinking):
    derivation, answer = logic.propositional_derivation(premises)
    assert derivation == thinking and derivation.endswith(f"So {answer}.")
    assert logic.check_propositional_derivation(derivation, premises, answer)


def test_no_derivation_where_nothing_new_follows():
    assert logic.propositional_derivation(["(P → Q)"]) is None
    assert logic.propositional_derivation(["(P → P)"]) is None


def test_derivations_of_several_steps_pass_in_any_spacing():
    premises = ["((P ∧ Q) → R)", "P", "Q"]
    text = "From 2: P. From 3: Q. So P & Q. From 1: ((P ∧ Q) → R). So R."
    assert logic.check_propositional_derivation(text, premises, "R")
    assert logic.check_propositional_derivation(respaced(text), premises, "(R)")
    assert logic.check_propositional_derivation(text.replace(" ", "\n "), premises)


def test_wrong_propositional_steps_fail():
    for e in load_task("propositional_logic", "test", 300):
        premises = e.metadata["premises"]
        right, answer = logic.propositional_derivation(premises)
        stated, _, _ = right.partition("So ")
        number = int(right[5])
        others = [i for i in range(1, 10) if i != number]
        wrong = [
            f"{stated}So ¬{answer}.",
            f"{stated}So ¬¬{answer}",
            f"So {answer}.",
            stated,
            "",
            f"So {premises[number - 1]}.",
            right.replace("From ", "From 1", 1),
            right.replace("From", "For", 1),
            right.replace(": ", ": ¬", 1),
            right.replace("So", "Thus"),
            right + " Done",
            right + " " + stated,
            right * 300,
            *(right.replace(f"From {number}", f"From {i}", 1) for i in others),
        ]
        assert logic.check_propositional_derivation(right, premises)
        for text in wrong:
            assert not logic.check_propositional_derivation(text, premises), (premises, text)
        assert not logic.check_propositional_derivation(right, premises, f"¬{answer}")
        assert not logic.check_propositional_derivation(right, premises, "no formula")


# --- letter counting ---


def test_the_teacher_counts_strawberry():
    text = "s = 0 t = 0 r = 1 a = 1 w = 1 b = 1 e = 1 r = 2 r = 3 y = 3"
    assert logic.letter_derivation("strawberry", "r") == logic.letter_derivation("Strawberry", "R") == text
    assert logic.check_letter_derivation(text.replace(" = ", "=").replace(" ", "\n"), "strawberry", "r")


def test_wrong_counts_fail():
    for e in load_task("letter_counting", "test", 200):
        word, letter = e.metadata["word"], e.metadata["letter"]
        tokens = logic.letter_derivation(word, letter).split()
        for i, token in enumerate(tokens):
            wrong = str(int(token) + 1) if token.isdigit() else ("e" if token == "a" else "a")
            for text in ([*tokens[:i], wrong, *tokens[i + 1 :]], tokens[:i], [*tokens, *tokens[: i + 1]]):
                assert not logic.check_letter_derivation(" ".join(text), word, letter)


@settings(deadline=None)
@given(st.text(max_size=5000))
def test_checkers_never_raise(text):
    question = ("All dogs are mammals", "All mammals are animals", "All dogs are animals")
    right = logic.syllogism_derivation(*question)
    for candidate in (text, right[:40] + text, right.replace("B", text, 1), f"From 1: P. So {text}."):
        assert logic.check_letter_derivation(candidate, "strawberry", "r") is False
        assert logic.check_syllogism_derivation(candidate, *question) in (True, False)
        assert logic.check_propositional_derivation(candidate, ["P", "Q"], candidate) is False
