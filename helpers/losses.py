"""From rewards and log-probs to one number to minimise: advantage, ratio, clip, KL, entropy, aggregation.

Shapes: Q questions, G completions in a group, B rows (completions) in a minibatch, T token positions.
A completion mask is True (or 1) on a completion's own tokens, its end-of-text token among them, else False.
Log-probs are natural logarithms, at the temperature the completions were sampled with.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")
IMPORTANCE_LEVELS = ("token", "sequence")
ADVANTAGE_SCALES = ("group", "batch", "none", "mean")
CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}.")


def group_advantages(rewards: Tensor, *, scale: str = "group", std_ddof: int = 1, eps: float = 1e-4) -> Tensor:
    """How much better a completion did than its group: A = (r - mean of the group) / (std + eps).

    rewards: (Q, G), a row a question. Returns (Q, G); a group of equal rewards gets exactly 0.
    scale: divide by the std of the "group", by that of the whole "batch", by nothing ("none", Dr. GRPO), or by the
    group's "mean" (MaxRL, made for rewards of 0 and 1): the rarer the success, the more each one counts.
    std_ddof: 1, the sample std (`torch.std`), turns rewards [1, 0] into +-0.707; 0 (`np.std`) into +-1.
    Raises ValueError unless rewards are finite, of shape (Q, G), with G at least 2, and for "mean" not negative.
    Source: DeepSeekMath (arXiv 2402.03300) section 4.1.2; TRL's `scale_rewards`; "mean": arXiv 2602.02710, algorithm 1.
    """
    _check_choice("scale", scale, ADVANTAGE_SCALES)
    if std_ddof not in (0, 1):
        raise ValueError(f"std_ddof must be 0 (population) or 1 (sample), not {std_ddof!r}.")
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be (questions, completions >= 2), not {tuple(rewards.shape)}.")
    if not torch.isfinite(rewards).all():
        raise ValueError("rewards must be finite: give every completion a number.")
    rewards = rewards if rewards.is_floating_point() else rewards.float()
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    # The mean of equal numbers can miss them by a rounding error, which dividing by eps would blow up.
    all_equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    advantages = advantages.masked_fill(all_equal, 0.0)
    if scale == "group":
        advantages = advantages / (rewards.std(dim=1, correction=std_ddof, keepdim=True) + eps)
    elif scale == "batch":
        advantages = advantages / (rewards.std(correction=std_ddof) + eps)
    elif scale == "mean":
        if (rewards < 0).any():
            raise ValueError("scale is mean: give no completion a reward below 0, or set it to group.")
        advantages = advantages / (rewards.mean(dim=1, keepdim=True) + eps)
    return advantages


def step_advantages(
    right: Sequence[Sequence[float]], *, scale: str = "group", std_ddof: int = 1, eps: float = 1e-4
) -> list[list[float]]:
    """A group's advantages step by step: at each step, of the completions that got so far, who goes on rightly?

    right: for each completion of one question the reward of its steps, 1 or 0, up to its first mistake: 1, 1, 0.
    Returns the same lists with advantages in them: `group_advantages` of each step over the completions that reach
    it, 0 where one alone does. scale: any but "batch". Raises ValueError for another scale.
    Source: process supervision (DeepSeekMath, arXiv 2402.03300, section 4.1.3), with the completions that are at the
    same step, instead of all steps alike, as the baseline; compare VinePPO (arXiv 2410.01679).
    """
    _check_choice("scale", scale, ("group", "none", "mean"))
    advantages: list[list[float]] = [[0.0] * len(steps) for steps in right]
    for step in range(max(map(len, right), default=0)):
        here = [i for i, steps in enumerate(right) if len(steps) > step]
        if len(here) > 1:
            rewards = torch.tensor([[float(right[i][step]) for i in here]])
            found = group_advantages(rewards, scale=scale, std_ddof=std_ddof, eps=eps)[0].tolist()
            for i, advantage in zip(here, found, strict=True):
                advantages[i][step] = advantage
    return advantages


def importance_ratio(new: Tensor, old: Tensor, mask: Tensor, level: str = "token") -> Tensor:
    """How much likelier a completion is now than under the policy that sampled it: r = pi / pi_old.

    new, old, mask: (B, T). Padding may hold anything; its ratio is 1, without a gradient.
    level "token": (B, T), r_t = exp(new_t - old_t).
    level "sequence": (B, 1), s = exp(mean of new_t - old_t over the row's tokens), whose gradient they share.
    `old` is a constant: no gradient flows into it, so old = new is the first update: r = 1, with a gradient.
    Raises ValueError for another level.
    Source: PPO (arXiv 1707.06347), r_t; GSPO (arXiv 2507.18071), s_i; TRL's `importance_sampling_level`.
    """
    _check_choice("level", level, IMPORTANCE_LEVELS)
    mask = mask.bool()
    log_ratio = (new - old.detach()).masked_fill(~mask, 0.0)
    if level == "sequence":
        log_ratio = log_ratio.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return log_ratio.exp()


def _as_column(advantages: Tensor) -> Tensor:
    return advantages.unsqueeze(1) if advantages.dim() == 1 else advantages


def clipped_surrogate(ratio: Tensor, advantages: Tensor, epsilon_low: float, epsilon_high: float) -> Tensor:
    """PPO's token loss, -min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A), for both signs of A.

    The gradient is 0 where A > 0 and r > 1 + epsilon_high, and where A < 0 and r < 1 - epsilon_low: going
    further wins nothing. In the other two corners it stays, and pulls r back.

    ratio: (B, T) or (B, 1); advantages: (B,), or of a shape that fits the ratio's. Returns the ratio's shape.
    Source: PPO (arXiv 1707.06347) eq. 7; two epsilons: DAPO's clip-higher (arXiv 2503.14476).
    """
    advantages = _as_column(advantages)
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    return -torch.min(ratio * advantages, clipped * advantages)


def cispo_surrogate(ratio: Tensor, new: Tensor, advantages: Tensor, epsilon_high: float) -> Tensor:
    """CISPO's token loss, -sg(min(r, epsilon_high)) A log pi: weights are capped, no gradient is lost.

    epsilon_high caps r itself, not its distance from 1: with PPO's 0.2 nearly every weight would be 0.2.
    TRL advises 5, after ScaleRL (arXiv 2510.13786).

    ratio: (B, T) or (B, 1); new: (B, T) log-probs; advantages: (B,), or of a shape that fits. Returns (B, T).
    Source: MiniMax-M1 (arXiv 2506.13585), CISPO, as TRL's loss_type "cispo" computes it.
    """
    return -ratio.clamp(max=epsilon_high).detach() * _as_column(advantages) * new


def sampler_weights(
    old: Tensor, sampler: Tensor, mask: Tensor, mode: str = "sequence_mask", cap: float = 3.0
) -> Tensor:
    """What a token's loss is multiplied by where another program sampled it: pi_old / pi_sampler, kept below a cap.

    old, sampler, mask: (B, T); log-probs of the trainer before the update and of the program that sampled. A token
    whose sampler log-prob is NaN counts as agreed on. mode: "token" takes each token's own ratio, (B, T); "sequence"
    the product over the row, (B, 1); "truncate" cuts what is above the cap down to it, "mask" gives it weight 0.
    Without gradient. Raises ValueError for another mode.
    Source: truncated importance sampling, as TRL's `vllm_importance_sampling_mode` computes it.
    """
    _check_choice("correction", mode, CORRECTIONS)
    difference = (old - sampler).detach().masked_fill(~mask.bool(), 0.0).nan_to_num(nan=0.0)
    level, limit = mode.split("_")
    if level == "sequence":
        difference = difference.sum(dim=1, keepdim=True)
    weights = difference.exp()
    return weights.clamp(max=cap) if limit == "truncate" else weights.masked_fill(weights > cap, 0.0)


def kl_k3(new: Tensor, reference: Tensor) -> Tensor:
    """KL(pi || pi_ref) estimated from the sampled token: exp(d) - d - 1, where d = log pi_ref - log pi.

    new, reference: log-probs of one shape, which is returned, in nats. Never negative; 0 where both agree.
    `reference` is a constant: no gradient flows into it.
    Source: J. Schulman's note "Approximating KL divergence", k3; DeepSeekMath (arXiv 2402.03300) eq. 4.
    """
    d = reference.detach() - new
    return d.exp() - d - 1


def entropy(logits: Tensor) -> Tensor:
    """How undecided the policy is at each position: -(sum over the vocabulary of p log p), in nats.

    logits: (..., V), divided by the sampling temperature; -inf marks a token that cannot be drawn.
    Returns (...), between 0 and log V. Source: TRL's `entropy_from_logits`.
    """
    log_p = logits.log_softmax(dim=-1)
    # p log p goes to 0 with p, but 0 * -inf is NaN.
    return -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(dim=-1)


def aggregate(
    token_loss: Tensor,
    mask: Tensor,
    loss_type: str,
    *,
    rows: float | None = None,
    tokens: float | None = None,
    max_length: int | None = None,
) -> Tensor:
    """From a loss a token to one number. Loss types differ in the divisor, hence in what a long row weighs.

    grpo         sum over rows of (the row's mean over its tokens) / rows
    bnpo         sum over all tokens / tokens, those of this minibatch
    dapo, cispo  sum over all tokens / tokens, those of all minibatches of the optimiser step
    dr_grpo      sum over all tokens / (rows * max_length), a divisor that no completion's length changes

    token_loss: (B, T), or (B, 1), a value a row; mask: (B, T). Padding may hold anything. Returns a scalar.
    rows, tokens: the counts to divide by; left out, those of this mask (a row without tokens is a row, too).
    Pass those of the whole where the tensors are a part of it, because rows without signal were left out
    or gradients are accumulated: the parts' losses and gradients then add up to the whole's. The whole is the
    minibatch for bnpo, the optimiser step for dapo and cispo; with the same `tokens` they are one formula.
    If P processes average their gradients, pass the count over all of them divided by P.
    max_length: in tokens, the longest completion allowed (not the longest here). Only dr_grpo reads it.
    Raises ValueError for an unknown loss_type and for dr_grpo without max_length.
    Source: DeepSeekMath (arXiv 2402.03300) eq. 3, DAPO (arXiv 2503.14476), Dr. GRPO (arXiv 2503.20783);
    TRL's `loss_type`.
    """
    _check_choice("loss_type", loss_type, LOSS_TYPES)
    mask = mask.bool()
    token_loss = torch.where(mask, token_loss, 0.0)
    lengths = mask.sum(dim=1)
    rows = len(mask) if rows is None else rows
    tokens = max(1, lengths.sum() if tokens is None else tokens)
    if loss_type == "grpo":
        return (token_loss.sum(dim=1) / lengths.clamp(min=1)).sum() / rows
    if loss_type == "dr_grpo":
        if max_length is None:
            raise ValueError("dr_grpo needs max_length: pass the longest completion allowed, in tokens.")
        return token_loss.sum() / (rows * max_length)
    return token_loss.sum() / tokens


@dataclass(frozen=True)
class LossConfig:
    """The choices that turn log-probs and advantages into a loss.

    loss_type: see `aggregate`; "cispo" also takes `cispo_surrogate` in place of `clipped_surrogate`.
    importance: see `importance_ratio`; "sequence" is GSPO (with loss_type "grpo").
    epsilon_low, epsilon_high: the ratio's room below and above 1; for cispo epsilon_high is the cap, say 5.
    beta: weight of the KL to the reference model. entropy_coefficient: weight of the entropy bonus.
    kl_correction: multiply the KL by the ratio, TRL 1.16's default (`use_bias_correction_kl`), not GRPO's.
    correction, correction_cap: see `sampler_weights`, for a sampler that is another program than the trainer; none
    leaves it out.
    Raises ValueError for a name that is not allowed or a number below 0.
    """

    loss_type: str = "grpo"
    importance: str = "token"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    beta: float = 0.0
    entropy_coefficient: float = 0.0
    kl_correction: bool = False
    correction: str | None = None
    correction_cap: float = 3.0

    def __post_init__(self) -> None:
        _check_choice("loss_type", self.loss_type, LOSS_TYPES)
        _check_choice("importance", self.importance, IMPORTANCE_LEVELS)
        _check_choice("correction", self.correction or CORRECTIONS[0], CORRECTIONS)
        for name in ("epsilon_low", "epsilon_high", "beta", "entropy_coefficient", "correction_cap"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and value >= 0):
                raise ValueError(f"{name} must be a number of at least 0, not {value!r}.")


def policy_loss(
    new: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    config: LossConfig,
    *,
    reference: Tensor | None = None,
    sampler: Tensor | None = None,
    token_entropy: Tensor | None = None,
    rows: float | None = None,
    tokens: float | None = None,
    max_length: int | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The whole loss: aggregate(surrogate + beta KL) - entropy_coefficient * mean token entropy.

    new, old, reference, sampler: (B, T) log-probs under the policy, the policy before this buffer's updates, the
    reference model, and as the sampler itself gave them, which only `correction` reads.
    advantages: (B,), or (B, T) where they differ within a row. mask, token_entropy (from `entropy`): (B, T).
    Padding may hold anything, NaN included.
    rows, tokens, max_length: see `aggregate`. The entropy bonus is a mean over `tokens` for every loss type.
    Rows with A = 0 may be left out only while beta and entropy_coefficient are 0: those act on them too.

    Returns the scalar loss, and floats about these tensors: "clip_share_low" (r < 1 - epsilon_low, A < 0),
    "clip_share_high" (r > 1 + epsilon_high, A > 0; cispo: r > epsilon_high), "clip_share" (their sum),
    "ratio_mean", "ratio_min", "ratio_max", all over the mask's tokens, or over rows if the ratio is a row's;
    "correction", the mean of `sampler_weights`, if they are used,
    "kl" if there is a reference and "entropy" if there is a token_entropy, over the mask's tokens.
    Raises ValueError if shapes differ, beta lacks a reference, entropy_coefficient a token_entropy or correction a
    sampler, and for advantages of tokens beside a ratio of whole rows.
    Source: TRL 1.16's `GRPOTrainer._compute_loss`.
    """
    if config.beta > 0 and reference is None:
        raise ValueError("beta is above 0: pass the reference model's log-probs, or set it to 0.")
    if config.entropy_coefficient > 0 and token_entropy is None:
        raise ValueError("entropy_coefficient is above 0: pass token_entropy, or set it to 0.")
    if config.correction and sampler is None:
        raise ValueError("There is a correction: pass the sampler's log-probs, or set it to none.")
    others = {"old": old, "mask": mask, "reference": reference, "sampler": sampler, "token_entropy": token_entropy}
    for name, tensor in others.items():
        if tensor is not None and tensor.shape != new.shape:
            raise ValueError(f"{name} must have new's shape {tuple(new.shape)}, not {tuple(tensor.shape)}.")
    if advantages.shape not in (new.shape[:1], new.shape):
        shapes = f"({len(new)},) or {tuple(new.shape)}"
        raise ValueError(f"advantages must have shape {shapes}, not {tuple(advantages.shape)}.")
    if advantages.dim() == 2 and config.importance == "sequence":
        raise ValueError("importance is sequence, one ratio a row: give each row one advantage, or set it to token.")

    mask = mask.bool()
    advantages = advantages if advantages.dim() == 1 else advantages.masked_fill(~mask, 0.0)
    new = new.masked_fill(~mask, 0.0)  # before anything is computed: a NaN times a gradient of 0 is still NaN
    ratio = importance_ratio(new, old, mask, config.importance)
    if config.loss_type == "cispo":
        token_loss = cispo_surrogate(ratio, new, advantages, config.epsilon_high)
    else:
        token_loss = clipped_surrogate(ratio, advantages, config.epsilon_low, config.epsilon_high)
    stats = _ratio_stats(ratio.detach(), advantages, mask, config)

    if config.correction:
        correction = sampler_weights(old, sampler, mask, config.correction, config.correction_cap)
        token_loss = token_loss * correction
        stats["correction"] = aggregate(correction.expand_as(new), mask, "bnpo").item()

    if reference is not None:
        kl = kl_k3(new, reference.masked_fill(~mask, 0.0))
        kl = kl * ratio if config.kl_correction else kl
        stats["kl"] = aggregate(kl.detach(), mask, "bnpo").item()
        if config.beta > 0:
            token_loss = token_loss + config.beta * kl
    loss = aggregate(token_loss, mask, config.loss_type, rows=rows, tokens=tokens, max_length=max_length)

    if token_entropy is not None:
        stats["entropy"] = aggregate(token_entropy.detach(), mask, "bnpo").item()
        if config.entropy_coefficient > 0:
            loss = loss - config.entropy_coefficient * aggregate(token_entropy, mask, "bnpo", tokens=tokens)
    return loss, stats


def _ratio_stats(ratio: Tensor, advantages: Tensor, mask: Tensor, config: LossConfig) -> dict[str, float]:
    if config.loss_type == "cispo":
        lowest, highest = 0.0, config.epsilon_high  # a cap, no floor
    else:
        lowest, highest = 1 - config.epsilon_low, 1 + config.epsilon_high
    low = (ratio < lowest) & _as_column(advantages < 0)
    high = (ratio > highest) & _as_column(advantages > 0)
    # A row's ratio counts once, as in TRL; unlike there, not if the row has no tokens.
    counted = mask if config.importance == "token" else mask.any(dim=1, keepdim=True)
    seen = ratio[counted] if counted.any() else ratio.new_ones(1)
    low_share, high_share = ((side & counted).sum().item() / seen.numel() for side in (low, high))
    return {
        "clip_share": low_share + high_share,
        "clip_share_low": low_share,
        "clip_share_high": high_share,
        "ratio_mean": seen.mean().item(),
        "ratio_min": seen.min().item(),
        "ratio_max": seen.max().item(),
    }
