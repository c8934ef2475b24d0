"""What the logic tasks mean, settled by brute force, and a safe formula parser.

Both logics work alike. A world is one way things could be. A statement is the set of worlds in which it
holds, kept as a Python int whose bit w stands for world w. A claim follows when no world holds all premises
but not the claim.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple

MAX_LENGTH = 200  # characters of a formula; a longer one is not read
MAX_DEPTH = 32  # nesting of a formula
MAX_VARIABLES = 6  # a truth table has 2 ** variables bits


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
        return is_new(parse_formula(answer, variables_of(premises)), premises)
    except FormulaError:
        return False


def is_new(conclusion: Formula, premises: Sequence[str]) -> bool:
    """`is_conclusion` for a formula that has been read."""
    given, joined = _premise_tables(tuple(premises))
    table = truth_table(conclusion, variables_of(premises))
    return table != 0 and not given & ~table and table not in joined  # joined holds the always true one too
