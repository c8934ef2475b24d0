"""Losses and gradients against TRL's own code, and against values worked out by hand."""

import ast
import inspect
import math
from collections import defaultdict
from textwrap import dedent
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad
from torch.testing import assert_close
from trl.trainer import grpo_trainer as trl_module
from trl.trainer.grpo_trainer import GRPOTrainer

from helpers.losses import (
    ADVANTAGE_SCALES,
    CORRECTIONS,
    IMPORTANCE_LEVELS,
    LOSS_TYPES,
    LossConfig,
    aggregate,
    cispo_surrogate,
    clipped_surrogate,
    entropy,
    group_advantages,
    importance_ratio,
    kl_k3,
    policy_loss,
    sampler_weights,
    step_advantages,
)

torch.set_num_threads(1)

MAX_LENGTH = 9  # of a completion; the batches below are narrower
LENGTHS = (7, 1, 4, 0, 6, 1, 3, 7)  # tokens a row: one row without any, two of one token
VOCABULARY = 11
EXACT = {"rtol": 1e-9, "atol": 1e-9}  # float64: far below the 1e-5 asked for


def make_batch(seed: int = 0) -> SimpleNamespace:
    """Eight off-policy rows; `new` and `token_entropy` come from `logits`, the leaf of the gradients."""
    generator = torch.Generator().manual_seed(seed)
    rows, width = len(LENGTHS), max(LENGTHS)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logits = normal(rows, width, VOCABULARY).requires_grad_()
    ids = torch.randint(VOCABULARY, (rows, width, 1), generator=generator)
    new = logits.log_softmax(dim=-1).gather(-1, ids).squeeze(-1)
    # Off-policy by the row as well as by the token: a row's mean log-ratio must leave the clip range, too.
    old = new.detach() + 0.3 * normal(rows, width) + 0.4 * normal(rows, 1)
    reference = new.detach() + 0.3 * normal(rows, width)
    advantages = group_advantages(normal(2, rows // 2)).flatten()
    mask = torch.arange(width) < torch.tensor(LENGTHS).unsqueeze(1)
    sampler = old + 0.4 * normal(rows, width)
    return SimpleNamespace(
        logits=logits,
        new=new,
        old=old,
        reference=reference,
        sampler=sampler,
        advantages=advantages,
        mask=mask,
        token_entropy=entropy(logits),
    )


def take(batch: SimpleNamespace, rows: slice | Tensor) -> SimpleNamespace:
    return SimpleNamespace(**{name: tensor[rows] for name, tensor in vars(batch).items()})


def our_loss(batch: SimpleNamespace, config: LossConfig, **totals: float) -> tuple[Tensor, dict[str, float]]:
    return policy_loss(
        batch.new,
        batch.old,
        batch.advantages,
        batch.mask,
        config,
        reference=batch.reference,
        sampler=batch.sampler,
        token_entropy=batch.token_entropy,
        max_length=MAX_LENGTH,
        **totals,
    )


def trl_loss(
    batch: SimpleNamespace, config: LossConfig, *, tokens: int | None = None, minibatches: int = 1
) -> tuple[Tensor, dict[str, float]]:
    """TRL's own `_compute_loss`, on a stand-in that has the attributes it reads and returns our log-probs.

    tokens: those of all the `minibatches` that one optimiser step accumulates.
    """
    metrics = {"train": defaultdict(list)}
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (batch.new, batch.token_entropy, None),
        _metrics=metrics,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            num_processes=1, sync_gradients=True, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        args=SimpleNamespace(delta=None, steps_per_generation=minibatches, use_bias_correction_kl=config.kl_correction),
        current_gradient_accumulation_steps=minibatches,
        loss_type=config.loss_type,
        importance_sampling_level=config.importance,
        epsilon_low=config.epsilon_low,
        epsilon_high=config.epsilon_high,
        beta=config.beta,
        entropy_coef=config.entropy_coefficient,
        _entropy_bonus_enabled=config.entropy_coefficient != 0.0,
        use_adaptive_entropy=False,
        max_completion_length=MAX_LENGTH,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=config.correction is not None,
        vllm_importance_sampling_correction=True,
    )
    completion_mask = batch.mask.long()
    prompt = torch.ones(len(completion_mask), 1, dtype=torch.long)
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": prompt,
        "completion_ids": completion_mask,
        "completion_mask": completion_mask,
        "advantages": batch.advantages,
        "old_per_token_logps": batch.old,
        "ref_per_token_logps": batch.reference,
        "num_items_in_batch": completion_mask.sum() if tokens is None else torch.tensor(tokens),
    }
    if config.correction:
        inputs["importance_sampling_ratio"] = trl_sampler_weights(batch, config)
    loss = GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
    return loss, {name: values[0] for name, values in metrics["train"].items()}


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(loss, of, retain_graph=True)[0]


# --- parity with TRL ---


@pytest.mark.parametrize("epsilons", [(0.2, 0.2), (0.1, 0.28), (0.3, 1.2)])
@pytest.mark.parametrize("beta, kl_correction", [(0.0, False), (0.04, False), (0.04, True)])
@pytest.mark.parametrize("importance", IMPORTANCE_LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_and_gradient_equal_trl(loss_type, importance, beta, kl_correction, epsilons):
    batch = make_batch()
    config = LossConfig(loss_type, importance, *epsilons, beta=beta, kl_correction=kl_correction)
    ours, theirs = our_loss(batch, config)[0], trl_loss(batch, config)[0]
    assert_close(ours, theirs, **EXACT)
    for leaf in (batch.new, batch.logits):
        assert_close(gradient(ours, leaf), gradient(theirs, leaf), **EXACT)
    assert gradient(ours, batch.logits).abs().max() > 1e-3


@pytest.mark.parametrize("epsilons", [(0.2, 0.2), (0.1, 0.28), (0.3, 1.2)])
@pytest.mark.parametrize("importance", IMPORTANCE_LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_stats_equal_trl(loss_type, importance, epsilons):
    batch = make_batch()
    if importance == "sequence":  # TRL counts the ratio of a row without tokens, 1; we do not
        batch = take(batch, batch.mask.any(dim=1))
    config = LossConfig(loss_type, importance, *epsilons, beta=0.04)
    stats, metrics = our_loss(batch, config)[1], trl_loss(batch, config)[1]
    names = {"entropy": "entropy", "kl": "kl"}
    if loss_type == "cispo":
        names |= {"clip_share": "cispo_clip_ratio", "clip_share_high": "cispo_clip_ratio"}
    else:
        names |= {"clip_share_low": "clip_ratio/low_mean", "clip_share_high": "clip_ratio/high_mean"}
        names |= {"clip_share": "clip_ratio/region_mean"}
    for ours, theirs in names.items():
        assert stats[ours] == pytest.approx(metrics[theirs], abs=1e-6), ours


@pytest.mark.parametrize("epsilons", [(0.2, 0.2), (0.1, 0.28), (0.3, 1.2)])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_advantages_of_tokens_equal_trl(loss_type, epsilons):
    batch = make_batch()
    whole = our_loss(batch, config := LossConfig(loss_type, "token", *epsilons, beta=0.04))[0]
    by_row = batch.advantages.unsqueeze(1).expand_as(batch.new)
    batch.advantages = by_row.clone()
    assert our_loss(batch, config)[0] == whole  # the same one at every token of a row
    batch.advantages = by_row * torch.randn(by_row.shape, generator=torch.Generator().manual_seed(3)).double()
    ours, stats = our_loss(batch, config)
    theirs, metrics = trl_loss(batch, config)
    assert_close(ours, theirs, **EXACT)
    assert_close(gradient(ours, batch.logits), gradient(theirs, batch.logits), **EXACT)
    share = "cispo_clip_ratio" if loss_type == "cispo" else "clip_ratio/region_mean"
    assert stats["clip_share"] == pytest.approx(metrics[share], abs=1e-6) and stats["clip_share"] > 0
    batch.advantages = batch.advantages.masked_fill(~batch.mask, torch.nan)  # in the padding
    assert our_loss(batch, config)[0] == ours
    assert_close(gradient(our_loss(batch, config)[0], batch.logits), gradient(ours, batch.logits), **EXACT)


@pytest.mark.parametrize("importance", IMPORTANCE_LEVELS)
def test_the_parity_batch_is_clipped_on_both_sides(importance):
    _, stats = our_loss(make_batch(), LossConfig(importance=importance))
    assert stats["clip_share_low"] > 0.04 and stats["clip_share_high"] > 0.04 and stats["clip_share"] < 0.9


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_entropy_bonus_equals_trl(loss_type):
    batch = make_batch()
    config = LossConfig(loss_type, entropy_coefficient=0.1)
    ours, theirs = our_loss(batch, config)[0], trl_loss(batch, config)[0]
    assert_close(ours, theirs, **EXACT)
    assert_close(gradient(ours, batch.logits), gradient(theirs, batch.logits), **EXACT)
    without = our_loss(batch, LossConfig(loss_type))[0]
    assert ours < without


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "cispo"])  # TRL's bnpo never sees the whole
def test_accumulated_minibatches_equal_trl(loss_type):
    batch = make_batch()
    config = LossConfig(loss_type, beta=0.04)
    rows, tokens = batch.mask.shape[0], int(batch.mask.sum())
    halves = [take(batch, slice(0, 4)), take(batch, slice(4, 8))]
    ours = sum(our_loss(half, config, rows=rows, tokens=tokens)[0] for half in halves)
    theirs = sum(trl_loss(half, config, tokens=tokens, minibatches=2)[0] for half in halves)
    assert_close(ours, theirs, **EXACT)
    assert_close(gradient(ours, batch.logits), gradient(theirs, batch.logits), **EXACT)


def trl_lines(test: str, name: str, **scope):
    """TRL's own lines: they stand in the middle of a long method, from which they are cut out and run.

    test: of the if statement that they stand under; name: of the variable that they make, which is returned.
    """
    method = ast.parse(dedent(inspect.getsource(GRPOTrainer._generate_and_score_completions)))
    branches = [n for n in ast.walk(method) if isinstance(n, ast.If) and ast.unparse(n.test) == test]
    (branch,) = (b for b in branches if f"{name} =" in ast.unparse(b))
    exec(compile(ast.Module(branch.body, []), "trl", "exec"), scope)
    return scope[name]


def trl_sampler_weights(batch: SimpleNamespace, config: LossConfig) -> Tensor:
    return trl_lines(
        "self.use_vllm and self.vllm_importance_sampling_correction",
        "vllm_importance_sampling_ratio",
        **vars(trl_module),
        self=SimpleNamespace(
            vllm_importance_sampling_mode=config.correction,
            vllm_importance_sampling_clip_max=config.correction_cap,
            vllm_importance_sampling_clip_min=None,
        ),
        old_per_token_logps=batch.old,
        sampling_per_token_logps=batch.sampler,
        completion_mask=batch.mask.long(),
        tool_mask=None,
    )


def trl_advantages(rewards: Tensor, scale: str) -> Tensor:
    scope = dict(
        vars(trl_module),
        self=SimpleNamespace(scale_rewards=scale, reward_weights=torch.ones(1, dtype=rewards.dtype)),
        rewards_per_func=rewards.reshape(-1, 1),
        unscorable_mask=torch.zeros(rewards.numel(), dtype=torch.bool),
        num_generations=rewards.shape[1],
        device=rewards.device,
    )
    test = "self.multi_objective_aggregation == 'sum_then_normalize'"
    return trl_lines(test, "advantages", **scope).reshape(rewards.shape)


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("cap", [1.2, 3.0])
@pytest.mark.parametrize("mode", CORRECTIONS)
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "cispo"])
def test_the_correction_for_another_sampler_equals_trl(loss_type, mode, cap, beta):
    batch = make_batch()
    config = LossConfig(loss_type, beta=beta, correction=mode, correction_cap=cap)
    (ours, stats), (theirs, _) = our_loss(batch, config), trl_loss(batch, config)
    assert_close(ours, theirs, **EXACT)
    assert_close(gradient(ours, batch.logits), gradient(theirs, batch.logits), **EXACT)
    weights = sampler_weights(batch.old, batch.sampler, batch.mask, mode, cap)
    assert_close(weights, trl_sampler_weights(batch, config), **EXACT)
    assert (weights != 1).any() and stats["correction"] != 1
    without = our_loss(batch, LossConfig(loss_type, beta=beta))[0]
    assert abs(ours - without) > 1e-4


def test_the_correction_by_hand():
    mask = torch.tensor([[True, True, False]])
    old, sampler = torch.log(torch.tensor([[0.5, 0.8, 1.0]])), torch.log(torch.tensor([[0.25, 0.1, 0.1]]))  # 2, 8
    expected = {
        "token_truncate": [[2.0, 3.0, 1.0]],
        "token_mask": [[2.0, 0.0, 1.0]],
        "sequence_truncate": [[3.0]],
        "sequence_mask": [[0.0]],
    }
    for mode, weights in expected.items():
        assert_close(sampler_weights(old, sampler, mask, mode), torch.tensor(weights))
    unknown = torch.tensor([[math.nan, math.nan, 0.0]])  # a server may leave log-probs out
    assert_close(sampler_weights(old, unknown, mask, "token_mask"), torch.ones(1, 3))
    assert_close(sampler_weights(old, sampler, mask, "sequence_mask", cap=20.0), torch.tensor([[16.0]]))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_equal_trl(scale):
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(5, 6, generator=generator, dtype=torch.float64)
    rewards[1] = 1.0  # a group without signal
    rewards[2] = torch.tensor([0.0, 0.15, 0.15, 1.0, 1.0, 0.0])
    # TRL computes n / (n - 1) in float32, whatever the rewards are.
    assert_close(group_advantages(rewards, scale=scale), trl_advantages(rewards, scale), rtol=0, atol=1e-6)


# --- advantages ---


@pytest.mark.parametrize("std_ddof, size", [(1, 1 / math.sqrt(2)), (0, 1.0)])
def test_a_right_and_a_wrong_answer_by_hand(std_ddof, size):
    # Rewards of 1 and -1: mean 0, sample std sqrt(2), population std 1.
    advantages = group_advantages(torch.tensor([[1.0, -1.0]]), std_ddof=std_ddof)
    assert_close(advantages, torch.tensor([[size, -size]]), rtol=0, atol=2e-4)


def test_advantages_by_hand_for_each_scale():
    rewards = torch.tensor([[1, 0], [1, 1], [3, 0]])
    none = torch.tensor([[0.5, -0.5], [0.0, 0.0], [1.5, -1.5]])
    assert_close(group_advantages(rewards, scale="none"), none)
    group = none / torch.tensor([[0.5 + 0.5], [0.0 + 0.5], [1.5 + 0.5]])
    assert_close(group_advantages(rewards, scale="group", std_ddof=0, eps=0.5), group)
    # All six rewards: mean 1, squared deviations 0 1 0 0 4 1, sum 6.
    assert_close(group_advantages(rewards, scale="batch", std_ddof=0, eps=0.0), none)
    assert_close(group_advantages(rewards, scale="batch", std_ddof=1, eps=0.0), none / math.sqrt(6 / 5))
    assert_close(group_advantages(rewards, scale="mean", eps=0.0), none / torch.tensor([[0.5], [1.0], [1.5]]))
    rare = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    by_mean = torch.tensor([[3.0, -1, -1, -1], [1 / 3, 1 / 3, 1 / 3, -1], [0, 0, 0, 0], [0, 0, 0, 0]])
    assert_close(group_advantages(rare, scale="mean"), by_mean, rtol=1e-3, atol=0)
    with pytest.raises(ValueError, match="no completion a reward below 0"):
        group_advantages(torch.tensor([[1.0, -0.1]]), scale="mean")


@given(
    value=st.floats(-10, 10, width=32),
    size=st.integers(2, 12),
    scale=st.sampled_from(ADVANTAGE_SCALES),
    ddof=st.sampled_from([0, 1]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_equal_rewards_give_exactly_zero(value, size, scale, ddof, dtype):
    rewards = torch.full((2, size), abs(value) if scale == "mean" else value, dtype=dtype)
    assert (group_advantages(rewards, scale=scale, std_ddof=ddof) == 0).all()


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 0), (2, 2, 2), ()])
def test_advantages_of_a_wrong_shape(shape):
    with pytest.raises(ValueError, match="rewards must be"):
        group_advantages(torch.zeros(shape))


@pytest.mark.parametrize("options", [{"scale": "row"}, {"std_ddof": 2}])
def test_advantages_with_a_wrong_option(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        group_advantages(torch.zeros(2, 2), **options)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_advantages_of_rewards_that_are_not_finite(bad):
    with pytest.raises(ValueError, match="finite"):
        group_advantages(torch.tensor([[1.0, bad]]))


# --- ratio, clip, KL, entropy ---


@pytest.mark.parametrize("importance", IMPORTANCE_LEVELS)
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_before_the_first_update_the_loss_is_zero_and_its_gradient_is_not(loss_type, importance):
    batch = make_batch()
    batch.old = batch.new  # not even detached
    # Rows of one length, so that the advantages, which add up to 0, weigh the same.
    batch.mask = torch.ones_like(batch.mask)
    loss, stats = our_loss(batch, LossConfig(loss_type, importance))
    assert stats["ratio_min"] == stats["ratio_max"] == stats["ratio_mean"] == 1.0
    assert stats["clip_share"] == 0.0
    assert abs(loss.item()) < 1e-12
    divisor = batch.mask.numel() if loss_type != "dr_grpo" else len(LENGTHS) * MAX_LENGTH
    expected = (-batch.advantages / divisor).unsqueeze(1).expand_as(batch.new)
    assert_close(gradient(loss, batch.new), expected, **EXACT)
    assert (expected != 0).all()


def test_sequence_ratio_is_the_geometric_mean_and_its_tokens_share_the_gradient():
    new = torch.log(torch.tensor([[0.5, 0.8, 0.9], [0.3, 0.3, 0.3], [0.3, 0.3, 0.3]])).requires_grad_()
    old = torch.log(torch.tensor([[0.25, 0.2, 0.1], [0.6, 0.1, 0.1], [0.1, 0.1, 0.1]]))
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
    ratio = importance_ratio(new, old, mask, "sequence")
    assert_close(ratio, torch.tensor([[math.sqrt(2 * 4)], [0.5], [1.0]]))
    expected = torch.tensor([[math.sqrt(8) / 2, math.sqrt(8) / 2, 0], [0.5, 0, 0], [0, 0, 0]])
    assert_close(gradient(ratio.sum(), new), expected)
    assert_close(importance_ratio(new, old, mask), torch.tensor([[2.0, 4, 1], [0.5, 1, 1], [1, 1, 1]]))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_clip_stops_the_gradient_in_two_corners_of_four(sign):
    ratio = torch.tensor([[0.5, 0.69, 0.71, 1.0, 1.19, 1.21, 3.0]], requires_grad=True)
    loss = clipped_surrogate(ratio, torch.tensor([sign]), epsilon_low=0.3, epsilon_high=0.2)
    flat = [0, 0, 0, 0, 0, 1, 1] if sign > 0 else [1, 1, 0, 0, 0, 0, 0]
    expected = -sign * (1 - torch.tensor([flat], dtype=torch.float))
    assert_close(gradient(loss.sum(), ratio), expected, rtol=0, atol=0)
    clipped = torch.where(torch.tensor([flat]).bool(), 1.2 if sign > 0 else 0.7, ratio)
    assert_close(loss, -sign * clipped)


def test_cispo_caps_the_weight_and_keeps_every_gradient():
    ratio = torch.tensor([[0.1, 1.0, 4.9, 5.1, 90.0]], requires_grad=True)
    new = torch.tensor([[-1.0, -2, -3, -4, -5]], requires_grad=True)
    for advantage in (1.5, -1.5):
        loss = cispo_surrogate(ratio, new, torch.tensor([advantage]), epsilon_high=5.0).sum()
        weights = torch.tensor([[0.1, 1, 4.9, 5, 5]])
        assert_close(gradient(loss, new), -advantage * weights)
        assert torch.autograd.grad(loss, ratio, allow_unused=True)[0] is None


def test_k3_is_an_unbiased_estimate_that_is_never_negative():
    policy = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64).log().requires_grad_()
    reference = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64).log().requires_grad_()
    tokens = kl_k3(policy, reference)  # each token of the vocabulary as the one sampled
    exact = (policy.exp() * (policy - reference)).sum()
    assert_close((policy.exp() * tokens).sum(), exact)
    assert (tokens > 0).all()
    assert torch.autograd.grad(tokens.sum(), reference, allow_unused=True)[0] is None
    at_reference = kl_k3(policy, policy)
    assert (at_reference == 0).all() and (gradient(at_reference.sum(), policy) == 0).all()


def test_entropy_of_distributions_known_by_heart():
    never = -torch.inf
    rows = [[0.0, 0, 0, 0], [0, 0, never, never], [5, never, never, never]]
    logits = torch.tensor([rows], requires_grad=True)
    values = entropy(logits)
    assert_close(values, torch.tensor([[math.log(4), math.log(2), 0.0]]))
    assert_close(gradient(values.sum(), logits), torch.zeros(1, 3, 4), rtol=0, atol=1e-6)  # all stationary


def test_entropy_and_its_gradient_equal_torch_distributions():
    logits = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)).div(0.7).requires_grad_()
    ours, theirs = entropy(logits), torch.distributions.Categorical(logits=logits).entropy()
    assert_close(ours, theirs)
    assert_close(gradient(ours.sum(), logits), gradient(theirs.sum(), logits))


# --- aggregation ---


@pytest.mark.parametrize(
    "loss_type, expected",
    [("grpo", (2 + 4) / 3), ("bnpo", 10 / 4), ("dapo", 10 / 4), ("cispo", 10 / 4), ("dr_grpo", 10 / (3 * 5))],
)
def test_aggregate_by_hand(loss_type, expected):
    token_loss = torch.tensor([[1.0, 2, 3], [4, 99, 99], [99, 99, 99]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    assert aggregate(token_loss, mask, loss_type, max_length=5).item() == pytest.approx(expected)
    double = aggregate(token_loss, mask, loss_type, rows=6, tokens=8, max_length=5)
    assert double.item() == pytest.approx(expected / 2)
    a_value_a_row = aggregate(torch.tensor([[1.0], [2], [3]]), mask, loss_type, max_length=5)
    by_hand = {"grpo": (1 + 2) / 3, "dr_grpo": (3 * 1 + 2) / (3 * 5)}.get(loss_type, (3 * 1 + 2) / 4)
    assert a_value_a_row.item() == pytest.approx(by_hand)


@pytest.mark.parametrize("importance", IMPORTANCE_LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_minibatches_with_the_totals_add_up_to_the_whole(loss_type, importance):
    batch = make_batch()
    config = LossConfig(loss_type, importance, beta=0.04, entropy_coefficient=0.1)
    totals = {"rows": batch.mask.shape[0], "tokens": int(batch.mask.sum())}
    whole = our_loss(batch, config)[0]
    parts = [take(batch, slice(*ends)) for ends in ((0, 1), (1, 3), (3, 4), (4, 8))]
    total = sum(our_loss(part, config, **totals)[0] for part in parts)
    assert_close(total, whole, **EXACT)
    assert_close(gradient(total, batch.logits), gradient(whole, batch.logits), **EXACT)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_rows_without_signal_may_be_left_out(loss_type):
    batch = make_batch()
    batch.advantages[[0, 3, 5]] = 0.0
    config = LossConfig(loss_type)
    whole = our_loss(batch, config)[0]
    kept = take(batch, batch.advantages != 0)
    totals = {"rows": batch.mask.shape[0], "tokens": int(batch.mask.sum())}
    loss = our_loss(kept, config, **totals)[0]
    assert_close(loss, whole, **EXACT)
    assert_close(gradient(loss, batch.logits), gradient(whole, batch.logits), **EXACT)


# --- padding ---


@st.composite
def padded_cases(draw):
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    row = st.lists(st.booleans(), min_size=width, max_size=width)
    mask = draw(st.lists(row, min_size=rows, max_size=rows))
    junk = draw(st.sampled_from([math.nan, math.inf, -math.inf, 1e30, -1e30, 0.0]))
    config = LossConfig(
        draw(st.sampled_from(LOSS_TYPES)),
        draw(st.sampled_from(IMPORTANCE_LEVELS)),
        beta=draw(st.sampled_from([0.0, 0.04])),
        entropy_coefficient=draw(st.sampled_from([0.0, 0.1])),
        kl_correction=draw(st.booleans()),
        correction=draw(st.sampled_from([None, *CORRECTIONS])),
    )
    return torch.tensor(mask), junk, draw(st.integers(0, 999)), config


@settings(deadline=None, max_examples=200)
@given(padded_cases())
def test_what_padding_holds_never_matters(case):
    mask, junk, seed, config = case
    generator = torch.Generator().manual_seed(seed)
    # Log-probs of the policy, of that before the update, of the sampler, of the reference model; entropies.
    tensors = torch.randn(5, *mask.shape, generator=generator, dtype=torch.float64)
    advantages = torch.randn(len(mask), generator=generator, dtype=torch.float64)

    def run(values: Tensor, advantages: Tensor, mask: Tensor):
        leaves = values.clone().requires_grad_()
        new, old, sampler, reference, token_entropy = leaves
        loss, stats = policy_loss(
            new,
            old,
            advantages,
            mask,
            config,
            reference=reference,
            sampler=sampler,
            token_entropy=token_entropy,
            max_length=MAX_LENGTH,
        )
        return loss, gradient(loss, leaves), stats

    loss, grad, stats = run(tensors, advantages, mask)
    assert loss.isfinite() and grad.isfinite().all() and all(math.isfinite(value) for value in stats.values())
    assert (grad[:, ~mask] == 0).all()
    assert (grad[1:4] == 0).all()  # the policy alone is trained

    dirty_advantages = torch.where(mask.any(dim=1), advantages, junk)
    dirty = run(torch.where(mask, tensors, junk), dirty_advantages, mask)
    wider = run(pad(tensors, (0, 2), value=junk), advantages, pad(mask, (0, 2), value=False))
    for other_loss, other_grad, other_stats in (dirty, wider):
        assert_close(other_loss, loss, **EXACT)
        assert_close(other_grad[..., : mask.shape[1]], grad, **EXACT)
        assert (other_grad[..., mask.shape[1] :] == 0).all()
        assert other_stats == pytest.approx(stats)


# --- refusals ---


@pytest.mark.parametrize(
    "options, message",
    [
        ({"loss_type": "ppo"}, "loss_type must be one of grpo, bnpo, dr_grpo, dapo, cispo, not 'ppo'"),
        ({"importance": "word"}, "importance must be one of token, sequence, not 'word'"),
        ({"epsilon_low": -0.1}, "epsilon_low must be a number"),
        ({"epsilon_high": math.nan}, "epsilon_high must be a number"),
        ({"beta": "1e-3"}, "beta must be a number"),
        ({"entropy_coefficient": -1}, "entropy_coefficient must be a number"),
        ({"correction": "word_mask"}, "correction must be one of token_truncate, .* not 'word_mask'"),
        ({"correction_cap": -1.0}, "correction_cap must be a number"),
    ],
)
def test_a_wrong_config_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**options)


def test_a_wrong_call_is_refused():
    batch = make_batch()
    logps = (batch.new, batch.old, batch.advantages, batch.mask)
    with pytest.raises(ValueError, match="reference model"):
        policy_loss(*logps, LossConfig(beta=0.1))
    with pytest.raises(ValueError, match="token_entropy"):
        policy_loss(*logps, LossConfig(entropy_coefficient=0.1))
    with pytest.raises(ValueError, match="sampler's log-probs"):
        policy_loss(*logps, LossConfig(correction="token_mask"))
    with pytest.raises(ValueError, match="max_length"):
        policy_loss(*logps, LossConfig("dr_grpo"))
    with pytest.raises(ValueError, match="old must have new's shape"):
        policy_loss(batch.new, batch.old[:, 1:], batch.advantages, batch.mask, LossConfig())
    with pytest.raises(ValueError, match="advantages must have shape"):
        policy_loss(batch.new, batch.old, batch.advantages.unsqueeze(1), batch.mask, LossConfig())
    with pytest.raises(ValueError, match="one ratio a row: give each row one advantage"):
        policy_loss(batch.new, batch.old, batch.new.detach(), batch.mask, LossConfig(importance="sequence"))
    with pytest.raises(ValueError, match="loss_type must be one of"):
        aggregate(batch.new, batch.mask, "ppo")
    with pytest.raises(ValueError, match="level must be one of"):
        importance_ratio(batch.new, batch.old, batch.mask, "word")


# --- advantages by the step ---

right_steps = st.lists(
    st.tuples(st.integers(0, 6), st.booleans()).map(lambda x: [1.0] * x[0] + [0.0] * (x[1] or not x[0])),
    min_size=2, max_size=8,
)  # fmt: skip


@given(right_steps, st.sampled_from(["group", "none", "mean"]), st.sampled_from([0, 1]))
def test_each_step_is_a_group_of_those_that_reach_it(right, scale, std_ddof):
    advantages = step_advantages(right, scale=scale, std_ddof=std_ddof)
    assert [len(row) for row in advantages] == [len(row) for row in right]
    for step in range(max(map(len, right))):
        here = [(row[step], found[step]) for row, found in zip(right, advantages, strict=True) if len(row) > step]
        rewards, found = zip(*here, strict=True)
        if len(set(rewards)) == 1:
            assert set(found) == {0.0}  # one alone, or all of one mind
        else:
            mean = sum(rewards) / len(rewards)
            assert sum(found) == pytest.approx(0.0, abs=1e-5)
            assert all((a > 0) == (r > mean) for r, a in here)
            own = group_advantages(torch.tensor([rewards]), scale=scale, std_ddof=std_ddof)
            assert found == pytest.approx(own[0].tolist())


def test_advantages_by_the_step_by_hand():
    right = [[1, 1, 1], [1, 1, 0], [1, 0], [0]]
    expected = [[0.25, 1 / 3, 0.5], [0.25, 1 / 3, -0.5], [0.25, -2 / 3], [-0.75]]
    for row, numbers in zip(step_advantages(right, scale="none"), expected, strict=True):
        assert row == pytest.approx(numbers)
    with pytest.raises(ValueError, match="scale must be one of group, none, mean, not 'batch'"):
        step_advantages(right, scale="batch")
    assert step_advantages([]) == []
