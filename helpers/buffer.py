"""The memory buffer: what a training step needs of each response, stored without padding."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

LOGPROBS = ("old_logprobs", "reference_logprobs", "sampler_logprobs")  # of an experience and of a batch
PER_TOKEN = (*LOGPROBS, "token_advantages")  # of an experience


@dataclass(frozen=True)
class Experience:
    """One response and what was learned of it. The log-probs, in nats: (T,), or None where nothing needs them.

    token_advantages: (T,), where the advantage differs within the response; they then stand in for `advantage`.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    advantage: float
    old_logprobs: Tensor | None = None
    reference_logprobs: Tensor | None = None
    sampler_logprobs: Tensor | None = None
    token_advantages: Tensor | None = None

    def __post_init__(self) -> None:
        for name in PER_TOKEN:
            values = getattr(self, name)
            if values is not None and values.shape != (len(self.response_ids),):
                raise ValueError(
                    f"{name} needs one value for each of the {len(self.response_ids)} response tokens, "
                    f"not shape {tuple(values.shape)}."
                )

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def has_signal(self) -> bool:
        """Whether an advantage in it is not 0."""
        return self.advantage != 0 if self.token_advantages is None else bool(self.token_advantages.any())


@dataclass(frozen=True)
class Batch:
    """Experiences side by side: prompt, response, then padding on the right.

    input_ids: (B, L); prompt_lengths: (B,); mask: (B, T), True for response tokens; advantages: (B,), or (B, T)
    where they differ within a response;
    old_logprobs, reference_logprobs, sampler_logprobs: (B, T) with 0 in the padding, or None.
    """

    input_ids: Tensor
    prompt_lengths: Tensor
    mask: Tensor
    advantages: Tensor
    old_logprobs: Tensor | None
    reference_logprobs: Tensor | None
    sampler_logprobs: Tensor | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device."""
        return replace(self, **{k: v.to(device) for k, v in vars(self).items() if v is not None})


def pad(rows: Sequence[Tensor], value: float = 0) -> Tensor:
    """Tensors of shape (T_i,) as one of (B, longest T_i), filled up on the right with `value`."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


def collate(experiences: Sequence[Experience], pad_id: int = 0) -> Batch:
    """Put padding back, just as much as this minibatch needs. `pad_id` may be any token: nothing ever reads it.

    Raises ValueError for no experiences, and where some have log-probs, or advantages of tokens, and others have none.
    """
    if not experiences:
        raise ValueError("A minibatch needs 1 experience or more.")
    responses = [len(e.response_ids) for e in experiences]

    def column(name: str) -> Tensor | None:
        values = [getattr(e, name) for e in experiences]
        if any(v is None for v in values) and any(v is not None for v in values):
            raise ValueError(f"Give all experiences of a minibatch {name}, or none of them.")
        return None if values[0] is None else pad(values)

    by_token = column("token_advantages")
    return Batch(
        input_ids=pad([torch.tensor(e.prompt_ids + e.response_ids) for e in experiences], pad_id),
        prompt_lengths=torch.tensor([len(e.prompt_ids) for e in experiences]),
        mask=torch.arange(max(responses)) < torch.tensor(responses)[:, None],
        advantages=torch.tensor([e.advantage for e in experiences]) if by_token is None else by_token,
        **{name: column(name) for name in LOGPROBS},
    )


class Buffer:
    """Experiences of one or more rollouts, until it is full; then random minibatches of them."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"A buffer needs room for 1 experience or more, not {capacity}.")
        self.capacity = capacity
        self.experiences: list[Experience] = []

    def __len__(self) -> int:
        return len(self.experiences)

    @property
    def full(self) -> bool:
        """Whether it holds as many experiences as it was made for."""
        return len(self) >= self.capacity

    def add(self, experiences: Sequence[Experience]) -> None:
        """Store experiences. A whole rollout is kept, even if it goes beyond the capacity: groups are not torn."""
        self.experiences.extend(experiences)

    def minibatches(self, size: int, seed: int) -> list[list[Experience]]:
        """All experiences in random order, in lists of `size`; the last may be shorter.

        Raises ValueError for a size below 1.
        """
        if size < 1:
            raise ValueError(f"A minibatch needs room for 1 experience or more, not {size}.")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        return [[self.experiences[i] for i in order[at : at + size]] for at in range(0, len(self), size)]
