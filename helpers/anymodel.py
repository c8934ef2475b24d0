"""Sampling from any transformers model through its own forward pass and cache: the decoder's plain twin."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer


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


class ModelRows:
    """The responses being sampled, as `decoder.Rows`: `logits` behind the prompts, then `step` and `keep`.

    Each prompt is computed once, those of one length together, and its keys and values are copied for each response.
    Shorter prompts get empty places on their left, which the mask hides.
    """

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]], copies: int, room: int) -> None:
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
        self.model, self.cache = model, DynamicCache()
        self.cache.layers = [
            PreallocatedLayer(k.repeat_interleave(copies, dim=0), v.repeat_interleave(copies, dim=0), room)
            for k, v in layers
        ]
        self.mask = mask.repeat_interleave(copies, dim=0)  # (B, longest prompt + room), True where there is a token
        self.position = self.mask[:, :longest].sum(dim=1, keepdim=True)
        self.logits = torch.stack(logits).repeat_interleave(copies, dim=0)  # (B, V)

    def step(self, tokens: Tensor) -> Tensor:
        """Write one token to each row. tokens: (B,); returns the logits (B, V) behind it."""
        seen = self.mask[:, : self.cache.get_seq_length() + 1]
        logits = self.model(
            input_ids=tokens[:, None], attention_mask=seen, position_ids=self.position, cache=self.cache, use_cache=True
        ).logits[:, -1]
        self.position = self.position + 1
        return logits

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone: (B',), indices in rising order."""
        self.mask, self.position = self.mask[rows], self.position[rows]
        self.cache.batch_select_indices(rows)
