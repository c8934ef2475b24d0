"""Evaluation: statistics against known values and brute force, every figure against responses written by hand."""

import json
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import evaluate as module
from helpers.evaluate import evaluate, mcnemar, pass_at_k, report, wilson
from helpers.models import load_model
from helpers.prompts import completion
from helpers.rollout import Response
from helpers.tasks import load_task

torch.set_num_threads(1)
MODEL, TOKENIZER = load_model("pocket", device="cpu")


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [
        (8, 10, 0.490162, 0.943318),
        (0, 300, 0.0, 0.012643),  # z^2 / (n + z^2)
        (300, 300, 0.987357, 1.0),
        (150, 300, 0.443780, 0.556220),
        (1, 1, 0.206549, 1.0),
    ],
)
def test_wilson_s_interval(right, total, low, high):
    assert wilson(right, total) == pytest.approx((low, high), abs=1e-6)


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_s_interval_is_the_textbook_s(counts):
    """(p + z^2/2n +- z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n), Wilson 1927."""
    right, n = counts
    z, p = 1.959963984540054, right / n
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5 / (1 + z**2 / n)
    assert wilson(right, n) == pytest.approx((middle - half, middle + half), abs=1e-9)


@pytest.mark.parametrize(
    ("both", "neither", "gained", "lost", "p"),
    [
        (5, 5, 10, 2, 0.03857421875),  # 2 (1 + 12 + 66) / 2^12
        (0, 0, 5, 0, 0.0625),
        (3, 0, 0, 5, 0.0625),
        (7, 2, 1, 1, 1.0),
        (4, 4, 0, 0, 1.0),
        (100, 0, 21, 4, 0.0009105205535888672),  # 2 (1 + 25 + 300 + 2300 + 12650) / 2^25
    ],
)
def test_mcnemar_s_exact_test(both, neither, gained, lost, p):
    pairs = [(True, True)] * both + [(False, False)] * neither + [(False, True)] * gained + [(True, False)] * lost
    test = mcnemar(*zip(*pairs, strict=True))
    assert test == {"gained": gained, "lost": lost, "p": pytest.approx(p, rel=1e-9)}


def test_mcnemar_refuses_results_on_different_questions():
    with pytest.raises(ValueError, match=r"^Compare results on the same questions: 2 came with 3\.$"):
        mcnemar([True, False], [True, False, True])


def test_pass_at_k_is_the_share_of_all_choices_of_k_samples():
    for samples in range(1, 7):
        for right in range(samples + 1):
            outcomes = [True] * right + [False] * (samples - right)
            for k in range(1, samples + 1):
                choices = list(combinations(outcomes, k))
                assert pass_at_k(right, samples, k) == pytest.approx(sum(map(any, choices)) / len(choices))
    for k in (0, 5):
        with pytest.raises(ValueError, match="needs k between 1 and the 4 samples taken"):
            pass_at_k(1, 4, k)


# --- a policy whose responses are written by hand ---


@pytest.fixture
def scripted(monkeypatch):
    """scripted(task, groups, **settings): the evaluation of these completions, a list a question."""

    def run(task, groups, **settings):
        def rollout(model, prompts, **asked):
            assert len(prompts) == len(task) and asked["group_size"] == settings.get("samples", 1)
            return [
                [
                    Response(TOKENIZER(text).input_ids + [TOKENIZER.eos_token_id] * finished, [], finished)
                    for text, finished in group
                ]
                for group in groups
            ]

        with monkeypatch.context() as patch:
            patch.setattr(module, "rollout", rollout)
            return evaluate(MODEL, TOKENIZER, task, **settings)

    return run


def answers(task, *given_answers):
    """One finished completion a question, with the teacher's thinking where the answer is right."""
    return [
        [(completion(task.thinking(e) if a == e.answer else "So", a), True)]
        for e, a in zip(task, given_answers, strict=True)
    ]


def test_every_figure_of_responses_written_by_hand(scripted):
    task = load_task("letter_counting", "test", 6, seed=1)
    truths = [e.answer for e in task]
    assert sorted(truths) == ["1", "1", "2", "2", "3", "3"]
    groups = answers(task, *truths)
    first, second, third = (truths.index(a) for a in "123")  # three of the six go wrong, each in its own way
    groups[first] = [(completion(task.thinking(task[first]), "2"), True)]  # does not follow from its thinking
    groups[second] = [("<think> s = 1 </think> <answer> 2 </answer> more", True)]  # right for a wrong reason
    groups[third] = [("<think> s = 0 t", False)]
    result = scripted(task, groups)
    summary = result.summary()
    right = [i not in (first, third) for i in range(6)]
    assert result.right == right
    expected = {
        "task": "letter_counting", "questions": 6, "samples": 1, "temperature": 0.0, "seed": 0,
        "accuracy": 4 / 6, "balanced_accuracy": (1 / 2 + 2 / 2 + 1 / 2) / 3,
        "baseline": 1 / 3, "answers": {"1": 1 / 6, "2": 3 / 6, "3": 1 / 6, "(none)": 1 / 6},
        "format_rate": 4 / 6, "thinking_rate": 3 / 6, "unfinished": 1 / 6, "pass_at_k": {1: 4 / 6},
        "mean_length": sum(len(TOKENIZER(g[0][0]).input_ids) + g[0][1] for g in groups) / 6,
    }  # fmt: skip
    for name, value in expected.items():
        assert summary[name] == pytest.approx(value), name
    assert summary["baseline_answer"] in "123"
    assert (summary["accuracy_low"], summary["accuracy_high"]) == wilson(4, 6)
    assert json.loads(json.dumps(summary)) is not None
    line, (low, high) = report(summary), wilson(4, 6)
    assert line.startswith(f"66.7 % right ({100 * low:.1f} to {100 * high:.1f})") and "\n" not in line
    assert all(part in line for part in ("n = 6", "greedy", "33.3 %", "format 67 %", "derivation 50 %"))


def test_balanced_accuracy_unmasks_a_constant_answer(scripted):
    """On the stock mix "Yes" is right more often than not; each answer's own accuracy counts alike."""
    task = load_task("syllogism", "test", 100, balanced=False)
    share = sum(e.answer == "Yes" for e in task) / 100
    assert share > 0.5
    summary = scripted(task, answers(task, *["Yes"] * 100)).summary()
    assert summary["accuracy"] == summary["baseline"] == pytest.approx(share)
    assert summary["baseline_answer"] == "Yes" and summary["answers"] == {"Yes": 1.0}
    assert summary["balanced_accuracy"] == 0.5


def test_a_task_without_classes_has_no_balanced_accuracy(scripted):
    task = load_task("propositional_logic", "test", 12)
    summary = scripted(task, answers(task, *(e.answer for e in task))).summary()
    assert summary["balanced_accuracy"] is None
    assert summary["accuracy"] == summary["thinking_rate"] == 1.0 > summary["baseline"]


def test_several_samples_a_question(scripted):
    task = load_task("syllogism", "test", 3)
    rights = [(1, 0, 1, 0), (0, 0, 0, 0), (1, 0, 0, 0)]
    groups = [
        [(completion("So", e.answer if right else "Perhaps"), True) for right in row]
        for e, row in zip(task, rights, strict=True)
    ]
    result = scripted(task, groups, samples=4, temperature=1.0, seed=3)
    summary = result.summary()
    assert result.right == [bool(right) for row in rights for right in row]
    assert [r["question"] for r in result.records] == [0] * 4 + [1] * 4 + [2] * 4
    assert summary["accuracy"] == 3 / 12 and (summary["questions"], summary["samples"]) == (3, 4)
    assert (summary["accuracy_low"], summary["accuracy_high"]) == wilson(1, 3)  # questions count, not responses
    at_2 = (1 - 1 / 6 + 0 + 1 - 3 / 6) / 3
    assert summary["pass_at_k"] == pytest.approx({1: 3 / 12, 2: at_2, 4: 2 / 3})
    assert "n = 3, sampled;" in report(summary)


# --- a real, untrained model ---


def test_greedy_is_one_response_whatever_the_seed_sampled_is_not():
    task = load_task("letter_counting", "test", 4)
    settings = {"max_new_tokens": 5, "samples": 3}
    greedy = [evaluate(MODEL, TOKENIZER, task, seed=seed, **settings).records for seed in (0, 1)]
    assert greedy[0] == greedy[1] and len({r["completion"] for r in greedy[0][:3]}) == 1
    sampled = [evaluate(MODEL, TOKENIZER, task, temperature=1.0, seed=seed, **settings) for seed in (0, 0, 1)]
    assert sampled[0].records == sampled[1].records != sampled[2].records
    assert len({r["completion"] for r in sampled[0].records}) > 6
    for number, record in enumerate(sampled[0].records):
        assert (record["question"], record["truth"]) == (number // 3, task[number // 3].answer)
        assert 1 <= record["length"] <= 5 and (record["finished"] or record["length"] == 5)
    assert sampled[0].summary()["pass_at_k"].keys() == {1, 2}


def test_progress_is_told_in_questions():
    task, told = load_task("letter_counting", "test", 5), []
    evaluate(MODEL, TOKENIZER, task, samples=2, max_new_tokens=1, max_rows=4, on_progress=told.append)
    assert told == [2, 2, 1]
