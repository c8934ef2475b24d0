"""GRPO: collect rollouts into a buffer, score them, and move the policy towards what beat its group."""

import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import zip_longest

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from helpers.buffer import Buffer, Experience, collate
from helpers.decoder import Decoder, sampling_copy
from helpers.hygiene import NotFinite, StopAfterStep, Watch, check_finite
from helpers.logprobs import completion_logprobs
from helpers.losses import LossConfig, group_advantages, policy_loss, step_advantages
from helpers.models import bare
from helpers.names import unknown
from helpers.processes import add_gradients, gathered, in_any, ready, share
from helpers.rewards import Reward
from helpers.rollout import RemoteSampler, Response, encode_prompt, end_token_ids, rollout
from helpers.runs import Run, progress_bar, restore_weights, trained_weights
from helpers.tasks import Example, Task

CREDITS = ("response", "step")


@dataclass(frozen=True)
class GRPOConfig:
    """The loop's settings; the defaults are the article's, but for a learning rate that suits LoRA.

    A step fills the buffer (buffer_size responses, questions_per_rollout x group_size at a time), then goes through
    it updates_per_buffer times in random minibatches. gradient_accumulation minibatches make one update. Several
    processes share the rollouts of a step and the rows of a minibatch.
    steps: 0 leaves the loop out. stratified: a step asks as many questions of each true answer, see `questions_of`.
    credit: "response" gives all tokens of a response the advantage of its reward; "step" gives the tokens of each step
    of its thinking an advantage of their own, see `step_advantages`, in which the reward has no part.
    later_temperature: that of the steps after step `later_after`, once the policy has become sure, so that it goes on
    trying (POLARIS, An et al. 2025, raises it stage by stage); None keeps `temperature`.
    measure_kl logs the KL to the reference model (the policy the loop starts from) even where beta is 0.
    """

    steps: int = 100
    questions_per_rollout: int = 8
    stratified: bool = False
    group_size: int = 6
    buffer_size: int = 48
    updates_per_buffer: int = 1
    minibatch_size: int = 16
    gradient_accumulation: int = 12
    learning_rate: float = 1e-5
    temperature: float = 0.7
    later_temperature: float | None = None
    later_after: int = 0
    top_p: float = 0.95
    max_new_tokens: int = 300
    credit: str = "response"
    scale: str = "group"
    std_ddof: int = 1
    loss: LossConfig = field(default_factory=LossConfig)
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    measure_kl: bool = False
    checkpoint_every: int = 10

    def __post_init__(self) -> None:
        whole = ("steps", "questions_per_rollout", "buffer_size", "updates_per_buffer", "minibatch_size",
                 "gradient_accumulation", "max_new_tokens", "checkpoint_every", "later_after")  # fmt: skip
        for name in whole:
            least = int(name not in ("steps", "later_after"))
            if getattr(self, name) < least:
                raise ValueError(f"grpo.{name} must be {least} or more, not {getattr(self, name)}.")
        if self.group_size < 2:
            raise ValueError(f"grpo.group_size must be 2 or more: one response has no group, not {self.group_size}.")
        if not (self.temperature > 0 and 0 < self.top_p <= 1 and self.learning_rate > 0 and self.max_grad_norm > 0):
            raise ValueError("grpo needs temperature, learning_rate and max_grad_norm above 0, and 0 < top_p <= 1.")
        if self.later_temperature is not None and not self.later_temperature > 0:
            raise ValueError(f"grpo.later_temperature must be above 0, or null, not {self.later_temperature}.")
        group_advantages(torch.zeros(1, 2), scale=self.scale, std_ddof=self.std_ddof)  # says what is wrong with these
        if self.credit not in CREDITS:
            raise ValueError(unknown("grpo.credit", self.credit, CREDITS))
        if self.credit == "step" and (self.scale == "batch" or self.loss.importance == "sequence"):
            raise ValueError("grpo.credit=step needs a scale of group, none or mean, and an importance of token.")

    def at(self, step: int) -> "GRPOConfig":
        """The settings of a step, counted from 0: those with the temperature it has."""
        later = self.later_temperature is not None and step >= self.later_after
        return replace(self, temperature=self.later_temperature) if later else self

    @property
    def every_row(self) -> bool:
        """Whether a response with advantage 0 matters: KL and entropy act on it, the surrogate does not."""
        return self.loss.beta > 0 or self.loss.entropy_coefficient > 0 or self.measure_kl


@dataclass(frozen=True)
class Collected:
    """One rollout, scored. rewards: (Q, G); parts, responses and texts: a list a question, an entry a response."""

    examples: list
    responses: list[list[Response]]
    texts: list[list[str]]
    parts: list[list[dict[str, float]]]
    rewards: torch.Tensor
    experiences: list[Experience]

    @property
    def signals(self) -> list[list[bool]]:
        """Which responses have an advantage that is not 0, a list a question."""
        size = self.rewards.shape[1]
        each = [e.has_signal for e in self.experiences]
        return [each[at : at + size] for at in range(0, len(each), size)]


def check_fits(config: GRPOConfig, task: Task) -> None:
    """Raise ValueError, in one sentence, for what a task cannot have.

    That is `stratified` where it lists no answers or has some more often than others, so that in the end one alone is
    left to ask for, and `credit` by the step where its derivations have no given steps.
    """
    if config.stratified and not task.classes:
        raise ValueError(f"{task.name} has no short list of answers: leave out grpo.stratified.")
    if config.stratified:
        counts = Counter(example.answer for example in task).values()
        if max(counts) - min(counts) > 1:
            raise ValueError(
                f"{task.name}'s answers are not equally frequent: set balanced, or leave out grpo.stratified."
            )
    if config.credit == "step" and not task.stepwise:
        raise ValueError(f"{task.name}'s derivations have no given steps: leave out grpo.credit.")


def questions_of(task: Task, number: int, count: int, seed: int, stratified: bool = False) -> list:
    """The `count` questions of rollout `number`: the task in random order, then again in another.

    stratified: in turns of one question for each true answer, so that a policy which leans to one answer gets no more
    praise than blame for it.
    """
    chosen, orders = [], {}
    for place in range(number * count, (number + 1) * count):
        epoch, at = divmod(place, len(task))
        if epoch not in orders:
            orders[epoch] = _order(task, seed * 1_000_003 + epoch, stratified)
        chosen.append(task[orders[epoch][at]])
    return chosen


def _order(task: Task, seed: int, stratified: bool) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(task), generator=generator).tolist()
    if not stratified:
        return order
    with_answer = defaultdict(list)
    for i in order:
        with_answer[task[i].answer].append(i)
    turns = ([i for i in turn if i is not None] for turn in zip_longest(*with_answer.values()))
    return [turn[k] for turn in turns for k in torch.randperm(len(turn), generator=generator)]


def collect(
    sampler: nn.Module | Decoder | RemoteSampler,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    reward: Reward,
    config: GRPOConfig,
    number: int = 0,
    seed: int = 0,
) -> Collected:
    """Rollout `number`: questions -> G responses each -> rewards -> advantages inside each group -> experiences."""
    examples = questions_of(task, number, config.questions_per_rollout, seed, config.stratified)
    prompts = [encode_prompt(tokenizer, example.question) for example in examples]
    responses = rollout(
        sampler,
        prompts,
        group_size=config.group_size,
        max_new_tokens=config.max_new_tokens,
        end_ids=end_token_ids(sampler, tokenizer),
        temperature=config.temperature,
        top_p=config.top_p,
        seed=seed * 1_000_003 + number,
    )
    texts = [tokenizer.batch_decode([r.token_ids for r in g], skip_special_tokens=True) for g in responses]
    parts = [[reward.parts(text, e) for text in group] for group, e in zip(texts, examples, strict=True)]
    rewards = torch.tensor([[part["total"] for part in group] for group in parts])  # (Q, G)
    if config.credit == "response":
        advantages = group_advantages(rewards, scale=config.scale, std_ddof=config.std_ddof)  # (Q, G)
    else:
        advantages = torch.zeros_like(rewards)  # the steps' stand in for them below
    experiences = [
        Experience(prompt, response.token_ids, advantage)
        for prompt, group, row in zip(prompts, responses, advantages.tolist(), strict=True)
        for response, advantage in zip(group, row, strict=True)
    ]
    if config.credit == "step":
        groups = zip(responses, texts, examples, strict=True)
        by_token = [row for g, some, e in groups for row in by_step(g, some, e, reward, tokenizer, config)]
        experiences = [replace(e, token_advantages=row) for e, row in zip(experiences, by_token, strict=True)]
    if config.loss.correction:
        told = [torch.tensor(response.logprobs) for group in responses for response in group]
        experiences = [replace(e, sampler_logprobs=x) for e, x in zip(experiences, told, strict=True)]
    return Collected(examples, responses, texts, parts, rewards, experiences)


def by_step(
    group: list[Response],
    texts: list[str],
    example: Example,
    reward: Reward,
    tokenizer: PreTrainedTokenizerBase,
    config: GRPOConfig,
) -> list[torch.Tensor]:
    """The advantages of each response's tokens, (T_i,) each, in one group: each token has its step's.

    A token belongs to the step in which it ends. What comes after the first mistake has 0: it cannot be right any more.
    """
    steps = [reward.steps(text, example) for text in texts]
    right = [[float(is_right) for _, is_right in some] for some in steps]
    advantages = step_advantages(right, scale=config.scale, std_ddof=config.std_ddof)
    found = []
    for response, some, values in zip(group, steps, advantages, strict=True):
        ids, ends, row = response.token_ids, [end for end, _ in some], [*values, 0.0]
        reach = [len(tokenizer.decode(ids[: i + 1], skip_special_tokens=True)) for i in range(len(ids))]
        found.append(torch.tensor([row[bisect_left(ends, end)] for end in reach]))
    return found


def score(
    model: nn.Module, experiences: list[Experience], config: GRPOConfig, accelerator: Accelerator
) -> list[torch.Tensor]:
    """The model's log-probs of each response, (T_i,) each, without gradient; a group stays together."""
    order = sorted(range(len(experiences)), key=lambda i: experiences[i].prompt_ids)  # a prompt is computed once
    mine, scores = share(order, accelerator), []
    for at in range(0, len(mine), config.minibatch_size):
        some = mine[at : at + config.minibatch_size]
        batch = collate([experiences[i] for i in some]).to(accelerator.device)
        with torch.no_grad(), accelerator.autocast():
            logprobs, _ = completion_logprobs(
                model, batch.input_ids, batch.prompt_lengths, batch.mask, config.temperature
            )
        scores += [row[mask] for row, mask in zip(logprobs.cpu(), batch.mask.cpu(), strict=True)]
    by_row = dict(zip(order, gathered(scores, accelerator), strict=True))
    return [by_row[i] for i in range(len(experiences))]


def agreement(
    policy: nn.Module, collected: Collected, config: GRPOConfig, accelerator: Accelerator
) -> dict[str, float]:
    """The ratio of the trainer's to the sampler's probability of each token of a minibatch: the least, the greatest."""
    policy.eval()  # with dropout they would differ, and a resumed run would draw other random numbers
    responses = [r for group in collected.responses for r in group][: config.minibatch_size]
    scores = score(policy, collected.experiences[: config.minibatch_size], config, accelerator)
    ratio = (torch.cat(scores) - torch.tensor([x for r in responses for x in r.logprobs])).exp()
    return {"sampler_ratio_min": ratio.min().item(), "sampler_ratio_max": ratio.max().item()}


def learn(
    policy: nn.Module,
    optimizer: torch.optim.Optimizer,
    buffer: Buffer,
    config: GRPOConfig,
    accelerator: Accelerator,
    seed: int = 0,
) -> dict[str, float]:
    """Go through the buffer `updates_per_buffer` times in random minibatches; returns means of the loss's statistics.

    first_ratio_min and first_ratio_max are the ratio's in the first update. Raises NotFinite before an update whose
    loss or gradient is no number.
    Responses with advantage 0 add nothing to the gradient unless KL or entropy act on them, so they are left out of
    the forward pass and the statistics, unless the KL is to be measured; `rows` and `tokens` still count them.
    Of several processes, each with the same buffer, every one computes its share of a minibatch's rows.
    """
    weights = [p for p in policy.parameters() if p.requires_grad]
    # These are in the result even where no response has a signal.
    totals = dict.fromkeys(("loss", "grad_norm", "clip_share", "clip_share_low", "clip_share_high"), 0.0)
    seen, updates = 0, 0
    for epoch in range(config.updates_per_buffer):
        size = config.minibatch_size * config.gradient_accumulation
        for batch in buffer.minibatches(size, seed=seed * 1009 + epoch):  # one update each
            rows, tokens = len(batch), sum(len(e.response_ids) for e in batch)
            batch.sort(key=lambda e: (e.prompt_ids, len(e)))  # a group together, so that its prompt is computed once
            minis = [batch[i : i + config.minibatch_size] for i in range(0, rows, config.minibatch_size)]
            for p in weights:  # a gradient of 0, not none: where no row has a signal, Adam's momentum still goes on
                p.grad = torch.zeros_like(p)
            for mini in minis:
                counted = tokens
                if config.loss.loss_type == "bnpo":  # this minibatch's own tokens, then a mean over minibatches
                    counted = len(minis) * sum(len(e.response_ids) for e in mini)
                mini = share([e for e in mini if config.every_row or e.has_signal], accelerator)
                if not mini:
                    continue
                b = collate(mini).to(accelerator.device)
                with accelerator.autocast():
                    new, token_entropy = completion_logprobs(
                        policy, b.input_ids, b.prompt_lengths, b.mask, config.temperature,
                        with_entropy=config.loss.entropy_coefficient > 0,
                    )  # fmt: skip
                old = new.detach() if b.old_logprobs is None else b.old_logprobs
                loss, stats = policy_loss(
                    new, old, b.advantages, b.mask, config.loss, reference=b.reference_logprobs,
                    sampler=b.sampler_logprobs, token_entropy=token_entropy, rows=rows, tokens=counted,
                    max_length=config.max_new_tokens,
                )  # fmt: skip
                accelerator.backward(loss)
                totals["loss"] += loss.item()
                if accelerator.num_processes == 1:  # else the others would wait; the gradient shows it as well
                    check_finite("loss", totals["loss"], mini)
                weight = int(b.mask.sum())
                seen += weight
                for name, value in stats.items():
                    if name in ("ratio_min", "ratio_max"):
                        pick = min if name == "ratio_min" else max
                        for key in (name, f"first_{name}") if updates == 0 else (name,):
                            totals[key] = pick(totals.get(key, value), value)
                    else:
                        totals[name] = totals.get(name, 0.0) + weight * value
            add_gradients(weights, accelerator)
            norm = float(accelerator.clip_grad_norm_(weights, config.max_grad_norm))
            totals["grad_norm"] += check_finite("gradient", norm, batch)
            optimizer.step()
            optimizer.zero_grad()
            updates += 1
    parts = gathered([{**totals, "seen": seen}], accelerator)
    seen = max(1, sum(part.pop("seen") for part in parts))
    means = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        values = [part[name] for part in parts if name in part]
        if name.endswith(("ratio_min", "ratio_max")):
            means[name] = min(values) if name.endswith("min") else max(values)
        elif name == "grad_norm":
            means[name] = values[0] / updates  # the same in every process
        else:
            means[name] = sum(values) / (updates if name == "loss" else seen)
    return means


def summarise(collected: list[Collected]) -> dict[str, float]:
    """What a step's responses were like; shares are in [0, 1], entropy is in nats, estimated from sampled tokens."""
    rewards = torch.cat([c.rewards for c in collected])  # (Q, G)
    parts = [part for c in collected for group in c.parts for part in group]
    responses = [r for c in collected for group in c.responses for r in group]
    tokens = sum(len(r.token_ids) for r in responses)
    signals = [signal for c in collected for signal in c.signals]
    process = [key for key in ("derivation", "steps") if key in parts[0]]
    return {
        "reward": rewards.mean().item(),
        "reward_std": rewards.std().item(),
        "accuracy": sum(p["correct"] for p in parts) / len(parts),
        "format_rate": sum(p["format"] for p in parts) / len(parts),
        **{f"{key}_rate": sum(p[key] for p in parts) / len(parts) for key in process},
        "no_signal": 1 - sum(map(any, signals)) / len(signals),
        "length": tokens / len(responses),
        "unfinished": sum(not r.finished for r in responses) / len(responses),
        "entropy": -sum(sum(r.logprobs) for r in responses) / tokens,
    }


def grpo(
    policy: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    config: GRPOConfig,
    *,
    reward: Reward | None = None,
    accelerator: Accelerator | None = None,
    sampler_dtype: torch.dtype | None = None,
    sampler: RemoteSampler | None = None,
    run: Run | None = None,
    seed: int = 0,
    progress: bool = True,
    on_step: Callable[[dict], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> list[dict[str, float]]:
    """Train a policy in place, as the article's loop does; returns a dict of metrics a step.

    Each step depends on the weights, the optimiser's state, its number and the seed alone, so a run that was stopped
    goes on exactly. sampler_dtype: sample from a copy in this dtype, LoRA merged in; None samples from the policy.
    sampler: sample there instead, a `server.Server` say; it is told the policy's weights before each step.
    An accelerator of several processes: each samples its share of a step's rollouts, all make the same update.
    ValueError where there are fewer rollouts than processes, or a server to several of them, and for `stratified` on
    a task without `classes`.
    With a run, logs and checkpoints go there. `on_step` is called with each step's metrics. `say` gets the sentences of
    `Watch` and on damaged checkpoints; without it they are printed where there is progress to see.
    Ctrl-C raises `Stopped` after the step, with a checkpoint; a loss or gradient that is no number raises NotFinite.
    """
    say = say or (tqdm.write if progress else lambda sentence: None)
    accelerator = accelerator or Accelerator()
    reward = reward or Reward(task)
    weights = [p for p in policy.parameters() if p.requires_grad]
    per_rollout = config.questions_per_rollout * config.group_size
    rollouts = -(-config.buffer_size // per_rollout)  # to fill a buffer
    processes = accelerator.num_processes
    if rollouts < processes:
        raise ValueError(
            f"{processes} processes need {processes} rollouts a step: set grpo.buffer_size to "
            f"{processes * per_rollout} or more, or grpo.questions_per_rollout to "
            f"{max(1, config.questions_per_rollout // processes)} or fewer."
        )
    if sampler and processes > 1:
        raise ValueError("A server samples for one process: start without accelerate launch, or without the server.")
    check_fits(config, task)
    optimizer = torch.optim.AdamW(weights, lr=config.learning_rate, weight_decay=0)
    policy, optimizer = ready(policy, optimizer, accelerator)
    reference = {k: v.clone() for k, v in trained_weights(policy).items()}  # the policy the loop starts from
    done = run.resume("grpo", policy, optimizer, say) if run else 0
    sampler = sampler or sampling_copy(policy, sampler_dtype)
    if config.gradient_checkpointing:
        bare(policy).activation_checkpointing_enable()
    # A buffer used for one update is on-policy: the log-probs of that forward pass are the old ones as well.
    one_update = rollouts * per_rollout <= config.minibatch_size * config.gradient_accumulation
    on_policy = config.updates_per_buffer == 1 and one_update
    history, watch = [], Watch(run.records("metrics") if run else [], config.credit)
    with progress_bar("GRPO", config.steps, done, progress) as bar, StopAfterStep(bar) as interrupt:
        for step in range(done, config.steps):
            start, now = time.perf_counter(), config.at(step)
            torch.manual_seed(seed * 1_000_003 + step)  # for LoRA's dropout, in a resumed run too
            if isinstance(sampler, Decoder | RemoteSampler):
                sampler.refresh(policy)
            numbers = share(range(step * rollouts, (step + 1) * rollouts), accelerator)
            mine = [collect(sampler, tokenizer, task, reward, now, number, seed) for number in numbers]
            buffer, collected = Buffer(config.buffer_size), gathered(mine, accelerator)
            for some in collected:
                buffer.add(some.experiences)
            sampled = time.perf_counter()
            first = agreement(policy, collected[0], now, accelerator) if step == done else {}
            policy.train()
            if not on_policy:
                used = [i for i, e in enumerate(buffer.experiences) if config.every_row or e.has_signal]
                old = score(policy, [buffer.experiences[i] for i in used], now, accelerator)
                for i, logprobs in zip(used, old, strict=True):
                    buffer.experiences[i] = replace(buffer.experiences[i], old_logprobs=logprobs)
            if config.loss.beta > 0 or config.measure_kl:
                current = {k: v.clone() for k, v in trained_weights(policy).items()}
                restore_weights(policy, reference)
                ref = score(policy, buffer.experiences, now, accelerator)
                restore_weights(policy, current)
                buffer.experiences = [
                    replace(e, reference_logprobs=r) for e, r in zip(buffer.experiences, ref, strict=True)
                ]
            try:
                stats = learn(policy, optimizer, buffer, now, accelerator, seed=seed * 1_000_003 + step)
            except NotFinite as error:
                raise error.kept(run, "grpo", step + 1, tokenizer) from None
            policy.eval()
            end = time.perf_counter()
            summary = summarise(collected)
            tokens = summary["length"] * len(buffer)
            record = {"stage": "grpo", "step": step + 1, **summary, **stats,
                      "tokens_per_second": tokens / (sampled - start), "seconds_sampling": sampled - start,
                      "seconds_learning": end - sampled}  # fmt: skip
            history.append(record)
            speed = f"{record['tokens_per_second']:.0f}"
            bar.set_postfix(reward=f"{record['reward']:.2f}", length=f"{record['length']:.0f}", tokens_s=speed)
            bar.update()
            for sentence in watch({**record, **first}):
                say(sentence)
            asked = in_any(interrupt.asked, accelerator)
            if run:
                run.log("metrics", record)
                c = collected[0]
                for text, part in zip(c.texts[0], c.parts[0], strict=True):
                    run.log("samples", {"stage": "grpo", "step": step + 1, "question": c.examples[0].question,
                                        "truth": c.examples[0].answer, "completion": text, **part})  # fmt: skip
                if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps or asked:
                    run.save_checkpoint("grpo", step + 1, policy, optimizer)
            if on_step:
                on_step(record)
            if asked:
                raise interrupt.stopped("grpo", step + 1, config.steps, run)
    return history
