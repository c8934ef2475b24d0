"""Rollouts against transformers' own decoding, against the model's own probabilities, and their cost in tokens."""

import copy
from collections import Counter
from itertools import accumulate, chain, product
from unittest.mock import patch

import pytest
import torch
from accelerate import Accelerator
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor
from transformers import GenerationConfig

from helpers import decoder as decoder_module
from helpers import rollout as rollout_module
from helpers.decoder import Decoder, round_up, sampling_copy
from helpers.models import add_lora
from helpers.rollout import (
    Response,
    draw,
    encode_prompt,
    end_token_ids,
    nucleus,
    rollout,
    sample,
)
from helpers.tasks import load_task
from helpers.tests.conftest import (
    BUILDS,
    END,
    decoder_logits,
    disturb,
    inputs_of,
    no_decoder,
    plain_logits,
    plain_logprobs,
    random_prompts,
    small_model,
)

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


def test_greedy_text_is_what_generate_writes(model, sampled_by):
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
def test_every_kind_of_attention_sees_the_same(attention, monkeypatch):
    model = small_model()
    settings = {"group_size": 3, "max_new_tokens": 8, "end_ids": {END}, "seed": 3}
    expected = rollout(model, PROMPTS, **settings)
    model.set_attn_implementation(attention)
    assert model.config._attn_implementation == attention
    assert_same(rollout(model, PROMPTS, **settings), expected)
    no_decoder(monkeypatch)
    assert_same(rollout(model, PROMPTS, **settings), expected)


# --- sampling follows the model's own probabilities ---


@pytest.mark.parametrize("build", ["llama_gqa_tied", "qwen3_gqa_untied"])
@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8), (1.4, 0.9)])
def test_pairs_of_tokens_are_as_frequent_as_the_model_says(build, temperature, top_p, sampled_by):
    size, copies = 10, 6000
    model = small_model(build, vocabulary=size, spread=0.2)
    prompts = random_prompts([4, 7], size)
    # end_ids: none that exists, so each response has two tokens: one from the prompt's logits, one from the cache's.
    groups = rollout(
        model, prompts, group_size=copies, max_new_tokens=2, end_ids={size}, temperature=temperature, top_p=top_p,
        seed=1,
    )  # fmt: skip
    for prompt, group in zip(prompts, groups, strict=True):
        first, second = torch.tensor([response.token_ids for response in group]).T
        observed = torch.bincount(size * first + second, minlength=size * size).view(size, size)

        def joint(temperature: float, top_p: float, prompt=prompt) -> Tensor:
            def distribution(ids: list[int]) -> Tensor:
                return renormalised((plain_logits(model, ids)[-1] / temperature).softmax(dim=0), top_p)

            return distribution(prompt)[:, None] * torch.stack([distribution([*prompt, a]) for a in range(size)])

        assert fit(observed, joint(temperature, top_p)) > 0.001
        # The test has teeth: another temperature would not pass it.
        assert fit(observed, joint(temperature + 0.3, top_p)) < 1e-6


ENDS = {END, 4}


def whole_responses(model, prompt: list[int], size: int, limit: int) -> dict[tuple[int, ...], float]:
    """Every response that can be written, and its probability."""
    found, open_ends = {}, {(): 1.0}
    for length in range(1, limit + 1):
        longer = {}
        for text, probability in open_ends.items():
            following = plain_logits(model, [*prompt, *text])[-1].double().softmax(dim=0).tolist()
            for token, share in enumerate(following):
                over = token in ENDS or length == limit
                (found if over else longer)[*text, token] = probability * share
        open_ends = longer
    return found


@pytest.mark.parametrize("shrink", [0.0, 0.75, 1.0])
def test_whole_responses_are_as_frequent_as_the_model_says_though_others_end_before(sampled_by, shrink, monkeypatch):
    """300 groups of 12: some rows end at once, and some groups whole, while the others go on."""
    monkeypatch.setattr(rollout_module, "SHRINK", shrink)
    size, limit, times = 6, 4, 100
    model = small_model(vocabulary=size, spread=0.15)
    prompts = random_prompts([4, 7, 1], size)
    groups = rollout(model, times * prompts, group_size=12, max_new_tokens=limit, end_ids=ENDS, seed=3)
    for number, prompt in enumerate(prompts):
        counts = Counter(tuple(r.token_ids) for group in groups[number :: len(prompts)] for r in group)
        due = whole_responses(model, prompt, size, limit)
        assert sum(due.values()) == pytest.approx(1) and counts.keys() <= due.keys()
        probabilities = torch.tensor(list(due.values()))
        observed = torch.tensor([counts[text] for text in due])
        assert fit(observed, probabilities) > 0.001
        # The test has teeth: were each response as likely as those of its length are together, it would fail.
        lengths = torch.tensor([len(text) for text in due])
        levelled = torch.stack([probabilities[lengths == n].mean() for n in lengths.tolist()])
        assert fit(observed, levelled) < 1e-6


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
@given(
    st.integers(2, 300), st.floats(0.0, 6.0), st.floats(0.02, 1.0), st.integers(0, 10_000),
    st.booleans(),
)  # fmt: skip
def test_nucleus_is_the_one_of_a_full_sort(size, spread, top_p, seed, half):
    assume(spread == 0 or spread > 1e-3)
    logits = spread * (64 * torch.randn(1, size, generator=generator(seed))).round() / 64  # equal, or clearly not
    if half:
        logits[:, ::2] = -torch.inf  # tokens that cannot be drawn
    probs = logits.double().softmax(dim=1)
    probs = probs.expand(size, -1)  # row i proposes token i first, then the likeliest
    likelier = (probs * (probs > probs.diagonal()[:, None])).sum(dim=1)
    possible = probs[0] > 1e-30
    assume((likelier - top_p).abs()[possible].min() > 1e-5)  # at the very edge float32 may decide either way
    proposals = iter([torch.arange(size)[possible]])
    rows = probs.float()[possible]

    def propose(weights: Tensor, _) -> Tensor:
        return next(proposals, weights.argmax(dim=1))[: len(weights)].clone()

    with patch.object(rollout_module, "draw", propose):
        tokens = nucleus(rows, top_p, None)
    kept = (likelier < top_p)[possible]
    assert torch.equal(tokens[kept], torch.arange(size)[possible][kept])
    assert (tokens[~kept] == rows[0].argmax()).all()


def test_a_nucleus_never_sorts_the_vocabulary():
    logits = torch.randn(4, 50_000, generator=generator())
    probs = logits.softmax(dim=1)
    with patch.object(Tensor, "topk", side_effect=AssertionError), patch.object(Tensor, "sort", None):
        nucleus(probs, 0.95, generator())


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=30).filter(lambda w: sum(w) > 1e-3),
       st.integers(0, 200), st.integers(0, 200), st.integers(0, 1000))  # fmt: skip
def test_a_weight_of_zero_is_never_drawn(weights, before, behind, seed):
    weights = [0.0] * before + weights + [0.0] * behind
    tokens = draw(torch.tensor([weights] * 50), generator(seed))
    assert all(weights[token] > 0 for token in tokens.tolist())


def drawn_at(weights: Tensor, number: float) -> list[int]:
    """What is drawn when the random number of each row is this one."""
    with patch("torch.rand", lambda *shape, generator, device, dtype: torch.full(shape, number, dtype=dtype)):
        return draw(weights, None).tolist()


@pytest.mark.parametrize("before, behind", [(0, 0), (1, 1), (62, 0), (63, 64), (64, 100), (200, 1)])
@pytest.mark.parametrize("number, drawn", [(0.0, 1), (0.25 - 1e-9, 1), (0.25, 3), (1 - 1e-12, 3), (1 - 2**-53, 3)])
def test_a_draw_inverts_the_cumulative_sum_up_to_its_edges(number, drawn, before, behind):
    weights = [0.0] * before + [0.0, 1.0, 0.0, 3.0, 0.0] + [0.0] * behind
    assert drawn_at(torch.tensor([weights]), number) == [before + drawn]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=150).filter(any), st.floats(0, 1, exclude_max=True))
def test_a_draw_is_a_naive_loop_s(weights, number):
    """Whole numbers have exact sums, so both must agree everywhere."""
    at = next(at for at, total in enumerate(accumulate(weights)) if total > sum(weights) * number)
    assert drawn_at(torch.tensor([weights], dtype=torch.float32), number) == [at]


@pytest.mark.parametrize("number", [0.0, 0.3, 1 - 2**-53])
def test_sums_that_are_rounded_lead_to_no_token_of_weight_0(number):
    """Values of all sizes: float32 sums of a block differ from the sum of its tokens one after the other."""
    weights = torch.rand(200, 1000, generator=generator(3)) ** 8
    weights[:, ::3] = 0
    weights[:, 990:] = 0
    tokens = torch.tensor(drawn_at(weights, number))
    assert (weights.gather(1, tokens[:, None]) > 0).all()
    assert (tokens == 1).all() if number == 0 else (tokens > 5).all()


def test_a_temperature_of_zero_takes_the_likeliest_and_its_log_prob_at_one():
    logits = torch.randn(5, 40, generator=generator())
    tokens, logprobs = sample(logits, 0.0, 0.3, None)
    assert torch.equal(tokens, logits.argmax(dim=1))
    torch.testing.assert_close(logprobs, logits.log_softmax(dim=1).max(dim=1).values)


# --- seeds ---


def test_the_seed_alone_decides(sampled_by):
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
def test_a_response_ends_with_one_end_token_or_is_unfinished_at_the_limit(ends, sampled_by):
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
def test_log_probs_are_those_of_one_plain_pass_though_finished_rows_leave(model, sampled_by, temperature, top_p):
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


class Watched:
    """What a `Decoder` computes: `calls`, the token ids and positions of each pass; `rows`, those of each product.

    heads: rows that the vocabulary projection saw in each pass.
    """

    def __init__(self, monkeypatch, vocabulary: int = 24) -> None:
        self.calls: list[tuple[list[int], list[int]]] = []
        self.rows: list[set[int]] = []
        self.heads: list[int] = []
        forward, packed_product = Decoder.forward, decoder_module.packed_product

        def watched_forward(decoder, ids, positions, *rest, **more):
            self.calls.append((ids.tolist(), positions.tolist()))
            self.rows.append(set())
            return forward(decoder, ids, positions, *rest, **more)

        def watched_product(weight, bias):
            product = packed_product(weight, bias)

            def multiply(x):
                if len(weight) == vocabulary:
                    self.heads.append(x.shape[:-1].numel())
                else:
                    self.rows[-1].add(x.shape[:-1].numel())
                return product(x)

            return multiply

        monkeypatch.setattr(Decoder, "forward", watched_forward)
        monkeypatch.setattr(decoder_module, "packed_product", watched_product)


def written(groups: list[list[Response]]) -> list[int]:
    """Of each response, all tokens but the last: those that are looked at to find the next one."""
    return [token for _, r in flat(groups) for token in r.token_ids[:-1]]


COST = {"group_size": 6, "max_new_tokens": 10, "end_ids": {END, 2, 3}}


@pytest.mark.parametrize("build", BUILDS)
def test_every_prompt_is_computed_once_and_no_padding_ever(build, monkeypatch):
    """A decoder reads all prompts in one pass, end to end; then one token a row, and no more than there are."""
    monkeypatch.setattr(rollout_module, "SHRINK", 1.0)  # a row leaves as soon as it has ended
    watched = Watched(monkeypatch)
    groups = rollout(small_model(build), PROMPTS, **COST)
    (ids, positions), *rest = watched.calls
    assert ids == list(chain.from_iterable(PROMPTS))
    assert positions == list(chain.from_iterable(range(len(p)) for p in PROMPTS))
    assert sorted(chain.from_iterable(ids for ids, _ in rest)) == sorted(written(groups)) and len(rest) < 10
    assert len({len(ids) for ids, _ in rest}) > 2  # finished rows left
    assert watched.rows == [{round_up(len(ids))} for ids, _ in watched.calls]  # in each linear layer
    assert watched.heads == [len(PROMPTS), *(round_up(len(ids)) for ids, _ in rest)]


@pytest.mark.parametrize("build", BUILDS)
def test_a_model_without_a_decoder_computes_every_prompt_once_and_no_padding_ever(build, monkeypatch):
    monkeypatch.setattr(rollout_module, "SHRINK", 1.0)
    no_decoder(monkeypatch)
    model, groups, heads = small_model(build), [], []

    def run() -> None:
        heads.extend(inputs_of(model.get_output_embeddings(), lambda: groups.extend(rollout(model, PROMPTS, **COST))))

    calls = inputs_of(model.get_input_embeddings(), run)
    lengths = {len(p) for p in PROMPTS}  # prompts of one length together
    prompts, rest = calls[: len(lengths)], calls[len(lengths) :]
    assert sorted(chain.from_iterable(c.tolist() for c in prompts)) == sorted(PROMPTS)
    assert sorted(torch.cat([c.flatten() for c in rest]).tolist()) == sorted(written(groups))
    assert all(c.shape[1] == 1 for c in rest) and len(rest) < 10
    assert len({len(c) for c in rest}) > 2
    assert sum(h.shape[:-1].numel() for h in heads[: len(lengths)]) == len(PROMPTS)


def test_rows_that_have_ended_stay_only_while_they_are_few(monkeypatch):
    watched = Watched(monkeypatch)
    prompts = PROMPTS * 10
    groups = rollout(small_model(spread=0.15), prompts, group_size=6, max_new_tokens=40, end_ids={END, 2, 3})
    lengths = [len(r.token_ids) for group in groups for r in group]
    computed = [len(ids) for ids, _ in watched.calls[1:]]
    needed = [sum(length > step for length in lengths) for step in range(1, max(lengths))]
    assert len(computed) == len(needed) > 10
    # At each step fewer than a quarter of the rows have ended, and rows are not moved for each one that ends.
    assert all(n <= c and n > 0.75 * c for n, c in zip(needed, computed, strict=True))
    assert len(set(computed)) < len(set(needed)) and sum(needed) < sum(computed)


@pytest.mark.parametrize("shrink", [0.0, 0.5, 1.0])
def test_what_is_written_does_not_depend_on_when_rows_leave(model, sampled_by, shrink, monkeypatch):
    settings = COST | {"temperature": 0, "max_new_tokens": 12}
    expected = rollout(model, PROMPTS, **settings)
    monkeypatch.setattr(rollout_module, "SHRINK", shrink)
    assert_same(rollout(model, PROMPTS, **settings), expected)


def test_max_rows_bounds_the_batch_and_keeps_the_order(sampled_by, monkeypatch):
    model, done, groups = small_model(), [], []
    settings = {"group_size": 4, "max_new_tokens": 5, "end_ids": {END}, "temperature": 0}
    whole = rollout(model, PROMPTS, **settings)

    def run() -> None:
        groups.extend(rollout(model, PROMPTS, max_rows=9, on_progress=done.append, **settings))

    if sampled_by == "a decoder":
        watched = Watched(monkeypatch)
        run()
        sizes, first = [len(ids) for ids, _ in watched.calls], [sum(map(len, PROMPTS[i : i + 2])) for i in (0, 2, 4)]
        assert [n for n in sizes if n > 8] == [n for n in first if n > 8]  # but for prompts, 8 tokens at most
    else:
        sizes = [len(c) for c in inputs_of(model.get_input_embeddings(), run)]
        assert max(sizes) == 8
    assert 8 in sizes and done == [2, 2, 2]
    assert_same(groups, whole)
    assert len(rollout(model, PROMPTS, group_size=4, max_new_tokens=2, end_ids={END}, max_rows=1)) == len(PROMPTS)
    assert rollout(model, [], group_size=4, max_new_tokens=2, end_ids={END}) == []


# --- what must not leak in, and what must not stay behind ---


def test_the_model_s_generation_settings_shape_nothing(sampled_by):
    model = small_model()
    settings = {"group_size": 3, "max_new_tokens": 8, "end_ids": {END}, "seed": 2}
    expected = rollout(model, PROMPTS, **settings)
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=1, top_p=0.1, min_p=0.5, temperature=0.01, repetition_penalty=9.0, no_repeat_ngram_size=1,
        suppress_tokens=list(range(12)), max_new_tokens=2, min_new_tokens=1, num_beams=3, eos_token_id=3,
    )  # fmt: skip
    assert rollout(model, PROMPTS, **settings) == expected


def test_training_mode_dropout_and_checkpointing_do_not_reach_the_rollout(sampled_by):
    model = small_model()
    settings = {"group_size": 3, "max_new_tokens": 8, "end_ids": {END}, "seed": 2}
    expected = rollout(model, PROMPTS, **settings)
    assert not model.training
    policy = add_lora(model, r=2, alpha=4, dropout=0.5)
    assert_same(rollout(policy, PROMPTS, **settings), expected)  # a new adapter changes nothing
    disturb(policy)
    modes = [m.training for m in policy.modules()]
    assert any(modes) and not all(modes)  # a new adapter's layers train, the model's do not
    expected = rollout(policy, PROMPTS, **settings)
    assert [m.training for m in policy.modules()] == modes
    policy.gradient_checkpointing_enable()
    policy.train()
    wrapped = torch.nn.Module()
    wrapped.module = policy  # as DistributedDataParallel holds it
    for some in (policy, wrapped, Accelerator(cpu=True).prepare(policy)):
        assert_same(rollout(some, PROMPTS, **settings), expected)
        assert all(m.training for m in policy.modules())
    with pytest.raises(KeyboardInterrupt), patch.object(rollout_module, "sample", side_effect=KeyboardInterrupt):
        rollout(policy, PROMPTS, **settings)
    assert all(m.training for m in policy.modules())  # a reader who interrupts does not leave it otherwise
    assert all(p.grad is None for p in policy.parameters())


@pytest.mark.parametrize("build", BUILDS)
def test_a_bfloat16_copy_samples_by_its_own_probabilities(build):
    model = small_model(build)
    sampler = sampling_copy(model, torch.bfloat16)
    groups = rollout(sampler, PROMPTS, group_size=4, max_new_tokens=8, end_ids={END, 2, 3})
    gaps = []
    for prompt, response in flat(groups):
        table = decoder_logits(sampler, prompt + response.token_ids).log_softmax(dim=1)[len(prompt) - 1 : -1]
        plain = table.gather(1, torch.tensor(response.token_ids)[:, None])[:, 0]
        assert response.logprobs == pytest.approx(plain.tolist(), abs=0.15)  # bfloat16 holds 3 digits
        gaps += (plain - plain_logprobs(model, prompt, response.token_ids)).abs().tolist()
    assert 1e-3 < sum(gaps) / len(gaps) < 0.1  # which are near the model's, though not them


def test_a_decoder_that_is_kept_is_used_as_it_is(monkeypatch):
    model = small_model()
    sampler, settings = sampling_copy(model), {"group_size": 3, "max_new_tokens": 8, "end_ids": {END}, "seed": 2}
    expected = rollout(model, PROMPTS, **settings)
    monkeypatch.setattr(Decoder, "refresh", None)
    assert rollout(sampler, PROMPTS, **settings) == expected


GOOD = {"group_size": 2, "max_new_tokens": 3, "temperature": 1.0, "top_p": 1.0}
BAD = [("group_size", 0), ("group_size", -1), ("max_new_tokens", 0), ("temperature", -0.1), ("top_p", 0.0),
       ("top_p", 1.1), *product(("temperature", "top_p"), (float("nan"), float("inf")))]  # fmt: skip


@pytest.mark.parametrize("name, value", BAD)
def test_settings_that_cannot_be_sampled_with_get_one_sentence(name, value):
    with pytest.raises(ValueError, match=rf"^A rollout needs [^\n]*\b{name}\b[^\n]*{value}[^\n]*\.$"):
        rollout(small_model(), PROMPTS, end_ids={END}, **GOOD | {name: value})
