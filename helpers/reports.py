"""What recorded runs say: figures, tables, a diagnosis and an animation, made from run folders. Nothing here trains."""

import re
from base64 import b64encode
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten, wrap
from typing import Any

import numpy as np
from matplotlib.animation import PillowWriter
from matplotlib.figure import Figure
from scipy.stats import linregress

from helpers.drawings import visible
from helpers.evaluate import mcnemar
from helpers.plots import BLUE, GREEN, GREY, ORANGE, RED, STAGE_NAMES, figure, reward_range, smooth, training_curves
from helpers.prompts import extract_answer
from helpers.runs import Run

_DISJUNCTION = re.compile(r"[()\s]*[¬~]?[A-Z](?:[()\s]*∨[()\s]*[¬~]?[A-Z])+[()\s]*")
_STYLES = ((BLUE, "-"), (ORANGE, "--"), (GREEN, "-."), (RED, ":"), (GREY, (0, (6, 1, 1, 1))))
Choices = Sequence[Sequence[tuple[str, float]]]  # for each token of a response: (token, probability), likeliest first


def run_folders(*places: str | Path) -> dict[str, Path]:
    """Runs that lie in some folders, by name, place by place: folders with a config.yaml and a metrics.jsonl.

    A place that is not there holds none. A name that an earlier place has gets its place's name before it.
    """
    found: dict[str, Path] = {}
    for place in map(Path, places):
        for config in sorted(place.glob("*/config.yaml")):
            if (config.parent / "metrics.jsonl").is_file():
                name = config.parent.name
                found[f"{place.name}/{name}" if name in found else name] = config.parent
    return found


def grpo_steps(run: Run) -> list[dict[str, Any]]:
    """A run's GRPO metrics, a record a step."""
    return [m for m in run.records("metrics") if m["stage"] == "grpo"]


def evaluations(run: Run) -> dict[tuple[str, str], dict[str, Any]]:
    """A run's records of eval.jsonl by (stage, decoding)."""
    return {(e["stage"], e["decoding"]): e for e in run.records("eval")}


def reward_curves(runs: Mapping[str, Run]) -> Figure:
    """Reward of the rollouts by step, a panel a run (1 to 4); the band is the standard deviation of single rewards.

    All panels have one scale, so that they can be compared.
    """
    fig, axes = figure(min(11.0, 1.2 + 2.6 * len(runs)), 3.0, columns=len(runs))
    ends = []
    for ax, (name, run) in zip(np.atleast_1d(axes), runs.items(), strict=True):
        metrics = grpo_steps(run)
        steps, reward, spread = (np.array([m[key] for m in metrics]) for key in ("step", "reward", "reward_std"))
        ends.append(reward_range(reward))
        low, high = (np.clip(smooth(reward) + sign * smooth(spread), *ends[-1]) for sign in (-1, 1))
        ax.fill_between(steps, low, high, color=BLUE, alpha=0.15, linewidth=0, label="± 1 std")
        ax.plot(steps, reward, ".", color=BLUE, alpha=0.4, markersize=4, label="one step")
        ax.plot(steps, smooth(reward), color=BLUE, linewidth=2, label="mean of 7 steps")
        ax.set_title(name, fontsize=10)
        ax.set_xlabel("step")
    lows, highs = zip(*ends, strict=True)
    for ax in np.atleast_1d(axes):
        ax.set_ylim(1.02 * min(lows), 1.02 * max(highs))
    np.atleast_1d(axes)[0].set_ylabel("reward")
    np.atleast_1d(axes)[0].legend(loc="lower right", fontsize=8)
    return fig


def step_lines(runs: Mapping[str, Run], keys: Mapping[str, str]) -> Figure:
    """Some metrics by step, means of 7 steps: a panel a metric (key: title), a line a run (up to 5)."""
    fig, axes = figure(min(11.0, 1.0 + 3.4 * len(keys)), 3.6, columns=len(keys))
    for ax, (key, title) in zip(np.atleast_1d(axes), keys.items(), strict=True):
        for (name, run), (colour, style) in zip(runs.items(), _STYLES, strict=False):
            steps, values = zip(*((m["step"], m[key]) for m in grpo_steps(run)), strict=True)
            ax.plot(steps, smooth(values), color=colour, linestyle=style, linewidth=2, label=name)
        ax.set(title=title, xlabel="step", ylim=(0, None))
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return fig


def accuracy_intervals(runs: Mapping[str, Run], stages: Sequence[str] = ("sft", "grpo")) -> Figure:
    """Held-out accuracy with Wilson intervals, a line a run and stage, greedy and sampled, beside the constant answer.

    A stage that a run was not evaluated at gets no line.
    """
    rows = [(name, stage, evaluations(run)) for name, run in runs.items() for stage in stages]
    rows = [row for row in rows if {(row[1], "greedy"), (row[1], "sampled")} <= row[2].keys()]
    fig, ax = figure(9.0, 0.3 * len(rows) + 1.4)
    ax.grid(False)
    place, places = -1.0, []
    for number, (name, stage, found) in enumerate(rows):
        places.append(place := place + (1.6 if number and rows[number - 1][0] != name else 1.0))
        for shift, decoding, marker, colour in ((-0.17, "greedy", "o", BLUE), (0.17, "sampled", "D", ORANGE)):
            low, middle, high = (100 * found[stage, decoding][f"accuracy{end}"] for end in ("_low", "", "_high"))
            ax.hlines(place + shift, low, high, color=colour, linewidth=2)
            ax.plot(middle, place + shift, marker, color=colour, markeredgecolor="black", label=decoding)
        baseline = 100 * found[stage, "greedy"]["baseline"]
        ax.vlines(baseline, place - 0.45, place + 0.45, color="black", linestyle=":", label="constant answer")
    ax.set_yticks(places, [f"{name}, {STAGE_NAMES[stage]}" for name, stage, _ in rows], fontsize=9)
    ax.set(xlim=(0, 100), ylim=(place + 0.7, -0.7), xlabel="right (%), with 95 % interval")
    once = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    fig.legend(once.values(), once.keys(), loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return fig


def run_page(run: Run) -> tuple[Figure, dict[str, float | str]]:
    """A run at one look: its curves (of GRPO, or else of the warm-up's loss) and what goes beside them."""
    metrics = grpo_steps(run)
    if len(metrics) >= 2:
        fig = training_curves(metrics)
    else:
        fig, ax = figure()
        ax.plot([m["loss"] for m in run.records("metrics") if m["stage"] == "sft"], color=BLUE)
        ax.set(title="Loss of the warm-up", xlabel="step", ylim=(0, None))
    numbers: dict[str, float | str] = {"GRPO steps": len(metrics)}
    for (stage, decoding), e in evaluations(run).items():
        accuracy, low, high, constant = (100 * e[k] for k in ("accuracy", "accuracy_low", "accuracy_high", "baseline"))
        text = f"{accuracy:.1f} % right ({low:.1f} to {high:.1f}; n = {e['questions']}; constant {constant:.1f} %)"
        numbers[f"{STAGE_NAMES[stage]}, {decoding}"] = text
    numbers["what went wrong or stayed flat"] = "".join(f"\n- {sentence}" for sentence in diagnosis(run))
    return fig, numbers


def only_disjunction(answer: str | None) -> bool:
    """Is an answer nothing but letters, negated or not, joined by "or"? Such as "(P ∨ ¬Q ∨ R)"."""
    return _DISJUNCTION.fullmatch(answer or "") is not None


def responses_table(run: Run, question: int, stages: Sequence[str], decoding: str = "sampled") -> str:
    """A Markdown table: what a run answered to held-out question number `question`, a column a stage."""
    texts = []
    for stage in stages:
        record = run.records(f"evaluations/{stage}-{decoding}")[question]
        text = shorten(record["completion"], 330, placeholder=" …")
        text = re.sub(r"[&<>|*_$`\\[\]~]", lambda sign: f"&#{ord(sign[0])};", text)  # no mark-up in what a model wrote
        verdict = "right" if record["correct"] == 1 else "no answer" if record["answer"] is None else "wrong"
        texts.append(f"{text} **{verdict}**")
    heads = " | ".join(STAGE_NAMES[stage] for stage in stages)
    return f"| {heads} |\n{'|---' * len(stages)}|\n| {' | '.join(texts)} |"


def diagnosis(run: Run) -> list[str]:
    """What went wrong or stayed flat in a run, from its files alone: a sentence each, with the numbers behind it."""
    steps, found = grpo_steps(run), evaluations(run)
    told = _while_training(run, steps) if steps else ["It has no GRPO steps: this is a warm-up alone."]
    if steps and ("grpo", "sampled") not in found:
        told.append(f"It ended at step {steps[-1]['step']} without an evaluation: what it learned is not measured.")
    told += _when_examined(run, found)
    return told or ["Nothing that these checks look for went wrong or stayed flat."]


def _while_training(run: Run, steps: Sequence[Mapping[str, float]]) -> list[str]:
    told, k, window = [], max(1, min(10, len(steps) // 5)), min(10, max(3, len(steps) // 3))
    some = f"{k} steps" if k > 1 else "step"
    if all(m["reward"] == 0 and m["no_signal"] == 1 for m in steps):  # credit=step needs no reward
        return [f"Every reward in {len(steps)} steps is 0: no response beats its group, so nothing can be learned."]
    keys = ("reward", "no_signal", "length", "entropy")
    first, last = ({key: np.mean([m[key] for m in part]) for key in keys} for part in (steps[:k], steps[-k:]))
    trend = linregress([m["step"] for m in steps], [m["reward"] for m in steps]) if len(steps) > 2 else None
    clear = trend is not None and trend.pvalue < 0.05  # where no reward differs from another, p is nan
    if not clear or trend.slope < 0:
        ends = f"(first {some} {first['reward']:.2f}, last {some} {last['reward']:.2f})"
        told.append(f"The reward {'fell' if clear else 'has no clear trend'} {ends}.")
    if last["no_signal"] > 0.5:
        state, share = "has stopped" if last["no_signal"] > 0.95 else "has slowed down", 100 * last["no_signal"]
        told.append(f"Learning {state}: {share:.0f} % of the groups of the last {some} carry no signal.")
    late = [s for s in run.records("samples") if s["stage"] == "grpo" and s["step"] > steps[-1]["step"] - window]
    answers = Counter((extract_answer(s["completion"]) or "none").lower() for s in late).most_common(1)
    if len({s["truth"] for s in late}) > 1 and answers[0][1] >= 0.95 * len(late):
        share = f"{100 * answers[0][1] / len(late):.0f} % of the responses kept from the last {window} steps"
        told.append(f"It gives one answer to everything: {share} say “{answers[0][0]}”, whatever the question.")
        if last["entropy"] > 0.5 * first["entropy"]:
            told.append(f"The entropy hides that: {first['entropy']:.2f} at first, {last['entropy']:.2f} nats at last.")
    if last["entropy"] < 0.3 * first["entropy"]:
        told.append(f"The entropy fell from {first['entropy']:.3f} to {last['entropy']:.3f} nats: little new is tried.")
    if abs(last["length"] / first["length"] - 1) > 0.2:
        told.append(f"Responses went from {first['length']:.0f} to {last['length']:.0f} tokens: read why.")
    return told


def _when_examined(run: Run, found: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[str]:
    told = []
    for e in [found[stage, "sampled"] for stage in ("grpo", "sft") if (stage, "sampled") in found][:1]:
        if e["accuracy_low"] <= e["baseline"]:
            pair = f"{100 * e['accuracy']:.1f} % against {100 * e['baseline']:.1f} %"
            told.append(f"Sampled, it is not clearly above the constant answer: {pair}.")
    both = [d for d in ("greedy", "sampled") if {("sft", d), ("grpo", d)} <= found.keys()]
    answers = {(s, d): run.records(f"evaluations/{s}-{d}") for d in both for s in ("sft", "grpo")}
    for decoding in both:
        before, after = ([r["correct"] == 1 for r in answers[stage, decoding]] for stage in ("sft", "grpo"))
        gain, p = 100 * (np.mean(after) - np.mean(before)), mcnemar(before, after)["p"]
        if p >= 0.05 or gain < 0:
            what = "fell" if p < 0.05 else "did not clearly change"
            told.append(f"{decoding.capitalize()} accuracy {what} with GRPO ({gain:+.1f} points, p = {p:.2g}).")
    if "sampled" in both:
        old, new = found["sft", "sampled"], found["grpo", "sampled"]
        right, sound = (100 * (new[key] - old[key]) for key in ("accuracy", "thinking_rate"))
        if right >= 5 and sound < right / 2:
            told.append(f"Right answers rose by {right:.0f} points, right derivations by {sound:.0f}: read them.")
        plain = [100 * np.mean([only_disjunction(r["answer"]) for r in answers[s, "sampled"]]) for s in ("sft", "grpo")]
        if plain[1] > plain[0] + 20:
            told.append(f"One shape: {plain[1]:.0f} % of answers only join letters by “or” ({plain[0]:.0f} % before).")
    return told


def answer_moment(question: str, tokens: Sequence[str], choices: Choices, at: int, fig: Figure | None = None) -> Figure:
    """An answer up to token `at` (from 1), and the likeliest tokens for that place; on a new figure or on `fig`."""
    fig = fig or Figure(figsize=(8.0, 3.6), dpi=110, facecolor="white")
    fig.clear()
    page, bars = fig.add_axes((0.02, 0.03, 0.66, 0.94)), fig.add_axes((0.82, 0.22, 0.16, 0.56))
    asked, written = ([piece for line in text.split("\n") for piece in wrap(line, 52) or [""]]
                      for text in (question, "".join(tokens[:at]) + "▌"))  # fmt: skip
    page.axis("off")
    page.set(xlim=(0, 1), ylim=(14.5, -0.8))
    style = {"family": "monospace", "fontsize": 9.5, "parse_math": False}
    for row, line in enumerate([*asked, "", *written]):
        page.text(0, row, line, color=GREY if row < len(asked) else "black", **style)
    taken, chances = zip(*choices[at - 1][:5], strict=True)
    names = [re.sub(r"[^\x00-\u2e7f]", "▯", visible(token)) for token in taken]  # the font has no others
    colours = [BLUE if token == tokens[at - 1] else "#b5b5b5" for token in taken]
    bars.barh(range(len(names)), np.multiply(chances, 100), color=colours)
    bars.set_yticks(range(len(names)), names, **style)
    bars.set(xlim=(0, 100), ylim=(4.6, -0.6), xlabel="probability (%)", title=f"token {at} of {len(tokens)}")
    bars.spines[["top", "right"]].set_visible(False)
    return fig


class _ThreeTimes(PillowWriter):
    """A GIF that comes to rest on its last frame: what moves for ever disturbs reading."""

    def finish(self) -> None:
        first, *others = self._frames
        first.save(self.outfile, save_all=True, append_images=others, duration=int(1000 / self.fps), loop=2)


def answer_animation(question: str, tokens: Sequence[str], choices: Choices, fps: int = 6) -> bytes:
    """An answer token by token as a GIF, `answer_moment` a frame. It rests at the end, and plays three times."""
    fig, writer = Figure(figsize=(8.0, 3.6), facecolor="white"), _ThreeTimes(fps=fps)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "answer.gif"
        with writer.saving(fig, str(path), dpi=80):
            for at in [*range(1, len(tokens) + 1), *[len(tokens)] * 3 * fps]:
                answer_moment(question, tokens, choices, at, fig)
                writer.grab_frame()
        return path.read_bytes()


def show_gif(gif: bytes, alt: str) -> None:
    """Display a GIF in a notebook with an alternative text, which is also its plain-text form."""
    from IPython.display import display

    display({"image/gif": b64encode(gif).decode(), "text/plain": alt}, metadata={"image/gif": {"alt": alt}}, raw=True)
