"""One update, twice: TRL's GRPOTrainer makes it, and our code computes it from the same completions and weights."""

import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

from helpers.bridges import trl_trainer
from helpers.buffer import Buffer, Experience
from helpers.grpo import GRPOConfig, learn, score
from helpers.losses import LossConfig, group_advantages
from helpers.models import add_lora, load_model
from helpers.rewards import Reward, RewardConfig
from helpers.rollout import encode_prompt
from helpers.sft import SFTConfig, sft
from helpers.tasks import Example, load_task

# Quarters have no rounding error. With 0.85 and 0.15 the mean of eight equal rewards misses them by 1.5e-8, which TRL
# divides by a std of 0 + 1e-4: completions that are all alike get an advantage of 1.5e-4 there, and 0 here.
EXACT = RewardConfig(correct=0.75, format=0.25)


class Grabber:
    """In an optimiser's place: keeps the gradient it was to step along, and leaves the weights alone."""

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        self.weights = weights

    def step(self) -> None:
        """Keep the gradient, all weights in one row."""
        self.gradient = torch.cat([w.grad.flatten() for w in self.weights])

    def zero_grad(self) -> None:
        """Nothing: TRL's gradients are put back over ours."""


class Comparison(TrainerCallback):
    """Looks on while a trainer of TRL's works and computes each of its updates with our code. `rows`: one an update.

    What TRL gives is its completions, as token ids; from there prompts, rewards, advantages, log-probs, loss, gradient
    and its clipping are ours, up to the step of the optimiser, which `learn` is kept from.
    """

    def __init__(self, trainer, tokenizer, reward: Reward, config: GRPOConfig) -> None:
        self.trainer, self.tokenizer, self.reward, self.config = trainer, tokenizer, reward, config
        self.weights = [p for p in trainer.model.parameters() if p.requires_grad]
        self.start = [w.detach().clone() for w in self.weights]  # the reference model's
        self.rows: list[dict[str, Any]] = []
        self.places: list[int] = []  # of the rollouts in this update
        self.losses: list[float] = []  # of its minibatches
        self.generate, trainer._generate_and_score_completions = trainer._generate_and_score_completions, self.collect
        self.compute_loss, trainer.compute_loss = trainer.compute_loss, self.note_loss
        trainer.add_callback(self)

    def collect(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's rollouts, scored by both."""
        output, config = self.generate(inputs), self.config
        theirs, ids = (
            [row[mask.bool()].tolist() for row, mask in zip(output[f"{name}_ids"], output[f"{name}_mask"], strict=True)]
            for name in ("prompt", "completion")
        )
        examples = [Example(**row["example"]) for row in inputs]
        prompts = [encode_prompt(self.tokenizer, e.question) for e in examples]
        rewards = torch.tensor(self.reward(self.tokenizer.batch_decode(ids, skip_special_tokens=True), examples))
        groups = rewards.view(-1, config.group_size)  # TRL, too, keeps a question's completions together
        advantages = group_advantages(groups, scale=config.scale, std_ddof=config.std_ddof).flatten()
        made = [Experience(*parts) for parts in zip(prompts, ids, advantages.tolist(), strict=True)]
        if config.updates_per_buffer > 1 or len(made) > config.minibatch_size * config.gradient_accumulation:
            made = [replace(e, old_logprobs=x) for e, x in zip(made, self.logprobs(made), strict=True)]
        if config.loss.beta > 0:
            now = self.exchange(self.start)
            made = [replace(e, reference_logprobs=x) for e, x in zip(made, self.logprobs(made), strict=True)]
            self.exchange(now)
        self.experiences = made
        told = torch.tensor(list(self.trainer._logs["rewards"][self.reward.__name__])[-len(made) :])
        self.scores = {
            "same_prompts": prompts == theirs,
            "reward": rewards.mean().item(),
            "signal": (advantages != 0).float().mean().item(),
            "reward_difference": (rewards - told).abs().max().item(),
            "advantage_difference": (advantages - output["advantages"]).abs().max().item(),
        }
        return output | {"place": torch.arange(len(made))}  # TRL shuffles this column with the others

    def logprobs(self, experiences: list[Experience]) -> list[torch.Tensor]:
        """Of each response, under the weights as they are."""
        return score(self.trainer.model, experiences, self.config, self.trainer.accelerator)

    @torch.no_grad()
    def exchange(self, values: list[torch.Tensor]) -> list[torch.Tensor]:
        """Put these values into the weights; returns those that were there."""
        before = [w.clone() for w in self.weights]
        for weight, value in zip(self.weights, values, strict=True):
            weight.copy_(value)
        return before

    def note_loss(self, model, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """TRL's loss of a minibatch."""
        loss = self.compute_loss(model, inputs, *args, **kwargs)
        self.places += inputs["place"].tolist()
        self.losses.append(loss.item())
        return loss

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """TRL has its gradient and has clipped it: now ours, then TRL's again."""
        theirs = [w.grad.clone() for w in self.weights]
        buffer, grabber = Buffer(len(self.places)), Grabber(self.weights)
        buffer.add([self.experiences[i] for i in self.places])
        once = replace(self.config, updates_per_buffer=1)
        stats = learn(self.trainer.model, grabber, buffer, once, self.trainer.accelerator)
        for weight, gradient in zip(self.weights, theirs, strict=True):
            weight.grad = gradient
        gradient = torch.cat([g.flatten() for g in theirs])
        difference = (grabber.gradient - gradient).abs().max() / gradient.abs().max()
        names = ("grad_norm", "clip_share")
        self.rows.append(
            {"step": len(self.rows) + 1, "our_loss": stats["loss"], "their_loss": sum(self.losses), **self.scores,
             "gradient_difference": difference.item(), **{name: stats[name] for name in names}}
        )  # fmt: skip
        self.places, self.losses = [], []


@cache
def warm_pocket(seed: int = 0) -> dict[str, torch.Tensor]:
    """The weights of a pocket model that is right now and then and forgets a tag now and then: so groups differ."""
    model, tokenizer = load_model("pocket", device="cpu", seed=seed)
    settings = SFTConfig(epochs=1, batch_size=32, minibatch_size=32, learning_rate=2e-3, decay=0.3)
    sft(model, tokenizer, load_task("letter_counting", "train", 1600, seed), settings, progress=False, seed=seed)
    return model.state_dict()


def compare_with_trl(
    steps: int = 3,
    loss: LossConfig | str = "grpo",
    lora_r: int = 0,
    seed: int = 0,
    weights: RewardConfig = EXACT,
    **more: Any,
) -> list[dict[str, Any]]:
    """`steps` real updates of TRL's GRPOTrainer on a warm pocket model that counts letters, each compared with ours.

    loss: a `LossConfig`, or a loss type. lora_r: 0 trains all weights. weights: of the reward. more: other settings of
    our `GRPOConfig`.
    A dict an update: "our_loss" and "their_loss"; "reward", the mean; "signal", the share of responses with an
    advantage; "same_prompts"; the largest "reward_difference" and "advantage_difference"; "gradient_difference", as a
    share of TRL's largest entry; "grad_norm" before clipping and "clip_share", of our loss.
    """
    policy, tokenizer = load_model("pocket", device="cpu", seed=seed)
    policy.load_state_dict(warm_pocket(seed))
    task = load_task("letter_counting", "train", 400, seed + 1000)
    reward = Reward(task, weights)
    settings = {
        "questions_per_rollout": 8, "group_size": 8, "buffer_size": 64, "minibatch_size": 64, "max_new_tokens": 48,
        "gradient_accumulation": 1, "learning_rate": 1e-3, "temperature": 1.0, "top_p": 1.0,
        "loss": LossConfig(loss) if isinstance(loss, str) else loss,
    }  # fmt: skip
    config = GRPOConfig(**settings | more)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # what TRL still calls by its old name in transformers
        policy = add_lora(policy, lora_r, 2 * lora_r) if lora_r else policy
        trainer = trl_trainer(
            policy, tokenizer, task, config, reward, output_dir=folder, max_steps=steps, seed=seed, use_cpu=True,
            save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        comparison = Comparison(trainer, tokenizer, reward, config)
        trainer.train()
    return comparison.rows
