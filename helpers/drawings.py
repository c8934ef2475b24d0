"""Pictures of ideas: the loop, worlds as Venn diagrams, token strips."""

from collections.abc import Collection, Mapping, Sequence
from itertools import groupby

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, Patch, Rectangle

from helpers.plots import BLUE, GREEN, GREY, ORANGE, RED, figure

# kind of token: its ground, its edge, its hatching, its letter
TOKEN_KINDS = {
    "prompt": ("#e4e4e4", GREY, None, "P"),
    "response": ("#cfe6f5", BLUE, None, "R"),
    "end": (ORANGE, "black", None, "E"),
    "padding": ("white", GREY, "////", "pad"),
}
# a token that is counted or not, and rightly so or not: ground, hatching, mark
MASK_MARKS = {
    (True, True): ("#56b4e9", None, "●"),
    (False, False): ("white", None, ""),
    (True, False): (RED, "////", "−"),
    (False, True): (ORANGE, "....", "+"),
}


def visible(token: str) -> str:
    """A token's text with a dot for a blank and an arrow for a new line, so that nothing in it is lost to sight."""
    return token.replace(" ", "·").replace("\n", "↵")


def token_strip(rows: Sequence[tuple[str, Sequence[str], Sequence[str]]], keep: int = 5) -> Figure:
    """Texts as strips of tokens, each in a box whose colour, hatching and letter say what it is.

    rows: (label, tokens, kinds), kinds being keys of TOKEN_KINDS; a strip goes on in the next line where it is long.
    Of a longer run of prompt or padding tokens only the `keep` at either end are drawn, and how many are not.
    Raises ValueError if a row has more tokens than kinds, or fewer.
    """
    width, line, char = 8.0, 0.5, 0.083  # inches: of the figure, from line to line, of a character
    boxes, labels, y = [], [], 0.0
    for label, tokens, kinds in rows:
        if len(tokens) != len(kinds):
            raise ValueError(f"Give every token a kind: {len(tokens)} tokens came with {len(kinds)} kinds.")
        labels.append((label, y))
        x, y = 0.0, y + 0.3
        for text, kind in _folded(tokens, kinds, keep):
            size = char * len(text) + 0.1
            if x + size > width - 0.1:
                x, y = 0.0, y + line
            boxes.append((x, y, size, text, kind))
            x += size + 0.03
        y += line + 0.12
    fig = Figure(figsize=(width, y + 0.35), dpi=110, facecolor="white")
    ax = fig.add_axes((0.006, 0, 0.988, 1))
    ax.set(xlim=(0, width), ylim=(y + 0.35, 0))
    ax.axis("off")
    for label, top in labels:
        ax.text(0, top + 0.16, label, fontsize=10, fontweight="bold", va="center")
    for x, top, size, text, kind in boxes:
        ground, edge, hatch, letter = TOKEN_KINDS.get(kind, ("none", "none", None, ""))
        ax.add_patch(Rectangle((x, top), size, 0.24, facecolor=ground, edgecolor=edge, hatch=hatch, linewidth=0.8))
        backing = {"facecolor": "white", "edgecolor": "none", "pad": 0.6} if hatch else None
        ax.text(x + size / 2, top + 0.125, text, fontsize=9, family="monospace", ha="center", va="center",
                bbox=backing)  # fmt: skip
        ax.text(x + size / 2, top + 0.33, letter, fontsize=8, ha="center", va="center", color="#444444")
    shown = {n: looks for n, looks in TOKEN_KINDS.items() if any(n in kinds for _, _, kinds in rows)}
    handles = [Patch(facecolor=g, edgecolor=e, hatch=h, label=f"{n} ({m})") for n, (g, e, h, m) in shown.items()]
    fig.legend(handles=handles, loc="lower center", ncols=max(1, len(handles)), fontsize=9, frameon=False)
    return fig


def _folded(tokens: Sequence[str], kinds: Sequence[str], keep: int) -> list[tuple[str, str]]:
    """(text, kind) pairs to draw, long runs of prompt or padding with their middle left out."""
    drawn = []
    for kind, run in groupby(zip(tokens, kinds, strict=True), key=lambda pair: pair[1]):
        run = [(visible(token), kind) for token, _ in run]
        if kind in ("prompt", "padding") and len(run) > 2 * keep + 1:
            run[keep:-keep] = [(f"… {len(run) - 2 * keep} more …", "")]
        drawn += run
    return drawn


def mask_rows(
    tokens: Sequence[str], truth: Sequence[bool | None], masks: Mapping[str, Sequence[bool | None]]
) -> Figure:
    """Completion masks below one another over the same tokens; what is missing and what is too much stands out.

    truth: the right mask, None where the row goes on without being drawn; masks: by name, in the order they are drawn.
    Raises ValueError for a mask of another length.
    """
    fig = Figure(figsize=(8.0, 0.36 * len(masks) + 1.75), dpi=110, facecolor="white", layout="constrained")
    ax = fig.subplots()
    for row, (name, mask) in enumerate(masks.items()):
        if not len(mask) == len(truth) == len(tokens):
            raise ValueError(f"The mask {name!r} needs one value for each of the {len(tokens)} tokens.")
        for column, (should, does) in enumerate(zip(truth, mask, strict=True)):
            if should is None:
                ax.text(column, row, "…", fontsize=11, ha="center", va="center")
                continue
            ground, hatch, mark = MASK_MARKS[bool(should), bool(does)]
            box = Rectangle((column - 0.5, row - 0.42), 1, 0.84, facecolor=ground, edgecolor="#888888", hatch=hatch)
            ax.add_patch(box)
            backing = {"facecolor": "white", "edgecolor": "none", "pad": 0.4} if hatch else None
            ax.text(column, row, mark, fontsize=10, fontweight="bold", ha="center", va="center", bbox=backing)
    ax.set(xlim=(-0.6, len(tokens) - 0.4), ylim=(len(masks) - 0.4, -0.6))
    ax.set_yticks(range(len(masks)), list(masks), fontsize=10)
    ax.set_xticks(range(len(tokens)), [visible(token) for token in tokens], rotation=60, fontsize=9, ha="left",
                  rotation_mode="anchor", family="monospace")  # fmt: skip
    ax.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    ax.spines[:].set_visible(False)
    names = ("counts, rightly", "does not count, rightly", "missing", "too much")
    handles = [
        Patch(facecolor=ground, edgecolor="#888888", hatch=hatch, label=f"{mark} {name}".strip())
        for name, (ground, hatch, mark) in zip(names, MASK_MARKS.values(), strict=True)
    ]
    fig.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return fig


def distribution_bars(panels: Sequence[tuple[str, Sequence[str], Sequence[float], Sequence[bool]]]) -> Figure:
    """Next-token distributions side by side: solid bars for tokens that may be drawn, hatched ones for those cut off.

    panels: (title, tokens, probabilities, whether it is kept), the likeliest token first.
    """
    fig, axes = figure(9.0, 0.27 * max(len(tokens) for _, tokens, _, _ in panels) + 1.2, columns=len(panels))
    longest = max(max(probabilities) for _, _, probabilities, _ in panels)
    for ax, (title, tokens, probabilities, kept) in zip(np.atleast_1d(axes), panels, strict=True):
        for place, (probability, keep) in enumerate(zip(probabilities, kept, strict=True)):
            ground, hatch = (BLUE, None) if keep else ("white", "////")
            ax.barh(place, probability, 0.7, facecolor=ground, edgecolor=BLUE if keep else RED, hatch=hatch)
            ax.annotate(f"{100 * probability:.1f} %", (probability, place), (3, 0), textcoords="offset points",
                        va="center", fontsize=9)  # fmt: skip
        ax.set_yticks(range(len(tokens)), [visible(token) for token in tokens], family="monospace", fontsize=9)
        ax.set(ylim=(len(tokens) - 0.4, -0.6), xlim=(0, 1.35 * longest))
        ax.set_xticks([])
        ax.grid(False)
        ax.spines["bottom"].set_visible(False)
        ax.set_title(title, fontsize=10)
    handles = [Patch(facecolor=BLUE, edgecolor=BLUE, label="kept by top-p"),
               Patch(facecolor="white", edgecolor=RED, hatch="////", label="cut off")]  # fmt: skip
    fig.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return fig


# The boxes of `loop_picture`: column and row of the grid, title, words, what in helpers holds it, notebook.
LOOP_BOXES = {
    "question": (0, 0, "1  question", "“How many r’s are in\nstrawberry?”", "tasks", "01"),
    "prompt": (1, 0, "2  prompt", "question and instruc-\ntions, as numbers", "prompts", "03"),
    "responses": (2, 0, "3  G responses", "sampled, here four:\n“3”    “2”    “3”    “2”", "rollout", "03"),
    "verifier": (3, 0, "4  verifier", "a program compares\neach answer with 3", "tasks", "01"),
    "rewards": (3, 1, "5  rewards", "one for each response\n1.00  0.15  1.00  0.15", "rewards", "01"),
    "advantages": (3, 2, "6  advantages", "better than its group?\n+0.87 −0.87 +0.87 −0.87", "losses", "02"),
    "buffer": (3, 3, "7  buffer", "keeps groups until\nthere are enough", "buffer", "03"),
    "minibatches": (2, 3, "8  minibatches", "some responses at\na time, shuffled", "buffer", "03"),
    "loss": (1, 3, "9  ratio, clip, loss", "which way to change,\nand not too far", "losses", "02"),
    "update": (0, 3, "10  update", "the weights move\na little", "grpo", "05"),
}
LOOP_ARROWS = (
    ("question", "prompt"), ("prompt", "responses"), ("responses", "verifier"), ("verifier", "rewards"),
    ("rewards", "advantages"), ("advantages", "buffer"), ("buffer", "minibatches"), ("minibatches", "loss"),
    ("loss", "update"), ("update", "policy"), ("policy", "responses"), ("policy", "loss"),
)  # fmt: skip


def loop_picture() -> Figure:
    """One turn of GRPO as numbered boxes and arrows; each box names what in helpers, and which notebook, holds it."""
    wide, high, across, down = 1.8, 1.02, 2.2, 1.44  # inches: a box, and from box to box
    fig = Figure(figsize=(8.6, 5.54), dpi=110, facecolor="white")
    ax = fig.add_axes((0, 0, 1, 1))
    ax.set(xlim=(-0.1, 8.5), ylim=(5.44, -0.1))
    ax.axis("off")

    def box(x, y, width, height, ground, edge, style):
        shape = "round,pad=0,rounding_size=0.1"
        patch = FancyBboxPatch((x, y), width, height, shape, facecolor=ground, edgecolor=edge, linestyle=style, lw=2)
        ax.add_patch(patch)

    def write(x, y, text, size, **more):
        ax.text(x, y, text, fontsize=size, ha="center", va="center", **more)

    for column, row, title, words, module, notebook in LOOP_BOXES.values():
        x, y, collects = column * across, row * down, int(title.split()[0]) <= 7
        box(x, y, wide, high, *(("#e3f1fa", BLUE, "-") if collects else ("#fdf3dc", ORANGE, "--")))
        write(x + wide / 2, y + 0.18, title, 11, fontweight="bold")
        write(x + wide / 2, y + 0.52, words, 9, linespacing=1.3)
        write(x + wide / 2, y + high - 0.14, f"helpers.{module} · notebook {notebook}", 8, color="#444444")
    middle = across + wide / 2
    box(0, down, 2 * across + wide, down + high, "#e3f4ee", GREEN, "-")
    write(middle, down + 0.36, "policy", 15, fontweight="bold")
    write(middle, down + 0.68, "the language model that is being trained", 11)
    write(middle, down + 0.95, "helpers.models · notebook 03", 8, color="#444444")
    write(middle, down + 1.4, "solid boxes, 1 to 7: collect experience", 10)
    write(middle, down + 1.66, "dashed boxes, 8 to 10: learn from it, then start again with new questions", 10)
    write(middle, down + 2.1, "the whole loop: helpers.grpo · notebook 05", 8, color="#444444")
    for start, end in LOOP_ARROWS:
        tail, head = _loop_ends(start, end, wide, high, across, down)
        ax.annotate("", head, tail, arrowprops={"arrowstyle": "-|>,head_width=0.35,head_length=0.6", "lw": 2.2,
                                                "color": "black", "shrinkA": 1, "shrinkB": 1})  # fmt: skip
    for column, row, text in ((2, 1, "writes"), (1, 3, "log-probs"), (0, 3, "new weights")):
        ax.text(column * across + wide / 2 + 0.12, row * down - 0.21, text, fontsize=9, va="center")
    return fig


def _loop_ends(start: str, end: str, wide: float, high: float, across: float, down: float):
    """Where an arrow of the loop begins and ends: on the sides of two boxes that face each other."""
    if "policy" in (start, end):  # it spans three columns and two rows
        column, row, *_ = LOOP_BOXES[end if start == "policy" else start]
        x, outer = column * across + wide / 2, row * down + (high if row == 0 else 0)
        inner = down if row == 0 else 2 * down + high
        return ((x, inner), (x, outer)) if start == "policy" else ((x, outer), (x, inner))
    (c0, r0, *_), (c1, r1, *_) = LOOP_BOXES[start], LOOP_BOXES[end]
    dx, dy = c1 - c0, r1 - r0
    centres = [(c * across + wide / 2, r * down + high / 2) for c, r in ((c0, r0), (c1, r1))]
    return tuple((x + s * dx * wide / 2, y + s * dy * high / 2) for s, (x, y) in zip((1, -1), centres, strict=True))


def verdict_grid(truths: Sequence[str], rows: Mapping[str, Sequence[str | None]]) -> Figure:
    """Which answers are right: a row a model, a column a question; an answer of None is drawn as hatched and empty.

    truths: the true answers; rows: by name, one answer a question. The row's label counts the right ones.
    Raises ValueError for a row of another length.
    """
    fig, ax = figure(8.0, 0.5 * len(rows) + 1.0)
    labels = []
    for row, (name, answers) in enumerate(rows.items()):
        if len(answers) != len(truths):
            raise ValueError(f"The row {name!r} needs one answer for each of the {len(truths)} questions.")
        right = [answer == truth for answer, truth in zip(answers, truths, strict=True)]
        labels.append(f"{name}: {sum(right)} of {len(truths)}")
        for column, (answer, good) in enumerate(zip(answers, right, strict=True)):
            ground = GREEN if good else "white" if answer is None else RED
            ax.add_patch(Rectangle((column - 0.46, row - 0.42), 0.92, 0.84, facecolor=ground, edgecolor="#888888",
                                   hatch="////" if answer is None else None))  # fmt: skip
            mark = "" if answer is None else f"{'✓' if good else '✗'} {answer}"
            ax.text(column, row, mark, fontsize=10, fontweight="bold", ha="center", va="center")
    ax.set(xlim=(-0.5, len(truths) - 0.5), ylim=(len(rows) - 0.5, -0.5))
    ax.set_yticks(range(len(rows)), labels, fontsize=10)
    ax.set_xticks(range(len(truths)), [f"truth:\n{truth}" for truth in truths], fontsize=9)
    ax.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    ax.spines[:].set_visible(False)
    ax.grid(False)
    return fig


# what is known of a region of a Venn diagram: its ground, its hatching, its mark, what the mark means
VENN_STATES = {
    "has members": ("#cfe6f5", None, "●", "has members"),
    "empty": ("white", None, "", "empty"),
    "ruled out": ("#d9d9d9", "///", "✕", "cannot have members"),
    "open": ("white", None, "?", "may or may not have members"),
}
VENN_CENTRES = ((-0.5, 0.32), (0.5, 0.32), (0.0, -0.54))
VENN_RADIUS = 0.82


def venn(panels: Sequence[tuple[str, Sequence[str], Mapping[tuple, str], Collection[tuple]]]) -> Figure:
    """Three kinds as circles, a diagram a panel; each region's ground, hatching and mark say what is known of it.

    panels: (title, the three kinds, states, regions to outline in red). A region is (inside the first kind, the second,
    the third), 0 or 1 each; states gives those with a 1 in them a key of VENN_STATES. ValueError for anything else.
    """
    step = np.linspace(-1.5, 1.5, 601)
    x, y = np.meshgrid(step, step)
    edge = [VENN_RADIUS - np.hypot(x - a, y - b) for a, b in VENN_CENTRES]  # above 0 inside that circle
    fig, axes = figure(4.1 * len(panels), 4.5, columns=len(panels))
    for ax, (title, kinds, states, outlined) in zip(np.atleast_1d(axes), panels, strict=True):
        if len(kinds) != 3 or len(states) != 7 or not set(states.values()) <= VENN_STATES.keys():
            raise ValueError(f"Name three kinds and give each of the 7 regions one of: {', '.join(VENN_STATES)}.")
        for region, state in states.items():
            ground, hatch, mark, _ = VENN_STATES[state]
            depth = np.min([e if inside else -e for e, inside in zip(edge, region, strict=True)], axis=0)
            drawn = ax.contourf(x, y, depth, [0, 9], colors=[ground], hatches=[hatch])
            drawn.set(edgecolor="#9a9a9a", linewidth=0)
            at = np.unravel_index(depth.argmax(), depth.shape)  # where the region is widest
            ax.text(x[at], y[at], mark, fontsize=14, fontweight="bold", ha="center", va="center")
        for (a, b), kind, place in zip(VENN_CENTRES, kinds, ((-0.75, 1.25), (0.75, 1.25), (0, -1.47)), strict=True):
            ax.add_patch(Circle((a, b), VENN_RADIUS, fill=False, edgecolor="black", linewidth=1.3))
            ax.text(*place, kind, fontsize=11, fontweight="bold", ha="center", va="center")
        inside = np.zeros(x.shape, dtype=bool)
        for region in outlined:
            inside |= np.all([(e > 0) == bool(flag) for e, flag in zip(edge, region, strict=True)], axis=0)
        ax.contour(x, y, inside, [0.5], colors=[RED], linewidths=3)
        ax.set_title(title, fontsize=10)
        ax.set(xlim=(-1.5, 1.5), ylim=(-1.6, 1.4), aspect="equal")
        ax.axis("off")
    used = [state for state in VENN_STATES if any(state in states.values() for _, _, states, _ in panels)]
    handles = [Patch(facecolor=g, edgecolor="#6b6b6b", hatch=h, label=f"{m} {name}".strip())
               for g, h, m, name in map(VENN_STATES.get, used)]  # fmt: skip
    handles.append(Patch(facecolor="white", edgecolor=RED, linewidth=2.5, label="what the claim speaks of"))
    fig.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return fig
