"""Token log-probs of completions at the sampling temperature, and the completion mask."""

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from helpers.losses import entropy
from helpers.models import bare

CHUNK = 1024  # rows of the vocabulary projection that are held at once


def completion_mask(token_ids: Tensor, end_ids: Collection[int]) -> Tensor:
    """True for every completion token up to and including the first end-of-text token.

    token_ids: (B, T), sampled tokens, with anything behind the end. Returns (B, T), bool.
    The end-of-text token belongs to the completion: a mask that drops it (as `!= pad` does where pad and end share
    an id) never teaches the model to stop. TRL's `completion_mask`.
    """
    is_end = torch.isin(token_ids, torch.tensor(sorted(end_ids), device=token_ids.device))
    ends_before = is_end.cumsum(dim=1) - is_end.long()
    return ends_before == 0


def completion_logprobs(
    model: nn.Module,
    input_ids: Tensor,
    prompt_lengths: Tensor,
    mask: Tensor,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-prob of every completion token under the model at a temperature, in nats.

    input_ids: (B, L), each row a prompt, its completion, then padding on the right; prompt_lengths: (B,);
    mask: (B, T), True where a row has a completion token. Returns (B, T) log-probs and, if asked for, (B, T)
    entropies of the sampling distribution; 0 where the mask is False.
    Padding stands behind all that is read, and attention looks back only: so no attention mask is needed.
    The vocabulary projection is computed for completion tokens only, `CHUNK` of them at a time.
    TRL's `_get_per_token_logps_and_entropies`.
    """
    model = bare(model)
    hidden = model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state  # (B, L, H)
    row, step = mask.nonzero(as_tuple=True)
    place = prompt_lengths[row] + step
    states, targets = hidden[row, place - 1], input_ids[row, place]  # a token is predicted one place before it stands
    head = model.get_output_embeddings()

    def score(states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(states).float() / temperature  # (n, V)
        logprobs = logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(dim=1)
        return logprobs, entropy(logits) if with_entropy else logprobs

    parts = []
    for some_states, some_targets in zip(states.split(CHUNK), targets.split(CHUNK), strict=True):
        if torch.is_grad_enabled() and len(states) > CHUNK:
            # Logits of one chunk are recomputed for the backward pass, so B x T x V of them are never held.
            parts.append(checkpoint(score, some_states, some_targets, use_reentrant=False))
        else:
            parts.append(score(some_states, some_targets))
    logprobs, entropies = (torch.cat(column) for column in zip(*parts, strict=True))

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(mask.shape).index_put((row, step), values)

    return spread(logprobs), spread(entropies) if with_entropy else None
