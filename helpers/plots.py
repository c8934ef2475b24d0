"""Figures in one style: colours that colour-blind readers tell apart, a light ground that reads in a dark theme too."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#6b6b6b"  # Okabe and Ito's palette
SIGNED = LinearSegmentedColormap.from_list("blame to praise", [ORANGE, "white", BLUE])
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
    show_png(png_bytes(fig), alt)


def png_bytes(fig: Figure) -> bytes:
    """A figure as the bytes of a PNG."""
    png = io.BytesIO()
    fig.savefig(png, format="png")
    return png.getvalue()


def show_png(png: bytes, alt: str) -> None:
    """Display a PNG in a notebook with an alternative text, which is also its plain-text form."""
    from IPython.display import display

    display({"image/png": png, "text/plain": alt}, metadata={"image/png": {"alt": alt}}, raw=True)


def smooth(values: Sequence[float], window: int = 7) -> np.ndarray:
    """The mean over the last `window` values, or as many as there are."""
    values = np.asarray(values, dtype=float)
    return np.array([values[max(0, i + 1 - window) : i + 1].mean() for i in range(len(values))])


def reward_range(reward: np.ndarray) -> tuple[float, float]:
    """The ends of a reward's scale: 0 and 1, or the least and the greatest mean reward where they go beyond.

    A derivation paid for on top takes the total above 1, a length penalty below 0.
    """
    return float(reward.min(initial=0.0)), float(reward.max(initial=1.0))


def training_curves(metrics: Sequence[Mapping[str, float]]) -> Figure:
    """Reward with its standard deviation, groups without signal, and entropy, by step; input: GRPO metrics records."""
    steps = [m["step"] for m in metrics]
    fig, (left, middle, right) = figure(11.0, 3.2, columns=3)
    reward, spread = (np.array([m[key] for m in metrics]) for key in ("reward", "reward_std"))
    mean, half, (low, high) = smooth(reward), smooth(spread), reward_range(reward)
    left.fill_between(steps, mean - half, np.minimum(mean + half, high), color=BLUE, alpha=0.12, label="± 1 std")
    left.plot(steps, reward, ".", color=BLUE, alpha=0.35, markersize=4, label="one step")
    left.plot(steps, mean, color=BLUE, linewidth=2, label="mean of 7 steps")
    left.set(title="Reward of the rollouts", xlabel="step", ylim=(1.02 * low, 1.02 * high))
    left.legend(loc="lower right", fontsize=8)
    for ax, key, colour, title in (
        (middle, "no_signal", ORANGE, "Share of groups without signal"),
        (right, "entropy", GREEN, "Entropy (nats a token)"),
    ):
        values = [m[key] for m in metrics]
        ax.plot(steps, values, ".", color=colour, alpha=0.35, markersize=4)
        ax.plot(steps, smooth(values), color=colour, linewidth=2)
        ax.set(title=title, xlabel="step", ylim=(0, None))
    for ax in (left, middle, right):
        ax.xaxis.get_major_locator().set_params(integer=True)
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


def advantage_grids(panels: Sequence[tuple[str, Any]], labels: Sequence[str]) -> Figure:
    """Grids (Q, G) side by side, a row a question and a column a response: one of rewards, then some of advantages.

    panels: (title, values). Advantages are blue above 0 and orange below it; their signs are printed.
    """
    width = min(8.6, 1.6 + 0.58 * sum(np.shape(values)[1] for _, values in panels))
    fig, axes = figure(width, 0.42 * len(labels) + 1.15, columns=len(panels))
    for number, (ax, (title, values)) in enumerate(zip(np.atleast_1d(axes), panels, strict=True)):
        values = np.asarray(values, dtype=float)
        scale = {"cmap": "cividis", "vmin": 0, "vmax": 1} if number == 0 else {"cmap": SIGNED, "vmin": -2, "vmax": 2}
        ax.imshow(values, aspect="auto", **scale)
        ax.grid(False)
        for (row, column), value in np.ndenumerate(values):
            dark = value < 0.5 if number == 0 else value > 1.4
            text = f"{value:.2f}" if number == 0 or abs(value) < 0.005 else f"{value:+.2f}"
            ax.text(column, row, text, ha="center", va="center", fontsize=9, color="white" if dark else "black")
        ax.set_yticks(*((range(len(labels)), labels) if number == 0 else ([],)))
        ax.set_xticks(range(values.shape[1]), range(1, values.shape[1] + 1))
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("response")
    return fig


def token_shift(
    rows: Sequence[tuple[str, Sequence[str], Sequence[float], Sequence[float]]],
    per_row: int | None = None,
    width: float = 10.0,
) -> Figure:
    """Log-prob of each token of some completions before and after an update.

    rows: (title, tokens, log-probs before, log-probs after), nats; a panel each, one below the other.
    per_row: let a completion go on in a panel of its own after this many tokens. width: of the figure, in inches.
    """
    pieces = []
    for title, tokens, *values in rows:
        step = per_row or len(tokens)
        for at in range(0, len(tokens), step):
            piece = (part[at : at + step] for part in (tokens, *values))
            pieces.append((title if at == 0 else f"{title}, continued", *piece))
    height = 2.9 if per_row is None else 2.0
    fig = Figure(figsize=(width, height * len(pieces)), dpi=110, facecolor="white", layout="constrained")
    axes = np.atleast_1d(fig.subplots(len(pieces), 1, sharey=True))
    for ax, (title, tokens, before, after) in zip(axes, pieces, strict=True):
        places = np.arange(len(tokens))
        ax.vlines(places, before, after, color=BLUE, linewidth=1.5)
        ax.plot(places, before, "o", color=GREY, markerfacecolor="white", markersize=6, label="before")
        ax.plot(places, after, "o", color=BLUE, markersize=5, label="after")
        ax.set_xticks(places, tokens, rotation=60, fontsize=9, ha="right", rotation_mode="anchor")
        ax.set_title(title, fontsize=None if per_row is None else 10)
        ax.set_ylabel("log-prob (nats)")
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", alpha=0.25)
        if per_row is None or ax is axes[0]:
            ax.legend(fontsize=9, loc="lower left")
        if per_row:
            ax.set_xlim(-0.8, min(per_row, max(len(row[1]) for row in rows)) - 0.2)  # as wide as the panel above
    return fig


def matrices(
    panels: Sequence[tuple[str, Any]], rows: Sequence[str], columns: Sequence[str] | None, symbols: str = ""
) -> Figure:
    """Matrices (R, C) as heat maps side by side: blue above 0, orange below it, every number written out.

    panels: (title, values), all on one scale of colours; symbols: what stands between neighbours, such as "×=".
    """
    values = [np.asarray(v, dtype=float) for _, v in panels]
    top = max(np.abs(v).max() for v in values)
    width = 1.2 + sum(0.35 + 0.62 * v.shape[1] for v in values)
    fig, axes = figure(min(width, 8.0), 0.5 * len(rows) + 0.9, columns=len(panels))
    for number, (ax, (title, _), v) in enumerate(zip(np.atleast_1d(axes), panels, values, strict=True)):
        ax.imshow(v, aspect="auto", cmap=SIGNED, vmin=-top, vmax=top)
        ax.grid(False)
        for (row, column), x in np.ndenumerate(v):
            text = "0" if abs(x) < 0.0005 else f"{x:+.2f}" if top >= 0.5 else f"{x:+.3f}"
            colour = "white" if x > 0.8 * top else "black"
            ax.text(column, row, text, ha="center", va="center", fontsize=10, color=colour)
        ax.set_yticks(range(len(rows)), rows if number == 0 else [])
        ax.set_xticks(range(v.shape[1]), columns or [])
        ax.set_title(title, fontsize=10)
        if number:
            where = {"transform": ax.transAxes, "ha": "center", "va": "center"}
            ax.text(-0.1, 0.5, symbols[number - 1 : number], fontsize=15, **where)
    return fig


def logprob_rounds(history, tokens: Sequence[Sequence[str]], titles: Sequence[str]) -> Figure:
    """Log-probs of some responses' tokens over rounds of updates: a panel a response, an arrow a token.

    history: (rounds + 1, responses, T), in nats. A hollow dot is before the first round, small dots are after each
    round, a large dot is after the last.
    """
    history = np.asarray(history, dtype=float)
    fig, axes = figure(8.0, 3.4, columns=len(titles))
    low = min(history.min() * 1.12, -1.0)
    for i, (ax, title) in enumerate(zip(np.atleast_1d(axes), titles, strict=True)):
        places = np.arange(history.shape[2])
        before, after = history[0, i], history[-1, i]
        for x, start, end in zip(places, before, after, strict=True):
            arrow = {"arrowstyle": "->", "color": BLUE, "alpha": 0.6}
            ax.annotate("", (x + 0.13, end), (x + 0.13, start), arrowprops=arrow)
        for values in history[1:-1, i]:
            ax.plot(places, values, "o", color=BLUE, alpha=0.45, markersize=3.5)
        ax.plot(places, after, "o", color=BLUE, markersize=9, label="after the last round")
        hollow = {"markerfacecolor": "none", "markersize": 9, "markeredgewidth": 1.5}
        ax.plot(places, before, "o", color=GREY, label="before", **hollow)
        ax.axhline(0, color=GREY, linestyle="--", linewidth=1)
        ax.set_xticks(places, tokens[i])
        ax.set(title=title, ylim=(low, -0.06 * low), xlim=(-0.5, len(places) - 0.5))
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, fontsize=9, frameon=False)
    np.atleast_1d(axes)[0].set_ylabel("log-prob (0 is certain)")
    return fig


def clip_quadrants(ratio, panels: Sequence[tuple[str, float, Any, Any]], low: float, high: float, at: float) -> Figure:
    """What a token gains (above) and the slope of that gain (below) over its ratio: a column a sign of the advantage.

    ratio: (N,), rising; panels: (title, advantage, gain (N,), slope (N,)); low, high: where the clip begins;
    at: a ratio to mark. Where the slope is 0 the ground is hatched; each side of 1 says which way the token went.
    """
    ratio = np.asarray(ratio, dtype=float)
    fig = Figure(figsize=(8.0, 4.8), dpi=110, facecolor="white", layout="constrained")
    axes = fig.subplots(2, len(panels), sharex=True, sharey="row", height_ratios=(1.5, 1))
    here = np.abs(ratio - at).argmin()
    for column, (title, advantage, *curves) in zip(axes.T, panels, strict=True):
        for ax, values, name in zip(column, map(np.asarray, curves), ("gain", "slope of the gain"), strict=True):
            ax.spines[["top", "right"]].set_visible(False)
            ax.axvline(1, color=GREY, linewidth=0.8)
            for edge in (low, high):
                ax.axvline(edge, color=GREY, linewidth=0.8, linestyle=":")
            flat = np.asarray(curves[1]) == 0
            ax.fill_between(ratio, 0, 1, where=flat, transform=ax.get_xaxis_transform(), facecolor=ORANGE, alpha=0.25,
                            hatch="//", edgecolor=ORANGE, linewidth=0)  # fmt: skip
            ax.plot(ratio, values, color=BLUE, linewidth=2.2)
            ax.plot(ratio[here], values[here], "D", color=RED, markersize=8)
            if column[0] is axes[0, 0]:
                ax.set_ylabel(name)
        column[0].set_title(title, fontsize=11)
        for x, side, end in ((0.02, -1, 0), (0.98, 1, -1)):
            way = "right way" if side * advantage > 0 else "wrong way"
            slope = curves[1][end]
            push = "no push" if slope == 0 else "pushed up" if slope > 0 else "pushed down"
            column[0].text(x, 0.98, f"{way}:\n{push}", transform=column[0].transAxes, fontsize=9, va="top",
                           ha="left" if side < 0 else "right")  # fmt: skip
        column[0].set_ylim(-2.1, 2.4)
        column[1].set(xlabel="ratio r", ylim=(-1.35, 1.35), xlim=(ratio[0] - 0.04, ratio[-1] + 0.04))
    return fig


def ratio_paths(panels: Sequence[tuple[str, Sequence[str], Any, Any]], low: float, high: float) -> Figure:
    """How the tokens' ratios move with the updates, with a clip (lines with marks) and without (dashed).

    panels: (title, tokens, ratios (rounds + 1, T), ratios without a clip, likewise); low, high: the clip's band.
    """
    fig, axes = figure(8.0, 3.5, columns=len(panels))
    for ax, (title, tokens, clipped, free) in zip(np.atleast_1d(axes), panels, strict=True):
        clipped, free = np.asarray(clipped), np.asarray(free)
        rounds = np.arange(len(clipped))
        ax.axhspan(low, high, color=GREY, alpha=0.15, linewidth=0, label="1 ± ε")
        for k, (token, marker, colour) in enumerate(zip(tokens, "os^", (BLUE, ORANGE, GREEN), strict=False)):
            ax.plot(rounds, free[:, k], "--", color=colour, linewidth=1, alpha=0.9)
            ax.plot(rounds, clipped[:, k], color=colour, marker=marker, markersize=4.5, label=token)
        ax.set(title=title, xlabel="update", ylim=(0, max(1.3, 1.05 * free.max(), 1.05 * clipped.max())))
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=4, fontsize=9, frameon=False)
    np.atleast_1d(axes)[0].set_ylabel("ratio r")
    return fig


def benchmark_bars(result: Mapping[str, Any]) -> Figure:
    """Rollouts and whole steps beside the limit, how a step's time grows, and memory; input: `benchmark.benchmark`."""
    fig, axes = figure(15.0, 3.6, columns=3)
    names = {"transformers_generate": "transformers\ngenerate", "transformers_batching": "transformers\nbatching",
             "ours_rollouts": "our\nrollouts", "trl_step": "TRL\nstep", "ours_step": "our\nstep"}  # fmt: skip
    bars = axes[0]
    for offset, (dtype, found) in zip((-0.19, 0.19), result["dtypes"].items(), strict=False):
        for place, name in enumerate(names):
            if "seconds" not in found.get(name, {}):
                continue
            seconds, colour = found[name]["seconds"], ORANGE if dtype == "float32" else BLUE
            hatch = "//" if dtype == "float32" else None
            bars.bar(place + offset, seconds, 0.36, color=colour, hatch=hatch, edgecolor="black", linewidth=0.6,
                     label=dtype if place == 0 else None)  # fmt: skip
            told = f"{seconds:.1f}" if seconds < 100 else f"{seconds:.0f}"
            bars.annotate(told, (place + offset, seconds), (0, 2), textcoords="offset points", ha="center", fontsize=7)
            limit = found["limits"]["rollouts"] + (found["limits"]["update"] if name.endswith("step") else 0)
            bars.plot([place + offset - 0.18, place + offset + 0.18], [limit, limit], color="black", linewidth=2)
    bars.set_xticks(range(len(names)), names.values(), fontsize=8)
    bars.set(ylabel="seconds", title="Time for the same work; black line: the limit")
    bars.set_ylim(0, 1.06 * bars.get_ylim()[1])
    bars.legend(fontsize=9)
    labels = {"group_size": "responses a question, G", "length": "tokens a response",
              "prompt_length": "tokens a prompt"}  # fmt: skip
    for name, marker, colour in zip(labels, "osD", (BLUE, ORANGE, GREEN), strict=True):
        values, seconds = np.array((result["growth"] or {name: [(1, 1)]})[name]).T  # a quick run has none
        axes[1].plot(values / values[0], seconds / seconds[0], marker=marker, color=colour, label=labels[name])
    axes[1].plot([1, 16], [1, 16], color=GREY, linestyle="--", label="in proportion")
    axes[1].set(xscale="log", yscale="log", xlabel="size, times the smallest", ylabel="time, times the smallest",
                title="How a step's time grows", xticks=(1, 2, 4, 8, 16), yticks=(1, 2, 4, 8, 16))  # fmt: skip
    for axis in (axes[1].xaxis, axes[1].yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
    axes[1].legend(fontsize=8)
    memory = [(names[n].replace("\n", " "), d, f[n]["peak_bytes"] / 2**30) for d, f in result["dtypes"].items()
              for n in ("trl_step", "ours_step") if "seconds" in f[n]]  # fmt: skip
    axes[2].barh([f"{name}, {dtype}" for name, dtype, _ in memory], [m for *_, m in memory], color=GREY)
    axes[2].set(xlabel="GiB", title="Peak memory of a step")
    return fig


def ablation_intervals(rows: Sequence[Mapping[str, Any]], limits: tuple[float, float] = (-45.0, 30.0)) -> Figure:
    """How far each variant ends from the baseline, with its 95 % interval over seeds; input: `against_baseline`'s rows.

    A filled dot: the interval leaves out 0. A triangle at the edge: the mean lies beyond `limits`, in points. The
    baseline itself is the line at 0 and gets no row, nor does a variant that it has no seed for. Numbers stand on the
    right.
    """
    rows = [row for row in rows if row["variant"] != "baseline" and row["gain"] is not None]
    fig, ax = figure(8.6, 0.27 * len(rows) + 0.9)
    ax.grid(False)
    ax.axvline(0, color=GREY, linewidth=1.2)
    for place, row in enumerate(rows):
        gain, low, high = (100 * row[key] for key in ("gain", "gain_low", "gain_high"))
        colour = BLUE if row["differs"] else GREY
        shown = min(max(gain, limits[0]), limits[1])
        marker = "o" if shown == gain else "<" if gain < shown else ">"
        ax.hlines(place, *np.clip([low, high], *limits), color=colour, linewidth=2)
        fill = colour if row["differs"] else "white"
        ax.plot(shown, place, marker, color=colour, markerfacecolor=fill, markersize=7, clip_on=False)
        ax.text(1.02, place, f"{gain:+.1f} ({low:+.1f} to {high:+.1f})", transform=ax.get_yaxis_transform(),
                va="center", fontsize=9, color=colour)  # fmt: skip
    ax.set_yticks(range(len(rows)), [row["variant"] for row in rows])
    ax.set(xlim=limits, ylim=(len(rows) - 0.4, -0.6), xlabel="sampled accuracy minus the baseline's, points")
    return fig
