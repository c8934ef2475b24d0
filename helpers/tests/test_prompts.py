"""The tags: what is extracted from replies of every shape."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.prompts import SYSTEM_PROMPT, completion, extract_answer, extract_thinking, messages

CASES = [json.loads(line) for line in (Path(__file__).parent / "cases" / "rewards.jsonl").open()]

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
# Tags, halves of tags and words in any order, up to about 20,000 characters.
tag_soup = st.one_of(
    st.text(max_size=20_000),
    st.lists(st.sampled_from([*TAGS, "<answer", "</", ">", " ", "\n", "Yes", "."]), max_size=60).map("".join),
    st.builds(str.__mul__, st.sampled_from([*TAGS, "<", " ", "</think><answer>"]), st.integers(0, 1200)),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_extracted_answer_is_the_case_s(case):
    assert extract_answer(case["completion"]) == case["extracted"]


def test_completion_has_the_exact_shape_and_reads_back():
    text = completion("s = 0", "1")
    assert text == "<think> s = 0 </think>\n<answer> 1 </answer>"
    assert extract_thinking(text) == "s = 0"
    assert extract_answer(text) == "1"


def test_the_system_prompt_shows_the_shape_it_asks_for():
    assert messages("Why?") == [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": "Why?"},
    ]
    assert SYSTEM_PROMPT.endswith(completion("your steps", "your final answer"))


@pytest.mark.parametrize(
    ("text", "thinking"),
    [
        ("<think> a </think> <answer> b </answer>", "a"),
        ("<think> a </think><think> b </think>", "a </think><think> b"),
        ("<think> a", None),
        ("a </think>", None),
        ("</think> a <think>", None),
        ("<think></think>", ""),
        ("", None),
    ],
)
def test_thinking_runs_from_the_first_opening_to_the_last_closing_tag(text, thinking):
    assert extract_thinking(text) == thinking


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer> a </answer> <answer> b", "a"),  # the last complete one
        ("<answer> a <answer> b </answer>", "b"),  # a reopened one starts anew
        ("<answer> a </answer> b </answer>", "a"),  # a stray closing tag adds nothing
        ("<answer> a </answer> </think>", None),  # still thinking
    ],
)
def test_the_last_complete_answer_counts(text, answer):
    assert extract_answer(text) == answer


@settings(deadline=None)
@given(tag_soup)
def test_extractors_never_raise_and_return_text_of_the_completion(text):
    for found in (extract_answer(text), extract_thinking(text)):
        assert found is None or (found in text and found == found.strip())


@settings(deadline=None)
@given(st.text(), st.text())
def test_any_text_without_tags_reads_back(thinking, answer):
    text = completion(thinking, answer)
    if not any(tag in thinking + answer for tag in TAGS):
        assert (extract_thinking(text), extract_answer(text)) == (thinking.strip(), answer.strip())
