"""Ablations on the pocket model: one setting changed at a time, on several seeds, from the same warm-up each."""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from accelerate import Accelerator
from scipy import stats

from helpers.evaluate import evaluate
from helpers.grpo import check_fits, grpo
from helpers.hygiene import Stopped
from helpers.models import default_device
from helpers.names import unknown
from helpers.pipeline import held_out, start_model, train
from helpers.recipes import Recipe, load_recipe
from helpers.rewards import Reward
from helpers.runs import Run, environment, write_atomically
from helpers.tasks import Task, load_task

BASELINE, WARM_UP = "baseline", "warm-up"
# What each variant changes in the recipe `pocket`; a step has 288 responses and 2 updates in all but those that say so.
VARIANTS: dict[str, tuple[str, ...]] = {
    BASELINE: (),
    "BNPO": ("grpo.loss.loss_type=bnpo",),
    "DAPO, clip-higher": ("grpo.loss.loss_type=dapo", "grpo.loss.epsilon_high=0.28"),
    "Dr. GRPO": ("grpo.loss.loss_type=dr_grpo", "grpo.scale=none"),
    "GSPO": ("grpo.loss.importance=sequence", "grpo.loss.epsilon_low=0.0003", "grpo.loss.epsilon_high=0.0004"),
    "CISPO": ("grpo.loss.loss_type=cispo", "grpo.loss.epsilon_high=5"),
    "std not divided by": ("grpo.scale=none",),
    "std of the batch": ("grpo.scale=batch",),
    "mean divided by": ("grpo.scale=mean",),
    "an advantage a step": ("grpo.credit=step",),
    "a step, by the mean": ("grpo.credit=step", "grpo.scale=mean"),
    "steps paid": ("reward.correct=0", "reward.steps=0.85"),
    "G = 3": ("grpo.group_size=3", "grpo.questions_per_rollout=96"),
    "G = 12": ("grpo.group_size=12", "grpo.questions_per_rollout=24"),
    "temperature 0.7": ("grpo.temperature=0.7",),
    "temperature 1.3": ("grpo.temperature=1.3",),
    "1 update a buffer": ("grpo.minibatch_size=288",),
    "6 updates a buffer": ("grpo.updates_per_buffer=3",),
    "KL, beta 0.04": ("grpo.loss.beta=0.04",),
    "entropy bonus 0.01": ("grpo.loss.entropy_coefficient=0.01",),
    "learning rate / 3": ("grpo.learning_rate=3.3e-5",),
    "learning rate x 3": ("grpo.learning_rate=3e-4",),
    "no warm-up": ("sft.epochs=0",),
}


def _recipe_of_warm_up(recipe: str, settings: Sequence[str], seed: int) -> Recipe:
    return load_recipe(recipe, [*settings, f"seed={seed}", "grpo.steps=0"])


def _recipe_of_variant(recipe: str, settings: Sequence[str], variant: str, seed: int) -> Recipe:
    return load_recipe(recipe, [*settings, *VARIANTS[variant], f"seed={seed}"])


def _questions(chosen: Recipe) -> Task:
    return load_task(chosen.task, "train", chosen.train_size, seed=chosen.seed + 1000, balanced=chosen.balanced)


def _warm_up(recipe: str, settings: Sequence[str], seed: int, folder: Path) -> list[dict[str, Any]]:
    chosen = _recipe_of_warm_up(recipe, settings, seed)
    run = train(chosen, folder, resume=(folder / "config.yaml").exists(), say=lambda text: None, progress=False)
    stages = {"base": "base", "sft": WARM_UP}
    return [
        {"variant": stages[e["stage"]], "seed": seed, **_figures(e)}
        for e in run.records("eval") if e["stage"] in stages and e["decoding"] == "sampled"
    ]  # fmt: skip


def _figures(summary: dict[str, Any]) -> dict[str, Any]:
    wanted = ("questions", "accuracy", "baseline", "format_rate", "thinking_rate", "mean_length")
    return {name: summary[name] for name in wanted}


def _one(recipe: str, settings: Sequence[str], variant: str, seed: int, warm: Path) -> list[dict[str, Any]]:
    chosen = _recipe_of_variant(recipe, settings, variant, seed)
    model, tokenizer = start_model(chosen)
    if chosen.sft.epochs:
        Run.open(warm).load_weights(model, "sft")
    task = _questions(chosen)
    accelerator = Accelerator(cpu=default_device() == "cpu")
    history = grpo(model, tokenizer, task, chosen.grpo, reward=Reward(task, chosen.reward), accelerator=accelerator,
                   seed=seed, progress=False)  # fmt: skip
    after = evaluate(model, tokenizer, held_out(chosen), temperature=chosen.evaluation.temperature, seed=seed,
                     max_new_tokens=chosen.evaluation.max_new_tokens)  # fmt: skip
    curves = {name: [round(r[name], 4) for r in history] for name in ("accuracy", "length", "entropy", "clip_share")}
    return [{"variant": variant, "seed": seed, **_figures(after.summary()), "curves": curves}]


def _check_recipes(recipe: str, settings: Sequence[str], missing: dict[int, list[str]]) -> None:
    """Raise the ValueError, in one sentence, that a run would stop with for its recipe: now, not after hours."""
    for number, (seed, names) in enumerate(missing.items()):
        start = _recipe_of_warm_up(recipe, settings, seed)
        chosen = [_recipe_of_variant(recipe, settings, name, seed) for name in names]
        if number == 0:  # drawing the questions takes time, and what a task lacks it lacks for each seed
            held_out(start)
            task = _questions(start)  # no variant has other questions
            for one in (start, *chosen):
                check_fits(one.grpo, task)


def _check_same(path: Path, recipe: str, settings: Sequence[str]) -> None:
    """Raise ValueError, in one sentence, where the ablation that `path` tells of had another recipe or settings."""
    cure = "choose another --out, or delete the folder"
    text = path.read_bytes()
    try:
        told = yaml.safe_load(text)
        # The variants come after the settings, so a file that has them was not cut off within the settings.
        before = {"recipe": told["recipe"], "settings": list(told["settings"]), "variants": told["variants"]}
    except Exception:  # PyYAML has a YAMLError, and many another error; and what it reads may be no dictionary
        raise ValueError(f"{path} is damaged, so what its results are of is not known: {cure}.") from None
    for key, now in (("recipe", recipe), ("settings", list(settings))):
        if before[key] != now:
            raise ValueError(f"The results in {path.parent} are of the {key} {before[key]!r}, not {now!r}: {cure}.")


def ablate(
    out: str | Path,
    seeds: Sequence[int] = (0, 1, 2),
    variants: Sequence[str] = tuple(VARIANTS),
    workers: int = 1,
    recipe: str = "pocket",
    settings: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Train each variant on each seed and append what came out to `out`/results.jsonl; what is there is not run again.

    All variants of a seed go on from one warm-up and answer the same held-out questions, at temperature 1. `workers`
    runs are under way at a time, one thread each. Returns all records. Raises ValueError, in one sentence and before
    anything is run, for an unknown variant, a recipe or setting that will not do, and an `out` with the results of
    others. An error or Ctrl-C begins no further run; what is under way may end, and what came out of it is kept.
    Ctrl-C raises `Stopped`.
    """
    for name in variants:
        if name not in VARIANTS:
            raise ValueError(unknown("variant", name, VARIANTS))
    run = Run(out)
    if (run.folder / "ablation.yaml").exists():
        _check_same(run.folder / "ablation.yaml", recipe, settings)
    done = {(r["variant"], r["seed"]) for r in run.records("results")}
    missing = {seed: [v for v in variants if (v, seed) not in done] for seed in seeds}
    missing = {seed: names for seed, names in missing.items() if names}
    _check_recipes(recipe, settings, missing)
    run.folder.mkdir(parents=True, exist_ok=True)
    if not (run.folder / "ablation.yaml").exists():
        told = {"recipe": recipe, "settings": list(settings), "variants": {k: list(v) for k, v in VARIANTS.items()}}
        told["environment"] = environment(default_device())
        write_atomically(run.folder / "ablation.yaml", yaml.safe_dump(told, sort_keys=False))
    run.mend()
    if not missing:
        return run.records("results")

    def keep(records: Iterable[dict[str, Any]]) -> None:
        for record in records:
            key = (record["variant"], record["seed"])
            if key not in done:
                run.log("results", record)
                done.add(key)
                say(f"seed {record['seed']}, {record['variant']}: {100 * record['accuracy']:.1f} %")

    folders = {seed: run.folder / f"warm-up-seed{seed}" for seed in missing}
    queue = deque((WARM_UP, seed) for seed in missing)
    under_way: dict[Future, tuple[str, int]] = {}

    def begin(name: str, seed: int) -> Future:
        if name == WARM_UP:
            return pool.submit(_warm_up, recipe, settings, seed, folders[seed])
        return pool.submit(_one, recipe, settings, name, seed, folders[seed])

    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        try:
            while queue or under_way:
                # No more than can begin at once: what the pool has taken from its own queue cannot be cancelled.
                while queue and len(under_way) < workers:
                    name, seed = queue.popleft()
                    under_way[begin(name, seed)] = name, seed
                wait(under_way, return_when=FIRST_COMPLETED)
                for future in [future for future in under_way if future.done()]:
                    name, seed = under_way[future]
                    if isinstance(future.exception(), Exception):  # not Ctrl-C
                        say(f"seed {seed}, {name}: failed")
                    keep(future.result())
                    del under_way[future]
                    if name == WARM_UP:
                        queue += [(variant, seed) for variant in missing[seed]]
        finally:
            if running := sum(not future.done() for future in under_way):
                say(f"no more runs are begun; waiting for those under way: {running}")
            try:
                pool.shutdown(cancel_futures=True)
            finally:  # also where a second Ctrl-C ends the waiting
                for future in under_way:
                    if future.done() and not future.cancelled() and future.exception() is None:
                        keep(future.result())
    except KeyboardInterrupt:
        raise Stopped(f"Stopped; {run.folder} keeps what is done, and the same call goes on from there.") from None
    return run.records("results")


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval of a mean over seeds, by Student's t; with one value the interval is without bounds."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return float(values.mean()), -np.inf, np.inf
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


def against_baseline(records: Sequence[dict[str, Any]], key: str = "accuracy") -> list[dict[str, Any]]:
    """For each variant: its mean over seeds, and the mean difference to the baseline of the same seeds, with intervals.

    The difference is paired: a seed's warm-up and questions are the same for both, so they cancel. "gain" and its
    bounds are None where the baseline has none of the variant's seeds. "differs": its interval leaves out 0; None with
    fewer than three seeds that both have, because two can agree by accident, and their interval is then a point.
    `key`: a figure of the records, a share in [0, 1] for accuracy.
    """
    by_variant: dict[str, dict[int, float]] = {}
    for record in records:
        by_variant.setdefault(record["variant"], {})[record["seed"]] = record[key]
    base = by_variant.get(BASELINE, {})
    order = [name for name in ("base", WARM_UP, *VARIANTS) if name in by_variant]
    rows = []
    for name in order:
        values = by_variant[name]
        mean, low, high = mean_interval(list(values.values()))
        pairs = [v - base[seed] for seed, v in values.items() if seed in base]
        gain, gain_low, gain_high = mean_interval(pairs) if pairs else (None, None, None)
        differs = None if len(pairs) < 3 else name != BASELINE and (gain_low > 0 or gain_high < 0)
        rows.append(
            {"variant": name, "seeds": len(values), "mean": mean, "low": low, "high": high, "gain": gain,
             "gain_low": gain_low, "gain_high": gain_high, "differs": differs}
        )  # fmt: skip
    return rows


def ablation_table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line a variant, sampled accuracy and its paired difference to the baseline, in points.

    Where there is no baseline on any of its seeds, a variant's line has no difference and says so.
    """
    lines = [
        "| variant | sampled accuracy, % | difference to the baseline, points (95 %) | parts from 0 | seeds |",
        "|---|---|---|---|---|",
    ]
    for row in against_baseline(records):
        gain, verdict = "", {True: "yes", False: "no", None: "too few seeds"}[row["differs"]]
        if row["variant"] == BASELINE:
            verdict = ""
        elif row["gain"] is None:
            verdict = "no baseline"
        else:
            gain = f"{100 * row['gain']:+.1f} ({100 * row['gain_low']:+.1f} to {100 * row['gain_high']:+.1f})"
        lines.append(f"| {row['variant']} | {100 * row['mean']:.1f} | {gain} | {verdict} | {row['seeds']} |")
    return "\n".join(lines)
