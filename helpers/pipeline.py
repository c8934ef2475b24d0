"""The main job: base -> warm-up -> GRPO, each evaluated on the same held-out questions."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import is_tensorboard_available, set_seed
from tqdm import tqdm

from helpers.datagen import load_traces
from helpers.decoder import sampling_copy
from helpers.evaluate import evaluate, mcnemar, report
from helpers.grpo import check_fits, grpo
from helpers.models import add_lora, default_device, halve_frozen, load_model, save_adapter
from helpers.recipes import Recipe, build
from helpers.rewards import Reward
from helpers.runs import Run
from helpers.server import Server
from helpers.sft import sft
from helpers.stock import stock_score
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


def fitted(recipe: Recipe, device: str) -> Recipe:
    """The recipe as this device can compute it: a GPU without bfloat16, such as a T4, trains in float32.

    It samples in float16 where the recipe says bfloat16. (PyTorch would imitate bfloat16 there, which is slow.)
    """
    if device != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False):
        return recipe
    other = {key: "float16" for key in ("sampler_dtype",) if getattr(recipe, key) == "bfloat16"}
    return replace(recipe, mixed_precision="no", dtype=recipe.dtype.replace("bfloat16", "float32"), **other)


def send_to_tracker(run: Run, accelerator: Accelerator) -> None:
    """Draw the numbers that a run logs in the accelerator's tracker as well, each under its stage's name."""

    def also(name: str, record: dict) -> None:
        if name in ("metrics", "eval"):
            label = "/".join(record[key] for key in ("stage", "decoding") if key in record)
            numbers = {f"{label}/{k}": v for k, v in record.items() if type(v) in (int, float) and k != "step"}
            accelerator.log(numbers, step=record.get("step", 0))

    accelerator.init_trackers("tracker")
    run.also = also


def held_out(recipe: Recipe) -> Task:
    """The recipe's test questions: the same for every seed of a recipe, so that runs can be compared."""
    return load_task(recipe.task, "test", recipe.evaluation.size, seed=0, balanced=recipe.balanced)


def train(recipe: Recipe, out: str | Path, resume: bool = False, say=tqdm.write, progress: bool = True) -> Run:
    """Run a recipe in a folder, or go on with what is there. `say` gets a line for a person at each milestone.

    Under `accelerate launch` several processes share the work; the first alone writes, speaks and evaluates.
    """
    if resume:
        recipe = build(Recipe, Run.open(out).config["recipe"])
    recipe = fitted(recipe, default_device())
    if recipe.tracker and not is_tensorboard_available():
        raise ValueError("tracker: tensorboard needs that package: run pip install tensorboard.")
    # Whatever is wrong with a recipe shows here, before its folder is made.
    test = held_out(recipe)
    traces = load_task(recipe.task, "train", recipe.sft.traces, seed=recipe.seed, balanced=recipe.balanced)
    written = None
    if recipe.sft.traces_file:
        written, traces = load_traces(recipe.sft.traces_file, traces)
    task = load_task(recipe.task, "train", recipe.train_size, seed=recipe.seed + 1000, balanced=recipe.balanced)
    check_fits(recipe.grpo, task)
    accelerator = Accelerator(mixed_precision=recipe.mixed_precision, cpu=default_device() == "cpu",
                              log_with=recipe.tracker, project_dir=str(out))  # fmt: skip
    first = accelerator.is_main_process
    if not first:
        progress, say = False, lambda sentence: None
    model, tokenizer = start_model(recipe)
    if recipe.lora and recipe.mixed_precision == "bf16":
        halve_frozen(model, torch.bfloat16)
    if first and not resume:
        Run.start(out, recipe, default_device(), accelerator.num_processes)
    accelerator.wait_for_everyone()
    run = Run.open(out)
    run.writes = first
    run.mend()
    if recipe.tracker:
        send_to_tracker(run, accelerator)
    say(f"{recipe.model} on {recipe.task}, seed {recipe.seed}; the run is kept in {run.folder}")

    def judge(stage: str) -> None:
        if first:
            _evaluate_stage(run, stage, model, tokenizer, test, recipe, say)
        accelerator.wait_for_everyone()

    judge("base")
    sft(model, tokenizer, traces, recipe.sft, traces=written, accelerator=accelerator, run=run, seed=recipe.seed,
        progress=progress, say=say)  # fmt: skip
    stages = ["base"]
    if recipe.sft.epochs:
        stages.append("sft")
        judge("sft")

    sampler_dtype = getattr(torch, recipe.sampler_dtype) if recipe.sampler_dtype else None
    server = recipe.server and Server(recipe.server.url, recipe.server.model, Path(recipe.server.adapters))
    grpo(
        model, tokenizer, task, recipe.grpo, reward=Reward(task, recipe.reward), accelerator=accelerator,
        sampler_dtype=sampler_dtype, sampler=server, run=run, seed=recipe.seed, progress=progress, say=say,
    )  # fmt: skip
    if recipe.grpo.steps:
        stages.append("grpo")
        judge("grpo")
    if recipe.lora and first:
        with run.writing():
            save_adapter(model, run.folder / "adapter")
    for decoding in ("greedy", "sampled") if first and len(stages) > 1 else ():
        say(compare(run, *stages[-2:], decoding))
    if accelerator.num_processes > 1:
        accelerator.wait_for_everyone()
        accelerator.end_training()  # a process that goes while another still listens can take it down
    return run


def _evaluate_stage(run: Run, stage: str, model, tokenizer, test: Task, recipe: Recipe, say) -> None:
    step = (run.newest(stage) or {"step": 0})["step"]
    # By a run that was stopped later. One that was made longer since then is another policy, and evaluated again.
    logged = run.records("eval")
    kept = [r for r in logged if r["stage"] != stage or r.get("step", step) == step]
    if len(kept) < len(logged):
        run.write_records("eval", kept)
    done = {r["decoding"] for r in kept if r["stage"] == stage}
    wanted = {"greedy": 0.0, "sampled": recipe.evaluation.temperature}
    sampler = model
    if recipe.sampler_dtype and done != wanted.keys():
        sampler = sampling_copy(model, getattr(torch, recipe.sampler_dtype))
    for decoding, temperature in wanted.items():
        if decoding in done:
            continue
        result = evaluate(
            sampler, tokenizer, test, temperature=temperature, seed=recipe.seed,
            max_new_tokens=recipe.evaluation.max_new_tokens,
        )  # fmt: skip
        run.write_records(f"evaluations/{stage}-{decoding}", result.records)
        run.log("eval", {"stage": stage, "step": step, "decoding": decoding, **result.summary()})
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


def results_table(folders: Sequence[str | Path]) -> str:
    """A Markdown table of runs: each stage's held-out accuracy in %, its 95 % interval, and what belongs beside it.

    "stock scorer" is what reasoning-gym's own scorer gives the same sampled responses on average.
    """

    def share(e: dict) -> str:
        return f"{100 * e['accuracy']:.1f} ({100 * e['accuracy_low']:.1f} to {100 * e['accuracy_high']:.1f})"

    lines = [
        "| run | stage | greedy | sampled | stock scorer | constant answer | format | derivation right | n |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for folder in folders:
        run = Run.open(folder)
        test, evaluations = held_out(build(Recipe, run.config["recipe"])), run.records("eval")
        for stage in dict.fromkeys(e["stage"] for e in evaluations):
            of_stage = {e["decoding"]: e for e in evaluations if e["stage"] == stage}
            if len(of_stage) < 2:
                continue  # the run is not that far
            greedy, sampled = of_stage["greedy"], of_stage["sampled"]
            records = run.records(f"evaluations/{stage}-sampled")
            stock = sum(stock_score(r["answer"], test[r["question"]], test) for r in records) / len(records)
            lines.append(
                f"| {Path(folder).name} | {stage} | {share(greedy)} | {share(sampled)} | {100 * stock:.1f} "
                f"| {100 * greedy['baseline']:.1f} | {100 * sampled['format_rate']:.0f} "
                f"| {100 * sampled['thinking_rate']:.0f} | {greedy['questions']} |"
            )
    return "\n".join(lines)
