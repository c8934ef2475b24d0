"""Several responses to one prompt through a transformers model: the prompt computed once, and no padding."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from helpers.decoder import Decoder, spare_rows
from helpers.models import bare

NAME = "shared_prompts"


@dataclass(frozen=True)
class Layout:
    """Prompts and responses laid end to end in one row of N tokens, each distinct prompt once.

    ids, positions: (N,), the prompts' tokens first; question: (B,), the prompt of each response.
    prompts: (Q, P) and responses: (B, T - 1), True where there is a token: a response's last one is only predicted.
    mask: (B, 1, T - 1, P + T - 1), what each response token looks at: its prompt, and its response so far.
    """

    ids: Tensor
    positions: Tensor
    question: Tensor
    prompts: Tensor
    responses: Tensor
    mask: Tensor

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return int(self.prompts.sum())

    def predictors(self, row: Tensor, step: Tensor) -> Tensor:
        """Where in the row of N stands the token that predicts token `step` of response `row`. (n,) each."""
        prompt_end = self.prompts.sum(dim=1).cumsum(dim=0) - 1
        response_end = self.prompt_tokens + self.responses.sum(dim=1).cumsum(dim=0)
        start = response_end - self.responses.sum(dim=1)
        return torch.where(step == 0, prompt_end[self.question[row]], start[row] + step - 1)


def lay_out(input_ids: Tensor, prompt_lengths: Tensor, lengths: Tensor) -> Layout:
    """The layout of a padded batch. input_ids: (B, L); prompt_lengths, lengths (of the responses): (B,)."""
    numbers: dict[tuple[int, ...], int] = {}
    rows = zip(input_ids.tolist(), prompt_lengths.tolist(), strict=True)
    question = [numbers.setdefault(tuple(row[:length]), len(numbers)) for row, length in rows]
    device = input_ids.device

    def inside(sizes: Tensor) -> Tensor:
        return torch.arange(max(1, int(sizes.max())), device=device) < sizes[:, None]

    prompts = inside(torch.tensor([len(prompt) for prompt in numbers], device=device))
    responses = inside((lengths - 1).clamp(min=0))
    question = torch.tensor(question, device=device)
    row, step = responses.nonzero(as_tuple=True)
    place = prompt_lengths[row] + step
    prompt_ids = torch.tensor([token for prompt in numbers for token in prompt], device=device)
    size = responses.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool, device=device).tril().expand(len(lengths), 1, size, size)
    to_prompt = prompts[question][:, None, None].expand(-1, 1, size, -1)
    return Layout(
        ids=torch.cat([prompt_ids, input_ids[row, place]]),
        positions=torch.cat([prompts.nonzero(as_tuple=True)[1], place]),
        question=question,
        prompts=prompts,
        responses=responses,
        mask=torch.cat([to_prompt, causal], dim=-1),
    )


def spread(x: Tensor, inside: Tensor) -> Tensor:
    """(n, H, D) -> (B, H, T, D) with zeros where `inside` (B, T) is False."""
    return x.new_zeros(*inside.shape, *x.shape[1:]).index_put((inside,), x).transpose(1, 2)


def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, layout=None, **kwargs):
    """Transformers' attention function: as its `sdpa`, or over a `Layout` where the forward pass was given one.

    query: (1, heads, N, D); key, value: (1, key-value heads, N, D). Returns (1, N, heads, D) and no weights.
    """
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, heads, D)
    n, scale = layout.prompt_tokens, kwargs.get("scaling")
    q, prompt_keys, prompt_values = (spread(x[:n], layout.prompts) for x in (query, key, value))
    looked = F.scaled_dot_product_attention(q, prompt_keys, prompt_values, is_causal=True, scale=scale, enable_gqa=True)
    outputs, end = [looked.transpose(1, 2)[layout.prompts]], len(layout.ids)
    if end > n:
        q, keys, values = (spread(x[n:end], layout.responses) for x in (query, key, value))
        keys = torch.cat([prompt_keys[layout.question], keys], dim=2)
        values = torch.cat([prompt_values[layout.question], values], dim=2)
        # Query heads that share a key head stand behind each other, as if they were more queries of that one head.
        shared = q.shape[1] // keys.shape[1]
        q = q.unflatten(1, (-1, shared)).flatten(2, 3)
        looked = F.scaled_dot_product_attention(q, keys, values, layout.mask.repeat(1, 1, shared, 1), scale=scale)
        looked = looked.unflatten(2, (shared, -1)).flatten(1, 2)
        outputs.append(looked.transpose(1, 2)[layout.responses])
    return F.pad(torch.cat(outputs), (0, 0, 0, 0, 0, len(query) - end))[None], None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)  # without a layout, masks are what they were


def packed_states(model: nn.Module, layout: Layout) -> Tensor | None:
    """The last hidden states (N, H) of a layout's tokens, or None if the model's attention cannot be given one."""
    model = bare(model)
    if model.config._attn_implementation == "sdpa" and Decoder.supports(model):
        model.set_attn_implementation(NAME)  # for good: checkpointed layers run again in the backward pass
    if model.config._attn_implementation != NAME:
        return None
    nothing = torch.empty(1, 1, 1, 1, device=layout.ids.device)  # a mask of four dimensions is taken as it is
    more = spare_rows(len(layout.ids), layout.ids.device)  # tokens that nothing looks at
    ids, positions = (F.pad(x, (0, more))[None] for x in (layout.ids, layout.positions))
    return model.get_decoder()(
        input_ids=ids, position_ids=positions, attention_mask=nothing, use_cache=False, layout=layout
    ).last_hidden_state[0]
