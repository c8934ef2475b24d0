"""Sliders: what a move draws, what is displayed, and what a saved notebook keeps of it."""

import struct
from pathlib import Path

import ipywidgets
import pytest

from helpers.plots import figure
from helpers.runs import Run
from helpers.widgets import Explorer, choice, explore, slider

RECORDED = Path(__file__).parents[1] / "recorded/smollm2-135m-syllogism-seed0"


def draw(height, colour):
    fig, ax = figure(3.0, 2.0)
    ax.bar(0, height, color=colour)
    ax.set_ylim(0, 10)
    return fig, {"height": height, "twice": 2.0 * height, "colour": colour}


def explorer(**changes):
    sliders = {"height": slider("height", 2, 0, 10, 1), "colour": choice("colour", ["red", "blue"])}
    return Explorer(changes.get("draw", draw), sliders, alt="A bar.")


@pytest.fixture
def displayed(monkeypatch):
    """What is displayed, as (bundle, metadata)."""
    outputs = []
    monkeypatch.setattr(
        "IPython.display.display",
        lambda bundle, metadata=None, raw=False: outputs.append((bundle, metadata)) if raw else pytest.fail("not raw"),
    )
    return outputs


def test_a_move_draws_again_with_all_values():
    e = explorer()
    before = e.png
    assert before.startswith(b"\x89PNG") and e.numbers == {"height": 2, "twice": 4.0, "colour": "red"}
    e.sliders["height"].value = 7
    assert e.numbers == {"height": 7, "twice": 14.0, "colour": "red"} and e.png != before
    taller = e.png
    e.sliders["colour"].value = "blue"
    assert e.numbers == {"height": 7, "twice": 14.0, "colour": "blue"} and e.png not in (before, taller)


def test_reset_goes_back_to_the_first_picture_and_numbers():
    e = explorer()
    before, numbers = e.png, e.numbers
    e.sliders["height"].value, e.sliders["colour"].value = 7, "blue"
    e.reset()
    assert e.values == {"height": 2, "colour": "red"} and e.numbers == numbers and e.png == before


def test_numbers_are_written_beside_the_sliders_as_text():
    e = explorer(draw=lambda height, colour: (figure()[0], {"a < b": -0.001, "n": height, "which": colour}))
    assert e.text == "a < b: 0.00\nn: 2\nwhich: red"
    assert "a &lt; b: 0.00<br>n: 2<br>which: red" in e.line.value
    e.sliders["height"].value = 3
    assert "n: 3" in e.line.value


def test_an_error_in_draw_reaches_the_caller_and_the_old_picture_stays():
    def refuse_nine(height, colour):
        if height == 9:
            raise RuntimeError("nine")
        return draw(height, colour)

    e = explorer(draw=refuse_nine)
    before = e.png
    with pytest.raises(RuntimeError, match="nine"):
        e.sliders["height"].value = 9
    assert e.png == before and e.numbers["height"] == 2
    e.sliders["height"].value = 5
    assert e.numbers["height"] == 5


def test_show_displays_sliders_then_a_picture_that_stays_and_prints_the_numbers(displayed, capsys):
    e = explorer()
    e.show()
    (sliders, _), (picture, metadata) = displayed
    view = sliders["application/vnd.jupyter.widget-view+json"]
    assert set(view) == {"version_major", "version_minor", "model_id"} and view["version_major"] == 2
    assert picture == {"image/png": e.png, "text/plain": "A bar."}
    assert metadata == {"image/png": {"alt": "A bar."}}
    assert capsys.readouterr().out == "height: 2\ntwice: 4.00\ncolour: red\n"


def test_what_is_displayed_in_words_holds_nothing_that_differs_between_versions_or_runs(displayed):
    explorer().show()
    explorer().show()
    first, _, second, _ = (bundle["text/plain"] for bundle, _ in displayed)
    assert first == second == "[Sliders for height and colour appear here while the notebook is running.]"


def test_the_picture_that_follows_the_sliders_appears_with_the_first_move_and_goes_with_a_reset():
    e = explorer()
    assert e._live.layout.display == "none"
    e.sliders["height"].value = 3
    assert e._live.layout.display is None and e.image in e._live.children
    e.reset()
    assert e._live.layout.display == "none"


def test_a_browsers_rounding_is_no_move():
    seen = []

    def remember(rate):
        seen.append(rate)
        return figure()[0], {}

    e = Explorer(remember, {"rate": slider("rate", 0.3, 0.0, 1.0, 0.1)}, alt="")
    e.sliders["rate"].value = 0.1 + 0.2  # 0.30000000000000004
    assert seen == [0.3] and e._live.layout.display == "none"
    e.sliders["rate"].value = 0.1 + 0.7  # 0.7999999999999999
    assert seen == [0.3, 0.8]


@pytest.mark.parametrize(
    ("numbers", "kind", "form"),
    [
        ((1, 0, 9, 1), ipywidgets.IntSlider, "d"),
        ((1.0, 0, 9, 1), ipywidgets.FloatSlider, ".0f"),
        ((0.2, 0.0, 0.9, 0.05), ipywidgets.FloatSlider, ".2f"),
        ((1e-5, 0.0, 1e-3, 1e-5), ipywidgets.FloatSlider, ".5f"),
    ],
)
def test_a_slider_shows_as_many_places_as_it_can_take(numbers, kind, form):
    value, low, high, step = numbers
    made = slider("epsilon", value, low, high, step)
    assert type(made) is kind and made.readout_format == form
    assert (made.value, made.min, made.max, made.step, made.description) == (value, low, high, step, "epsilon")


@pytest.mark.parametrize("numbers", [(3, 0, 2, 1), (-1, 0, 2, 1), (1, 0, 2, 0), (1, 2, 0, 1)])
def test_a_slider_that_cannot_be_is_refused(numbers):
    with pytest.raises(ValueError, match="rounds: give low <= value <= high"):
        slider("rounds", *numbers)


def test_an_empty_list_and_an_explorer_without_sliders_are_refused():
    with pytest.raises(ValueError, match="1 entry or more"):
        choice("completion", [])
    with pytest.raises(ValueError, match="plots.show"):
        Explorer(draw, {}, alt="")


def test_labels_have_room_and_sliders_fit_a_narrow_window():
    e = explorer()
    for control in e.sliders.values():
        assert control.style.description_width == "11em" and control.layout.max_width == "98%"
    assert e.image.layout.max_width == "100%"
    width = struct.unpack(">I", e.png[16:20])[0]
    assert width == 330  # 3 inches at 110 dots: drawn at the size it is shown at


def test_a_run_can_be_paged_through_step_by_step_and_response_by_response():
    run = Run.open(RECORDED)
    steps = [m for m in run.records("metrics") if m["stage"] == "grpo"]
    tenth = [sample for sample in run.records("samples") if sample["step"] == 10]
    e = explore(run)
    assert (e.sliders["step"].max, e.sliders["response"].max) == (len(steps), len(tenth))
    before = e.png
    e.sliders["step"].value = 10
    assert e.png != before and e.numbers["reward"] == steps[9]["reward"]
    for number, sample in enumerate(tenth, 1):
        e.sliders["response"].value = number
        assert sample["completion"] in e.text and sample["question"] in e.text
        assert f"response {number}, reward {sample['total']:.2f}" in e.numbers
    assert e.numbers["rewards of this group"].count(",") == len(tenth) - 1


def test_a_run_without_samples_has_its_curves_and_one_without_steps_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("recipe: {}\n")
    run = Run(tmp_path)
    with pytest.raises(ValueError, match="has 0 GRPO steps so far"):
        explore(tmp_path)
    for step in (1, 2):
        record = {"reward": 0.1 * step, "reward_std": 0.1, "no_signal": 0.5, "entropy": 1.0, "length": 9.0}
        run.log("metrics", {"stage": "sft", "step": step, "loss": 1.0})
        run.log("metrics", {"stage": "grpo", "step": step, **record})
    e = explore(str(tmp_path))
    assert e.sliders.keys() == {"step"} and "question" not in e.numbers
    e.sliders["step"].value = 2
    assert e.text.startswith("reward: 0.20\n")
