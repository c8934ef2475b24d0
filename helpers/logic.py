"""What the logic tasks mean, settled by brute force; a safe formula parser; the offline teacher.

Both logics work alike. A world is one way things could be. A statement is the set of worlds in which it
holds, kept as a Python int whose bit w stands for world w. A claim follows when no world holds all premises
but not the claim. The teacher writes derivations whose every step can be read off what stands before it; the
checkers verify each step.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import permutations
from typing import NamedTuple

MAX_LENGTH = 200  # characters of a formula; a longer one is not read
MAX_DEPTH = 32  # nesting of a formula
MAX_VARIABLES = 6  # a truth table has 2 ** variables bits
MAX_TRACE = 2000  # characters of a derivation; a longer one is not read


# --- letter counting ---


def letter_derivation(word: str, letter: str) -> str:
    """The teacher's count: each letter of `word` with how often `letter` came so far, "s = 0 t = 0 r = 1"."""
    word, letter = word.lower(), letter.lower()
    return " ".join(f"{character} = {word[: i + 1].count(letter)}" for i, character in enumerate(word))


def check_letter_derivation(text: str, word: str, letter: str) -> bool:
    """True when `text` spells `word` and every running count is right, however it is spaced."""
    return _tokens(text) == _tokens(letter_derivation(word, letter))


def _tokens(text: str) -> list[str]:
    """Words and punctuation marks one by one, so that spacing does not matter; [] beyond MAX_TRACE."""
    return re.findall(r"\w+|[^\w\s]", text) if len(text) <= MAX_TRACE else []


# --- syllogisms ---


@dataclass(frozen=True)
class Statement:
    """A categorical statement; `quantifier` is "All", "No", "Some" or "Some not" (Some X are not Y)."""

    quantifier: str
    subject: str
    predicate: str

    def __str__(self) -> str:
        negation = "not " if self.quantifier == "Some not" else ""
        return f"{self.quantifier.split()[0]} {self.subject} are {negation}{self.predicate}"


def parse_statement(text: str) -> Statement:
    """Read "All X are Y", "No X are Y", "Some X are Y" or "Some X are not Y"; ValueError on anything else."""
    match = re.fullmatch(r"(All|No|Some)\s+(\w+)\s+are\s+(not\s+)?(\w+)\s*\.?", text.strip()[:MAX_LENGTH])
    if match is None or match[2] == match[4] or (match[3] and match[1] != "Some"):
        raise ValueError(f"{text[:60]!r} is no statement; write All/No/Some X are Y or Some X are not Y.")
    return Statement("Some not" if match[3] else match[1], match[2], match[4])


# Three kinds cut what there is into 7 regions, each inside at least one of them: region r = 1 ... 7 is inside
# kind k when bit k of r is set. A world says which regions have members, bit r - 1 for region r: 128 worlds.
_REGIONS, _WORLDS = range(1, 8), range(128)


@cache
def _holds(quantifier: str, subject: int, predicate: int) -> int:
    """The worlds in which the statement about the kinds with these two numbers holds."""
    of_subject = [r for r in _REGIONS if r >> subject & 1]
    both = sum(1 << r - 1 for r in of_subject if r >> predicate & 1)
    only = sum(1 << r - 1 for r in of_subject if not r >> predicate & 1)
    about = both if quantifier in ("No", "Some") else only
    inhabited = quantifier in ("Some", "Some not")
    return sum(1 << world for world in _WORLDS if bool(world & about) == inhabited)


def follows(premises: Sequence[Statement], claim: Statement) -> bool:
    """True when `claim` holds in every world in which the `premises` hold and every kind named has members.

    The last condition is existential import: with it, "All dogs are mammals" implies "Some dogs are mammals".
    ValueError when more than three kinds are named.
    """
    kinds = list(dict.fromkeys(kind for s in (*premises, claim) for kind in (s.subject, s.predicate)))
    if len(kinds) > 3:
        raise ValueError(f"A syllogism names at most three kinds, not {len(kinds)}.")
    worlds = -1  # all of them
    for kind in range(len(kinds)):
        worlds &= _holds("Some", kind, kind)  # "Some dogs are dogs": there are dogs
    for s in premises:
        worlds &= _holds(s.quantifier, kinds.index(s.subject), kinds.index(s.predicate))
    return not worlds & ~_holds(claim.quantifier, kinds.index(claim.subject), kinds.index(claim.predicate))


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


def check_syllogism_derivation(text: str, premise1: str, premise2: str, claim: str) -> bool:
    """True when each step of `text` means what the teacher's does: "Some C are A" may be "Some A are C"."""
    steps, right = (" ".join(_tokens(t)).split(" .") for t in (text, syllogism_derivation(premise1, premise2, claim)))
    return len(steps) == len(right) and all(map(_same_step, steps, right))


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


# --- propositional formulas ---


class FormulaError(ValueError):
    """A text is not a formula within the bounds."""


class Formula(NamedTuple):
    """A variable (`op` is its letter, no `args`) or an operator ¬ ∧ ∨ → ↔ with its one or two formulas."""

    op: str
    args: tuple["Formula", ...] = ()
    height: int = 0

    def __str__(self) -> str:
        if len(self.args) == 2:
            return f"({self.args[0]} {self.op} {self.args[1]})"
        return self.op + "".join(map(str, self.args))


def combine(op: str, *args: Formula) -> Formula:
    """The formula that `op` makes of `args`; FormulaError when it nests deeper than MAX_DEPTH."""
    height = 1 + max(arg.height for arg in args)
    if height > MAX_DEPTH:
        raise FormulaError(f"A formula nests at most {MAX_DEPTH} deep.")
    return Formula(op, args, height)


# ¬ binds tightest, then ∧ to ↔ as numbered; → groups to the right, the others to the left.
_BINDING = {"∧": 4, "∨": 3, "→": 2, "↔": 1}
_ASCII = {"~": "¬", "!": "¬", "&": "∧", "&&": "∧", "|": "∨", "||": "∨",
          "->": "→", "=>": "→", "<->": "↔", "<=>": "↔"}  # fmt: skip


def parse_formula(text: str, variables: Sequence[str]) -> Formula:
    """Read a formula over `variables` (capital letters) with ¬ ∧ ∨ → ↔ or ~ ! & && | || -> => <-> <=>.

    FormulaError when it is not one, is longer than MAX_LENGTH or nests deeper than MAX_DEPTH.
    """
    if len(text) > MAX_LENGTH:
        raise FormulaError(f"A formula has at most {MAX_LENGTH} characters, not {len(text)}.")
    tokens = [_ASCII.get(token, token) for token in re.findall(r"<->|<=>|->|=>|&&|\|\||\S", text)]
    tokens.reverse()  # pop() takes the next one

    def operand(depth: int) -> Formula:
        if depth > MAX_DEPTH:
            raise FormulaError(f"A formula nests at most {MAX_DEPTH} deep.")
        token = tokens.pop() if tokens else "the end"
        if token in variables:
            return Formula(token)
        if token == "¬":
            return combine("¬", operand(depth + 1))
        if token == "(":
            inside = operation(1, depth + 1)
            if tokens and tokens.pop() == ")":
                return inside
        raise FormulaError(f"A formula cannot go on with {token}.")

    def operation(weakest: int, depth: int) -> Formula:
        left = operand(depth)
        while tokens and _BINDING.get(tokens[-1], 0) >= weakest:
            op = tokens.pop()
            left = combine(op, left, operation(_BINDING[op] + (op != "→"), depth + 1))
        return left

    formula = operation(1, 0)
    if tokens:
        raise FormulaError(f"A formula cannot go on with {tokens[-1]}.")
    return formula


def truth_table(formula: Formula, variables: Sequence[str]) -> int:
    """The worlds in which `formula` holds; variable i is true in world w when bit i of w is set."""
    worlds = range(2 ** len(variables))
    everywhere = (1 << len(worlds)) - 1
    tables = [truth_table(arg, variables) for arg in formula.args]
    match formula.op, tables:
        case "¬", [a]:
            return everywhere & ~a
        case "∧", [a, b]:
            return a & b
        case "∨", [a, b]:
            return a | b
        case "→", [a, b]:
            return everywhere & ~a | b
        case "↔", [a, b]:
            return everywhere & ~(a ^ b)
    return sum(1 << w for w in worlds if w >> variables.index(formula.op) & 1)


def variables_of(premises: Sequence[str]) -> tuple[str, ...]:
    """The capital letters the premises use, in order; ValueError for more than MAX_VARIABLES."""
    variables = tuple(sorted(set(re.findall("[A-Z]", " ".join(premises)))))
    if len(variables) > MAX_VARIABLES:
        raise ValueError(f"The premises use {len(variables)} variables; use at most {MAX_VARIABLES}.")
    return variables


@lru_cache(maxsize=1024)
def _premise_tables(premises: tuple[str, ...]) -> tuple[int, frozenset[int]]:
    """(worlds in which all premises hold, tables of any of the premises joined by ∧, of none of them too)."""
    variables = variables_of(premises)
    given = (1 << 2 ** len(variables)) - 1
    joined = {given}
    for premise in premises:
        table = truth_table(parse_formula(premise, variables), variables)
        joined |= {table & other for other in joined}
        given &= table
    return given, frozenset(joined)


def consistent(premises: Sequence[str]) -> bool:
    """True when the premises can all hold at once; else anything would follow from them."""
    return _premise_tables(tuple(premises))[0] != 0


def is_conclusion(answer: str, premises: Sequence[str]) -> bool:
    """True when `answer` is a formula over the premises' variables that is worth concluding from them.

    That is, it follows, can be true, can be false, and is not equivalent to a premise or to premises joined
    by ∧. Never raises on any `answer`; MAX_LENGTH, MAX_DEPTH and MAX_VARIABLES bound its work.
    """
    try:
        return _is_new(parse_formula(answer, variables_of(premises)), premises)
    except FormulaError:
        return False


def _is_new(conclusion: Formula, premises: Sequence[str]) -> bool:
    given, joined = _premise_tables(tuple(premises))
    table = truth_table(conclusion, variables_of(premises))
    return table != 0 and not given & ~table and table not in joined  # joined holds the always true one too


# --- the teacher of propositional logic ---

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
    return next((step for step in steps if _is_new(step[2], premises)), None)


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
        return _is_new(said, premises) and (answer is None or said == parse_formula(answer, variables))
    except (AttributeError, IndexError, FormulaError):  # a step of another shape, no such premise, no formula
        return False
