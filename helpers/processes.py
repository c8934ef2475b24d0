"""Several processes: each samples and computes its share, and all make the same update. The engine is accelerate."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from torch import Tensor, nn

# accelerate would wrap a policy in DistributedDataParallel, which waits for the model's own forward pass in every
# backward pass, as often in each process. Log-probs here go around that forward pass, and a process whose responses
# have no signal computes nothing; so gradients are added up once, when an update's minibatches are through.


def share(items: Sequence[Any], accelerator: Accelerator) -> Sequence[Any]:
    """This process's part of what all have: neighbours stay together, sizes differ by one at the most."""
    number, count = accelerator.process_index, accelerator.num_processes
    return items[number * len(items) // count : (number + 1) * len(items) // count]


def gathered(items: list, accelerator: Accelerator) -> list:
    """The shares of all processes, put together again in their order, in every process."""
    return gather_object(items) if accelerator.num_processes > 1 else items


def add_gradients(weights: Sequence[Tensor], accelerator: Accelerator) -> None:
    """Every weight's gradient becomes the sum over the processes; a weight without one counts as 0."""
    if accelerator.num_processes == 1:
        return
    for weight in weights:
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
    total = accelerator.reduce(torch.cat([weight.grad.flatten() for weight in weights]), "sum")
    for weight, part in zip(weights, total.split([weight.numel() for weight in weights]), strict=True):
        weight.grad = part.view_as(weight)


def ready(
    policy: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Policy and optimiser on this process's device; what trains is what it is in the first process."""
    policy = accelerator.prepare_model(policy, evaluation_mode=True)  # that is, without DistributedDataParallel
    if accelerator.num_processes > 1:
        with torch.no_grad():
            for weight in policy.parameters():
                if weight.requires_grad:
                    broadcast(weight.data)
    return policy, accelerator.prepare_optimizer(optimizer)


def in_any(flag: bool, accelerator: Accelerator) -> bool:
    """Whether it is so in any process."""
    return any(gathered([flag], accelerator))
