"""Rollouts: G sampled responses to each question, every prompt computed once."""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache, DynamicLayer

from helpers.models import bare
from helpers.prompts import messages


@dataclass(frozen=True)
class Response:
    """One sampled response.

    token_ids: with the end-of-text token at the end if the policy wrote it (`finished`).
    logprobs: the sampler's log-prob of each token at the sampling temperature, in nats, before top_p. They tell
    whether sampler and trainer agree; the loss takes its own from the trainer.
    """

    token_ids: list[int]
    logprobs: list[float]
    finished: bool


def encode_prompt(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """Token ids of a question in the model's chat template, up to where the assistant begins to write."""
    return tokenizer.apply_chat_template(messages(question), add_generation_prompt=True, return_dict=False)


def end_token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a response: the tokenizer's, and those of the model's generation settings."""
    ends = bare(model).generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return {end for end in [*ends, tokenizer.eos_token_id] if end is not None}


def sample(
    logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """One token a row and its log-prob before top_p. logits: (B, V); returns (B,) and (B,).

    Temperature 0 takes the likeliest token, with its log-prob at temperature 1.
    """
    logits = logits.float() / (temperature or 1.0)
    probs = logits.softmax(dim=-1)
    if temperature == 0:
        tokens = logits.argmax(dim=-1)
    elif top_p >= 1:
        tokens = draw(probs, generator)
    else:
        tokens = nucleus(probs, top_p, generator)
    return tokens, probs.gather(1, tokens[:, None])[:, 0].log()


def nucleus(probs: Tensor, top_p: float, generator: torch.Generator | None) -> Tensor:
    """One token a row from the smallest set of likeliest tokens whose probability reaches top_p.

    probs: (B, V); returns (B,). Source: nucleus sampling, arXiv 1904.09751. The set is found among the 64 likeliest
    tokens, then 128 and so on: the whole vocabulary is never sorted.
    """
    count = min(64, probs.shape[-1])
    while True:
        top, tokens = probs.topk(count, dim=-1)  # falling
        total = top.cumsum(dim=-1)
        if count == probs.shape[-1] or bool((total[:, -1] >= top_p).all()):
            break
        count = min(2 * count, probs.shape[-1])
    top = top.masked_fill(total - top >= top_p, 0.0)  # what stood before a token already reached top_p
    return tokens.gather(1, draw(top, generator)[:, None])[:, 0]


def draw(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """One index a row with probability in proportion to its weight. weights: (B, V), float32; returns (B,).

    Inverts the cumulative sum: one random number a row where `torch.multinomial` draws one for every token.
    """
    exact = torch.float32 if weights.device.type == "mps" else torch.float64  # an Apple GPU has no float64
    total = weights.cumsum(dim=-1, dtype=exact)
    threshold = total[:, -1:] * torch.rand(len(weights), 1, generator=generator, device=weights.device, dtype=exact)
    return torch.searchsorted(total, threshold, right=True)[:, 0].clamp(max=weights.shape[-1] - 1)


class PreallocatedLayer(DynamicLayer):
    """A layer's keys and values with room for all tokens to come: adding a token copies nothing but that token."""

    def __init__(self, keys: Tensor, values: Tensor, room: int) -> None:
        super().__init__()
        self.length = keys.shape[-2]
        self.keys, self.values = (
            torch.cat([x, x.new_zeros(*x.shape[:2], room, x.shape[3])], dim=-2) for x in (keys, values)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write the new tokens behind the old ones; returns all keys and values so far, as views."""
        start, self.length = self.length, self.length + key_states.shape[-2]
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_seq_length(self) -> int:
        """Tokens held, without the free room."""
        return self.length


def prefill(model: nn.Module, prompts: Sequence[Sequence[int]], copies: int, room: int):
    """Compute each prompt once and repeat its keys and values for `copies` responses.

    Prompts of one length go through the model together, so no padding is computed; in the cache the shorter ones get
    empty places on the left, which the mask hides. Returns the logits (Q * copies, V) behind each prompt, the cache,
    and the mask (Q * copies, longest prompt + room), True where a token may be looked at.
    """
    by_length = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_length[len(prompt)].append(index)
    longest, device = max(by_length), next(model.parameters()).device
    logits, layers = [None] * len(prompts), None
    mask = torch.zeros(len(prompts), longest + room, dtype=torch.bool, device=device)
    mask[:, longest:] = True
    for length, members in by_length.items():
        cache = DynamicCache()
        ids = torch.tensor([prompts[i] for i in members], device=device)
        last = model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        layers = layers or [
            [x.new_zeros(len(prompts), x.shape[1], longest, x.shape[3]) for x in (layer.keys, layer.values)]
            for layer in cache.layers
        ]
        for layer, stored in zip(cache.layers, layers, strict=True):
            stored[0][members, :, longest - length :] = layer.keys
            stored[1][members, :, longest - length :] = layer.values
        mask[members, longest - length : longest] = True
        for i, row in zip(members, last, strict=True):
            logits[i] = row
    cache = DynamicCache()
    cache.layers = [
        PreallocatedLayer(k.repeat_interleave(copies, dim=0), v.repeat_interleave(copies, dim=0), room)
        for k, v in layers
    ]
    return torch.stack(logits).repeat_interleave(copies, dim=0), cache, mask.repeat_interleave(copies, dim=0)


@torch.no_grad()
def rollout(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    group_size: int,
    max_new_tokens: int,
    end_ids: Collection[int],
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    max_rows: int = 384,
    on_progress: Callable[[int], None] | None = None,
) -> list[list[Response]]:
    """Sample `group_size` responses to each prompt (token ids). Returns a list of responses for each prompt, in order.

    A response ends with an end-of-text token or at `max_new_tokens`. Nothing but temperature and top_p shapes the
    distribution. The same seed gives the same responses on the same machine. `max_rows` bounds memory: that many
    responses are sampled at a time. `on_progress` is told how many prompts are done.
    Raises ValueError for settings that cannot be sampled with.
    """
    if group_size < 1 or max_new_tokens < 1 or not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise ValueError(
            "A rollout needs group_size and max_new_tokens of 1 or more, a finite temperature of at least 0 "
            f"and 0 < top_p <= 1; it got {group_size}, {max_new_tokens}, {temperature} and {top_p}."
        )
    model = bare(model)
    was_training = model.training
    model.eval()
    generator = torch.Generator(device=next(model.parameters()).device).manual_seed(seed)
    step = max(1, max_rows // group_size)
    groups: list[list[Response]] = []
    try:
        for start in range(0, len(prompts), step):
            some = prompts[start : start + step]
            groups += _rollout_batch(model, some, group_size, max_new_tokens, end_ids, temperature, top_p, generator)
            if on_progress:
                on_progress(len(some))
    finally:
        model.train(was_training)  # also when a reader interrupts
    return groups


def _rollout_batch(model, prompts, group_size, max_new_tokens, end_ids, temperature, top_p, generator):
    logits, cache, mask = prefill(model, prompts, group_size, max_new_tokens)
    written: list[list[int]] = [[] for _ in range(len(logits))]
    scores: list[list[float]] = [[] for _ in range(len(logits))]
    rows = torch.arange(len(logits))  # which response each row of the batch is; finished rows leave
    positions = mask[:, :-max_new_tokens].sum(dim=1, keepdim=True)
    ends = torch.tensor(sorted(end_ids), device=mask.device)
    finished = [False] * len(logits)
    while True:
        tokens, logprobs = sample(logits, temperature, top_p, generator)
        ended = torch.isin(tokens, ends).tolist()
        for row, token, logprob, end in zip(rows.tolist(), tokens.tolist(), logprobs.tolist(), ended, strict=True):
            written[row].append(token)
            scores[row].append(logprob)
            finished[row] = end
        if all(ended) or len(written[rows[0]]) == max_new_tokens:
            break
        if any(ended):
            stay = torch.tensor([not end for end in ended], device=mask.device).nonzero()[:, 0]
            rows, tokens, mask, positions = rows[stay.cpu()], tokens[stay], mask[stay], positions[stay]
            cache.batch_select_indices(stay)
        seen = mask[:, : cache.get_seq_length() + 1]
        logits = model(
            input_ids=tokens[:, None], attention_mask=seen, position_ids=positions, cache=cache, use_cache=True
        ).logits[:, -1]
        positions = positions + 1
    responses = [Response(*columns) for columns in zip(written, scores, finished, strict=True)]
    return [responses[i : i + group_size] for i in range(0, len(responses), group_size)]
