"""Shared prompts against the padded pass: the layout, log-probs, gradients, cost, and nothing left behind."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from helpers import logprobs as logprobs_module
from helpers.buffer import Batch, Experience, collate
from helpers.decoder import round_up
from helpers.logprobs import completion_logprobs
from helpers.models import bare
from helpers.packing import NAME, lay_out, packed_states
from helpers.tests.conftest import (
    BUILDS,
    END,
    inputs_of,
    plain_logits,
    plain_logprobs,
    policy_of,
    random_prompts,
    small_model,
)

CLOSE = {"rtol": 0, "atol": 1e-5}


def batch_of(rows: list[tuple[list[int], list[int]]], pad_id: int = 0) -> Batch:
    return collate([Experience(prompt, response, 0.0) for prompt, response in rows], pad_id)


# --- the layout, against plain loops ---

tokens = st.integers(2, 4)  # few, so that prompts are alike, or begin alike
texts = st.lists(tokens, min_size=1, max_size=5)


@st.composite
def drawn_rows(draw) -> list[tuple[list[int], list[int]]]:
    """Rows of (prompt, response), the prompts from a short list."""
    prompts = draw(st.lists(texts, min_size=1, max_size=3))
    return draw(st.lists(st.tuples(st.sampled_from(prompts), texts), min_size=1, max_size=6))


@given(drawn_rows(), st.integers(0, 4))
def test_a_layout_has_each_prompt_once_and_says_where_each_token_is_predicted(rows, pad_id):
    batch = batch_of(rows, pad_id)
    layout = lay_out(batch.input_ids, batch.prompt_lengths, batch.mask.sum(dim=1))

    # The row of N tokens, laid by hand: `at` says where each token of each prompt and of each response stands.
    ids, positions, at = [], [], {}
    prompts = list(dict.fromkeys(tuple(prompt) for prompt, _ in rows))
    for prompt in prompts:
        for place, token in enumerate(prompt):
            at[prompt, place] = len(ids)
            ids.append(token)
            positions.append(place)
    assert layout.prompt_tokens == len(ids)
    for row, (prompt, response) in enumerate(rows):
        for step, token in enumerate(response[:-1]):  # nothing looks at the last one
            at[row, step] = len(ids)
            ids.append(token)
            positions.append(len(prompt) + step)
    assert (layout.ids.tolist(), layout.positions.tolist()) == (ids, positions)
    assert [prompts[q] for q in layout.question.tolist()] == [tuple(prompt) for prompt, _ in rows]

    for row, (prompt, response) in enumerate(rows):
        prompt = tuple(prompt)
        for step in range(len(response)):
            before = at[row, step - 1] if step else at[prompt, len(prompt) - 1]
            assert layout.predictors(torch.tensor([row]), torch.tensor([step])).tolist() == [before]
        width = layout.prompts.shape[1]
        for step in range(len(response) - 1):
            seen = layout.mask[row, 0, step].nonzero()[:, 0].tolist()
            assert seen == [*range(len(prompt)), *range(width, width + step + 1)]
    assert layout.prompts.sum(dim=1).tolist() == [len(prompt) for prompt in prompts]
    assert layout.responses.sum(dim=1).tolist() == [len(response) - 1 for _, response in rows]


# --- values and gradients are the padded pass's ---


def rows_of(pattern: list[tuple[int, int]], lengths: list[int]) -> list[tuple[list[int], list[int]]]:
    """(number of a prompt, response's length) -> rows, the prompts of these lengths."""
    prompts = random_prompts(lengths)
    responses = random_prompts([length for _, length in pattern], seed=1)
    return [(prompts[number], response) for (number, _), response in zip(pattern, responses, strict=True)]


ROWS = {
    "one prompt": rows_of([(0, 4), (0, 9), (0, 1), (0, 6)], [7]),
    "prompts shared, rows mixed": rows_of([(0, 5), (1, 3), (0, 8), (2, 1), (1, 6), (0, 2)], [6, 11, 1]),
    "no prompt twice": rows_of([(0, 3), (1, 7), (2, 5)], [4, 9, 2]),
    "responses of one token": rows_of([(0, 1), (1, 1), (0, 1)], [3, 5]),
    "one row": rows_of([(0, 6)], [5]),
    "a prompt that begins as another": [([5, 6, 7], [8, 9]), ([5, 6], [7, 8, 9]), ([5, 6, 7], [3])],
}


def holes(batch: Batch) -> Tensor:
    """A mask that leaves out the first token of a row, one inside, the last one, and all of the last row."""
    mask = batch.mask.clone()
    mask[0, 0] = mask[1, 2] = False
    mask[2, int(mask[2].sum()) - 1] = False
    mask[-1] = False
    return mask


def computed(policy, batch: Batch, mask: Tensor, temperature: float, with_entropy: bool) -> tuple[Tensor, list[Tensor]]:
    """Log-probs and the gradient of a weighted sum of them (and of entropies) for all that trains."""
    weights = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0))
    logprobs, entropies = completion_logprobs(
        policy, batch.input_ids, batch.prompt_lengths, mask, temperature, with_entropy
    )
    total = (weights * (logprobs + (0.3 * entropies if with_entropy else 0))).sum()
    trains = [p for p in policy.parameters() if p.requires_grad]
    return logprobs.detach(), torch.autograd.grad(total, trains)


def padded(*arguments) -> tuple[Tensor, list[Tensor]]:
    """The same without the layout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs_module, "packed_states", lambda model, layout: None)
        return computed(*arguments)


def assert_alike(ours: tuple[Tensor, list[Tensor]], theirs: tuple[Tensor, list[Tensor]]) -> None:
    """Log-probs to 1e-5, gradients to 1e-5 of the largest."""
    assert_close(ours[0], theirs[0], **CLOSE)
    largest = max(g.abs().max().item() for g in theirs[1])
    assert largest > 0.1
    for a, b in zip(ours[1], theirs[1], strict=True):
        assert_close(a, b, rtol=0, atol=1e-5 * max(1.0, largest))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "lora"])
@pytest.mark.parametrize("build", BUILDS)
def test_log_probs_and_gradients_are_those_of_the_padded_pass(build, lora, checkpointing):
    policy = policy_of(build) if lora else small_model(build)
    if checkpointing:
        bare(policy).activation_checkpointing_enable()
    policy.train()
    for rows in ROWS.values():
        assert_packed_is_padded(policy, batch_of(rows), 1 + checkpointing)


def assert_packed_is_padded(policy, batch: Batch, times: int) -> None:
    """And each layer runs this many times, over as many tokens as there are without padding, rounded up."""
    given, ours = (policy, batch, batch.mask, 0.7, False), []
    seen = inputs_of(bare(policy).model.layers[1].mlp, lambda: ours.append(computed(*given)))
    assert [x.shape[:2].numel() for x in seen] == times * [round_up(tokens_of(batch))]
    assert bare(policy).config._attn_implementation == NAME
    assert_alike(ours[0], padded(*given))


def tokens_of(batch: Batch) -> int:
    """Those of the distinct prompts, and of the responses without their last ones."""
    rows = zip(batch.input_ids.tolist(), batch.prompt_lengths.tolist(), strict=True)
    return sum(map(len, {tuple(ids[:length]) for ids, length in rows})) + int(batch.mask.sum()) - len(batch.mask)


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "lora"])
def test_masks_with_holes_and_empty_rows_are_heeded(lora, with_entropy):
    policy = policy_of("qwen2_biases") if lora else small_model("qwen2_biases")
    batch = batch_of(ROWS["prompts shared, rows mixed"])
    mask = holes(batch)
    ours = computed(policy, batch, mask, 1.3, with_entropy)
    assert_alike(ours, padded(policy, batch, mask, 1.3, with_entropy))
    assert (ours[0][~mask] == 0).all()
    whole, _ = computed(policy, batch, batch.mask, 1.3, with_entropy)
    assert_close(ours[0][mask], whole[mask], **CLOSE)


def test_they_are_those_of_a_plain_pass(model):
    for name in ("prompts shared, rows mixed", "a prompt that begins as another"):
        batch = batch_of(ROWS[name])
        logprobs, _ = completion_logprobs(model, batch.input_ids, batch.prompt_lengths, batch.mask, 0.8)
        for (prompt, response), ours in zip(ROWS[name], logprobs.detach(), strict=True):
            assert_close(ours[: len(response)], plain_logprobs(model, prompt, response, 0.8), **CLOSE)


@pytest.mark.parametrize("build", ["llama_gqa_tied", "qwen3_gqa_untied"])
def test_under_autocast_they_are_the_padded_pass_s_but_for_rounding(build):
    policy, batch = policy_of(build), batch_of(ROWS["prompts shared, rows mixed"])
    exact = computed(policy, batch, batch.mask, 1.0, False)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (run(policy, batch, batch.mask, 1.0, False) for run in (computed, padded))
    assert ours[0].dtype == torch.float32
    for mine, right in ((ours, theirs), (ours, exact)):
        assert_close(mine[0], right[0], rtol=0, atol=0.15)
        flat, plain = (torch.cat([g.flatten() for g in some[1]]) for some in (mine, right))
        assert torch.cosine_similarity(flat, plain, dim=0) > 0.99
    assert not torch.equal(ours[0], exact[0])


# --- cost ---


def test_a_group_s_prompt_is_computed_once_and_padding_hardly_at_all():
    """8 responses to each of 2 long prompts: 40 + 25 tokens of prompts instead of 16 x 40, rounded up to a 16."""
    model = small_model()
    rows = rows_of([(number % 2, 1 + number) for number in range(16)], [40, 25])
    batch = batch_of(rows)
    expected = 40 + 25 + sum(range(16)) + 7  # of a response of n tokens, n - 1 are looked at
    for layer in model.model.layers:
        for module in (layer.self_attn.q_proj, layer.mlp.down_proj):
            seen = inputs_of(module, lambda: computed(model, batch, batch.mask, 1.0, False))
            assert [x.shape[:2] for x in seen] == [(1, expected)]
    assert batch.input_ids.numel() > 4 * expected


# --- models it cannot be given to, and models it was given to ---

OTHERS = {
    "sliding window": lambda: small_model("mistral_wide_heads", sliding_window=4),
    "one layer with a sliding window": lambda: small_model(
        "qwen2_biases", use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "another activation": lambda: small_model(hidden_act="gelu"),
    "eager attention": lambda: small_model(attn_implementation="eager"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_are_read_with_padding_as_they_were(name):
    model, rows = OTHERS[name](), ROWS["prompts shared, rows mixed"]
    attention = model.config._attn_implementation
    assert attention == ("eager" if name == "eager attention" else "sdpa")
    batch = batch_of(rows)
    assert packed_states(model, lay_out(batch.input_ids, batch.prompt_lengths, batch.mask.sum(dim=1))) is None
    seen = inputs_of(model.model.layers[0].mlp, lambda: computed(model, batch, batch.mask, 1.0, False))
    assert [x.shape[:2] for x in seen] == [batch.input_ids.shape] and model.config._attn_implementation == attention
    logprobs, _ = computed(model, batch, batch.mask, 1.0, False)
    for (prompt, response), ours in zip(rows, logprobs, strict=True):
        assert_close(ours[: len(response)], plain_logprobs(model, prompt, response), **CLOSE)


@torch.no_grad()
def usual_uses(model) -> list[Tensor]:
    """What a model is asked for elsewhere: a text, a batch with padding on its left, with labels, and generating."""
    prompts = random_prompts([9, 3, 6])
    ids = torch.tensor([[0] * (9 - len(prompt)) + prompt for prompt in prompts])
    attention_mask = (ids != 0).long()
    labels = ids.masked_fill(ids == 0, -100)
    return [
        plain_logits(model, prompts[0]),
        model(input_ids=ids, attention_mask=attention_mask).logits[attention_mask.bool()],
        model(input_ids=ids, attention_mask=attention_mask, labels=labels).loss,
        *(
            model.generate(input_ids=ids, attention_mask=attention_mask, max_new_tokens=8, eos_token_id=None, **how)
            for how in ({"do_sample": False}, {"num_beams": 3}, {"do_sample": False, "use_cache": False})
        ),
    ]


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "lora"])
@pytest.mark.parametrize("build", BUILDS)
def test_a_model_s_other_uses_are_what_they_were(build, lora):
    model, batch = policy_of(build) if lora else small_model(build), batch_of(ROWS["one prompt"])
    before = usual_uses(model)
    computed(model, batch, batch.mask, 1.0, False)
    assert bare(model).config._attn_implementation == NAME
    for some in (model, copy.deepcopy(model)):
        for a, b in zip(usual_uses(some), before, strict=True):
            assert torch.equal(a, b)


def test_a_saved_model_does_not_ask_for_it(tmp_path):
    model, batch = small_model(), batch_of(ROWS["one prompt"])
    expected = computed(model, batch, batch.mask, 1.0, False)
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    assert_alike(computed(loaded, batch, batch.mask, 1.0, False), expected)


def test_padding_may_have_any_id():
    model = small_model()
    rows = [(prompt, [*response[:-1], END]) for prompt, response in ROWS["prompts shared, rows mixed"]]
    batches = [batch_of(rows, pad_id) for pad_id in (0, END, 5)]
    first, *others = (computed(model, batch, batch.mask, 1.0, False) for batch in batches)
    for other in others:
        assert torch.equal(first[0], other[0]) and all(map(torch.equal, first[1], other[1]))
