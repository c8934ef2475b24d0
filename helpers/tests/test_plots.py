"""Figures of numbers: what is drawn, read off the figures."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from helpers import plots


@pytest.mark.parametrize(
    ("rewards", "ends"),
    [
        ((0.2, 0.6, 1.0), (0.0, 1.02)),
        ((0.7, 1.1, 1.58), (0.0, 1.02 * 1.58)),  # a derivation or steps paid for on top
        ((-0.5, 0.3, 0.9), (1.02 * -0.5, 1.02)),  # a length penalty
    ],
    ids=["usual", "above 1", "below 0"],
)
def test_no_reward_of_a_step_lies_outside_of_the_training_curves(rewards, ends):
    metrics = [
        {"step": i, "reward": reward, "reward_std": 0.4, "no_signal": 0.5, "entropy": 0.1}
        for i, reward in enumerate(rewards, start=1)
    ]
    left = plots.training_curves(metrics).axes[0]
    assert left.get_ylim() == pytest.approx(ends)
    assert (rewards[-1] > 1 or rewards[0] < 0) or left.get_ylim() == (0, 1.02)
    dots, _ = left.lines
    assert list(dots.get_ydata()) == list(rewards)
    [band] = left.collections
    corners = band.get_paths()[0].vertices
    for step, mean in enumerate(plots.smooth(rewards), start=1):
        top = corners[corners[:, 0] == step, 1].max()
        assert top == pytest.approx(min(mean + 0.4, max(1.0, *rewards)))


def test_advantage_grids_write_rewards_plainly_and_advantages_with_their_sign():
    rewards, advantages = [[1.0, 0.15], [1.0, 1.0]], [[0.71, -0.71], [0.0, 0.0]]
    fig = plots.advantage_grids([("rewards", rewards), ("advantages", advantages)], ["mixed", "all right"])
    left, right = fig.axes
    assert [text.get_text() for text in left.texts] == ["1.00", "0.15", "1.00", "1.00"]
    assert [text.get_text() for text in right.texts] == ["+0.71", "-0.71", "0.00", "0.00"]
    assert [label.get_text() for label in left.get_yticklabels()] == ["mixed", "all right"]
    assert not right.get_yticklabels() and [ax.get_title() for ax in fig.axes] == ["rewards", "advantages"]


def test_advantages_are_blue_above_zero_orange_below_and_white_at_zero():
    fig = plots.advantage_grids([("rewards", [[1.0, 0.0, 0.5]]), ("advantages", [[2.0, -2.0, 0.0]])], ["group"])
    [image] = fig.axes[1].images
    colours = image.cmap(image.norm(image.get_array()))[0, :, :3]
    assert np.allclose(colours, [to_rgb(plots.BLUE), to_rgb(plots.ORANGE), (1, 1, 1)], atol=0.02)


def test_matrices_write_every_number_and_colour_it_by_its_sign_on_one_scale():
    fig = plots.matrices([("a", [[-0.5, 2.0]]), ("b", [[0.0, -2.0]])], ["row"], ["x", "y"], symbols="×")
    left, right = fig.axes
    assert [text.get_text() for text in left.texts] == ["-0.50", "+2.00"]
    assert [text.get_text() for text in right.texts] == ["0", "-2.00", "×"]
    [image] = right.images
    colours = image.cmap(image.norm(image.get_array()))[0, :, :3]
    assert np.allclose(colours, [(1, 1, 1), to_rgb(plots.ORANGE)], atol=0.02)
    assert left.images[0].norm.vmax == 2.0 and left.images[0].norm.vmin == -2.0
    assert [label.get_text() for label in left.get_xticklabels()] == ["x", "y"]


def test_small_numbers_get_a_third_place():
    [ax] = plots.matrices([("a", [[0.167, -0.025]])], ["row"], ["x", "y"]).axes
    assert [text.get_text() for text in ax.texts] == ["+0.167", "-0.025"]


def test_logprob_rounds_show_before_hollow_and_after_filled_with_an_arrow_a_token():
    history = np.array([[[-1.0, -2.0], [-1.0, -0.5]], [[-0.7, -1.5], [-1.5, -0.9]], [[-0.5, -1.0], [-2.0, -3.0]]])
    fig = plots.logprob_rounds(history, ["AB", "DE"], ["praised", "blamed"])
    for i, (ax, tokens) in enumerate(zip(fig.axes, ("AB", "DE"), strict=True)):
        lines = {line.get_label(): line for line in ax.lines}
        assert list(lines["before"].get_ydata()) == list(history[0, i])
        assert lines["before"].get_markerfacecolor() == "none"
        assert list(lines["after the last round"].get_ydata()) == list(history[2, i])
        assert any(list(line.get_ydata()) == list(history[1, i]) for line in ax.lines)
        arrows = [(text.xyann[1], text.xy[1]) for text in ax.texts]
        assert arrows == list(zip(history[0, i], history[2, i], strict=True))
        assert [label.get_text() for label in ax.get_xticklabels()] == list(tokens)
    assert fig.axes[0].get_ylim() == fig.axes[1].get_ylim() and fig.axes[0].get_ylim()[0] < -3 < 0


def test_clip_quadrants_name_the_way_and_the_push_of_each_corner_and_hatch_where_there_is_none():
    ratio = np.linspace(0, 2, 21)
    up, down = np.where(ratio > 1.2, 0.0, 1.0), np.where(ratio < 0.8, 0.0, -1.0)
    panels = [("praise", 1.0, np.minimum(ratio, 1.2), up), ("blame", -1.0, -np.maximum(ratio, 0.8), down)]
    fig = plots.clip_quadrants(ratio, panels, 0.8, 1.2, at=0.5)
    praise, blame, praise_slope, blame_slope = fig.axes
    assert [text.get_text() for text in praise.texts] == ["wrong way:\npushed up", "right way:\nno push"]
    assert [text.get_text() for text in blame.texts] == ["right way:\nno push", "wrong way:\npushed down"]
    places = [(praise, 1.9, 0.5), (blame, 0.3, 1.5), (praise_slope, 1.9, 0.5), (blame_slope, 0.3, 1.5)]
    for ax, inside, outside in places:
        [ground] = ax.collections
        assert ground.get_hatch() == "//"
        [path] = ground.get_paths()
        assert path.contains_point((inside, 0.5)) and not path.contains_point((outside, 0.5))
    marks = [line for ax in fig.axes for line in ax.lines if line.get_marker() == "D"]
    assert [mark.get_xdata()[0] for mark in marks] == [0.5] * 4
    assert [mark.get_ydata()[0] for mark in marks] == [0.5, -0.8, 1, 0]


def test_ratio_paths_show_the_band_and_both_climbs():
    clipped, free = np.array([[1.0, 1.0], [1.2, 1.1]]), np.array([[1.0, 1.0], [1.9, 1.1]])
    [ax] = plots.ratio_paths([("praise", "AB", clipped, free)], 0.8, 1.2).axes
    solid = {line.get_label(): line for line in ax.lines if line.get_linestyle() == "-"}
    assert list(solid["A"].get_ydata()) == [1.0, 1.2] and list(solid["B"].get_ydata()) == [1.0, 1.1]
    assert solid["A"].get_marker() != solid["B"].get_marker()
    dashed = [list(line.get_ydata()) for line in ax.lines if line.get_linestyle() == "--"]
    assert dashed == [[1.0, 1.9], [1.0, 1.1]]
    [band] = ax.patches
    assert (band.get_y(), band.get_y() + band.get_height()) == (0.8, 1.2)
    assert ax.get_ylim()[1] > 1.9


def test_a_long_completion_goes_on_in_further_panels():
    tokens, before, after = [*"abcde"], [-1.0, -2, -3, -4, -5], [-0.5, -2, -4, -4, -6]
    fig = plots.token_shift([("one", tokens, before, after)], per_row=2)
    assert [ax.get_title() for ax in fig.axes] == ["one", "one, continued", "one, continued"]
    assert [label.get_text() for ax in fig.axes for label in ax.get_xticklabels()] == tokens
    drawn = {name: [] for name in ("before", "after")}
    for ax in fig.axes:
        for line in ax.lines:
            drawn[line.get_label()] += list(line.get_ydata())
    assert drawn == {"before": before, "after": after}
    assert len({ax.get_xlim() for ax in fig.axes}) == 1
    [whole] = plots.token_shift([("one", tokens, before, after)]).axes
    assert whole.get_title() == "one" and len(whole.get_xticklabels()) == 5


def test_ablation_intervals_fill_what_parts_from_0_and_mark_what_lies_beyond_the_edge():
    def row(variant, gain, low, high):
        return {"variant": variant, "gain": gain, "gain_low": low, "gain_high": high, "differs": low > 0 or high < 0}

    lone = dict.fromkeys(("gain", "gain_low", "gain_high", "differs"))  # no seed of the baseline's
    rows = [row("baseline", 0.0, 0.0, 0.0), {"variant": "lone", **lone}, row("same", 0.01, -0.02, 0.04),
            row("better", 0.05, 0.02, 0.08),
            row("gone", -0.9, -1.0, -0.8), row("one seed", 0.02, -np.inf, np.inf)]  # fmt: skip
    [ax] = plots.ablation_intervals(rows, limits=(-20, 20)).axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["same", "better", "gone", "one seed"]
    zero, *dots = ax.lines
    assert list(zero.get_xdata()) == [0, 0]
    assert [(dot.get_marker(), round(dot.get_xdata()[0], 6)) for dot in dots] == [
        ("o", 1), ("o", 5), ("<", -20), ("o", 2)]  # fmt: skip
    assert [dot.get_markerfacecolor() for dot in dots] == ["white", plots.BLUE, plots.BLUE, "white"]
    spans = [lines.get_segments()[0][:, 0].tolist() for lines in ax.collections]
    assert np.allclose(spans, [(-2, 4), (2, 8), (-20, -20), (-20, 20)])
    assert [text.get_text() for text in ax.texts][:3] == [
        "+1.0 (-2.0 to +4.0)", "+5.0 (+2.0 to +8.0)", "-90.0 (-100.0 to -80.0)"]  # fmt: skip
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first row is on top
