"""The warm-up: supervised fine-tuning on traces whose answer the verifier accepts."""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from helpers.buffer import Experience, collate
from helpers.hygiene import NotFinite, StopAfterStep, check_finite
from helpers.logprobs import completion_logprobs
from helpers.processes import add_gradients, gathered, in_any, ready, share
from helpers.prompts import completion
from helpers.rewards import format_reward
from helpers.rollout import encode_prompt
from helpers.runs import Run, progress_bar
from helpers.tasks import Task


@dataclass(frozen=True)
class SFTConfig:
    """The warm-up's settings. Defaults: the article's 200 traces, at a LoRA learning rate.

    traces: how many a run draws. traces_file: where `datagen` wrote them for the same questions (none: the offline
    teacher writes them). leave_out: a regular expression; what it matches is cut out of each trace's thinking, to see
    what that part teaches. epochs: 0 leaves the warm-up out. batch_size traces make one update, minibatch_size go
    through the model at once. warmup and decay: shares of the updates in which the learning rate rises from and falls
    to 0. checkpoint_every: updates.
    """

    traces: int = 200
    traces_file: str | None = None
    leave_out: str | None = None
    epochs: int = 3
    batch_size: int = 16
    minibatch_size: int = 16
    learning_rate: float = 2e-4
    warmup: float = 0.05
    decay: float = 0.5
    max_grad_norm: float = 1.0
    checkpoint_every: int = 50

    def __post_init__(self) -> None:
        for name in ("traces", "epochs", "batch_size", "minibatch_size", "checkpoint_every"):
            least = int(name != "epochs")
            if getattr(self, name) < least:
                raise ValueError(f"sft.{name} must be {least} or more, not {getattr(self, name)}.")
        try:
            re.compile(self.leave_out or "")
        except re.error as error:
            raise ValueError(f"sft.leave_out is no regular expression: {error}.") from None
        if not (0 <= self.warmup <= 1 and 0 <= self.decay <= 1 and self.learning_rate > 0 and self.max_grad_norm > 0):
            raise ValueError(
                "sft.warmup and sft.decay are shares from 0 to 1; learning_rate and max_grad_norm are above 0."
            )

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of update `step` (from 0) of `steps`: up in a line, level, then down in a line."""
        rising = (step + 1) / max(1.0, self.warmup * steps)
        falling = (steps - step) / max(1.0, self.decay * steps)
        return self.learning_rate * min(1.0, rising, falling)


def encode_traces(
    tokenizer: PreTrainedTokenizerBase, task: Task, traces: Sequence[tuple[str, str]]
) -> list[Experience]:
    """(thinking, answer) pairs, one for each question of the task, as token ids that end with end-of-text.

    A trace is taken only if its answer scores 1 and its tags are in order. Raises ValueError if none is left, and
    if there are not as many traces as questions.
    """
    if len(traces) != len(task):
        raise ValueError(f"Give one trace for each of the {len(task)} questions, not {len(traces)}.")
    encoded = []
    for example, (thinking, answer) in zip(task, traces, strict=True):
        text = completion(thinking, answer)
        if task.score(answer, example) == 1.0 and format_reward(text) == 1.0:
            response = tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
            encoded.append(Experience(encode_prompt(tokenizer, example.question), response, advantage=0.0))
    if not encoded:
        raise ValueError(f"The verifier accepts none of the {len(task)} traces; check their answers and tags.")
    return encoded


def sft(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    config: SFTConfig,
    *,
    traces: Sequence[tuple[str, str]] | None = None,
    accelerator: Accelerator | None = None,
    run: Run | None = None,
    seed: int = 0,
    progress: bool = True,
    say: Callable[[str], None] = tqdm.write,
) -> list[dict[str, float]]:
    """Fine-tune a model in place to write the traces: by default the offline teacher's for `task`.

    The loss is minus the mean log-prob of the completion tokens, end-of-text included; prompts are not in it.
    Several processes share the traces of a minibatch.
    With a run, logs and checkpoints go there and a stopped warm-up goes on. Returns a dict of metrics an update.
    Ctrl-C raises `Stopped` after the update, with a checkpoint; a loss or gradient that is no number raises NotFinite
    before it. `say` gets a sentence where a checkpoint is damaged.
    """
    accelerator = accelerator or Accelerator()
    if traces is None:
        traces = [(task.thinking(example), example.answer) for example in task]
    if config.leave_out:
        traces = [(re.sub(config.leave_out, "", thinking), answer) for thinking, answer in traces]
    data = encode_traces(tokenizer, task, traces)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=config.learning_rate, weight_decay=0.0)
    model, optimizer = ready(model, optimizer, accelerator)
    done = run.resume("sft", model, optimizer, say) if run else 0
    order: list[int] = []
    history = []
    per_epoch = -(-len(data) // config.batch_size)
    steps = config.epochs * per_epoch
    model.train()
    with progress_bar("warm-up", steps, done, progress) as bar, StopAfterStep(bar) as interrupt:
        for step in range(steps):
            if step % per_epoch == 0:  # each epoch in an order of its own, the same whenever the run is resumed
                order = random.Random(f"{seed} {step // per_epoch}").sample(range(len(data)), len(data))
            if step < done:
                continue
            torch.manual_seed(seed * 1_000_003 + step)  # for LoRA's dropout: a resumed run drops what it would have
            rate = config.rate(step, steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            at = step % per_epoch * config.batch_size
            batch = sorted((data[i] for i in order[at : at + config.batch_size]), key=len)
            tokens = sum(len(e.response_ids) for e in batch)
            total = 0.0
            try:
                for start in range(0, len(batch), config.minibatch_size):
                    some = share(batch[start : start + config.minibatch_size], accelerator)
                    if not some:
                        continue
                    part = collate(some).to(accelerator.device)
                    with accelerator.autocast():
                        logprobs, _ = completion_logprobs(model, part.input_ids, part.prompt_lengths, part.mask)
                    loss = -logprobs.sum() / tokens
                    accelerator.backward(loss)
                    total += loss.item()
                    if accelerator.num_processes == 1:  # else the others would wait; the gradient shows it as well
                        check_finite("loss", total, some)
                add_gradients(weights, accelerator)
                norm = float(accelerator.clip_grad_norm_(weights, config.max_grad_norm))
                check_finite("gradient", norm, batch)
            except NotFinite as error:
                optimizer.zero_grad()
                raise error.kept(run, "sft", step + 1, tokenizer) from None
            optimizer.step()
            optimizer.zero_grad()
            total = sum(gathered([total], accelerator))
            record = {"stage": "sft", "step": step + 1, "loss": total, "grad_norm": norm, "learning_rate": rate}
            history.append(record)
            bar.set_postfix(loss=f"{total:.3f}")
            bar.update()
            asked = in_any(interrupt.asked, accelerator)
            if run:
                run.log("metrics", record)
                if (step + 1) % config.checkpoint_every == 0 or step + 1 == steps or asked:
                    run.save_checkpoint("sft", step + 1, model, optimizer)
            if asked:
                model.eval()
                raise interrupt.stopped("sft", step + 1, steps, run)
    model.eval()
    return history
