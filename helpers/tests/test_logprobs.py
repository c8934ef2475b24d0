"""Token log-probs against a plain full forward pass, and the completion mask against a naive loop."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import logprobs as logprobs_module
from helpers.buffer import Batch, Experience, collate, pad
from helpers.logprobs import CHUNK, FrozenHead, completion_logprobs, completion_mask
from helpers.losses import importance_ratio
from helpers.models import add_lora, bare, halve_frozen
from helpers.rollout import encode_prompt, end_token_ids, rollout
from helpers.tasks import load_task
from helpers.tests.conftest import (
    END,
    inputs_of,
    plain_logits,
    plain_logprobs,
    policy_of,
    random_prompts,
    small_model,
)

LENGTHS = [(5, 7), (1, 1), (9, 3), (3, 12), (5, 2), (12, 6)]  # of prompt and completion
PROMPTS = random_prompts([prompt for prompt, _ in LENGTHS])
# Each completion but the fourth, which ran into its limit, ends with the end-of-text token.
COMPLETIONS = [
    ids if row == 3 else [*ids[:-1], END]
    for row, ids in enumerate(random_prompts([completion for _, completion in LENGTHS], seed=1))
]
CLOSE = {"rtol": 0, "atol": 1e-5}


def batch_of(rows: list[int], pad_id: int = 0) -> Batch:
    return collate([Experience(PROMPTS[row], COMPLETIONS[row], 0.0) for row in rows], pad_id)


def logprobs_of(model, batch: Batch, temperature: float = 1.0, with_entropy: bool = False):
    return completion_logprobs(model, batch.input_ids, batch.prompt_lengths, batch.mask, temperature, with_entropy)


EVERY_ROW = list(range(len(LENGTHS)))


# --- values ---


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
def test_they_equal_a_plain_forward_pass_on_ragged_batches(model, temperature):
    batch = batch_of(EVERY_ROW)
    logprobs, entropies = logprobs_of(model, batch, temperature)
    assert entropies is None and logprobs.shape == batch.mask.shape == (6, 12)
    assert (logprobs[~batch.mask] == 0).all()
    for row in EVERY_ROW:
        plain = plain_logprobs(model, PROMPTS[row], COMPLETIONS[row], temperature)
        assert_close(logprobs[row, : len(plain)], plain, **CLOSE)
    assert logprobs[batch.mask].std() > 0.5  # they are not all alike


def test_a_row_has_the_same_log_probs_alone_and_in_a_batch(model):
    together, _ = logprobs_of(model, batch_of(EVERY_ROW))
    for row in EVERY_ROW:
        alone, _ = logprobs_of(model, batch_of([row]))
        assert_close(alone[0], together[row, : alone.shape[1]], **CLOSE)


def test_the_end_of_text_token_counts_where_padding_has_its_id():
    model = small_model()
    batch = batch_of(EVERY_ROW, pad_id=END)  # as in SmolLM2's tokenizer
    sampled = pad([torch.tensor(ids) for ids in COMPLETIONS], END)
    assert torch.equal(completion_mask(sampled, {END}), batch.mask)
    logprobs = logprobs_of(model, batch)[0]
    for row, (_, length) in enumerate(LENGTHS):
        plain = plain_logprobs(model, PROMPTS[row], COMPLETIONS[row])
        assert_close(logprobs[row, length - 1], plain[-1], **CLOSE)
        assert plain[-1] < -0.1
    # One step on the log-prob of the end-of-text tokens alone makes them likelier: the model can learn to stop.
    ends = batch.mask & (torch.arange(batch.mask.shape[1]) == batch.mask.sum(dim=1, keepdim=True) - 1)
    ends[3] = False
    policy = copy.deepcopy(model)
    before = logprobs_of(policy, batch)[0][ends].sum()
    before.backward()
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 1e-3 * weight.grad
    assert logprobs_of(policy, batch)[0][ends].sum() > before + 0.01


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_entropies_are_those_of_the_sampling_distribution(model, temperature):
    batch = batch_of(EVERY_ROW)
    logprobs, entropies = logprobs_of(model, batch, temperature, with_entropy=True)
    assert torch.equal(logprobs, logprobs_of(model, batch, temperature)[0])
    assert entropies.shape == batch.mask.shape and (entropies[~batch.mask] == 0).all()
    for row, (prompt, length) in enumerate(LENGTHS):
        logits = plain_logits(model, PROMPTS[row] + COMPLETIONS[row])[prompt - 1 : -1] / temperature
        expected = torch.distributions.Categorical(logits=logits).entropy()
        assert_close(entropies[row, :length], expected, **CLOSE)


def test_no_completion_tokens_give_no_log_probs():
    batch = batch_of([0, 2])
    none = torch.zeros_like(batch.mask)
    logprobs, entropies = completion_logprobs(
        small_model(), batch.input_ids, batch.prompt_lengths, none, with_entropy=True
    )
    assert (logprobs == 0).all() and (entropies == 0).all() and logprobs.shape == none.shape


def test_a_masked_token_is_left_out_and_the_others_stay():
    model, batch = small_model(), batch_of(EVERY_ROW)
    mask = batch.mask.clone()
    mask[0, 2] = mask[3, 0] = False
    some, _ = completion_logprobs(model, batch.input_ids, batch.prompt_lengths, mask)
    assert_close(some, logprobs_of(model, batch)[0] * mask, **CLOSE)


def test_a_wrapped_policy_is_looked_through():
    model = small_model()
    expected, _ = logprobs_of(model, batch_of(EVERY_ROW))
    policy = add_lora(model, r=2, alpha=4)
    wrapped = torch.nn.Module()
    wrapped.module = policy  # as DistributedDataParallel holds it
    for some in (policy, wrapped):
        assert_close(logprobs_of(some, batch_of(EVERY_ROW))[0], expected, **CLOSE)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(3))
    adapted, _ = logprobs_of(policy, batch_of(EVERY_ROW))
    assert (adapted - expected).abs().max() > 0.1
    for row in EVERY_ROW:  # the adapter is read, not passed by
        plain = plain_logprobs(policy, PROMPTS[row], COMPLETIONS[row])
        assert_close(adapted[row, : len(plain)].detach(), plain, **CLOSE)


# --- cost ---


def test_the_vocabulary_projection_sees_completion_positions_only():
    model, batch = small_model(), batch_of(EVERY_ROW)
    heads = inputs_of(model.get_output_embeddings(), lambda: logprobs_of(model, batch))
    assert sum(h.shape[:-1].numel() for h in heads) == int(batch.mask.sum()) == sum(length for _, length in LENGTHS)


@pytest.mark.parametrize("build", ["llama_gqa_tied", "llama_mha_untied"])
@pytest.mark.parametrize("chunk", [1, 4, 31])
def test_chunks_change_neither_values_nor_gradients(monkeypatch, build, chunk):
    model, batch = small_model(build), batch_of(EVERY_ROW)
    weights = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(0))

    def run() -> tuple[Tensor, Tensor, list[Tensor]]:
        logprobs, entropies = logprobs_of(model, batch, 0.7, with_entropy=True)
        gradients = torch.autograd.grad((weights * (logprobs + 0.3 * entropies)).sum(), list(model.parameters()))
        return logprobs.detach(), entropies.detach(), gradients

    whole = run()
    assert max(g.abs().max() for g in whole[2]) > 0.1
    monkeypatch.setattr(logprobs_module, "CHUNK", chunk)
    parts = []
    heads = inputs_of(model.get_output_embeddings(), lambda: parts.append(run()))
    assert max(len(h) for h in heads) == min(chunk, 31)  # that many rows of logits at most are held at once
    for a, b in zip(whole, parts[0], strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert_close(logprobs_of(model, batch, 0.7)[0], whole[0], **CLOSE)


def test_logits_of_a_chunk_are_not_kept_for_the_backward_pass(monkeypatch):
    model, batch = small_model(vocabulary=500), batch_of(EVERY_ROW)
    tokens = int(batch.mask.sum())

    def kept() -> int:
        """Rows as wide as the vocabulary that are saved for the backward pass."""
        saved = []

        def note(tensor: Tensor) -> Tensor:
            if tensor.dim() == 2 and tensor.shape[1] == 500 and len(tensor) <= tokens:
                saved.append(len(tensor))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            logprobs_of(model, batch)
        return sum(saved)

    assert kept() >= tokens
    monkeypatch.setattr(logprobs_module, "CHUNK", tokens - 1)
    assert kept() == 0


# --- a vocabulary projection that does not train ---


def frozen_case(rows: int, size: int = 32, vocabulary: int = 300) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States (n, H) that want a gradient, targets (n,), weight (V, H), and the gradient from above (n,)."""
    generator = torch.Generator().manual_seed(rows)
    states = torch.randn(rows, size, generator=generator).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    weight = 0.3 * torch.randn(vocabulary, size, generator=generator)
    return states, targets, weight, torch.randn(rows, generator=generator)


def plain_head(states: Tensor, targets: Tensor, weight: Tensor, temperature: float) -> Tensor:
    return (F.linear(states, weight) / temperature).log_softmax(dim=1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
@pytest.mark.parametrize("rows", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK - 5])
def test_a_frozen_head_gives_the_plain_formula_s_values_and_gradients(rows, temperature):
    states, targets, weight, above = frozen_case(rows)
    ours, theirs = (head(states, targets, weight, temperature) for head in (FrozenHead.apply, plain_head))
    assert ours.dtype == torch.float32
    assert_close(ours, theirs, **CLOSE)
    gradients = [torch.autograd.grad(values, states, above)[0] for values in (ours, theirs)]
    assert_close(*gradients, **CLOSE)
    assert rows == 0 or gradients[0].abs().max() > 0.1
    with torch.no_grad():
        assert torch.equal(FrozenHead.apply(states, targets, weight, temperature), ours)


class Watch(TorchDispatchMode):
    """The products that are computed, and the most entries of a tensor as wide as the vocabulary."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.rows, self.products = vocabulary, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        self.products += function is torch.ops.aten.mm.default
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.shape[-1:] == (self.vocabulary,):
                self.rows = max(self.rows, tensor.numel() // self.vocabulary)
        return result


@pytest.mark.parametrize("rows", [CHUNK, 5 * CHUNK])
def test_a_frozen_head_never_holds_more_logits_than_a_chunk_s(rows):
    """Nor does it multiply again for the backward pass; without a gradient it forms none."""
    states, targets, weight, above = frozen_case(rows)
    with Watch(len(weight)) as forward:
        logprobs = FrozenHead.apply(states, targets, weight, 0.9)
    with Watch(len(weight)) as backward:
        logprobs.backward(above)
    assert forward.rows == CHUNK and backward.rows == backward.products == 0
    assert forward.products == 2 * rows // CHUNK  # logits, and the vocabulary's mean under them
    with torch.no_grad(), Watch(len(weight)) as without:
        FrozenHead.apply(states.detach(), targets, weight, 0.9)
    assert without.rows == CHUNK and without.products == rows // CHUNK


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_head_in_bfloat16_is_near_the_exact_one(state_dtype):
    states, targets, weight, above = frozen_case(300)
    exact = plain_head(states, targets, weight, 0.8)
    [right] = torch.autograd.grad(exact, states, above)
    short = states.detach().to(state_dtype).requires_grad_()
    logprobs = FrozenHead.apply(short, targets, weight.bfloat16(), 0.8)
    [gradient] = torch.autograd.grad(logprobs, short, above)
    assert logprobs.dtype == torch.float32 and gradient.dtype == state_dtype
    assert_close(logprobs, exact, rtol=0, atol=0.1)  # logits of up to 9, of which bfloat16 holds 3 digits
    assert (logprobs - exact).abs().mean() < 0.05
    assert (gradient - right).norm() < 0.02 * right.norm()


@pytest.mark.parametrize("build", ["llama_gqa_tied", "llama_mha_untied"])
@pytest.mark.parametrize("chunk", [1, 4, 128])
def test_under_lora_the_frozen_head_changes_neither_values_nor_gradients(monkeypatch, build, chunk):
    policy, batch = policy_of(build), batch_of(EVERY_ROW)
    weights = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(0))
    trains = [p for p in policy.parameters() if p.requires_grad]
    monkeypatch.setattr(logprobs_module, "CHUNK", chunk)
    used = []
    apply = FrozenHead.apply
    monkeypatch.setattr(FrozenHead, "apply", lambda *given: used.append(given) or apply(*given))

    def run(with_entropy: bool) -> tuple[Tensor, list[Tensor]]:
        logprobs, _ = logprobs_of(policy, batch, 0.7, with_entropy)
        return logprobs.detach(), torch.autograd.grad((weights * logprobs).sum(), trains)

    frozen = run(False)
    assert len(used) == 1 and len(used[0][0]) == int(batch.mask.sum())
    plain = run(True)  # for entropies the logits are needed: the other way
    assert len(used) == 1
    assert_close(frozen[0], plain[0], **CLOSE)
    largest = max(g.abs().max() for g in plain[1])
    assert largest > 0.1
    for a, b in zip(frozen[1], plain[1], strict=True):
        assert_close(a, b, rtol=0, atol=1e-5 * max(1.0, largest))
    with torch.no_grad():
        assert_close(logprobs_of(policy, batch, 0.7)[0], plain[0], **CLOSE)


def test_a_head_that_trains_or_is_more_than_a_product_gets_its_gradient(monkeypatch):
    monkeypatch.setattr(FrozenHead, "apply", None)
    trained = small_model("llama_mha_untied")
    logprobs_of(trained, batch_of(EVERY_ROW))[0].sum().backward()
    assert trained.lm_head.weight.grad.abs().max() > 0.1
    policy = policy_of("llama_mha_untied")
    head = bare(policy).lm_head
    bare(policy).lm_head = torch.nn.Linear(32, 24).requires_grad_(False)  # with a bias
    bare(policy).lm_head.weight.data = head.weight.data
    for row in EVERY_ROW:
        plain = plain_logprobs(policy, PROMPTS[row], COMPLETIONS[row])
        ours, _ = logprobs_of(policy, batch_of([row]))
        assert_close(ours[0].detach(), plain, **CLOSE)


@pytest.mark.parametrize("halved", [False, True])
def test_under_autocast_the_frozen_head_is_near_the_exact_one(halved):
    policy, batch = policy_of("llama_mha_untied"), batch_of(EVERY_ROW)
    exact, _ = logprobs_of(policy, batch)
    trains = [p for p in policy.parameters() if p.requires_grad]
    right = torch.autograd.grad(exact[batch.mask].sum(), trains)
    if halved:  # the weights that do not train, as a recipe in mixed precision keeps them
        halve_frozen(policy, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        ours, _ = logprobs_of(policy, batch)
    assert ours.dtype == torch.float32
    gradients = torch.autograd.grad(ours[batch.mask].sum(), trains)
    assert_close(ours, exact, rtol=0, atol=0.15)
    flat, plain = (torch.cat([g.flatten() for g in some]) for some in (gradients, right))
    assert torch.cosine_similarity(flat, plain, dim=0) > 0.99


# --- sampler and trainer agree ---


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.95)])
def test_the_first_ratio_between_sampler_and_trainer_is_one(pocket, temperature, top_p):
    model, tokenizer = pocket
    prompts = [encode_prompt(tokenizer, e.question) for e in load_task("syllogism", "train", 6)]
    groups = rollout(
        model, prompts, group_size=4, max_new_tokens=25, end_ids=end_token_ids(model, tokenizer),
        temperature=temperature, top_p=top_p,
    )  # fmt: skip
    batch = collate([
        Experience(prompt, response.token_ids, 1.0, old_logprobs=torch.tensor(response.logprobs))
        for prompt, group in zip(prompts, groups, strict=True) for response in group
    ])  # fmt: skip
    new, _ = logprobs_of(model, batch, temperature)
    for level in ("token", "sequence"):
        ratio = importance_ratio(new, batch.old_logprobs, batch.mask, level)
        assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-4)
    if temperature != 1.0:  # left out, it would be far from 1: the article's mistake
        wrong = importance_ratio(logprobs_of(model, batch)[0], batch.old_logprobs, batch.mask)
        assert (wrong - 1).abs().max() > 0.01


# --- the mask ---


def naive_mask(rows: list[list[int]], ends: set[int]) -> list[list[bool]]:
    masks = []
    for row in rows:
        mask, over = [], False
        for token in row:
            mask.append(not over)
            over = over or token in ends
        masks.append(mask)
    return masks


rectangles = st.integers(1, 12).flatmap(
    lambda width: st.lists(st.lists(st.integers(0, 4), min_size=width, max_size=width), min_size=1, max_size=5)
)


@given(rectangles, st.sets(st.integers(0, 5), max_size=3))
def test_completion_mask_is_a_naive_loop_s(rows, ends):
    mask = completion_mask(torch.tensor(rows), ends)
    assert mask.dtype == torch.bool
    assert mask.tolist() == naive_mask(rows, ends)


def test_completion_mask_of_hand_written_rows():
    rows = torch.tensor([[5, 2, 2, 2], [2, 5, 6, 7], [5, 6, 7, 8], [5, 6, 7, 2]])
    assert completion_mask(rows, {2}).long().tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
