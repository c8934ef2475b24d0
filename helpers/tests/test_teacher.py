"""The teacher's derivations word for word, and its checkers against every kind of wrong step."""

import re
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import teacher
from helpers.logic import Statement, follows
from helpers.tasks import load_task
from helpers.tests.test_logic import STATEMENTS

# --- syllogisms ---


def test_premises_on_two_pairs_leave_one_strongest_statement_at_most():
    forms = 0
    for p1, p2 in product(STATEMENTS, repeat=2):
        pairs = [frozenset((s.subject, s.predicate)) for s in (p1, p2)]
        strongest = teacher.strongest((p1, p2), "A", "C")
        for claim in STATEMENTS:
            if {claim.subject, claim.predicate} == {"A", "C"}:  # the claim can be read off them alone
                assert follows([p1, p2], claim) == any(follows([s], claim) for s in strongest)
        if len(set(pairs)) == 2:
            forms += 1
            assert len(strongest) <= 1
    assert forms == 384
    assert len(teacher.strongest((STATEMENTS[1], Statement("All", "C", "A")), "A", "C")) == 2  # on one pair


def test_the_teacher_s_syllogism_word_for_word():
    premises = ("All dogs are mammals", "All mammals are animals")
    assert teacher.syllogism_derivation(*premises, "Some dogs are animals") == (
        "A = dogs, B = mammals, C = animals. A and B: All A are B. B and C: All B are C. "
        "So A and C: All A are C. Claim: Some A are C. It follows."
    )
    assert teacher.syllogism_derivation("Some cats are birds", "No birds are ants", "All ants are cats") == (
        "A = ants, B = birds, C = cats. A and B: No B are A. B and C: Some C are B. "
        "So A and C: Some C are not A. Claim: All A are C. It does not follow."
    )
    inversion = ("No cats are birds", "Some birds are not ants", "No birds are cats")
    assert teacher.syllogism_derivation(*inversion) == (
        "A = birds, B = ants, C = cats. A and B: Some A are not B. A and C: No C are A. "
        "So A and C: No A are C. Claim: No A are C. It follows."
    )
    assert "So A and C: nothing." in teacher.syllogism_derivation(
        "Some cats are birds", "Some birds are ants", "All cats are ants"
    )


def respaced(text):
    """The text as a word-level tokenizer prints it: a blank around every mark."""
    return " ".join(re.findall(r"\w+|[^\w\s]", text))


def test_right_syllogism_steps_pass_in_any_spacing_and_order_of_the_terms():
    question = ("No cats are birds", "Some birds are ants", "Some ants are not cats")
    right = teacher.syllogism_derivation(*question)
    assert right.startswith("A = ants, B = birds, C = cats. A and B: Some B are A. B and C: No C are B.")
    converted = right.replace("Some B are A", "Some A are B").replace("No C are B", "No B are C")
    for text in (right, respaced(right), right.replace(" ", "\n  "), converted):
        assert teacher.syllogism_steps(text, *question).sound


def test_wrong_syllogism_steps_fail():
    swaps = {"All": "No", "No": "Some", "Some": "All", "A": "C", "B": "A", "C": "B", "not": "",
             "nothing": "All A are C", "=": ":", ":": "=", ",": ".", ".": ",", "So": "Claim"}  # fmt: skip
    tried = 0
    for e in load_task("syllogism", "test", 200):
        question = [e.metadata[part] for part in ("premise1", "premise2", "conclusion")]
        right = teacher.syllogism_derivation(*question)
        tokens = re.findall(r"\w+|[^\w\s]", right)
        steps, _, verdict = right.rpartition(" It ")
        other = "follows." if verdict == "does not follow." else "does not follow."
        assert not teacher.syllogism_steps(f"{steps} It {other}", *question).sound
        for i, token in enumerate(tokens):
            wrong = " ".join([*tokens[:i], swaps.get(token, "x"), *tokens[i + 1 :]])
            tried += 1
            assert not teacher.syllogism_steps(wrong, *question).sound, wrong
            assert not teacher.syllogism_steps(" ".join(tokens[:i]), *question).sound
    assert tried > 5000


# --- propositional logic ---


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
    derivation, answer = teacher.propositional_derivation(premises)
    assert derivation == thinking and derivation.endswith(f"So {answer}.")
    assert teacher.check_propositional_derivation(derivation, premises, answer)


def test_no_derivation_where_nothing_new_follows():
    assert teacher.propositional_derivation(["(P → Q)"]) is None
    assert teacher.propositional_derivation(["(P → P)"]) is None


def test_derivations_of_several_steps_pass_in_any_spacing():
    premises = ["((P ∧ Q) → R)", "P", "Q"]
    text = "From 2: P. From 3: Q. So P & Q. From 1: ((P ∧ Q) → R). So R."
    assert teacher.check_propositional_derivation(text, premises, "R")
    assert teacher.check_propositional_derivation(respaced(text), premises, "(R)")
    assert teacher.check_propositional_derivation(text.replace(" ", "\n "), premises)


def test_wrong_propositional_steps_fail():
    for e in load_task("propositional_logic", "test", 300):
        premises = e.metadata["premises"]
        right, answer = teacher.propositional_derivation(premises)
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
        assert teacher.check_propositional_derivation(right, premises)
        for text in wrong:
            assert not teacher.check_propositional_derivation(text, premises), (premises, text)
        assert not teacher.check_propositional_derivation(right, premises, f"¬{answer}")
        assert not teacher.check_propositional_derivation(right, premises, "no formula")


# --- letter counting ---


def test_the_teacher_counts_strawberry():
    text = "s = 0 t = 0 r = 1 a = 1 w = 1 b = 1 e = 1 r = 2 r = 3 y = 3"
    assert teacher.letter_derivation("strawberry", "r") == teacher.letter_derivation("Strawberry", "R") == text
    assert teacher.letter_steps(text.replace(" = ", "=").replace(" ", "\n"), "strawberry", "r").sound


def test_wrong_counts_fail():
    for e in load_task("letter_counting", "test", 200):
        word, letter = e.metadata["word"], e.metadata["letter"]
        tokens = teacher.letter_derivation(word, letter).split()
        for i, token in enumerate(tokens):
            wrong = str(int(token) + 1) if token.isdigit() else ("e" if token == "a" else "a")
            for text in ([*tokens[:i], wrong, *tokens[i + 1 :]], tokens[:i], [*tokens, *tokens[: i + 1]]):
                assert not teacher.letter_steps(" ".join(text), word, letter).sound


@settings(deadline=None)
@given(st.text(max_size=5000))
def test_checkers_never_raise(text):
    question = ("All dogs are mammals", "All mammals are animals", "All dogs are animals")
    right = teacher.syllogism_derivation(*question)
    for candidate in (text, right[:40] + text, right.replace("B", text, 1), f"From 1: P. So {text}."):
        assert teacher.letter_steps(candidate, "strawberry", "r").sound is False
        assert teacher.syllogism_steps(candidate, *question).sound in (True, False)
        assert teacher.check_propositional_derivation(candidate, ["P", "Q"], candidate) is False
