"""How fast: rollouts against transformers, a whole step against TRL, both against the machine's own limit."""

import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from helpers.buffer import Buffer
from helpers.decoder import sampling_copy
from helpers.grpo import GRPOConfig, collect, learn
from helpers.hotspots import hotspots
from helpers.limits import Shape, Work, limits
from helpers.losses import LossConfig
from helpers.models import add_lora, halve_frozen, load_model
from helpers.rollout import encode_prompt, rollout
from helpers.tasks import load_task


def peak() -> int:
    """Bytes: the most that this process has held at once."""
    status = Path("/proc/self/status")  # not `getrusage`, whose figure begins at what the parent process had
    if status.exists():
        return 1024 * int(next(w for w in status.read_text().splitlines() if w.startswith("VmHWM")).split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


@dataclass(frozen=True)
class Job:
    """The work, the same for all: a model with LoRA, questions x responses x forced tokens, and one dtype."""

    model: str = "smollm2-135m"
    task: str = "syllogism"
    dtype: str = "float32"
    questions: int = 8
    group_size: int = 6
    length: int = 64
    prompt_length: int = 0  # 0: the question's own; else it is repeated or cut to so many tokens
    minibatch: int = 12
    lora_r: int = 32
    threads: int = 2
    top_p: float = 0.95


class Coin:
    """A reward that any text gets or does not, by the number of its characters: the work is what counts here."""

    def parts(self, text: str, example: object = None) -> dict[str, float]:
        """As `rewards.Reward.parts`."""
        return {"total": float(len(text) % 2), "correct": 0.0, "format": 0.0}


class Sized:
    """A tokenizer whose prompts have a given length, if any, and that names no token as the end."""

    eos_token_id = None

    def __init__(self, tokenizer, prompt_length: int) -> None:
        self.tokenizer, self.prompt_length = tokenizer, prompt_length

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def apply_chat_template(self, *args, **kwargs) -> list[int]:
        """The prompt, repeated or cut to the length."""
        ids = self.tokenizer.apply_chat_template(*args, **kwargs)
        return (ids * (self.prompt_length // len(ids) + 1))[: self.prompt_length] if self.prompt_length else ids


def prompts_of(job: Job, tokenizer) -> list[list[int]]:
    """The questions' prompts, as token ids."""
    sized = Sized(tokenizer, job.prompt_length)
    return [encode_prompt(sized, example.question) for example in load_task(job.task, "train", job.questions)]


def ours_rollouts(job: Job) -> Iterator[Any]:
    """Our rollouts: take over the policy's weights, then sample."""
    model, tokenizer = load_model(job.model, device="cpu")
    policy = add_lora(model, job.lora_r, 2 * job.lora_r)
    sampler, prompts = sampling_copy(policy, getattr(torch, job.dtype)), prompts_of(job, tokenizer)
    for seed in range(10**9):
        yield
        sampler.refresh(policy)
        rollout(sampler, prompts, group_size=job.group_size, max_new_tokens=job.length, end_ids=(), top_p=job.top_p,
                seed=seed)  # fmt: skip


def generate_settings(job: Job) -> dict[str, Any]:
    """The same sampling for transformers: temperature 1, top_p, no top_k, as many tokens as are asked for."""
    return {"do_sample": True, "temperature": 1.0, "top_p": job.top_p, "top_k": 0, "max_new_tokens": job.length,
            "min_new_tokens": job.length}  # fmt: skip


def transformers_generate(job: Job) -> Iterator[Any]:
    """`generate` with num_return_sequences, LoRA merged, prompts padded on the left."""
    model, tokenizer = load_model(job.model, device="cpu", dtype=getattr(torch, job.dtype))
    prompts = prompts_of(job, tokenizer)
    longest = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.eos_token_id] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    while True:
        yield
        model.generate(input_ids=ids, attention_mask=mask, num_return_sequences=job.group_size,
                       pad_token_id=tokenizer.eos_token_id, **generate_settings(job))  # fmt: skip


def transformers_batching(job: Job) -> Iterator[Any]:
    """transformers' continuous batching, each prompt given once for each response."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model, tokenizer = load_model(job.model, device="cpu", dtype=getattr(torch, job.dtype))
    prompts = [p for p in prompts_of(job, tokenizer) for _ in range(job.group_size)]
    settings = generate_settings(job) | {"eos_token_id": -1, "pad_token_id": tokenizer.eos_token_id}
    del settings["min_new_tokens"]  # continuous batching has no such processor; no token is the end instead
    config = GenerationConfig(**settings)
    pages = -(-(max(map(len, prompts)) + job.length) // 256)  # of 256 tokens each; by default it takes all memory
    room = ContinuousBatchingConfig(num_blocks=2 * pages * len(prompts), max_batch_tokens=1024)
    while True:
        yield
        found = model.generate_batch(
            prompts, generation_config=config, continuous_batching_config=room, progress_bar=False
        )
        if sorted(len(r.generated_tokens) for r in found.values()) != [job.length] * len(prompts):
            raise RuntimeError("continuous batching did not return all tokens")


def ours_step(job: Job) -> Iterator[Any]:
    """A whole step of ours: rollouts, rewards, advantages, one update. Tells the sampling's share of its time."""
    from accelerate import Accelerator

    model, tokenizer = load_model(job.model, device="cpu")
    model.generation_config.eos_token_id, tokenizer = None, Sized(tokenizer, job.prompt_length)
    policy = add_lora(model, job.lora_r, 2 * job.lora_r)
    half = job.dtype == "bfloat16"
    if half:
        halve_frozen(policy, torch.bfloat16)
    rows = job.questions * job.group_size
    config = GRPOConfig(
        questions_per_rollout=job.questions, group_size=job.group_size, buffer_size=rows, temperature=1.0,
        minibatch_size=job.minibatch, gradient_accumulation=-(-rows // job.minibatch), max_new_tokens=job.length,
        top_p=job.top_p, learning_rate=1e-6, loss=LossConfig(loss_type="dapo"),
    )  # fmt: skip
    accelerator = Accelerator(mixed_precision="bf16" if half else "no", cpu=True)
    weights = [p for p in policy.parameters() if p.requires_grad]
    policy, optimizer = accelerator.prepare(policy, torch.optim.AdamW(weights, lr=config.learning_rate))
    sampler, task = sampling_copy(policy, getattr(torch, job.dtype)), load_task(job.task, "train", job.questions)
    sampling = None
    for number in range(10**9):
        yield sampling
        start = time.perf_counter()
        sampler.refresh(policy)
        buffer = Buffer(rows)
        buffer.add(collect(sampler, tokenizer, task, Coin(), config, number).experiences)
        # Every response has a signal, so that all of the work is done.
        buffer.experiences = [replace(e, advantage=e.advantage or 1.0) for e in buffer.experiences]
        sampling = time.perf_counter() - start
        policy.train()
        learn(policy, optimizer, buffer, config, accelerator, seed=number)


def trl_step(job: Job) -> Iterator[Any]:
    """A whole step of TRL's GRPOTrainer with the same model, LoRA, questions, group size, tokens and minibatches."""
    import queue
    import tempfile
    import threading

    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig as TrlConfig
    from trl import GRPOTrainer

    from helpers.models import LORA_TARGETS
    from helpers.prompts import messages

    model, tokenizer = load_model(job.model, device="cpu")
    task = load_task(job.task, "train", job.questions)
    rows = job.questions * job.group_size
    go, done = queue.Queue(), queue.Queue()

    class Gate(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            go.get()

        def on_step_end(self, *args, **kwargs):
            done.put(None)

    def train() -> None:
        try:
            with tempfile.TemporaryDirectory() as folder:
                half = job.dtype == "bfloat16"
                settings = TrlConfig(
                    folder, per_device_train_batch_size=job.minibatch, num_generations=job.group_size,
                    gradient_accumulation_steps=rows // job.minibatch, max_completion_length=job.length, max_steps=99,
                    generation_kwargs={"min_new_tokens": job.length}, top_p=job.top_p, temperature=1.0,
                    use_cpu=True, bf16=half, learning_rate=1e-6, gradient_checkpointing=False, report_to=[],
                    save_strategy="no", logging_strategy="no", disable_tqdm=True,
                )  # fmt: skip
                GRPOTrainer(
                    model, args=settings, processing_class=tokenizer, callbacks=[Gate()],
                    reward_funcs=lambda completions, **rest: [Coin().parts(c[0]["content"])["total"]
                                                              for c in completions],
                    train_dataset=Dataset.from_list([{"prompt": messages(e.question)} for e in task]),
                    peft_config=LoraConfig(r=job.lora_r, lora_alpha=2 * job.lora_r, target_modules=LORA_TARGETS),
                ).train()  # fmt: skip
        except BaseException as error:
            done.put(error)

    threading.Thread(target=train, daemon=True).start()
    while True:
        yield
        go.put(None)
        failed = done.get()
        if failed:
            raise failed


SIZES = {"group_size": (2, 8, 32), "length": (32, 128, 256), "prompt_length": (64, 256, 1024)}


def ours_growing(job: Job) -> Iterator[Any]:
    """A step of ours at each of `SIZES`, the others staying as they are: once to get ready, once to be timed."""
    for name, sizes in SIZES.items():
        for size in sizes:
            step = ours_step(replace(job, **{name: size}))
            yield
            next(step)
            yield
            next(step)
    yield


CONTESTANTS: dict[str, Callable[[Job], Iterator[Any]]] = {
    f.__name__: f
    for f in (ours_rollouts, transformers_generate, transformers_batching, ours_step, trl_step, ours_growing)
}


def _serve(name: str, job: Job, pipe) -> None:
    torch.set_num_threads(job.threads)
    try:
        contestant = CONTESTANTS[name](job)
        next(contestant)
        pipe.send(None)
        while pipe.recv():
            start = time.perf_counter()
            note = next(contestant)
            seconds = time.perf_counter() - start
            pipe.send({"seconds": seconds, "peak_bytes": peak(), "sampling": note})
    except BaseException as error:
        pipe.send(f"{type(error).__name__}: {error}".splitlines()[0][:200])
    os._exit(0)  # TRL's thread still waits for its next step


def alternate(
    names: list[str], job: Job, repeats: int, say: Callable[[str], None], warm_up: int = 1
) -> dict[str, dict[str, Any]]:
    """Time contestants in processes of their own, in turns: `warm_up` rounds that do not count, then `repeats`.

    Returns for each the median "seconds", all of them as "times" and "peak_bytes", or the "error" that stopped it.
    """
    context, workers, results = multiprocessing.get_context("spawn"), {}, {}
    for name in names:
        mine, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(name, job, theirs), daemon=True)
        process.start()
        theirs.close()
        workers[name], results[name] = (process, mine), []
        answer = mine.recv()
        if answer is not None:
            results[name] = {"error": answer}
    for turn in range(1 - warm_up, repeats + 1):
        for name, (_, pipe) in workers.items():
            if isinstance(results[name], dict):
                continue
            pipe.send(True)
            try:
                answer = pipe.recv()
            except EOFError:
                answer = "the process ended, most likely for want of memory"
            if isinstance(answer, str):
                results[name] = {"error": answer}
            else:
                results[name].append(answer)
                say(f"{job.dtype} {name} {'warm-up' if turn < 1 else turn}: {answer['seconds']:.1f} s")
    for process, pipe in workers.values():
        pipe.close()
        process.kill()
        process.join()
    return {name: r if isinstance(r, dict) else summary(r, warm_up) for name, r in results.items()}


def summary(answers: list[dict[str, Any]], warm_up: int) -> dict[str, Any]:
    """Median of the timed rounds, those of the warm-up left out, and the highest memory of all."""
    timed = answers[warm_up:]
    notes = [a["sampling"] for a in timed if a["sampling"] is not None]
    return {
        "seconds": statistics.median(a["seconds"] for a in timed),
        "times": [round(a["seconds"], 2) for a in timed],
        "peak_bytes": max(a["peak_bytes"] for a in answers),
        "sampling_seconds": statistics.median(notes) if notes else None,
    }


def machine(threads: int) -> dict[str, Any]:
    """The machine's description that belongs beside its numbers."""
    from helpers.runs import environment

    return {"threads": threads, **environment("cpu"), **{p: version(p) for p in ("transformers", "trl", "peft")}}


def growth(job: Job, say: Callable[[str], None]) -> dict[str, list[tuple[int, float]]]:
    """Seconds of a step of ours as one size grows: a question of 128 tokens, 8 responses of 64 tokens each."""
    small = replace(job, questions=1, group_size=8, length=64, prompt_length=128, minibatch=8)
    rounds = 2 * sum(map(len, SIZES.values()))
    times = iter(alternate(["ours_growing"], small, rounds, lambda text: None, 0)["ours_growing"]["times"][1::2])
    found = {name: [(size, next(times)) for size in sizes] for name, sizes in SIZES.items()}
    say(f"growth: {found}")
    return found


class Reached(Exception):
    """The training can end here."""


def time_to(target: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Seconds from nothing until the pocket model's mean sampled accuracy over 5 GRPO steps reaches `target`."""
    from accelerate import Accelerator

    from helpers.grpo import grpo
    from helpers.pipeline import start_model
    from helpers.recipes import load_recipe
    from helpers.sft import sft

    recipe, start, seen, reached = load_recipe("pocket"), time.perf_counter(), [], {}
    model, tokenizer = start_model(recipe)
    accelerator = Accelerator(cpu=True)
    sft(model, tokenizer, load_task(recipe.task, "train", recipe.sft.traces, recipe.seed, recipe.balanced), recipe.sft,
        accelerator=accelerator, progress=False)  # fmt: skip
    reached["warm_up_seconds"] = time.perf_counter() - start

    def watch(record: dict[str, float]) -> None:
        seen.append(record["accuracy"])
        if len(seen) >= 5 and sum(seen[-5:]) / 5 >= target:
            reached.update(seconds=time.perf_counter() - start, steps=len(seen))
            raise Reached

    task = load_task(recipe.task, "train", recipe.train_size, recipe.seed + 1000, recipe.balanced)
    with suppress(Reached):
        grpo(model, tokenizer, task, recipe.grpo, accelerator=accelerator, progress=False, on_step=watch)
    say(f"pocket: {reached}")
    return {"target": target, "start": seen[0], **reached}


def benchmark(job: Job, quick: bool = False, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Everything that is measured, as plain values for JSON; see `table`.

    quick: bfloat16 alone, half the questions and half the tokens, no growth, no profile and no pocket model. A whole
    step is timed once, from a cold start for both: a second one of TRL's costs minutes.
    """
    job = replace(job, questions=job.questions // 2, length=job.length // 2) if quick else job
    model, tokenizer = load_model(job.model, device="cpu")
    work = Work(tuple(map(len, prompts_of(job, tokenizer))), job.group_size, job.length)
    shape = Shape.of(model.config, job.lora_r)
    del model
    torch.set_num_threads(job.threads)
    result: dict[str, Any] = {"job": asdict(job), "work": asdict(work), "machine": machine(job.threads), "dtypes": {}}
    for dtype in ("bfloat16",) if quick else ("float32", "bfloat16"):
        one = replace(job, dtype=dtype)
        found = {"limits": limits(work, shape, getattr(torch, dtype), job.minibatch)}
        found |= alternate(["ours_rollouts", "transformers_generate"], one, 1 if quick else 2, say, 0 if quick else 1)
        if not quick and dtype == "bfloat16":  # by far the slowest on a CPU: once, in its better dtype
            found |= alternate(["transformers_batching"], one, 1, say, 0)
        found |= alternate(["ours_step", "trl_step"], one, 1, say, 0)
        result["dtypes"][dtype] = found
    result["growth"] = None if quick else growth(replace(job, dtype="bfloat16"), say)
    result["pocket"] = None if quick else time_to(0.8, say)
    half = replace(job, dtype="bfloat16")
    result["profile"] = None if quick else {name: hotspots(name, half) for name in ("ours_rollouts", "ours_step")}
    return result


def table(result: dict[str, Any]) -> str:
    """The result as Markdown: seconds, ratios and memory, with the limit beside each."""
    job = result["job"]
    tokens = job["questions"] * job["group_size"] * job["length"]
    names = {"ours_rollouts": "our rollouts", "transformers_generate": "transformers `generate`",
             "transformers_batching": "transformers continuous batching", "ours_step": "our step",
             "trl_step": "TRL GRPOTrainer step"}  # fmt: skip
    lines = ["| work | dtype | seconds | tokens/s | ours is faster by | time at the limit | peak memory |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for dtype, found in result["dtypes"].items():
        bounds = found["limits"]
        for name, r in ((n, found[n]) for n in names if n in found):
            rollouts = name in ("ours_rollouts", "transformers_generate", "transformers_batching")
            if "error" in r:
                lines.append(f"| {names[name]} | {dtype} | did not run: {r['error']} | | | | |")
                continue
            mine = found["ours_rollouts" if rollouts else "ours_step"]["seconds"]
            bound = bounds["rollouts"] + (0 if rollouts else bounds["update"])
            ratio = "" if name.startswith("ours") else f"{r['seconds'] / mine:.1f} x"
            share = f"{bound:.1f} s ({100 * bound / r['seconds']:.0f} %)"
            lines.append(f"| {names[name]} | {dtype} | {r['seconds']:.1f} | {tokens / r['seconds']:.0f} | {ratio} | "
                         f"{share} | {r['peak_bytes'] / 2**30:.1f} GiB |")  # fmt: skip
    return "\n".join(lines)


def profile_table(result: dict[str, Any]) -> str:
    """Where our time goes in bfloat16, as Markdown: each kind of operation's share of the whole, in %."""
    rollouts, step = (result["profile"][name] for name in ("ours_rollouts", "ours_step"))
    lines = ["| where our time goes (bfloat16) | rollouts | whole step |", "|---|---|---|"]
    return "\n".join(
        [*lines, *(f"| {kind} | {100 * rollouts[kind]:.0f} % | {100 * step[kind]:.0f} % |" for kind in step)]
    )


def best_ratio(result: dict[str, Any]) -> float | None:
    """TRL's step in its better dtype over ours in our better dtype; None where one of them did not run."""
    ours, theirs = ([found[name]["seconds"] for found in result["dtypes"].values() if "seconds" in found[name]]
                    for name in ("ours_step", "trl_step"))  # fmt: skip
    return min(theirs) / min(ours) if ours and theirs else None
