"""The offline teacher: derivations whose every step can be read off what stands before it, and their checkers."""

import operator
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import permutations, takewhile
from typing import NamedTuple

from helpers.logic import (
    Formula,
    FormulaError,
    Statement,
    combine,
    follows,
    is_new,
    parse_formula,
    parse_statement,
    truth_table,
    variables_of,
)

MAX_TRACE = 2000  # characters of a derivation; a longer one is not read


# --- letter counting ---


def letter_derivation(word: str, letter: str) -> str:
    """The teacher's count: each letter of `word` with how often `letter` came so far, "s = 0 t = 0 r = 1"."""
    word, letter = word.lower(), letter.lower()
    return " ".join(f"{character} = {word[: i + 1].count(letter)}" for i, character in enumerate(word))


class Steps(NamedTuple):
    """Where each step of a text ends, how many are right before the first mistake, and how many there should be.

    A text with a step too many has its last one wrong.
    """

    ends: list[int]
    right: int
    wanted: int

    @property
    def sound(self) -> bool:
        """Whether the text is the whole derivation, and right."""
        return self.right == self.wanted


def letter_steps(text: str, word: str, letter: str) -> Steps:
    """The steps of `text`, a letter with its running count each, "s = 0", however it is spaced."""
    tokens = _tokens(text)
    said, right = ([token for token, _ in some] for some in (tokens, _tokens(letter_derivation(word, letter))))
    wanted, ends = len(right) // 3, [end for _, end in tokens[2::3]]
    return Steps(ends, wanted if said == right else min(_agreeing(said, right) // 3, wanted - 1), wanted)


def _agreeing(said: Sequence[str], right: Sequence[str], same: Callable[[str, str], bool] = operator.eq) -> int:
    """How many parts agree before the first that does not."""
    return sum(1 for _ in takewhile(bool, map(same, said, right)))


def _tokens(text: str) -> list[tuple[str, int]]:
    """Words and punctuation marks one by one, so that spacing does not matter, and where each ends.

    [] beyond MAX_TRACE.
    """
    found = re.finditer(r"\w+|[^\w\s]", text) if len(text) <= MAX_TRACE else ()
    return [(token[0], token.end()) for token in found]


# --- syllogisms ---


@cache
def strongest(premises: tuple[Statement, ...], first: str, second: str) -> tuple[Statement, ...]:
    """The statements about two kinds that follow and are not implied by another one that follows.

    "No" and "Some" say the same both ways round and are written with `first` first. Two premises on different
    pairs of three kinds leave one at most, as trying all 384 forms shows; two on one pair may leave more.
    """
    both_ways = ((first, second), (second, first))
    possible = [Statement(quantifier, *pair) for quantifier in ("All", "Some not") for pair in both_ways]
    possible += [Statement(quantifier, first, second) for quantifier in ("No", "Some")]
    found = [s for s in possible if follows(premises, s)]
    return tuple(s for s in found if not any(follows([other], s) for other in found if other != s))


def syllogism_derivation(premise1: str, premise2: str, claim: str) -> str:
    """The teacher's derivation: name the kinds, restate the premises, say what follows for A and C, compare.

    A is the claim's subject, C its predicate, B the third kind. ValueError for a statement that cannot be
    read and for more than three kinds.
    """
    *premises, goal = map(parse_statement, (premise1, premise2, claim))
    kinds = dict.fromkeys(kind for s in premises for kind in (s.subject, s.predicate))
    middle = [kind for kind in kinds if kind not in (goal.subject, goal.predicate)]
    if len(middle) > 1:
        raise ValueError("A syllogism names at most three kinds: the claim's two and one more.")
    letter = {goal.subject: "A", **dict.fromkeys(middle, "B"), goal.predicate: "C"}
    *premises, goal = (Statement(s.quantifier, letter[s.subject], letter[s.predicate]) for s in (*premises, goal))

    steps = [", ".join(f"{letter[kind]} = {kind}" for kind in letter)]
    for pair in ("AB", "BC", "AC"):
        restated = [s for s in premises if {s.subject, s.predicate} == set(pair)]
        steps += [f"{pair[0]} and {pair[1]}: {s}" for s in restated]
    so = ", ".join(map(str, strongest(tuple(premises), "A", "C")))
    verdict = "It follows" if follows(premises, goal) else "It does not follow"
    return ". ".join([*steps, f"So A and C: {so or 'nothing'}", f"Claim: {goal}", f"{verdict}."])


def syllogism_steps(text: str, premise1: str, premise2: str, claim: str) -> Steps:
    """The steps of `text`, a sentence each; right is what means the same: "Some C are A" may be "Some A are C"."""
    tokens, model = _tokens(text), _tokens(syllogism_derivation(premise1, premise2, claim))
    said, right = (" ".join(token for token, _ in some).split(" .") for some in (tokens, model))
    agreeing, wanted = _agreeing(said, right, _same_step), len(right) - 1  # after the last full stop stands nothing
    whole = len(said) == len(right) == agreeing
    ends = [end for token, end in tokens if token == "."]
    return Steps(ends, wanted if whole else min(agreeing, wanted - 1), wanted)


def _same_step(step: str, right: str) -> bool:
    """True for the same text, and for the same heading over two statements that imply each other."""
    if step == right:
        return True
    try:
        (heading, said), (right_heading, meant) = step.split(" : "), right.split(" : ")
        one, other = parse_statement(said), parse_statement(meant)
        return heading == right_heading and follows([one], other) and follows([other], one)
    except ValueError:
        return False


# --- propositional logic ---

# In the order in which the teacher prefers them.
RULES = ("simplification", "modus ponens", "modus tollens", "disjunctive syllogism",
         "equivalence elimination", "chain", "one direction", "addition")  # fmt: skip


def _plain(formula: Formula) -> Formula:
    """`formula` without double negations in front."""
    while formula.op == "¬" and formula.args[0].op == "¬":
        formula = formula.args[0].args[0]
    return formula


def _negation(formula: Formula) -> Formula:
    return _plain(combine("¬", formula))


def _from_one(p: Formula) -> Iterator[tuple[str, Formula]]:
    """(rule, conclusion) for what one rule makes of `p` alone."""
    match p:
        case Formula("∧", (a, b)):
            yield from (("simplification", a), ("simplification", b))
        case Formula("¬", (Formula("∨", (a, b)),)):
            yield from (("simplification", _negation(a)), ("simplification", _negation(b)))
        case Formula("¬", (Formula("→", (a, b)),)):
            yield from (("simplification", a), ("simplification", _negation(b)))
        case Formula("↔", (a, b)):
            yield from (("one direction", combine("→", a, b)), ("one direction", combine("→", b, a)))


def _from_two(p: Formula, q: Formula) -> Iterator[tuple[str, Formula]]:
    """(rule, conclusion) for what one rule makes of `p`, taken apart with the help of `q`."""
    match p:
        case Formula("→", (a, b)):
            if q == _plain(a):
                yield "modus ponens", b
            if q == _negation(b):
                yield "modus tollens", _negation(a)
            if q.op == "→" and q.args[0] == b:
                yield "chain", combine("→", a, q.args[1])
        case Formula("∨" | "↔", sides):
            for a, b in (sides, sides[::-1]):
                if p.op == "∨" and q == _negation(a):
                    yield "disjunctive syllogism", b
                if p.op == "↔" and q == _plain(a):
                    yield "equivalence elimination", b
                if p.op == "↔" and q == _negation(a):
                    yield "equivalence elimination", _negation(b)


def propositional_step(premises: Sequence[str]) -> tuple[str, tuple[int, ...], Formula] | None:
    """(rule, positions of the premises used, conclusion) of the first step, by RULES, worth taking.

    A step is worth taking when its conclusion passes `is_conclusion`. None when no step is.
    """
    variables = variables_of(premises)
    facts = [_plain(parse_formula(premise, variables)) for premise in premises]
    steps = [(rule, (i,), new) for i, p in enumerate(facts) for rule, new in _from_one(p)]
    for i, j in permutations(range(len(facts)), 2):
        steps += [(rule, (i, j), new) for rule, new in _from_two(facts[i], facts[j])]
    letters = [Formula(variable) for variable in variables]
    for i in sorted(range(len(facts)), key=lambda i: facts[i].height):
        added = (*letters, *map(_negation, letters))
        steps += [("addition", (i,), combine("∨", facts[i], x)) for x in added]
    steps.sort(key=lambda step: RULES.index(step[0]))
    return next((step for step in steps if is_new(step[2], premises)), None)


def propositional_derivation(premises: Sequence[str]) -> tuple[str, str] | None:
    """The teacher's (derivation, answer): ("From 1: (P → Q). From 2: P. So Q.", "Q"); None without one."""
    step = propositional_step(premises)
    if step is None:
        return None
    _, used, conclusion = step
    return " ".join([*(f"From {i + 1}: {premises[i]}." for i in used), f"So {conclusion}."]), str(conclusion)


def check_propositional_derivation(text: str, premises: Sequence[str], answer: str | None = None) -> bool:
    """True when each step of `text` is right and the last one gives a conclusion, or the `answer` if given.

    "From n: F" has to restate premise n, "So F" to follow from what was stated before it.
    """
    if len(text) > MAX_TRACE:
        return False
    variables = variables_of(premises)
    known = (1 << 2 ** len(variables)) - 1  # the worlds that what was said so far leaves possible
    *steps, rest = " ".join(text.split()).split(".")
    so = None
    try:
        for step in steps:
            _, number, so, formula = re.fullmatch(r" ?(From ([1-9]) ?:|(So) )(.*)", step).groups()
            said = parse_formula(formula, variables)
            if not so and said != parse_formula(premises[int(number) - 1], variables):
                return False
            if so and known & ~truth_table(said, variables):
                return False
            known &= truth_table(said, variables)
        if so is None or rest.strip():
            return False
        return is_new(said, premises) and (answer is None or said == parse_formula(answer, variables))
    except (AttributeError, IndexError, FormulaError):  # a step of another shape, no such premise, no formula
        return False
