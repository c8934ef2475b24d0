"""Figures in one style: colours that colour-blind readers tell apart, a light ground that reads in a dark theme too."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#6b6b6b"  # Okabe and Ito's palette
STAGE_NAMES = {"base": "base", "sft": "after the warm-up", "grpo": "after GRPO"}


def figure(width: float = 8.0, height: float = 3.2, columns: int = 1) -> tuple[Figure, Any]:
    """An empty figure in the house style, sizes in inches, and its axes (an array if there are several columns)."""
    fig = Figure(figsize=(width, height), dpi=110, facecolor="white", layout="constrained")
    axes = fig.subplots(1, columns)
    for ax in np.atleast_1d(axes):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", alpha=0.25)
    return fig, axes


def show(fig: Figure, alt: str) -> None:
    """Display a figure in a notebook as a PNG with an alternative text, which is also its plain-text form."""
    from IPython.display import display

    png = io.BytesIO()
    fig.savefig(png, format="png")
    bundle = {"image/png": png.getvalue(), "text/plain": alt}
    display(bundle, metadata={"image/png": {"alt": alt}}, raw=True)


def smooth(values: Sequence[float], window: int = 7) -> np.ndarray:
    """The mean over the last `window` values, or as many as there are."""
    values = np.asarray(values, dtype=float)
    return np.array([values[max(0, i + 1 - window) : i + 1].mean() for i in range(len(values))])


def training_curves(metrics: Sequence[Mapping[str, float]]) -> Figure:
    """Reward with its standard deviation, groups without signal, and entropy, by step; input: GRPO metrics records."""
    steps = [m["step"] for m in metrics]
    fig, (left, middle, right) = figure(11.0, 3.2, columns=3)
    reward, spread = (np.array([m[key] for m in metrics]) for key in ("reward", "reward_std"))
    mean, half = smooth(reward), smooth(spread)
    left.fill_between(steps, mean - half, np.minimum(mean + half, 1.0), color=BLUE, alpha=0.12, label="± 1 std")
    left.plot(steps, reward, ".", color=BLUE, alpha=0.35, markersize=4, label="one step")
    left.plot(steps, mean, color=BLUE, linewidth=2, label="mean of 7 steps")
    left.set(title="Reward of the rollouts", xlabel="step", ylim=(0, 1.02))
    left.legend(loc="lower right", fontsize=8)
    for ax, key, colour, title in (
        (middle, "no_signal", ORANGE, "Share of groups without signal"),
        (right, "entropy", GREEN, "Entropy (nats a token)"),
    ):
        values = [m[key] for m in metrics]
        ax.plot(steps, values, ".", color=colour, alpha=0.35, markersize=4)
        ax.plot(steps, smooth(values), color=colour, linewidth=2)
        ax.set(title=title, xlabel="step", ylim=(0, None))
    return fig


def accuracy_bars(evaluations: Sequence[Mapping[str, Any]], title: str = "") -> Figure:
    """Held-out accuracy by stage, greedy and sampled, with Wilson intervals, beside the constant answer.

    Input: records of a run's eval.jsonl.
    """
    stages = [s for s in STAGE_NAMES if any(e["stage"] == s for e in evaluations)]
    fig, ax = figure(7.5, 3.4)
    for offset, decoding, colour in ((-0.19, "greedy", BLUE), (0.19, "sampled", ORANGE)):
        for place, stage in enumerate(stages):
            e = next(e for e in evaluations if e["stage"] == stage and e["decoding"] == decoding)
            accuracy, low, high = (100 * e[key] for key in ("accuracy", "accuracy_low", "accuracy_high"))
            bar = ax.bar(place + offset, accuracy, 0.36, color=colour, label=decoding if place == 0 else None)
            error = [[max(0.0, accuracy - low)], [max(0.0, high - accuracy)]]
            ax.errorbar(place + offset, accuracy, error, color="black", capsize=3, linewidth=1)
            ax.annotate(f"{accuracy:.0f} %", (place + offset, high), (0, 3), textcoords="offset points", ha="center",
                        fontsize=9)  # fmt: skip
            bar[0].set_edgecolor("black")
    baseline = evaluations[0]
    ax.axhline(100 * baseline["baseline"], color=GREY, linestyle="--", linewidth=1.2)
    label = f"always “{baseline['baseline_answer']}”: {100 * baseline['baseline']:.0f} %"
    place = (len(stages) - 0.55, 100 * baseline["baseline"])
    ax.annotate(label, place, (4, 3), textcoords="offset points", color=GREY, fontsize=9)
    ax.set_xlim(-0.5, len(stages) - 0.1)
    ax.set_xticks(range(len(stages)), [STAGE_NAMES[s] for s in stages])
    ax.set(ylabel="right (%)", ylim=(0, 109), title=title or f"{baseline['questions']} held-out questions")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, fontsize=9, frameon=False)
    return fig


def reward_grid(rewards, labels: Sequence[str]) -> Figure:
    """Rewards of a rollout as a grid: a row a question, a column a response; rows without signal are marked."""
    rewards = np.asarray(rewards)
    fig, ax = figure(7.0, 0.42 * len(rewards) + 1.1)
    ax.grid(False)
    ax.imshow(rewards, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(rewards):
        ax.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=9,
                color="white" if value < 0.5 else "black")  # fmt: skip
    flat = (rewards == rewards[:, :1]).all(axis=1)
    names = [f"{label}  (no signal)" if same else label for label, same in zip(labels, flat, strict=True)]
    ax.set_yticks(range(len(rewards)), names)
    ax.set(title="Reward of each response", xlabel="response of the group")
    ax.set_xticks(range(rewards.shape[1]), range(1, rewards.shape[1] + 1))
    return fig


def token_shift(rows: Sequence[tuple[str, Sequence[str], Sequence[float], Sequence[float]]]) -> Figure:
    """Log-prob of each token of some completions before and after an update.

    rows: (title, tokens, log-probs before, log-probs after), nats; a panel each, one below the other.
    """
    fig = Figure(figsize=(10.0, 2.9 * len(rows)), dpi=110, facecolor="white", layout="constrained")
    axes = np.atleast_1d(fig.subplots(len(rows), 1, sharey=True))
    for ax, (title, tokens, before, after) in zip(axes, rows, strict=True):
        places = np.arange(len(tokens))
        ax.vlines(places, before, after, color=BLUE, linewidth=1.5)
        ax.plot(places, before, "o", color=GREY, markersize=5, label="before")
        ax.plot(places, after, "o", color=BLUE, markersize=5, label="after")
        ax.set_xticks(places, tokens, rotation=60, fontsize=9, ha="right", rotation_mode="anchor")
        ax.set(title=title, ylabel="log-prob (nats)")
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", alpha=0.25)
        ax.legend(fontsize=9, loc="lower left")
    return fig
