"""Rollouts: G sampled responses to each question, every prompt computed once."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from helpers.anymodel import ModelRows
from helpers.decoder import Decoder, Rows, sampling_copy
from helpers.models import bare
from helpers.prompts import messages

MAX_ROWS = 384  # responses that are sampled at a time; more need more memory
BLOCK = 64  # tokens; the vocabulary is searched a block at a time
SHRINK = 0.75  # finished rows are dropped when so few are left: often enough to save work, seldom enough to copy little


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


@runtime_checkable
class RemoteSampler(Protocol):
    """A sampler outside of this process, as `server.Server` is one."""

    def refresh(self, policy: nn.Module) -> None:
        """Take over the policy's present weights."""

    def respond(self, prompts: Sequence[Sequence[int]], **settings) -> list[list[Response]]:
        """What `rollout` returns, for its settings."""


def encode_prompt(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """Token ids of a question in the model's chat template, up to where the assistant begins to write."""
    return tokenizer.apply_chat_template(messages(question), add_generation_prompt=True, return_dict=False)


def end_token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a response: the tokenizer's, and those of the model's generation settings, if it has any."""
    settings = getattr(bare(model), "generation_config", None)
    ends = settings.eos_token_id if settings else None
    ends = ends if isinstance(ends, list) else [ends]
    return {end for end in [*ends, tokenizer.eos_token_id] if end is not None}


def sample(
    logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """One token a row and its log-prob before top_p. logits: (B, V); returns (B,) and (B,).

    Temperature 0 takes the likeliest token, with its log-prob at temperature 1.
    """
    if temperature not in (0, 1):
        logits = logits.float() / temperature
    probs = logits.softmax(dim=-1, dtype=torch.float32)
    if temperature == 0:
        tokens = logits.argmax(dim=-1)
    elif top_p >= 1:
        tokens = draw(probs, generator)
    else:
        tokens = nucleus(probs, top_p, generator)
    return tokens, probs.gather(1, tokens[:, None])[:, 0].log()


def nucleus(probs: Tensor, top_p: float, generator: torch.Generator | None) -> Tensor:
    """One token a row from the likeliest tokens, as few as reach top_p together, and any that tie with the last.

    probs: (B, V); returns (B,). Source: nucleus sampling, arXiv 1904.09751. Nothing is sorted: a token is drawn from
    the whole vocabulary, and drawn again where the tokens likelier than it reach top_p by themselves: 1 / top_p draws
    on average at the most.
    """
    tokens, rows = draw(probs, generator), None  # rows: whose token was drawn last; None stands for all
    while True:
        some, drawn = (probs, tokens) if rows is None else (probs[rows], tokens[rows])
        limit = some.gather(1, drawn[:, None])
        likelier = F.hardshrink(some / limit, 1.0).sum(dim=1) * limit[:, 0]  # the sum of all that is above the limit
        outside = likelier >= top_p
        rows = outside.nonzero()[:, 0] if rows is None else rows[outside]
        if not len(rows):
            return tokens
        tokens[rows] = draw(probs[rows], generator)


def in_blocks(rows: Tensor) -> Tensor:
    """Rows cut into blocks, with zeros behind if they do not come out even. (B, V) -> (B, n, BLOCK)."""
    short = -rows.shape[-1] % BLOCK
    return (F.pad(rows, (0, short)) if short else rows).unflatten(-1, (-1, BLOCK))


def draw(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """One index a row with probability in proportion to its weight. weights: (B, V), float32; returns (B,).

    Inverts the cumulative sum, first over blocks, then inside the block that was hit: one random number a row where
    `torch.multinomial` draws one for every token, and no running sum over the whole vocabulary.
    """
    exact = torch.float32 if weights.device.type == "mps" else torch.float64  # an Apple GPU has no float64
    blocks = in_blocks(weights)
    total = blocks.sum(dim=-1).cumsum(dim=-1, dtype=exact)  # (B, n)
    threshold = total[:, -1:] * torch.rand(len(weights), 1, generator=generator, device=weights.device, dtype=exact)
    block = torch.searchsorted(total, threshold, right=True).clamp(max=total.shape[1] - 1)  # (B, 1)
    before = F.pad(total, (1, 0)).gather(1, block)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK))[:, 0].cumsum(dim=-1, dtype=exact)  # (B, BLOCK)
    at = torch.searchsorted(inside, threshold - before, right=True)
    last = (inside < inside[:, -1:]).sum(dim=-1, keepdim=True)  # rounding must not lead to a token of weight 0
    return (block * BLOCK + torch.minimum(at, last))[:, 0]


@torch.no_grad()
def rollout(
    model: nn.Module | Decoder | RemoteSampler,
    prompts: Sequence[Sequence[int]],
    *,
    group_size: int,
    max_new_tokens: int,
    end_ids: Collection[int],
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    max_rows: int = MAX_ROWS,
    on_progress: Callable[[int], None] | None = None,
) -> list[list[Response]]:
    """Sample `group_size` responses to each prompt (token ids). Returns a list of responses for each prompt, in order.

    A response ends with an end-of-text token or at `max_new_tokens`. Nothing but temperature and top_p shapes the
    distribution. The same seed gives the same responses on the same machine. `max_rows` bounds memory: that many
    responses are sampled at a time. `on_progress` is told how many prompts are done.
    A model is turned into a `Decoder` first where its family allows; whoever samples often from one keeps a Decoder.
    Raises ValueError for settings that cannot be sampled with.
    """
    if group_size < 1 or max_new_tokens < 1 or not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise ValueError(
            "A rollout needs group_size and max_new_tokens of 1 or more, a finite temperature of at least 0 "
            f"and 0 < top_p <= 1; it got {group_size}, {max_new_tokens}, {temperature} and {top_p}."
        )
    if isinstance(model, RemoteSampler):
        return model.respond(
            prompts, group_size=group_size, max_new_tokens=max_new_tokens, end_ids=end_ids, temperature=temperature,
            top_p=top_p, seed=seed, on_progress=on_progress,
        )  # fmt: skip
    sampler = sampling_copy(model)
    generator = torch.Generator(device=sampler.device).manual_seed(seed)
    start_rows = Rows if isinstance(sampler, Decoder) else ModelRows
    # Each module's own mode: in a new adapter the dropout layers train, though the model around them does not.
    training = [] if isinstance(sampler, Decoder) else [module for module in sampler.modules() if module.training]
    step = max(1, max_rows // group_size)
    groups: list[list[Response]] = []
    try:
        for module in training:
            module.training = False
        for start in range(0, len(prompts), step):
            some = prompts[start : start + step]
            rows = start_rows(sampler, some, group_size, max_new_tokens)
            responses = _write(rows, max_new_tokens, end_ids, temperature, top_p, generator)
            groups += [responses[i : i + group_size] for i in range(0, len(responses), group_size)]
            if on_progress:
                on_progress(len(some))
    finally:
        for module in training:
            module.training = True  # also when a reader interrupts
    return groups


def _write(
    rows: Rows | ModelRows,
    max_new_tokens: int,
    end_ids: Collection[int],
    temperature: float,
    top_p: float,
    generator: torch.Generator,
) -> list[Response]:
    logits, device, total = rows.logits, rows.logits.device, len(rows.logits)
    ends = torch.tensor(sorted(end_ids), device=device)
    ids = torch.zeros(total, max_new_tokens, dtype=torch.long, device=device)
    scores = torch.zeros(total, max_new_tokens, device=device)
    lengths = torch.zeros(total, dtype=torch.long, device=device)
    numbers = torch.arange(total, device=device)  # which response each row of the batch is writing
    going = torch.ones(total, dtype=torch.bool, device=device)  # by row; False once it has ended
    finished = torch.zeros(total, dtype=torch.bool, device=device)  # by response
    for at in range(max_new_tokens):
        tokens, logprobs = sample(logits, temperature, top_p, generator)
        ids[numbers, at], scores[numbers, at] = tokens, logprobs
        lengths[numbers] += going
        going = going & ~torch.isin(tokens, ends)
        finished[numbers] = ~going
        left = int(going.sum())
        if left == 0 or at + 1 == max_new_tokens:
            break
        if left <= SHRINK * len(going):
            stay = going.nonzero()[:, 0]
            rows.keep(stay)
            numbers, tokens, going = numbers[stay], tokens[stay], going[stay]
        logits = rows.step(tokens)
    columns = zip(ids.tolist(), scores.tolist(), lengths.tolist(), finished.tolist(), strict=True)
    return [Response(row[:n], logprobs[:n], end) for row, logprobs, n, end in columns]
