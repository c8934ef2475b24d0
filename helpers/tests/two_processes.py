"""What test_processes starts, alone and twice: a few steps of each loss, and what came of them, in a file."""

import sys
from dataclasses import replace

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

from helpers import sft as warm_up
from helpers.grpo import grpo
from helpers.losses import LossConfig
from helpers.runs import trained_weights
from helpers.tasks import load_task
from helpers.tests.test_grpo import SMALL, TASK, TOKENIZER, StartsEarly, WholeText, tiny_model

LOSSES = {
    "grpo": LossConfig(),
    "bnpo": LossConfig(loss_type="bnpo"),
    "dapo and KL": LossConfig(loss_type="dapo", beta=0.04),
    "dr_grpo and entropy": LossConfig(loss_type="dr_grpo", entropy_coefficient=0.01),
}
# Two rollouts a step, two updates a buffer, two minibatches an update.
CONFIG = replace(SMALL, steps=2, buffer_size=16, minibatch_size=4, gradient_accumulation=2)
CONFIGS = {name: replace(CONFIG, loss=loss) for name, loss in LOSSES.items()}
CONFIGS["an advantage a step"] = replace(CONFIG, credit="step")


class InSteps(StartsEarly):
    stepwise = True


class Letters(WholeText):
    """Each character is a step, a vowel a mistake: an untrained model writes no step of the task."""

    def steps(self, completion, example):
        slip = next((i for i, letter in enumerate(completion) if letter in "aeiou"), len(completion))
        return [(i + 1, i < slip) for i in range(min(slip + 1, len(completion)))]


def main(out: str) -> None:
    """Train a tiny model as each of `CONFIGS` says, and warm one up; the first process writes what came of it."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    found: dict[str, torch.Tensor] = {}

    def record(name: str, history: list[dict], model, gradients: list[torch.Tensor]) -> None:
        found[f"{name}: gradients"] = torch.stack(gradients)
        found[f"{name}: weights"] = torch.cat([w.flatten() for w in trained_weights(model).values()])
        for key in ("loss", "grad_norm", "reward", "accuracy", "length", "ratio_max", "ratio_min", "ratio_mean", "kl"):
            if key in history[0]:
                found[f"{name}: {key}"] = torch.tensor([step[key] for step in history])

    gradients: list[torch.Tensor] = []
    register_optimizer_step_pre_hook(
        lambda optimizer, *_: gradients.append(
            torch.cat([p.grad.flatten() for group in optimizer.param_groups for p in group["params"]])
        )
    )
    for name, settings in CONFIGS.items():
        # All processes but the first begin elsewhere: they must take over its weights.
        model = tiny_model(seed=accelerator.process_index)
        gradients.clear()
        task = InSteps.draw("train", 12, 0, True) if settings.credit == "step" else TASK
        reward = (Letters if settings.credit == "step" else WholeText)(task)
        history = grpo(model, TOKENIZER, task, settings, reward=reward, accelerator=accelerator, progress=False)
        record(name, history, model, gradients)
    model, task = tiny_model(seed=accelerator.process_index), load_task("letter_counting", "train", 5)
    gradients.clear()
    config = warm_up.SFTConfig(traces=5, epochs=1, batch_size=4, minibatch_size=2)
    history = warm_up.sft(model, TOKENIZER, task, config, accelerator=accelerator, progress=False)
    record("sft", history, model, gradients)
    if accelerator.is_main_process:
        save_file(found, out)
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1])
