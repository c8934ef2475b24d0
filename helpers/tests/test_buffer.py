"""The buffer: nothing is lost, no padding is kept, and padding never matters."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from helpers.buffer import Buffer, Experience, collate, pad
from helpers.logprobs import completion_logprobs
from helpers.tests.conftest import small_model

SIZES = [(4, 6), (1, 1), (9, 2), (2, 8)]  # tokens of prompt and response


def experience(prompt: int, response: int, number: int = 0) -> Experience:
    """One with these lengths; tokens, advantage and log-probs tell it from others."""
    generator = torch.Generator().manual_seed(number)

    def ids(count: int) -> list[int]:
        return torch.randint(2, 24, (count,), generator=generator).tolist()

    def logprobs() -> torch.Tensor:
        return -torch.rand(response, generator=generator) - 0.01

    return Experience(ids(prompt), ids(response), number - 1.5, logprobs(), logprobs())


EXPERIENCES = [experience(*size, number) for number, size in enumerate(SIZES)]


# --- collation ---


def test_shapes_and_places():
    batch = collate(EXPERIENCES, pad_id=99)
    assert batch.input_ids.shape == (4, 11)  # 9 + 2 tokens is the longest row, 8 the longest response
    assert batch.mask.shape == batch.old_logprobs.shape == batch.reference_logprobs.shape == (4, 8)
    assert batch.mask.dtype == torch.bool and batch.input_ids.dtype == torch.int64
    assert batch.prompt_lengths.tolist() == [4, 1, 9, 2]
    assert batch.mask.sum(dim=1).tolist() == [6, 1, 2, 8]
    assert batch.advantages.tolist() == [-1.5, -0.5, 0.5, 1.5]
    for row, e in enumerate(EXPERIENCES):
        padding = 11 - len(e)
        assert batch.input_ids[row].tolist() == e.prompt_ids + e.response_ids + [99] * padding
        assert batch.mask[row].tolist() == [True] * len(e.response_ids) + [False] * (8 - len(e.response_ids))
        assert (batch.old_logprobs[row, len(e.response_ids) :] == 0).all()


sizes = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=6)


@given(sizes, st.integers(0, 30))
def test_round_trip(sizes, pad_id):
    experiences = [experience(*size, number) for number, size in enumerate(sizes)]
    batch = collate(experiences, pad_id)
    assert batch.input_ids.shape == (len(sizes), max(map(sum, sizes)))  # no more padding than this batch needs
    for row, e in enumerate(experiences):
        length, mask = batch.prompt_lengths[row], batch.mask[row]
        assert batch.input_ids[row, :length].tolist() == e.prompt_ids
        assert batch.input_ids[row, length : length + mask.sum()].tolist() == e.response_ids
        assert batch.advantages[row] == e.advantage
        assert torch.equal(batch.old_logprobs[row][mask], e.old_logprobs)
        assert torch.equal(batch.reference_logprobs[row][mask], e.reference_logprobs)


def test_absent_log_probs_stay_absent():
    batch = collate([Experience([5, 6], [7], 1.0), Experience([5], [7, 8], 1.0)])
    assert batch.old_logprobs is None and batch.reference_logprobs is None
    moved = batch.to("meta")
    assert moved.old_logprobs is None and moved.input_ids.is_meta and moved.advantages.is_meta
    assert not batch.input_ids.is_meta


def test_advantages_of_tokens_stand_in_for_those_of_responses():
    rows = [Experience([5, 6], [7], 1.0, token_advantages=torch.tensor([0.5])),
            Experience([5], [7, 8], 1.0, token_advantages=torch.tensor([0.0, -2.0])),
            Experience([5], [7, 8], 1.0, token_advantages=torch.zeros(2))]  # fmt: skip
    assert collate(rows).advantages.tolist() == [[0.5, 0.0], [0.0, -2.0], [0.0, 0.0]]
    assert [e.has_signal for e in rows] == [True, True, False]
    assert [Experience([5], [7], a).has_signal for a in (0.0, -0.1)] == [False, True]


def test_pad_fills_up_on_the_right():
    assert pad([torch.tensor([1, 2]), torch.tensor([3])], 9).tolist() == [[1, 2], [3, 9]]


@pytest.mark.parametrize("pad_id", [1, 2, 23])
def test_the_padding_token_changes_no_log_prob_and_no_gradient(model, pad_id):
    def run(pad_id: int, extra: int = 0):
        batch = collate(EXPERIENCES, pad_id)
        ids = torch.nn.functional.pad(batch.input_ids, (0, extra), value=pad_id)
        logprobs, entropies = completion_logprobs(model, ids, batch.prompt_lengths, batch.mask, 0.8, with_entropy=True)
        gradients = torch.autograd.grad((logprobs * batch.advantages[:, None]).sum(), list(model.parameters()))
        return logprobs.detach(), entropies.detach(), *gradients

    for a, b in zip(run(0), run(pad_id), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(run(0), run(pad_id, extra=3), strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_padding_token_needs_no_embedding_of_its_own():
    """An id that every row also holds as a real token: only real ones may be read."""
    model = small_model()
    rows = [Experience([7, 7], [7, 7, 7, 7], 0.0), Experience([7], [7], 0.0)]
    batch = collate(rows, pad_id=7)
    together, _ = completion_logprobs(model, batch.input_ids, batch.prompt_lengths, batch.mask)
    for row, e in enumerate(rows):
        b = collate([e])
        alone, _ = completion_logprobs(model, b.input_ids, b.prompt_lengths, b.mask)
        assert_close(together[row, : alone.shape[1]], alone[0], rtol=0, atol=1e-5)


# --- the buffer ---


def filled(count: int, capacity: int = 100) -> Buffer:
    buffer = Buffer(capacity)
    buffer.add([experience(3, 1 + number % 7, number) for number in range(count)])
    return buffer


def test_it_stores_no_padding():
    buffer = filled(20)
    kept = sum(len(e.prompt_ids) + len(e.response_ids) for e in buffer.experiences)
    assert kept == sum(len(e) for e in buffer.experiences) == sum(3 + 1 + number % 7 for number in range(20))
    assert [e.old_logprobs.untyped_storage().nbytes() for e in buffer.experiences] == [
        4 * len(e.response_ids) for e in buffer.experiences
    ]


def test_it_is_full_at_its_capacity_and_whole_groups_stay():
    buffer, group = Buffer(10), [experience(2, 2, number) for number in range(4)]
    for count, full in ((4, False), (8, False), (12, True)):
        buffer.add(group)
        assert (len(buffer), buffer.full) == (count, full)
    assert buffer.experiences == 3 * group  # the third group is not torn at 10
    exactly = Buffer(4)
    exactly.add(group)
    assert exactly.full


@given(st.integers(0, 40), st.integers(1, 50), st.integers(0, 1000))
def test_minibatches_are_a_permutation_of_all_experiences(count, size, seed):
    buffer = filled(count)
    minibatches = buffer.minibatches(size, seed)
    order = [int(e.advantage + 1.5) for minibatch in minibatches for e in minibatch]
    assert sorted(order) == list(range(count))
    assert [len(m) for m in minibatches] == [size] * (count // size) + ([count % size] if count % size else [])
    again = buffer.minibatches(size, seed)
    assert [[id(e) for e in m] for m in again] == [[id(e) for e in m] for m in minibatches]
    assert len(buffer) == count  # taking minibatches uses nothing up


def test_the_seed_decides_the_order_and_the_global_generator_does_not():
    buffer = filled(40)

    def order(seed: int) -> list[float]:
        return [e.advantage for m in buffer.minibatches(7, seed) for e in m]

    torch.manual_seed(0)
    state, first = torch.get_rng_state(), order(3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert order(3) == first != order(4) != sorted(order(4))


# --- errors ---


def test_what_cannot_be_is_said_in_one_sentence():
    def fails(words: str, action, *arguments, **named) -> None:
        with pytest.raises(ValueError, match=rf"^(?=.*{words})[^\n]+\.$"):
            action(*arguments, **named)

    for capacity in (0, -1):
        fails(f"room for 1 experience or more, not {capacity}", Buffer, capacity)
    for size in (0, -3):
        fails(f"room for 1 experience or more, not {size}", filled(5).minibatches, size, seed=0)
    fails("1 experience or more", collate, [])
    fails("old_logprobs .* 2 response tokens, not shape .3,.", Experience, [5], [6, 7], 1.0, torch.zeros(3))
    fails("token_advantages .* 2 resp", Experience, [5], [6, 7], 1.0, token_advantages=torch.zeros(1))
    fails("reference_logprobs .* 2 response tokens", Experience, [5], [6, 7], 1.0, None, torch.zeros(1, 2))
    mixed = [Experience([5], [6], 1.0, torch.zeros(1)), Experience([5], [6], 1.0)]
    for some in (mixed, mixed[::-1]):
        fails("old_logprobs, or none", collate, some)
