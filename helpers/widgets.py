"""Figures with sliders that work in JupyterLab and in Colab, and that code can move and check like a reader."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets
from matplotlib.figure import Figure

from helpers.plots import RED, png_bytes, show_png, training_curves

if TYPE_CHECKING:
    from helpers.runs import Run

Numbers = Mapping[str, float | str]
# A label wider than its room would be cut off, and a fixed width would stick out of a narrow window.
_LABEL = {"description_width": "11em"}
_WIDE, _WIDER = ({"width": width, "max_width": "98%"} for width in ("34em", "46em"))


def slider(label: str, value: float, low: float, high: float, step: float) -> widgets.Widget:
    """A slider over whole numbers if all four numbers are whole (`int`), else over decimals.

    The arrow keys move it by `step`; its number can be typed over. Raises ValueError unless low <= value <= high.
    """
    if not low <= value <= high or step <= 0:
        raise ValueError(f"{label}: give low <= value <= high and a step above 0, not {low}, {value}, {high}, {step}.")
    whole = all(isinstance(number, int) for number in (value, low, high, step))
    decimals = max(len(f"{number:.9f}".rstrip("0").split(".")[1]) for number in (value, low, step))
    kind, form = (widgets.IntSlider, "d") if whole else (widgets.FloatSlider, f".{decimals}f")
    return kind(
        value=value, min=low, max=high, step=step, readout_format=form,
        description=label, style=_LABEL, layout=_WIDE,
    )  # fmt: skip


def choice(label: str, options: Sequence[str]) -> widgets.Widget:
    """A list to choose from, with the first entry chosen. Raises ValueError for an empty list."""
    if not options:
        raise ValueError(f"{label}: a list needs 1 entry or more.")
    return widgets.Dropdown(
        options=list(options), value=options[0], description=label, style=_LABEL, layout=_WIDER
    )  # fmt: skip


class Explorer:
    """A figure that is drawn again, with the numbers that matter, each time one of its sliders moves.

    draw: called with every slider's value under its name; returns the figure, and numbers or texts by name.
    sliders: from `slider` and `choice`, by the names of draw's arguments.
    alt: what the figure shows, for a reader who cannot see it.

    `sliders[name].value` can be set from code, too; when the assignment returns, `png` and `numbers` are new. An error
    in `draw` reaches whoever set the value. Raises ValueError without sliders.
    """

    def __init__(
        self, draw: Callable[..., tuple[Figure, Numbers]], sliders: Mapping[str, widgets.Widget], alt: str
    ) -> None:
        if not sliders:
            raise ValueError("An explorer needs 1 slider or more; for a figure alone there is plots.show.")
        self.draw, self.sliders, self.alt = draw, dict(sliders), alt
        self.start = self.values
        self.image = widgets.Image(format="png", layout={"max_width": "100%", "align_self": "flex-start"})
        start = widgets.HTML("At the start it was:")
        self._live = widgets.VBox([self.image, start], layout={"display": "none"})  # nothing has moved yet
        self.line = widgets.HTML(layout=_WIDER)  # the image has no alternative text in ipywidgets 7 or 8; this has
        self.numbers: Numbers = {}
        self._update()
        for control in self.sliders.values():
            control.observe(self._moved, names="value")

    @property
    def values(self) -> dict[str, Any]:
        """Where each slider stands."""
        values = {name: control.value for name, control in self.sliders.items()}
        # A browser counts steps from the slider's left end, and answers 1.0 with 1.0000000000000002.
        return {name: round(value, 9) if isinstance(value, float) else value for name, value in values.items()}

    @property
    def png(self) -> bytes:
        """The picture that the image shows now."""
        return bytes(self.image.value)  # ipywidgets 8 keeps a memoryview

    @property
    def text(self) -> str:
        """The numbers as lines of text, decimals to two places."""
        return "\n".join(f"{name}: {_tidy(value)}" for name, value in self.numbers.items())

    def reset(self) -> None:
        """Put every slider back to where it started."""
        for name, value in self.start.items():
            self.sliders[name].value = value
        self._live.layout.display = "none"

    def show(self) -> None:
        """Display sliders and figure, and print the numbers.

        The figure is a picture of its own, which stays in the saved notebook when no kernel runs and the sliders are
        gone. The one that follows the sliders comes between sliders and picture with the first move.
        """
        from IPython.display import display

        labels = " and ".join(", ".join(c.description for c in self.sliders.values()).rsplit(", ", 1))
        box = widgets.VBox([*self.sliders.values(), self.line, self._live])
        # Not `display(box)`: its plain text would list traits, which differ between ipywidgets 7 and 8.
        view = {"version_major": 2, "version_minor": 0, "model_id": box.model_id}
        fallback = f"[Sliders for {labels} appear here while the notebook is running.]"
        display({"application/vnd.jupyter.widget-view+json": view, "text/plain": fallback}, raw=True)
        show_png(self.png, self.alt)
        print(self.text)

    def _moved(self, _change: Any) -> None:
        if self.values != self._drawn:
            self._update()
            self._live.layout.display = None

    def _update(self) -> None:
        values = self.values
        fig, self.numbers = self.draw(**values)
        self._drawn = values
        self.image.value = png_bytes(fig)
        lines = escape(self.text).replace("\n", "<br>")
        self.line.value = f'<div style="line-height: 1.5">{lines}</div>'


def explore(run: "Run | str | Path") -> Explorer:
    """Page through the GRPO steps of a run: its curves up to here, and what the policy answered at that step.

    run: a run or its folder, a reader's own too, while it trains or after. A slider goes through the steps, another
    through the logged responses, all of one group, to one question. Returns the explorer: call `show`.
    Raises ValueError until the run has two GRPO steps.
    """
    from helpers.runs import Run

    run = run if isinstance(run, Run) else Run.open(run)
    metrics = [m for m in run.records("metrics") if m["stage"] == "grpo"]
    if len(metrics) < 2:
        raise ValueError(f"{run.folder} has {len(metrics)} GRPO steps so far: look again when it has two or more.")
    samples: dict[int, list[dict]] = {}
    for record in run.records("samples"):
        samples.setdefault(record["step"], []).append(record)

    def draw(step: int, response: int = 1) -> tuple[Figure, Numbers]:
        fig, now = training_curves(metrics), metrics[step - 1]
        for ax, key in zip(fig.axes, ("reward", "no_signal", "entropy"), strict=True):
            ax.axvline(step, color=RED, linewidth=1)
            ax.plot(step, now[key], "D", color=RED, markersize=7)
        numbers: dict[str, float | str] = {
            name: now[key] for name, key in (("reward", "reward"), ("groups without signal", "no_signal"),
                                             ("entropy", "entropy"), ("tokens a response", "length"))
        }  # fmt: skip
        group = samples.get(now["step"], [])
        if group:
            shown = group[min(response, len(group)) - 1]
            numbers["rewards of this group"] = ", ".join(f"{sample['total']:.2f}" for sample in group)
            numbers["question"] = f"{shown['question']}\ntrue answer: {shown['truth']}"
            numbers[f"response {min(response, len(group))}, reward {shown['total']:.2f}"] = shown["completion"]
        return fig, numbers

    sliders = {"step": slider("step", 1, 1, len(metrics), 1)}
    most = max((len(group) for group in samples.values()), default=0)
    if most > 1:
        sliders["response"] = slider("response", 1, 1, most, 1)
    alt = "Reward, share of groups without signal and entropy over the steps; a red line marks the chosen step."
    return Explorer(draw, sliders, alt)


def _tidy(value: float | str) -> str:
    if isinstance(value, str | int):
        return str(value)
    return f"{round(value, 2) + 0.0:.2f}"  # + 0.0 turns -0.0 into 0.0
