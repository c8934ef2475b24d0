"""The main job: base -> warm-up -> GRPO, each evaluated on the same held-out questions."""

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from helpers.evaluate import evaluate, mcnemar, report
from helpers.grpo import grpo
from helpers.models import add_lora, default_device, load_model, sampling_copy, save_adapter
from helpers.recipes import Recipe, build
from helpers.rewards import Reward
from helpers.runs import Run
from helpers.sft import sft
from helpers.tasks import Task, load_task


def start_model(recipe: Recipe):
    """The model a recipe starts from, LoRA attached where it asks for it, and its tokenizer."""
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    set_seed(recipe.seed)
    model, tokenizer = load_model(recipe.model, dtype=getattr(torch, recipe.dtype), seed=recipe.seed)
    if recipe.lora:
        model = add_lora(model, recipe.lora.r, recipe.lora.alpha, recipe.lora.dropout, seed=recipe.seed)
    return model, tokenizer


def held_out(recipe: Recipe) -> Task:
    """The recipe's test questions: the same for every seed of a recipe, so that runs can be compared."""
    return load_task(recipe.task, "test", recipe.evaluation.size, seed=0, balanced=recipe.balanced)


def train(recipe: Recipe, out: str | Path, resume: bool = False, say=print) -> Run:
    """Run a recipe in a folder, or go on with what is there. `say` gets a line for a person at each milestone."""
    if resume:
        run = Run.open(out)
        recipe = build(Recipe, run.config["recipe"])
    else:
        run = Run.start(out, recipe, default_device())
    model, tokenizer = start_model(recipe)
    accelerator = Accelerator(mixed_precision=recipe.mixed_precision, cpu=default_device() == "cpu")
    test = held_out(recipe)
    say(f"{recipe.model} on {recipe.task}, seed {recipe.seed}; the run is kept in {run.folder}")

    _evaluate_stage(run, "base", model, tokenizer, test, recipe, say)
    traces = load_task(recipe.task, "train", recipe.sft.traces, seed=recipe.seed, balanced=recipe.balanced)
    sft(model, tokenizer, traces, recipe.sft, accelerator=accelerator, run=run, seed=recipe.seed)
    _evaluate_stage(run, "sft", model, tokenizer, test, recipe, say)

    task = load_task(recipe.task, "train", recipe.train_size, seed=recipe.seed + 1000, balanced=recipe.balanced)
    sampler_dtype = getattr(torch, recipe.sampler_dtype) if recipe.sampler_dtype else None
    grpo(
        model, tokenizer, task, recipe.grpo, reward=Reward(task, recipe.reward), accelerator=accelerator,
        sampler_dtype=sampler_dtype, run=run, seed=recipe.seed,
    )  # fmt: skip
    _evaluate_stage(run, "grpo", model, tokenizer, test, recipe, say)
    if recipe.lora:
        save_adapter(model, run.folder / "adapter")
    for decoding in ("greedy", "sampled"):
        say(compare(run, "sft", "grpo", decoding))
    return run


def _evaluate_stage(run: Run, stage: str, model, tokenizer, test: Task, recipe: Recipe, say) -> None:
    sampler = sampling_copy(model, getattr(torch, recipe.sampler_dtype)) if recipe.sampler_dtype else model
    for decoding, temperature in (("greedy", 0.0), ("sampled", recipe.evaluation.temperature)):
        if any(r["stage"] == stage and r["decoding"] == decoding for r in run.records("eval")):
            continue  # a resumed run has this figure already
        result = evaluate(
            sampler, tokenizer, test, temperature=temperature, seed=recipe.seed,
            max_new_tokens=recipe.evaluation.max_new_tokens,
        )  # fmt: skip
        run.write_records(f"evaluations/{stage}-{decoding}", result.records)
        run.log("eval", {"stage": stage, "decoding": decoding, **result.summary()})
        say(f"{stage:>4}: {report(result.summary())}")


def compare(run: Run, before: str, after: str, decoding: str) -> str:
    """One line on two stages of a run: the gain in points and McNemar's test over the same questions."""
    a, b = ([r["correct"] == 1.0 for r in run.records(f"evaluations/{stage}-{decoding}")] for stage in (before, after))
    test = mcnemar(a, b)
    gain = 100 * (sum(b) - sum(a)) / len(a)
    return (
        f"{before} -> {after}, {decoding}: {gain:+.1f} points ({test['gained']} gained, {test['lost']} lost of "
        f"{len(a)}; McNemar p = {test['p']:.2g})"
    )
