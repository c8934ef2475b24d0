"""The tasks: splits that cannot meet, true labels, exact scores, bounded work, a teacher that is right."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers import logic
from helpers.prompts import completion, extract_answer, extract_thinking
from helpers.tasks import DRAWN_LIMIT, TASK_NAMES, Example, load_task, split_of
from helpers.tests.test_prompts import tag_soup

CASES = Path(__file__).parent / "cases"
TASKS = {name: load_task(name, "test", 300) for name in TASK_NAMES}
SYLLOGISMS = [json.loads(line) for line in (CASES / "syllogism.jsonl").open()]
PROPOSITIONAL = [json.loads(line) for line in (CASES / "propositional.jsonl").open()]


@pytest.mark.parametrize("case", PROPOSITIONAL, ids=lambda case: case["id"])
def test_propositional_score_is_the_case_s(case):
    question = Example("", "", {"premises": case["premises"], "variables": case["variables"]})
    assert TASKS["propositional_logic"].score(case["answer"], question) == case["score"]


@pytest.mark.parametrize("case", SYLLOGISMS, ids=lambda case: case["about"])
def test_syllogism_score_goes_by_the_case_s_truth(case):
    statements = [logic.parse_statement(case[part]) for part in ("premise1", "premise2", "conclusion")]
    assert logic.follows(statements[:2], statements[2]) == (case["truth"] == "Yes")


@pytest.mark.parametrize("name", TASK_NAMES)
@pytest.mark.parametrize("balanced", [True, False])
def test_no_question_is_in_both_splits_or_twice_in_one(name, balanced):
    keys, questions = {"train": set(), "test": set()}, {"train": set(), "test": set()}
    draws = [("train", 4000, 0), ("train", 700, 1), ("train", 1, 42), ("test", 3000, 0), ("test", 500, 7)]
    for split, size, seed in draws:
        task = load_task(name, split, size, seed, balanced)
        own = {task.key(e.metadata) for e in task}
        assert len(task) == size == len({e.question for e in task})
        assert name == "letter_counting" or len(own) == size
        keys[split] |= own
        questions[split] |= {e.question for e in task}
    assert not keys["train"] & keys["test"] and not questions["train"] & questions["test"]


@pytest.mark.parametrize("name", TASK_NAMES)
def test_the_rule_that_parts_the_space_is_the_key_s_hash(name):
    for split in ("train", "test"):
        for seed in range(3):
            task = load_task(name, split, 200, seed)
            assert {split_of(task.key(e.metadata)) for e in task} == {split} == {task.split}


def test_the_split_depends_on_what_is_asked_not_on_the_order_of_the_premises():
    syllogism, propositional = TASKS["syllogism"], TASKS["propositional_logic"]
    m = syllogism[0].metadata
    assert syllogism.key(m) == syllogism.key(m | {"premise1": m["premise2"], "premise2": m["premise1"]})
    assert propositional.key({"premises": ["P", "Q"]}) == propositional.key({"premises": ["Q", "P"]})
    assert split_of("strawberry") == "test"


@pytest.mark.parametrize("name", TASK_NAMES)
def test_seeds_draw_different_questions_and_repeat_their_own(name):
    first = [e.question for e in load_task(name, size=100, seed=0)]
    other = [e.question for e in load_task(name, size=100, seed=1)]
    assert len(set(first) & set(other)) < 10
    assert first == [e.question for e in load_task(name, size=100, seed=0)]


@pytest.mark.parametrize("size", [9, 100, 301])
def test_balanced_answers_are_equally_frequent_and_in_no_order(size):
    for name, classes in [("syllogism", ("Yes", "No")), ("letter_counting", ("1", "2", "3"))]:
        task = load_task(name, "train", size)
        counts = Counter(e.answer for e in task)
        assert task.classes == classes == tuple(sorted(counts, key=classes.index))
        assert max(counts.values()) - min(counts.values()) <= 1
        assert [e.answer for e in task] != sorted((e.answer for e in task), key=classes.index)


def test_stock_mixes_are_unbalanced_as_reasoning_gym_draws_them():
    syllogism = load_task("syllogism", "train", 4000, balanced=False)
    assert 0.54 < sum(e.answer == "Yes" for e in syllogism) / 4000 < 0.60
    assert 0.10 < sum(e.answer != e.metadata["stock_label"] for e in syllogism) / 4000 < 0.14
    letters = load_task("letter_counting", "train", 4000, balanced=False)
    assert 0.78 < sum(e.answer == "1" for e in letters) / 4000 < 0.86


def test_labels_are_true():
    for e in TASKS["letter_counting"]:
        assert e.answer == str(sum(character == e.metadata["letter"] for character in e.metadata["word"]))
        assert re.findall('"(.*?)"', e.question) == [e.metadata["letter"], e.metadata["word"]]
    for e in TASKS["syllogism"]:
        lines = e.question.splitlines()
        assert lines[1:3] == [f"1. {e.metadata['premise1']}", f"2. {e.metadata['premise2']}"]
        assert f"{e.metadata['conclusion']}?" in lines
        *premises, claim = map(logic.parse_statement, (lines[1][3:], lines[2][3:], e.metadata["conclusion"]))
        assert (e.answer == "Yes") == logic.follows(premises, claim)
    for e in TASKS["propositional_logic"]:
        assert re.findall(r"^\d\. (.*)$", e.question, re.MULTILINE) == e.metadata["premises"]
        assert logic.consistent(e.metadata["premises"])


@pytest.mark.parametrize("name", TASK_NAMES)
def test_the_teacher_is_right_and_reads_back(name):
    task = load_task(name, "train", 500, seed=3)
    for e in task:
        text = completion(task.thinking(e), e.answer)
        thinking, answer = extract_thinking(text), extract_answer(text)
        assert task.score(answer, e) == 1.0
        assert task.check_thinking(thinking, e) and task.check_thinking(thinking, e, answer)
        assert not task.check_thinking(thinking, e, "Perhaps")
        assert not task.check_thinking(None, e)


@pytest.mark.parametrize("name", TASK_NAMES)
def test_all_steps_are_right_only_where_the_derivation_is(name):
    task = load_task(name, "train", 50, seed=3)
    for e, other in zip(task, task[1:], strict=False):
        thinking = task.thinking(e)
        cut = [thinking[: len(thinking) * i // 9] for i in range(10)]
        shares = [task.right_steps(text, e, e.answer) for text in cut]
        assert shares == sorted(shares) and shares[-1] == 1.0  # the further, the more
        for text in (*cut, task.thinking(other), thinking + " " + thinking, "", None):
            for answer in (e.answer, "Perhaps", None):
                share = task.right_steps(text, e, answer)
                assert 0.0 <= share <= 1.0 and (share == 1.0) == task.check_thinking(text, e, answer)
    for character in "a=.":  # read in time that grows with the length, or not at all
        assert task.right_steps(character * 1_000_000, task[0], "Yes") == 0.0
    if name != "propositional_logic":  # whose derivations have any number of steps
        assert 0.0 < shares[5] < 1.0 and 0.5 < task.right_steps(thinking, e, "Perhaps") < 1.0


@pytest.mark.parametrize("name", TASK_NAMES)
def test_a_derivation_of_another_question_is_wrong(name):
    task = TASKS[name]
    for e, other in zip(task[:-1], task[1:], strict=True):
        if task.thinking(e) != task.thinking(other):
            passed = task.check_thinking(task.thinking(other), e)
            assert not passed or name == "propositional_logic" and task.score(other.answer, e) == 1.0


@pytest.mark.parametrize(
    ("name", "truth", "right", "wrong"),
    [
        ("syllogism", "No", ["No", "no", " NO. ", "no ."],
         ["", "Yes", "No No", "None", "No!", "no..", "not", "No" + " " * 2000 + "Yes", None]),
        ("letter_counting", "3", ["3", " 3. ", "3\n", "03", "3 ."],
         ["", "2", "33", "3.0", "+3", "three", "3 r's", "٣", "3" * 5000, "3" + " " * 2000 + "4", None]),
    ],
)  # fmt: skip
def test_what_an_answer_may_look_like(name, truth, right, wrong):
    question = Example("", truth)
    assert [TASKS[name].score(answer, question) for answer in right] == [1.0] * len(right)
    assert [TASKS[name].score(answer, question) for answer in wrong] == [0.0] * len(wrong)


def test_what_a_formula_may_look_like():
    question = Example("", "", {"premises": ["(P → Q)", "P"]})
    score = TASKS["propositional_logic"].score
    assert [score(a, question) for a in ("Q", " Q. ", "(Q)", "¬¬Q", "~~ Q&Q .")] == [1.0] * 5
    assert [score(a, question) for a in ("q", "Q Q", "Q.Q", "Q" + " " * 500 + "¬", None)] == [0.0] * 5


formula_soup = st.lists(st.sampled_from(list("PQRSpT()¬∧∨→↔~!&|-><= .")), max_size=400).map("".join)


@settings(deadline=None)
@example("¬" * 20_000)
@example("(" * 20_000)
@example("P → " * 5_000 + "P")
@example("9" * 20_000)
@given(st.one_of(tag_soup, formula_soup))
def test_no_text_makes_scoring_or_checking_raise(text):
    for task in TASKS.values():
        assert task.score(text, task[0]) in (0.0, 1.0)
        assert task.check_thinking(text, task[0], text) in (True, False)


@pytest.mark.parametrize("text", [
    "P ∧ " * 32 + "P", "P ∧ " * 49 + "P", "¬" * 32 + "P", "¬" * 199 + "P", "(" * 199, "P → " * 32 + "P",
    "P∨" * 10_000, "a" * 20_000,
])  # fmt: skip
def test_scoring_work_is_bounded_by_construction(text, monkeypatch):
    """Counts the evaluations of formula nodes: never more than the characters that are looked at."""
    evaluated, evaluate = [], logic.truth_table

    def counting(formula, variables):
        evaluated.append(formula)
        assert len(variables) <= logic.MAX_VARIABLES
        return evaluate(formula, variables)

    monkeypatch.setattr(logic, "truth_table", counting)
    task = TASKS["propositional_logic"]
    assert task.score("(P ∧ ¬P)", task[0]) == 0.0
    assert len(evaluated) == 4  # once a node; the premises' tables are kept from before
    evaluated.clear()
    task.score(text, task[0])
    assert len(evaluated) <= (len(text) if len(text) <= logic.MAX_LENGTH else 0)


def test_constant_baselines():
    assert TASKS["syllogism"].constant_baseline() == ("Yes", 0.5)
    assert TASKS["letter_counting"].constant_baseline() == ("1", 1 / 3)
    task = TASKS["propositional_logic"]
    answer, accuracy = task.constant_baseline()
    assert accuracy == pytest.approx(sum(task.score(answer, e) for e in task) / len(task))
    for other in ("P", "¬Q", "(P ∨ R)", "(P ↔ Q)"):
        assert accuracy >= sum(task.score(other, e) for e in task) / len(task)


def test_a_task_is_a_sequence():
    task = TASKS["syllogism"]
    assert task[0] is next(iter(task)) and task[-1] is task[len(task) - 1]
    assert task[:2] == (task[0], task[1])
    assert (task.name, task.split) == ("syllogism", "test")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "sylogism"}, "did you mean 'syllogism'"),
        ({"name": "sums"}, "choose one of: syllogism, "),
        ({"name": "syllogism", "split": "valid"}, "use 'train' or 'test'"),
        ({"name": "syllogism", "size": 0}, "size of 1 or more"),
        ({"name": "syllogism", "seed": -1}, "seed of 0 or more"),
        ({"name": "syllogism", "size": DRAWN_LIMIT + 1}, "offers 200,000 such train questions"),
        ({"name": "propositional_logic", "size": DRAWN_LIMIT + 1}, "offers 200,000 such train questions"),
        ({"name": "letter_counting", "size": 10**6}, r"offers 2\d,\d{3} such train questions"),
        ({"name": "letter_counting", "size": 10**6, "balanced": False}, r"offers 49\d,\d{3} such train"),
    ],
)
def test_bad_arguments_get_one_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_task(**arguments)


def test_the_whole_of_a_task_can_be_drawn():
    with pytest.raises(ValueError) as refusal:
        load_task("letter_counting", "test", 10**6)
    limit = int(re.search(r"offers ([\d,]+)", str(refusal.value))[1].replace(",", ""))
    task = load_task("letter_counting", "test", limit)
    assert len({e.question for e in task}) == limit
    assert 'the letter "r" appear in the text: "strawberry"?' in " ".join(e.question for e in task)
