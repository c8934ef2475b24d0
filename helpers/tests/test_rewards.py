"""The reward: every recorded case, the weights, and the two ways in which it is called."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given, settings

from helpers.prompts import completion
from helpers.rewards import Reward, RewardConfig, format_reward
from helpers.tasks import TASK_NAMES, Example, load_task
from helpers.tests.test_prompts import TAGS, tag_soup

CASES = [json.loads(line) for line in (Path(__file__).parent / "cases" / "rewards.jsonl").open()]
TASK = load_task("syllogism", size=2)
YES = Example("Is it so?", "Yes")
RIGHT, WRONG = completion("x", "Yes"), completion("x", "No")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_parts_are_the_case_s(case):
    assert case["task"] == TASK.name
    parts = Reward(TASK).parts(case["completion"], Example("", case["truth"]))
    total = 0.85 * case["correct"] + 0.15 * case["format"]
    assert parts == {"correct": case["correct"], "format": case["format"], "length": 0.0, "total": total}


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (" \n<think>a</think>\n\n<answer>b</answer> \n", 1.0),
        ("<answer> b </answer> <think> a </think>", 0.0),
        ("<think> <think> a </think> <answer> b </answer>", 0.0),
        ("<think> a </think> <answer> <answer> b </answer>", 0.0),
        ("<think> a </think> <answer> b </answer> <answer>", 0.0),
        ("so <think> a </think> <answer> b </answer>", 0.0),
        ("<think> a </think> <answer> b </answer>" * 2, 0.0),
    ],
)
def test_format_needs_one_block_of_each_in_order(text, reward):
    assert format_reward(text) == reward


@settings(deadline=None)
@given(tag_soup)
def test_any_text_gets_a_total_between_0_and_1(text):
    parts = Reward(TASK).parts(text, YES)
    assert parts["correct"] in (0.0, 1.0) and parts["format"] in (0.0, 1.0)
    assert parts["format"] == 0.0 or [text.count(tag) for tag in TAGS] == [1, 1, 1, 1]
    assert 0.0 <= parts["total"] <= 1.0


def test_weights_and_length_make_the_total():
    reward = Reward(TASK, RewardConfig(correct=2.0, format=1.0, length=0.5, length_target=10))
    for words, excess, total in [(6, 0, 3), (10, 0, 3), (15, 0.5, 2.75), (20, 1, 2.5), (90, 1, 2.5)]:
        text = completion(" ".join(["x"] * (words - 5)), "Yes")  # the tags and the answer are five more
        parts = reward.parts(text, YES)
        assert (len(text.split()), parts["length"], parts["total"]) == (words, excess, total)


@pytest.mark.parametrize("name", TASK_NAMES)
def test_a_derivation_is_paid_only_where_each_step_and_the_answer_are_right(name):
    task = load_task(name, size=5)
    reward, plain = Reward(task, RewardConfig(derivation=2.0)), Reward(task)
    for example, other in zip(task, task[1:], strict=False):
        thinking = task.thinking(example)
        texts = [completion(thinking, example.answer), completion(thinking, "?"), completion("", example.answer),
                 completion(task.thinking(other), example.answer), thinking, ""]  # fmt: skip
        for text, sound in zip(texts, [1.0, 0.0, 0.0, 0.0, 0.0, 0.0], strict=True):
            with_it, without = reward.parts(text, example), plain.parts(text, example)
            assert with_it.pop("derivation") == sound and not {"derivation", "steps"} & without.keys()
            assert (with_it.pop("steps") == 1.0) == (sound == 1.0)
            assert with_it.pop("total") == without.pop("total") + 2 * sound and with_it == without
    assert Reward(task, RewardConfig(derivation=1.0))(texts[:2], example) == [2.0, 0.15]


def test_a_step_is_paid_as_long_as_no_mistake_stands_before_it():
    example = load_task("syllogism", size=1)[0]
    *steps, verdict = (f"{step}." for step in TASK.thinking(example).rstrip(".").split(". "))
    reward = Reward(TASK, RewardConfig(correct=0.0, format=0.0, steps=7.0))  # six steps and the answer
    other = "It follows." if verdict == "It does not follow." else "It does not follow."
    ends = [(steps[:k] + ["A = B."] + steps[k + 1 :] + [verdict], k) for k in range(len(steps))]
    for said, right in [*ends, (steps + [other], 5), (steps, 5), (steps + [verdict, "Done."], 5), ([""], 0)]:
        parts = reward.parts(completion(" ".join(said), example.answer), example)
        assert parts["total"] == pytest.approx(right) and parts["derivation"] == 0.0, said
    right = " ".join([*steps, verdict])
    assert reward([completion(right, example.answer), completion(right, "?")], example) == [7.0, 6.0]


def test_the_steps_of_a_completion_end_where_they_end():
    example = load_task("syllogism", size=1)[0]
    thinking = TASK.thinking(example)
    sentences = [f"{step}." for step in thinking.rstrip(".").split(". ")]
    text = completion(thinking, example.answer)

    def parts(text):  # what stands in each step, and whether it is right
        steps, at = [], 0
        for end, right in Reward(TASK).steps(text, example):
            steps, at = [*steps, (text[at:end].strip(), right)], end
        return steps

    right = [("<think> " * (i == 0) + sentence, True) for i, sentence in enumerate(sentences)]
    answer = f"</think>\n<answer> {example.answer} </answer>"
    assert parts(text) == [*right, (answer, True)]
    for i, sentence in enumerate(sentences[:-1]):
        wrong = text.replace(sentence, "A = B.")
        assert parts(wrong) == [*right[:i], ("<think> " * (i == 0) + "A = B.", False)]
    other = completion(thinking, "Yes" if example.answer == "No" else "No")
    for changed in (other, text[: -len(" </answer>")], text + " and more"):  # the wrong answer, no end, no format
        assert parts(changed)[:6] == right and Reward(TASK).steps(changed, example)[6] == (len(changed), False)
    verdict = text.replace(sentences[-1], "It may follow.")
    assert parts(verdict) == [*right[:-1], (f"It may follow. {answer}", False)]  # with the answer that comes of it
    for nothing in ("", "Yes", "<think> A = x", "</think> <think>"):
        assert Reward(TASK).steps(nothing, example) == [(len(nothing), False)]


def test_a_letter_and_its_count_are_a_step():
    task = load_task("letter_counting", "train", 5)
    for example in task:
        word, letter = example.metadata["word"], example.metadata["letter"]
        text = completion(task.thinking(example), example.answer)
        steps = Reward(task).steps(text, example)
        assert len(steps) == len(word) + 1 and all(right for _, right in steps) and steps[-1][0] == len(text)
        assert all(text[:end].endswith(f"= {word[: i + 1].count(letter)}") for i, (end, _) in enumerate(steps[:-1]))
        wrong = text.replace(f"{word[1]} = {word[:2].count(letter)}", f"{word[1]} = 7", 1)
        assert [right for _, right in Reward(task).steps(wrong, example)] in ([True, False], [False])


@settings(deadline=None)
@given(tag_soup)
def test_steps_of_any_text_are_in_order_and_only_the_last_can_be_wrong(text):
    example = load_task("syllogism", size=1)[0]
    ends, right = zip(*Reward(TASK).steps(text, example), strict=True)
    assert list(ends) == sorted(ends) and ends[-1] <= len(text) and all(right[:-1])


@pytest.mark.parametrize(
    "wrong",
    [{"correct": -0.1}, {"derivation": -1}, {"format": math.nan}, {"length": math.inf}, {"correct": "1"},
     {"length": 0.1}, {"length_target": -1}],
)  # fmt: skip
def test_bad_weights_are_refused_in_one_sentence(wrong):
    with pytest.raises(ValueError, match=r"^[^.]+(\.\d[^.]*)?\.$"):
        RewardConfig(**wrong)


def test_our_loop_s_calls():
    reward = Reward(TASK)
    assert reward([RIGHT, WRONG], YES) == [1.0, 0.15]
    assert reward([RIGHT, RIGHT], [YES, Example("", "No")]) == [1.0, 0.15]
    assert reward([], YES) == []
    with pytest.raises(ValueError, match="2 completions"):
        reward([RIGHT, WRONG], [YES])


def test_trl_s_call():
    """The arguments that GRPOTrainer._calculate_rewards passes, conversational and plain."""
    logged = {}
    columns = {
        "prompts": [[{"role": "user", "content": "?"}]] * 2,
        "completion_ids": [[1], [2]],
        "example": [asdict(YES)] * 2,
        "trainer_state": None,
        "log_extra": None,
        "log_metric": logged.__setitem__,
    }
    reward = Reward(TASK)
    chats = [[{"role": "assistant", "content": text}] for text in (RIGHT, WRONG)]
    assert reward(completions=chats, **columns) == [1.0, 0.15]
    assert reward(completions=[RIGHT, WRONG], **columns) == [1.0, 0.15]
    assert logged == {"accuracy": 0.5, "format_rate": 1.0}
    assert reward.__name__ == "syllogism_reward"
