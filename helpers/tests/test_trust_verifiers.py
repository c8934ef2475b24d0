"""The verifiers under 100,000 hostile completions a task, and against proofs found in another way."""

import random
from itertools import combinations

import pytest

from helpers import logic
from helpers.logic import Formula, Statement, combine
from helpers.prompts import completion
from helpers.rewards import Reward
from helpers.tasks import TASK_NAMES, load_task

COMPLETIONS = 100_000  # a task
ORACLE = 20_000  # of each kind
TASKS = {name: load_task(name, "test", 200) for name in TASK_NAMES}

# --- fuzz ---

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
BROKEN_TAGS = (
    "<Answer>",
    "< answer>",
    "<answer",
    "answer>",
    "<answer/>",
    "<<answer>>",
    "<аnswer>",
    "</answer >",
    "&lt;answer>",
)
# Cyrillic and Greek letters that look Latin, full-width and circled forms, other scripts' digits, other arrows.
LOOK_ALIKES = "РQ Рꓑ𝐏Ｐⓟ РΡ ¬￢⌐ ∧⋀Λ ∨⋁v →⇒⟶ ↔⇔ ３٣³Ⅲ③ Ｙes Уes Νо"
MARKS = (
    "\u202e",
    "\u202d",
    "\u2066",
    "\u200b",
    "\ufeff",
    "\x00",
    "\x1b[31m",
    "\r",
    "\u2028",
    "\ud800",
    "\udfff",
    "\ufffd",
    "e\u0301",
)
WORDS = (
    "Yes",
    "No",
    "yes",
    "no.",
    "NO",
    "0",
    "1",
    "2",
    "3",
    "03",
    "3.0",
    "-3",
    "1e3",
    "P",
    "Q",
    "¬P",
    "(P ∧ Q)",
    "(P → Q)",
    "So",
)
OPERATORS = ("∧", "∨", "→", "↔", "&", "|", "->", "<->", "=>", "<=>", "&&", "||", " ")


def noise(rng: random.Random) -> str:
    """Random bytes, read as UTF-8 as well as it goes, or one random character of all there are."""
    if rng.random() < 0.5:
        return rng.randbytes(rng.randrange(60)).decode("utf-8", rng.choice(("replace", "surrogateescape", "ignore")))
    return "".join(map(chr, (rng.randrange(0x110000) for _ in range(rng.randrange(12)))))


def formula_text(rng: random.Random, depth: int) -> str:
    """A formula, or nearly one: now and then a bracket is missing."""
    if depth == 0 or rng.random() < 0.2:
        return "¬" * rng.randrange(3) + rng.choice("PQRSTp")
    text = f"({formula_text(rng, depth - 1)} {rng.choice(OPERATORS)} {formula_text(rng, depth - 1)})"
    return text[rng.random() < 0.03 :]


def huge(rng: random.Random) -> str:
    """Long or deep, up to 20,000 characters; mostly around the bounds of length and depth."""
    size = rng.choice(
        (31, 32, 33, 66, 199, 200, 201, 1000, 1001, 20_000) if rng.random() < 0.1 else (31, 32, 33, 66, 200)
    )
    unit = rng.choice(("(", ")", "¬", "P → ", "P∧", "a", "9", " ", ".", "<answer>", "</think>", "😀"))
    end = rng.choice(("", "P", "P" + ")" * size))
    return (unit * size + end)[:20_000]


def answer_like(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.35:
        return formula_text(rng, rng.randrange(5))
    if kind < 0.6:
        return rng.choice(WORDS)
    if kind < 0.8:
        return huge(rng)
    return noise(rng)


def fuzzed(rng: random.Random, right: str) -> str:
    """A hostile completion: soup of tags, words, marks and noise, or a right completion with something put into it."""
    if rng.random() < 0.5:
        text = completion(answer_like(rng), right if rng.random() < 0.3 else answer_like(rng))
        at, put = rng.randrange(len(text) + 1), rng.choice((*MARKS, *TAGS, *LOOK_ALIKES, ""))
        return text[:at] + put + text[at + rng.randrange(2) :]
    makers = (
        lambda: rng.choice(TAGS), lambda: rng.choice(TAGS), lambda: rng.choice(BROKEN_TAGS), lambda: answer_like(rng),
        lambda: rng.choice(MARKS), lambda: rng.choice(LOOK_ALIKES), lambda: noise(rng), lambda: right,
    )  # fmt: skip
    return "".join(rng.choice(makers)() for _ in range(rng.randrange(12)))


@pytest.mark.parametrize("name", TASK_NAMES)
def test_no_completion_raises_or_scores_anything_but_0_or_1_and_work_is_bounded(name, monkeypatch):
    """Counted, not timed: the nodes of formulas that are evaluated, none of them with more than 2 ** 6 worlds."""
    task, rng, work = TASKS[name], random.Random(name), 0
    reward, truth_table = Reward(task), logic.truth_table

    def counting(formula, variables):
        nonlocal work
        work += 1
        assert len(variables) <= logic.MAX_VARIABLES
        return truth_table(formula, variables)

    for example in task:  # the tables of the premises, which are kept
        reward.parts(completion("", example.answer), example)
    monkeypatch.setattr(logic, "truth_table", counting)
    correct = well_formed = checked = most = 0
    for number in range(COMPLETIONS):
        example = task[number % len(task)]
        text = fuzzed(rng, example.answer)
        work = 0
        parts = reward.parts(text, example)
        most = max(most, work)
        assert parts["correct"] in (0.0, 1.0) and parts["format"] in (0.0, 1.0), text
        assert 0.0 <= parts["total"] <= 1.0
        correct += parts["correct"]
        well_formed += parts["format"]
        if number % 10 == 0:
            checked += task.check_thinking(text, example, text) in (True, False)
    assert most <= logic.MAX_LENGTH and (most > 30) == (name == "propositional_logic")
    assert checked == COMPLETIONS / 10
    # The fuzz reaches both sides of each decision.
    assert 0.02 < correct / COMPLETIONS < 0.5 and 0.1 < well_formed / COMPLETIONS < 0.9


# --- syllogisms, by emptied regions ---


def proves(premises: list[Statement], claim: Statement) -> bool:
    """Whether the premises and the claim's contradiction cannot hold together, by emptying regions of Venn's diagram.

    All and No empty the regions that they forbid. Each Some then needs a region of its own kind that is not emptied;
    existential import asks one of each kind. No world is looked at: what is left stands or falls region by region.
    """
    contradiction = {"All": "Some not", "Some not": "All", "No": "Some", "Some": "No"}[claim.quantifier]
    statements = [*premises, Statement(contradiction, claim.subject, claim.predicate)]
    kinds = sorted({kind for s in statements for kind in (s.subject, s.predicate)})
    left = {frozenset(inside) for n in range(1, len(kinds) + 1) for inside in combinations(kinds, n)}
    for s in statements:
        if s.quantifier in ("All", "No"):
            left -= {
                region for region in left if s.subject in region and (s.predicate in region) == (s.quantifier == "No")
            }
    needed = [[region for region in left if kind in region] for kind in kinds]
    needed += [
        [region for region in left if s.subject in region and (s.predicate in region) == (s.quantifier == "Some")]
        for s in statements if s.quantifier.startswith("Some")
    ]  # fmt: skip
    return not all(needed)


def test_20_000_syllogisms_are_labelled_as_another_algorithm_labels_them():
    rng, yes = random.Random(1), 0
    drawn = load_task("syllogism", "train", ORACLE // 2, seed=7, balanced=False)
    for example in drawn:
        *premises, claim = (logic.parse_statement(example.metadata[p]) for p in ("premise1", "premise2", "conclusion"))
        assert (example.answer == "Yes") == proves(premises, claim), example
        yes += example.answer == "Yes"
    kinds = ["dogs", "Ärzte", "x1", "ИМЕНА"]
    for _ in range(ORACLE // 2):  # and in any arrangement, with one to four premises, contradicting ones too
        three = rng.sample(kinds, 3)
        *premises, claim = (
            Statement(rng.choice(("All", "No", "Some", "Some not")), *rng.sample(three, 2))
            for _ in range(rng.randint(2, 5))
        )
        read = [logic.parse_statement(str(s)) for s in premises]
        assert logic.follows(read, logic.parse_statement(str(claim))) == proves(premises, claim), (premises, claim)
        yes += proves(premises, claim)
    assert 0.3 * ORACLE < yes < 0.7 * ORACLE


# --- formulas, by analytic tableaux ---


def closes(branch: list[tuple[Formula, bool]], values: dict[str, bool] | None = None) -> bool:
    """Whether formulas, each with the truth value it must have, cannot hold together: an analytic tableau (Smullyan).

    Values are pushed inwards; a formula that needs one of two things splits the branch; a branch closes when a variable
    must be both true and false. No truth table is made. values: what the variables have to be so far.
    """
    branch, values, splits = list(branch), dict(values or {}), []
    while branch:
        formula, value = signed = branch.pop()
        match formula.op, formula.args, value:
            case "¬", [a], _:
                branch.append((a, not value))
            case ("∧", [a, b], True) | ("∨", [a, b], False):
                branch += [(a, value), (b, value)]
            case "→", [a, b], False:
                branch += [(a, True), (b, False)]
            case "∧" | "∨", [a, b], _:
                splits.append((signed, [(a, value)], [(b, value)]))
            case "→", [a, b], True:
                splits.append((signed, [(a, False)], [(b, True)]))
            case "↔", [a, b], _:
                splits.append((signed, [(a, True), (b, value)], [(a, False), (b, not value)]))
            case variable, (), _:
                if values.setdefault(variable, value) != value:
                    return True
    if not splits:
        return False
    (_, *sides), *later = splits
    return all(closes([*side, *(split[0] for split in later)], values) for side in sides)


def entails(premises: list[Formula], conclusion: Formula) -> bool:
    return closes([*((p, True) for p in premises), (conclusion, False)])


def worth_concluding(answer: Formula, premises: list[Formula]) -> bool:
    """The definition of a right answer, word by word, each "follows" a closed tableau."""
    names = {v for p in premises for v in str(p) if v.isupper()}
    if not {v for v in str(answer) if v.isupper()} <= names:
        return False
    if not entails(premises, answer) or closes([(answer, True)]) or closes([(answer, False)]):
        return False
    for n in range(1, len(premises) + 1):
        for some in combinations(premises, n):
            if entails(list(some), answer) and all(entails([answer], p) for p in some):
                return False
    return True


def random_formula(rng: random.Random, variables: str, size: int) -> Formula:
    if size <= 1:
        return Formula(rng.choice(variables))
    if rng.random() < 0.25:
        return combine("¬", random_formula(rng, variables, size - 1))
    left = rng.randint(1, size - 1)
    return combine(
        rng.choice("∧∨→↔"), random_formula(rng, variables, left), random_formula(rng, variables, size - left)
    )


def test_20_000_pairs_of_premises_and_answer_are_judged_as_tableaux_judge_them():
    rng, right = random.Random(2), 0
    for _ in range(ORACLE):
        variables = "PQRS"[: rng.randint(2, 4)]
        premises = [random_formula(rng, variables, rng.randint(1, 4)) for _ in range(rng.randint(1, 4))]
        answer = random_formula(rng, variables, rng.randint(1, 5))
        if rng.random() < 0.5:  # half of them follow more often: a premise, weakened
            answer = combine("∨", answer, rng.choice(premises))
        judged = logic.is_conclusion(str(answer), [str(p) for p in premises])
        assert judged == worth_concluding(answer, premises), (answer, premises)
        right += judged
    assert ORACLE / 10 < right < ORACLE * 9 / 10
