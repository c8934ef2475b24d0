"""The pocket model and its tokenizer: small, seeded, and fluent in the three tasks."""

import re
import string

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.pocket import (
    ASSISTANT,
    CHAT_TEMPLATE,
    END,
    PAD,
    TAGS,
    UNKNOWN,
    USER,
    WORDS,
    pocket_model,
    pocket_tokenizer,
)
from helpers.prompts import completion, extract_answer, extract_thinking, messages
from helpers.rewards import format_reward
from helpers.rollout import encode_prompt, end_token_ids
from helpers.tasks import TASK_NAMES, load_task

COUNT = 300
TASKS = [load_task(name, split, COUNT, seed=5) for name in TASK_NAMES for split in ("train", "test")]
TASKS += [load_task(name, "train", COUNT, seed=6, balanced=False) for name in TASK_NAMES]
TOKENIZER = pocket_tokenizer()
each_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: f"{task.name}-{task.split}")


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False).input_ids


def tokens_of(text: str) -> list[str]:
    return TOKENIZER.convert_ids_to_tokens(ids_of(text))


# --- the model ---


def test_it_has_under_a_million_parameters_and_the_right_special_tokens(pocket):
    model, tokenizer = pocket
    assert 500_000 < sum(p.numel() for p in model.parameters()) < 650_000  # "about 0.6 M", as the table says
    assert model.config.vocab_size == len(tokenizer) == model.get_input_embeddings().num_embeddings
    assert 170 < len(tokenizer) < 190  # "about 180"
    assert (model.config.pad_token_id, model.config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert end_token_ids(model, tokenizer) == {tokenizer.eos_token_id}
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_seed_sets_the_weights_and_leaves_the_global_generator_alone():
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first, again, other = (dict(pocket_model(seed)[0].named_parameters()) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(not torch.equal(p, other[name]) for name, p in first.items() if p.dim() == 2)


def test_its_longest_texts_fit_its_positions(pocket):
    model, tokenizer = pocket
    longest = max(
        len(encode_prompt(tokenizer, e.question)) + len(ids_of(completion(task.thinking(e), e.answer))) + 1
        for task in TASKS
        for e in task
    )
    assert longest < model.config.max_position_embeddings


# --- the tokenizer knows the tasks ---


@each_task
def test_no_question_and_no_derivation_has_an_unknown_token(task):
    for e in task:
        for text in (e.question, task.thinking(e), e.answer, completion(task.thinking(e), e.answer)):
            assert UNKNOWN not in tokens_of(text), text


@each_task
def test_nothing_but_blanks_is_lost_on_the_way_to_tokens_and_back(task):
    for e in task:
        for text in (e.question, completion(task.thinking(e), e.answer)):
            back = TOKENIZER.decode(ids_of(text))
            assert re.sub(r"\s", "", back) == re.sub(r"\s", "", text)


@each_task
def test_what_the_teacher_writes_is_still_right_after_decoding(task):
    for e in task:
        thinking = task.thinking(e)
        ids = ids_of(completion(thinking, e.answer)) + [TOKENIZER.eos_token_id]
        text = TOKENIZER.decode(ids, skip_special_tokens=True)
        assert task.score(extract_answer(text), e) == 1.0, text
        assert task.check_thinking(extract_thinking(text), e, extract_answer(text)), text
        assert format_reward(text) == 1.0, text


def test_known_words_and_tags_are_one_token():
    for word in [*WORDS, *TAGS, "humans", "butterflies"]:
        assert tokens_of(word) == [word]
    assert tokens_of("All humans are butterflies.") == ["All", "humans", "are", "butterflies", "."]
    assert tokens_of("<think> a </think>\n<answer> Yes </answer>") == [
        "<think>", "a", "</think>", "<answer>", "Yes", "</answer>",
    ]  # fmt: skip


@each_task
def test_every_word_outside_quotation_marks_is_one_token(task):
    """Spelled words would cost time and, worse, would have to be learned letter by letter."""
    for e in task:
        unquoted = re.sub(r'"[^"]*"', "", e.question)
        for text in (unquoted, e.answer) if task.name == "letter_counting" else (unquoted, task.thinking(e)):
            assert [token for token in tokens_of(text) if token.isalpha()] == re.findall("[A-Za-z]+", text)


def test_decoded_text_has_no_blank_before_a_mark():
    text = "A = humans, B = writers. So no? No!"
    assert TOKENIZER.decode(ids_of(text)) == text.replace("no", "n o")


@pytest.mark.parametrize("word", ["times", "letter", "humans", "strawberry", "all", "Allow"])
def test_a_word_in_quotation_marks_is_spelled(word):
    assert tokens_of(f'the text: "{word}"?') == ["the", "text", ":", '"', *word, '"', "?"]


@each_task
def test_a_letter_question_spells_its_word_and_no_other(task):
    for e in task[:100]:
        tokens = tokens_of(e.question)
        if task.name == "letter_counting":
            word, letter = e.metadata["word"], e.metadata["letter"]
            quotes = [place for place, token in enumerate(tokens) if token == '"']
            assert tokens[quotes[0] + 1 : quotes[1]] == [letter]
            assert tokens[quotes[2] + 1 : quotes[3]] == list(word)
            tokens = tokens[: quotes[0]] + tokens[quotes[1] + 1 : quotes[2]]
        assert not any(token in string.ascii_lowercase and token != "a" for token in tokens)


def test_unknown_words_are_spelled_and_unknown_signs_are_marked():
    assert tokens_of("Alliance") == list("Alliance")  # not "All" and the rest
    for word in ("zebra", "cannot", "Noun"):
        assert tokens_of(word) == list(word)
    assert tokens_of("1 + é") == ["1", UNKNOWN, UNKNOWN]


@given(st.text(max_size=60))
def test_any_text_can_be_encoded_and_decoded(text):
    ids = ids_of(text)
    assert all(0 <= i < len(TOKENIZER) for i in ids)
    assert isinstance(TOKENIZER.decode(ids), str)


# --- special tokens and the chat template ---


def test_special_tokens_go_to_their_id_and_back():
    specials = [PAD, END, USER, ASSISTANT, UNKNOWN]
    assert TOKENIZER.convert_tokens_to_ids(specials) == list(range(5))
    for number, token in enumerate(specials):
        assert ids_of(token) == [number] and TOKENIZER.decode([number]) == token
        assert ids_of(f"All{token}humans") == [*ids_of("All"), number, *ids_of("humans")]
        assert TOKENIZER.decode([number], skip_special_tokens=True) == ""
    vocabulary = TOKENIZER.get_vocab()
    assert sorted(vocabulary.values()) == list(range(len(TOKENIZER)))  # no id twice, none left out


def test_the_chat_template_writes_user_and_assistant_and_leaves_the_system_message_out():
    chat = [*messages("All humans"), {"role": "assistant", "content": "Yes"}]
    assert TOKENIZER.chat_template == CHAT_TEMPLATE
    assert TOKENIZER.apply_chat_template(chat, tokenize=False) == f"{USER}All humans{ASSISTANT}Yes{END}"
    opened = TOKENIZER.apply_chat_template(chat[:2], tokenize=False, add_generation_prompt=True)
    assert opened == f"{USER}All humans{ASSISTANT}"
    twice = TOKENIZER.apply_chat_template(chat + chat[1:], tokenize=False)
    assert twice == 2 * f"{USER}All humans{ASSISTANT}Yes{END}"


@each_task
def test_a_prompt_and_a_completion_join_as_the_whole_chat_does(task):
    """Warm-up traces are encoded in two parts; read in one piece they must give the same ids."""
    for e in task[:50]:
        reply = completion(task.thinking(e), e.answer)
        chat = [*messages(e.question), {"role": "assistant", "content": reply}]
        whole = TOKENIZER.apply_chat_template(chat, return_dict=False)
        assert whole == encode_prompt(TOKENIZER, e.question) + ids_of(reply) + [TOKENIZER.eos_token_id]


def test_the_tokenizer_survives_saving(tmp_path):
    from transformers import AutoTokenizer

    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for task in TASKS:
        for e in task[:20]:
            assert encode_prompt(loaded, e.question) == encode_prompt(TOKENIZER, e.question)
            assert loaded(task.thinking(e)).input_ids == TOKENIZER(task.thinking(e)).input_ids
    assert (loaded.pad_token, loaded.eos_token, loaded.all_special_ids) == (
        TOKENIZER.pad_token, TOKENIZER.eos_token, TOKENIZER.all_special_ids,
    )  # fmt: skip
