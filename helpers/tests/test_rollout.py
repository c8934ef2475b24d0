"""Rollouts against transformers' own decoding, against the model's own probabilities, and their cost in tokens."""

import copy
from itertools import product
from unittest.mock import patch

import pytest
import torch
from accelerate import Accelerator
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor
from transformers import GenerationConfig

from helpers import rollout as rollout_module
from helpers.models import add_lora
from helpers.rollout import Response, draw, encode_prompt, end_token_ids, nucleus, rollout, sample
from helpers.tasks import load_task
from helpers.tests.conftest import END, inputs_of, plain_logits, plain_logprobs, random_prompts, small_model

PROMPTS = random_prompts([5, 1, 9, 5, 14, 2])  # two of one length, and the shortest there can be


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flat(groups: list[list[Response]]) -> list[tuple[list[int], Response]]:
    """(prompt, response) of every response to `PROMPTS`."""
    return [(prompt, response) for prompt, group in zip(PROMPTS, groups, strict=True) for response in group]


def assert_same(ours: list[list[Response]], theirs: list[list[Response]]) -> None:
    """The same tokens, and the same log-probs but for the last bits, which the order of additions decides."""
    for (_, a), (_, b) in zip(flat(ours), flat(theirs), strict=True):
        assert (a.token_ids, a.finished) == (b.token_ids, b.finished)
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


def fit(observed: Tensor, probabilities: Tensor) -> float:
    """p-value of the chi-square test that counts come from these probabilities; rare outcomes are pooled."""
    assert observed[probabilities == 0].sum() == 0, "something impossible was drawn"
    expected = probabilities.double() * observed.sum()
    common = expected >= 5
    seen, due = observed[common].double().tolist(), expected[common].tolist()
    rest, rest_due = observed[~common].sum().item(), expected[~common].sum().item()
    if rest_due >= 5:
        seen, due = [*seen, rest], [*due, rest_due]
    scale = sum(seen) / sum(due)
    return chisquare(seen, [scale * value for value in due]).pvalue


def renormalised(probabilities: Tensor, top_p: float) -> Tensor:
    """The nucleus's definition, by sorting everything: the fewest likeliest tokens whose probability reaches top_p."""
    kept = torch.zeros_like(probabilities)
    total = 0.0
    for token in probabilities.argsort(descending=True).tolist():
        kept[token] = probabilities[token]
        total += probabilities[token].item()
        if total >= top_p:
            break
    return kept / kept.sum()


# --- greedy decoding is transformers' ---


def test_greedy_text_is_what_generate_writes(model):
    first = model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    ends = {END, first[0, len(PROMPTS[0]) + 3].item()}  # so that some responses end early
    groups = rollout(model, PROMPTS, group_size=3, max_new_tokens=12, end_ids=ends, temperature=0)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        ids = torch.tensor([prompt])
        theirs = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=sorted(ends)
        )[0, len(prompt) :].tolist()
        assert [r.token_ids for r in group] == [theirs] * 3
        assert all(r.finished == (theirs[-1] in ends) for r in group)
    lengths = {len(r.token_ids) for _, r in flat(groups)}
    assert len(lengths) > 1 and max(lengths) == 12


def test_greedy_text_of_real_questions_is_what_generate_writes(pocket):
    model, tokenizer = pocket
    prompts = [encode_prompt(tokenizer, e.question) for name in ("letter_counting", "syllogism", "propositional_logic")
               for e in load_task(name, "test", 4)]  # fmt: skip
    assert len({len(p) for p in prompts}) > 4
    groups = rollout(model, prompts, group_size=2, max_new_tokens=10, end_ids={1}, temperature=0, max_rows=10)
    for prompt, group in zip(prompts, groups, strict=True):
        ids = torch.tensor([prompt])
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
        assert [r.token_ids for r in group] == [theirs[0, len(prompt) :].tolist()] * 2


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_kind_of_attention_sees_the_same(attention):
    model = small_model()
    other = copy.deepcopy(model)
    other.set_attn_implementation(attention)
    assert other.config._attn_implementation == attention
    settings = {"group_size": 3, "max_new_tokens": 8, "end_ids": {END}, "seed": 3}
    assert_same(rollout(other, PROMPTS, **settings), rollout(model, PROMPTS, **settings))


# --- sampling follows the model's own probabilities ---


@pytest.mark.parametrize("build", ["llama_gqa_tied", "qwen3_gqa_untied"])
@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8), (1.4, 0.9)])
def test_pairs_of_tokens_are_as_frequent_as_the_model_says(build, temperature, top_p):
    size, copies = 10, 6000
    model = small_model(build, vocabulary=size, spread=0.2)
    prompts = random_prompts([4, 7], size)
    # end_ids: none that exists, so each response has two tokens: one from the prompt's logits, one from the cache's.
    groups = rollout(
        model, prompts, group_size=copies, max_new_tokens=2, end_ids={size}, temperature=temperature, top_p=top_p,
        seed=1,
    )  # fmt: skip
    for prompt, group in zip(prompts, groups, strict=True):
        observed = torch.zeros(size, size)
        for response in group:
            observed[tuple(response.token_ids)] += 1

        def joint(temperature: float, top_p: float, prompt=prompt) -> Tensor:
            def distribution(ids: list[int]) -> Tensor:
                return renormalised((plain_logits(model, ids)[-1] / temperature).softmax(dim=0), top_p)

            return distribution(prompt)[:, None] * torch.stack([distribution([*prompt, a]) for a in range(size)])

        assert fit(observed, joint(temperature, top_p)) > 0.001
        # The test has teeth: another temperature would not pass it.
        assert fit(observed, joint(temperature + 0.3, top_p)) < 1e-6


@pytest.mark.parametrize("top_p, wanted", [(1.0, 300), (0.9, 200), (0.5, 65), (0.2, 8)])
def test_one_draw_follows_its_distribution_however_many_tokens_the_nucleus_has(top_p, wanted):
    rows = 30_000
    logits = 0.7 * torch.randn(300, generator=generator())
    tokens, logprobs = sample(logits.expand(rows, -1), 1.0, top_p, generator(1))
    wholly = logits.softmax(dim=0)
    nucleus_of = renormalised(wholly, top_p)
    assert (nucleus_of > 0).sum() >= wanted  # the search begins with 64
    assert fit(torch.bincount(tokens, minlength=300), nucleus_of) > 0.001
    assert len(tokens.unique()) == (nucleus_of > 0).sum()
    torch.testing.assert_close(logprobs, wholly.log()[tokens])  # before top_p


def test_rows_of_one_batch_are_drawn_independently():
    logits = torch.zeros(20_000, 2)
    tokens, _ = sample(logits, 1.0, 1.0, generator(2))
    pairs = 2 * tokens[:-1] + tokens[1:]
    assert fit(torch.bincount(pairs, minlength=4), torch.full((4,), 0.25)) > 0.001


@settings(max_examples=200)
@given(st.integers(2, 400), st.floats(0.0, 6.0), st.floats(0.02, 1.0), st.integers(0, 10_000), st.booleans())
def test_nucleus_is_the_one_of_a_full_sort(size, spread, top_p, seed, half):
    logits = spread * torch.randn(3, size, generator=generator(seed))
    if half:
        logits[:, ::2] = -torch.inf  # tokens that cannot be drawn
    probs = logits.double().softmax(dim=1)
    fallen = probs.sort(dim=1, descending=True).values
    before = fallen.cumsum(dim=1) - fallen
    assume((before - top_p).abs().min() > 1e-5)  # at the very edge float32 may decide either way
    recorded = []

    def last_kept(weights: Tensor, _) -> Tensor:
        recorded.append(weights)
        return (weights > 0).sum(dim=1) - 1

    with patch.object(rollout_module, "draw", last_kept):
        tokens = nucleus(probs.float(), top_p, None)
    kept = (before < top_p) & (fallen > 1e-30)
    assert torch.equal((recorded[0] > 0).sum(dim=1), kept.sum(dim=1))
    for row, token in enumerate(tokens):
        count = kept[row].sum()
        torch.testing.assert_close(recorded[0][row, :count].double(), fallen[row, :count], rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(probs[row, token], fallen[row, count - 1], rtol=1e-4, atol=1e-9)


def test_a_nucleus_never_sorts_the_vocabulary_where_a_few_tokens_hold_it():
    logits = torch.randn(4, 50_000, generator=generator())
    logits[:, 17] += 25
    sizes = []
    topk = Tensor.topk

    def watched(self: Tensor, k: int, **settings):
        sizes.append(k)
        return topk(self, k, **settings)

    with patch.object(Tensor, "topk", watched), patch.object(Tensor, "sort", side_effect=AssertionError):
        nucleus(logits.softmax(dim=1), 0.95, generator())
    assert set(sizes) == {64}


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=30).filter(lambda w: sum(w) > 1e-3),
       st.integers(0, 1000))  # fmt: skip
def test_a_weight_of_zero_is_never_drawn(weights, seed):
    tokens = draw(torch.tensor([weights] * 50), generator(seed))
    assert all(weights[token] > 0 for token in tokens.tolist())


@pytest.mark.parametrize("number, drawn", [(0.0, 1), (0.25 - 1e-9, 1), (0.25, 3), (1 - 1e-12, 3)])
def test_a_draw_inverts_the_cumulative_sum_up_to_its_edges(number, drawn):
    with patch("torch.rand", lambda *shape, generator, device, dtype: torch.full(shape, number, dtype=dtype)):
        assert draw(torch.tensor([[0.0, 1.0, 0.0, 3.0, 0.0]]), None).tolist() == [drawn]


def test_a_temperature_of_zero_takes_the_likeliest_and_its_log_prob_at_one():
    logits = torch.randn(5, 40, generator=generator())
    tokens, logprobs = sample(logits, 0.0, 0.3, None)
    assert torch.equal(tokens, logits.argmax(dim=1))
    torch.testing.assert_close(logprobs, logits.log_softmax(dim=1).max(dim=1).values)


# --- seeds ---


def test_the_seed_alone_decides():
    model = small_model()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = rollout(model, PROMPTS, group_size=2, max_new_tokens=8, end_ids={END}, seed=7)
    assert torch.equal(torch.get_rng_state(), before)  # nor is the global generator used
    torch.manual_seed(6)
    assert rollout(model, PROMPTS, group_size=2, max_new_tokens=8, end_ids={END}, seed=7) == first
    others = [rollout(model, PROMPTS, group_size=2, max_new_tokens=8, end_ids={END}, seed=s) for s in (8, 9)]
    assert first != others[0] != others[1] != first
    assert all(a.token_ids != b.token_ids for a, b in first)  # members of a group are drawn apart


# --- how responses end, and what their log-probs are ---


@pytest.mark.parametrize("ends", [{END}, {END, 5, 9}, set()])
def test_a_response_ends_with_one_end_token_or_is_unfinished_at_the_limit(ends):
    model = small_model(spread=0.15)
    responses = [r for _, r in flat(rollout(model, PROMPTS, group_size=20, max_new_tokens=15, end_ids=ends))]
    for response in responses:
        assert not ends & set(response.token_ids[:-1])
        assert response.finished == (response.token_ids[-1] in ends)
        assert response.finished or len(response.token_ids) == 15
        assert len(response.logprobs) == len(response.token_ids)
    assert {r.finished for r in responses} == ({True, False} if ends else {False})


def test_an_end_token_in_the_last_place_finishes_a_response():
    model = small_model(spread=0.15)
    responses = [r for _, r in flat(rollout(model, PROMPTS, group_size=20, max_new_tokens=1, end_ids={END, 5}))]
    assert {r.finished for r in responses} == {True, False}
    assert all(len(r.token_ids) == 1 and r.finished == (r.token_ids[0] in (END, 5)) for r in responses)


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.6, 1.0), (1.3, 0.8), (0.0, 1.0)])
def test_log_probs_are_those_of_one_plain_pass_though_finished_rows_leave(model, temperature, top_p):
    groups = rollout(
        model, PROMPTS, group_size=5, max_new_tokens=12, end_ids={END, 2, 3}, temperature=temperature, top_p=top_p
    )
    assert len({len(r.token_ids) for _, r in flat(groups)}) > 2  # rows leave at different times
    for prompt, response in flat(groups):
        plain = plain_logprobs(model, prompt, response.token_ids, temperature or 1.0)
        assert response.logprobs == pytest.approx(plain.tolist(), abs=1e-4)


def test_end_tokens_are_the_tokenizer_s_and_those_of_the_generation_settings(pocket):
    model, tokenizer = copy.deepcopy(pocket[0]), pocket[1]
    for named, ends in ((7, {7, 1}), ([8, 9], {8, 9, 1}), (None, {1})):
        model.generation_config.eos_token_id = named
        assert end_token_ids(model, tokenizer) == ends
        assert end_token_ids(add_lora(copy.deepcopy(model)), tokenizer) == ends


# --- the cost: every prompt once, no padding ---


def tokens_computed(model, run) -> list[Tensor]:
    return inputs_of(model.get_input_embeddings(), run)


# --- what must not leak in, and what must not stay behind ---


def test_the_model_s_generation_settings_shape_nothing():
    model = small_model()
    settings = {"group_size": 3, "max_new_tokens": 8, "end_ids": {END}, "seed": 2}
    expected = rollout(model, PROMPTS, **settings)
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=1, top_p=0.1, min_p=0.5, temperature=0.01, repetition_penalty=9.0, no_repeat_ngram_size=1,
        suppress_tokens=list(range(12)), max_new_tokens=2, min_new_tokens=1, num_beams=3, eos_token_id=3,
    )  # fmt: skip
    assert rollout(model, PROMPTS, **settings) == expected


def test_training_mode_dropout_and_checkpointing_do_not_reach_the_rollout():
    model = small_model()
    settings = {"group_size": 3, "max_new_tokens": 8, "end_ids": {END}, "seed": 2}
    expected = rollout(model, PROMPTS, **settings)
    assert not model.training
    policy = add_lora(model, r=2, alpha=4, dropout=0.5)
    assert_same(rollout(policy, PROMPTS, **settings), expected)  # a new adapter changes nothing
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1, generator=generator())
    expected = rollout(policy, PROMPTS, **settings)
    policy.gradient_checkpointing_enable()
    policy.train()
    wrapped = torch.nn.Module()
    wrapped.module = policy  # as DistributedDataParallel holds it
    for some in (policy, wrapped, Accelerator(cpu=True).prepare(policy)):
        assert_same(rollout(some, PROMPTS, **settings), expected)
        assert all(m.training for m in policy.modules())
    assert all(p.grad is None for p in policy.parameters())


GOOD = {"group_size": 2, "max_new_tokens": 3, "temperature": 1.0, "top_p": 1.0}
BAD = [("group_size", 0), ("group_size", -1), ("max_new_tokens", 0), ("temperature", -0.1), ("top_p", 0.0),
       ("top_p", 1.1), *product(("temperature", "top_p"), (float("nan"), float("inf")))]  # fmt: skip


@pytest.mark.parametrize("name, value", BAD)
def test_settings_that_cannot_be_sampled_with_get_one_sentence(name, value):
    with pytest.raises(ValueError, match=rf"^A rollout needs [^\n]*\b{name}\b[^\n]*{value}[^\n]*\.$"):
        rollout(small_model(), PROMPTS, end_ids={END}, **GOOD | {name: value})
