"""Token log-probs of completions at the sampling temperature, and the completion mask."""

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from helpers.decoder import spare_rows
from helpers.losses import entropy
from helpers.models import bare
from helpers.packing import lay_out, packed_states

CHUNK = 128  # rows of the vocabulary projection that are held at once: more are no faster


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
    A prompt that rows have in common is computed once, and padding not at all, where the model's attention allows
    (`packing`). The vocabulary projection is computed for completion tokens only, `CHUNK` of them at a time, so that
    B x T x V logits are never held. TRL's `_get_per_token_logps_and_entropies`.
    """
    row, step = mask.nonzero(as_tuple=True)
    place = prompt_lengths[row] + step
    targets = input_ids[row, place]
    lengths = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(dim=1)
    layout = lay_out(input_ids, prompt_lengths, lengths)
    states = packed_states(model, layout)  # (N, H)
    if states is None:
        # Padding stands behind all that is read, and attention looks back only: so no attention mask is needed.
        states = bare(model).get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state[row, place - 1]
    else:
        states = states[layout.predictors(row, step)]  # a token is predicted one place before it stands
    head = bare(model).get_output_embeddings()
    if not with_entropy and type(head) is nn.Linear and head.bias is None and not head.weight.requires_grad:
        weight = head.weight
        if torch.is_autocast_enabled(weight.device.type):
            weight = weight.to(torch.get_autocast_dtype(weight.device.type))
        logprobs, entropies = FrozenHead.apply(states, targets, weight, temperature), None
    else:
        logprobs, entropies = _project(head, states, targets, temperature, with_entropy)

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(mask.shape).index_put((row, step), values)

    return spread(logprobs), spread(entropies) if with_entropy else None


def _project(
    head: nn.Module, states: Tensor, targets: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor]:
    def score(states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(states).float() / temperature  # (n, V)
        logprobs = logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(dim=1)
        return logprobs, entropy(logits) if with_entropy else logprobs

    parts = []
    for some_states, some_targets in zip(states.split(CHUNK), targets.split(CHUNK), strict=True):
        if torch.is_grad_enabled() and len(states) > CHUNK:
            # Logits of one chunk are recomputed for the backward pass instead of being kept.
            parts.append(checkpoint(score, some_states, some_targets, use_reentrant=False))
        else:
            parts.append(score(some_states, some_targets))
    logprobs, entropies = (torch.cat(column) for column in zip(*parts, strict=True))
    return logprobs, entropies


class FrozenHead(torch.autograd.Function):
    """Log-probs of tokens behind a vocabulary projection that does not train, as under LoRA.

    The gradient with respect to a state is (W[token] - sum_v p_v W[v]) / temperature times what comes from above: it
    is formed while the logits are at hand, so they are neither kept nor computed again.
    """

    @staticmethod
    def forward(ctx, states: Tensor, targets: Tensor, weight: Tensor, temperature: float) -> Tensor:
        """states: (n, H); targets: (n,); weight: (V, H). Returns (n,) log-probs, float32."""
        logprobs, slopes, rows = [], [], len(states)
        more = spare_rows(rows, states.device)
        states, targets = F.pad(states, (0, 0, 0, more)), F.pad(targets, (0, more))
        with torch.autocast(states.device.type, enabled=False):
            for some, tokens in zip(states.to(weight.dtype).split(CHUNK), targets.split(CHUNK), strict=True):
                logits = F.linear(some, weight).float().div_(temperature)  # (c, V)
                total = logits.logsumexp(dim=1)
                logprobs.append(logits.gather(1, tokens[:, None])[:, 0] - total)
                if ctx.needs_input_grad[0]:
                    probs = logits.sub_(total[:, None]).exp_().to(weight.dtype)
                    slopes.append((weight[tokens].float() - (probs @ weight).float()) / temperature)
        if slopes:
            ctx.save_for_backward(torch.cat(slopes)[:rows])
            ctx.dtype = states.dtype
        return torch.cat(logprobs)[:rows]

    @staticmethod
    def backward(ctx, grad: Tensor):
        """grad: (n,). Returns (n, H) for the states; nothing else trains."""
        [slopes] = ctx.saved_tensors
        return (grad[:, None] * slopes).to(ctx.dtype), None, None, None
