"""Pictures of ideas: what is drawn, read off the figures."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.text import Annotation

from helpers import drawings
from helpers.losses import group_advantages
from helpers.rewards import Reward
from helpers.tasks import Example, load_task

REGIONS = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)]


def venn_panel(states, outlined=(), kinds=("ants", "bees", "cats")):
    return ("a title", kinds, dict(zip(REGIONS, states, strict=False)), outlined)


def inside(text):
    """The region of a Venn diagram that a text stands in."""
    x, y = text.get_position()
    return tuple(int(np.hypot(x - a, y - b) < drawings.VENN_RADIUS) for a, b in drawings.VENN_CENTRES)


def test_each_mark_of_a_venn_diagram_stands_in_its_region():
    states = ["ruled out", "open", "empty", "has members", "ruled out", "has members", "open"]
    ax = drawings.venn([venn_panel(states)]).axes[0]
    marks = {inside(text): text.get_text() for text in ax.texts if text.get_text() not in ("ants", "bees", "cats")}
    assert marks == dict(zip(REGIONS, ["✕", "?", "", "●", "✕", "●", "?"], strict=True))


def test_a_venn_diagram_names_its_kinds_outside_and_nearest_to_their_circles():
    ax = drawings.venn([venn_panel(["empty"] * 7)]).axes[0]
    for number, kind in enumerate(("ants", "bees", "cats")):
        [text] = [text for text in ax.texts if text.get_text() == kind]
        away = [np.hypot(*np.subtract(text.get_position(), centre)) for centre in drawings.VENN_CENTRES]
        assert inside(text) == (0, 0, 0) and np.argmin(away) == number


def test_a_venn_diagram_fills_its_regions_and_outlines_the_ones_asked_for():
    ax = drawings.venn([venn_panel(["has members"] + ["empty"] * 6, [(1, 1, 0), (1, 1, 1)])]).axes[0]
    *grounds, outline = ax.collections  # one a region, then the outline
    blue = [to_hex(ground.get_facecolor()[0]) == "#cfe6f5" for ground in grounds]
    assert blue == [True] + [False] * 6
    [path] = outline.get_paths()
    # The two regions together are the lens in which the first two circles overlap.
    first, second = (
        np.hypot(*(path.vertices - centre).T) < drawings.VENN_RADIUS + 0.01 for centre in drawings.VENN_CENTRES[:2]
    )
    assert len(path.vertices) > 50 and first.all() and second.all()


def test_a_venn_legend_explains_the_states_that_are_drawn_and_no_others():
    legend = drawings.venn([venn_panel(["empty"] * 7), venn_panel(["ruled out"] * 7)]).legends[0]
    shown = [text.get_text() for text in legend.get_texts()]
    assert shown == ["empty", "✕ cannot have members", "what the claim speaks of"]


@pytest.mark.parametrize(
    "panel",
    [venn_panel(["empty"] * 6), venn_panel(["full"] * 7), venn_panel(["empty"] * 7, kinds=("ants", "bees"))],
)
def test_a_venn_diagram_refuses_missing_regions_unknown_states_and_two_kinds(panel):
    with pytest.raises(ValueError, match="Name three kinds"):
        drawings.venn([panel])


# --- the loop ---


def test_the_loop_goes_round_in_the_order_of_its_numbers_and_back_to_the_policy():
    boxes = sorted(drawings.LOOP_BOXES, key=lambda name: int(drawings.LOOP_BOXES[name][2].split()[0]))
    assert boxes == list(drawings.LOOP_BOXES)
    ways_out = {end for start, end in drawings.LOOP_ARROWS if start == "policy"}
    assert list(zip(boxes, boxes[1:], strict=False)) + [("update", "policy")] == list(drawings.LOOP_ARROWS[:10])
    assert ways_out == {"responses", "loss"} and len(drawings.LOOP_ARROWS) == 12


def loop_parts():
    """The boxes (x, y, width, height), the arrows (tail, head) and the texts of the loop."""
    ax = drawings.loop_picture().axes[0]
    boxes = [(p.get_x(), p.get_y(), p.get_width(), p.get_height()) for p in ax.patches]
    arrows = [(text.xyann, text.xy) for text in ax.texts if isinstance(text, Annotation)]
    return boxes, arrows, [text for text in ax.texts if text.get_text()]


def test_each_arrow_of_the_loop_runs_from_the_side_of_its_box_to_the_side_of_the_next():
    boxes, arrows, texts = loop_parts()
    titled = {}  # box by title: the box that the title stands in
    for text in texts:
        x, y = text.get_position()
        for box in boxes:
            if box[0] < x < box[0] + box[2] and box[1] < y < box[1] + box[3]:
                titled[text.get_text()] = box

    def touches(point, name):
        x, y, width, height = titled["policy" if name == "policy" else drawings.LOOP_BOXES[name][2]]
        across, down = (point[0] - x) / width, (point[1] - y) / height
        edges = [abs(across), abs(across - 1), abs(down), abs(down - 1)]
        return min(edges) < 1e-9 and -1e-9 < across < 1 + 1e-9 and -1e-9 < down < 1 + 1e-9

    assert len(boxes) == 11 and len(arrows) == len(drawings.LOOP_ARROWS)
    for (start, end), (tail, head) in zip(drawings.LOOP_ARROWS, arrows, strict=True):
        assert touches(tail, start) and touches(head, end), (start, end)


def test_the_boxes_of_the_loop_do_not_overlap_and_hold_their_texts():
    fig = drawings.loop_picture()
    ax, renderer = fig.axes[0], FigureCanvasAgg(fig).get_renderer()
    boxes = [patch.get_window_extent(renderer) for patch in ax.patches]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    for text in ax.texts:
        extent = text.get_window_extent(renderer)
        inside_one = [box for box in boxes if box.overlaps(extent)]
        if text.get_text() in ("writes", "log-probs", "new weights", ""):
            continue  # beside an arrow, or the arrow itself
        [box] = inside_one
        assert box.x0 < extent.x0 and extent.x1 < box.x1 and box.y0 < extent.y0 and extent.y1 < box.y1, text


def test_the_rewards_and_advantages_in_the_loop_are_what_helpers_makes_of_its_responses():
    answers, rewards, advantages = (
        drawings.LOOP_BOXES[name][3].split("\n")[1].split() for name in ("responses", "rewards", "advantages")
    )
    example = Example("", "3", {})
    reward = Reward(load_task("letter_counting", "test", size=3))
    texts = [f"<think> x </think> <answer> {answer.strip('“”')} </answer>" for answer in answers]
    true = torch.tensor([reward(texts, example)])
    assert [float(r) for r in rewards] == pytest.approx(true[0].tolist())
    drawn = [float(a.replace("−", "-")) for a in advantages]
    assert drawn == pytest.approx(group_advantages(true)[0].tolist(), abs=0.005)


def test_each_box_of_the_loop_names_a_module_that_is_there():
    for _, _, title, _, module, _ in drawings.LOOP_BOXES.values():
        assert find_spec(f"helpers.{module}"), title


# --- right and wrong answers ---


def test_a_grid_of_verdicts_marks_right_wrong_and_missing_answers_and_counts_the_right_ones():
    fig = drawings.verdict_grid(["Yes", "No", "Yes"], {"before": ["No", "No", None], "after": ["Yes", "No", "No"]})
    ax = fig.axes[0]
    assert [text.get_text() for text in ax.texts] == ["✗ No", "✓ No", "", "✓ Yes", "✓ No", "✗ No"]
    green, red, white = map(to_hex, (drawings.GREEN, drawings.RED, "white"))
    assert [to_hex(p.get_facecolor()) for p in ax.patches] == [red, green, white, green, green, red]
    assert [bool(patch.get_hatch()) for patch in ax.patches] == [False, False, True, False, False, False]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["before: 1 of 3", "after: 2 of 3"]


def test_a_grid_of_verdicts_refuses_a_row_of_another_length():
    with pytest.raises(ValueError, match="one answer for each of the 2 questions"):
        drawings.verdict_grid(["Yes", "No"], {"before": ["Yes"]})


# --- strips of tokens ---


def boxes_of(ax):
    """(text, letter, colour) of each box of a token strip, in the order drawn."""
    texts = {tuple(np.round(text.get_position(), 3)): text.get_text() for text in ax.texts}
    found = []
    for box in ax.patches:
        x, y = box.get_x() + box.get_width() / 2, box.get_y()
        word, letter = (texts[tuple(np.round((x, y + down), 3))] for down in (0.125, 0.33))
        found.append((word, letter, to_hex(box.get_facecolor(), keep_alpha=False)))
    return found


def test_a_strip_shows_every_token_with_its_kind_in_colour_and_letter():
    kinds = ["prompt", "response", "response", "end", "padding"]
    fig = drawings.token_strip([("a row", ["Q\n", " A", "B", "<|e|>", "<|e|>"], kinds)])
    shown = boxes_of(fig.axes[0])
    assert [word for word, _, _ in shown] == ["Q↵", "·A", "B", "<|e|>", "<|e|>"]
    assert [letter for _, letter, _ in shown] == ["P", "R", "R", "E", "pad"]
    end, padding = shown[3:]
    assert end != padding and fig.axes[0].patches[4].get_hatch() and not fig.axes[0].patches[3].get_hatch()
    legend = [text.get_text() for text in fig.legends[0].get_texts()]
    assert legend == ["prompt (P)", "response (R)", "end (E)", "padding (pad)"]


def test_a_strip_leaves_out_the_middle_of_long_prompts_and_says_how_much():
    tokens = [str(i) for i in range(100)] + ["x"] * 50
    fig = drawings.token_strip([("a row", tokens, ["prompt"] * 100 + ["response"] * 50)], keep=3)
    words = [word for word, _, _ in boxes_of(fig.axes[0])]
    assert words == ["0", "1", "2", "… 94 more …", "97", "98", "99"] + ["x"] * 50  # a response is shown whole


def test_a_long_strip_goes_on_in_the_next_line_inside_the_figure():
    fig = drawings.token_strip([("one", ["word"] * 90, ["response"] * 90), ("two", ["x"], ["end"])])
    boxes = fig.axes[0].patches
    assert all(0 <= box.get_x() and box.get_x() + box.get_width() <= 8.0 for box in boxes)
    tops = [box.get_y() for box in boxes]
    assert tops == sorted(tops) and len(set(tops)) > 3
    same_line = [(a, b) for a, b in zip(boxes, boxes[1:], strict=False) if a.get_y() == b.get_y()]
    assert all(a.get_x() + a.get_width() < b.get_x() for a, b in same_line)


def test_a_strip_refuses_tokens_without_a_kind():
    with pytest.raises(ValueError, match="Give every token a kind"):
        drawings.token_strip([("a row", ["a", "b"], ["prompt"])])


def test_mask_rows_mark_what_is_missing_and_what_is_too_much():
    truth = [False, True, True, None, True]
    masks = {"right": truth, "wrong": [True, True, False, None, True]}
    ax = drawings.mask_rows(["P", " a", "b", "", "<|e|>"], truth, masks).axes[0]
    marks = {text.get_position(): text.get_text() for text in ax.texts}
    assert [marks[column, 0] for column in range(5)] == ["", "●", "●", "…", "●"]
    assert [marks[column, 1] for column in range(5)] == ["+", "●", "−", "…", "●"]
    assert len(ax.patches) == 8  # no box where the row is not drawn
    hatched = {(round(box.get_x() + 0.5), round(box.get_y() + 0.42)) for box in ax.patches if box.get_hatch()}
    assert hatched == {(0, 1), (2, 1)}
    assert [label.get_text() for label in ax.get_xticklabels()] == ["P", "·a", "b", "", "<|e|>"]


def test_mask_rows_refuse_a_mask_of_another_length():
    with pytest.raises(ValueError, match="needs one value for each of the 2 tokens"):
        drawings.mask_rows(["a", "b"], [True, True], {"short": [True]})


def test_distribution_bars_share_a_scale_and_tell_kept_from_cut():
    panels = [("cold", ["No", " Yes"], [0.9, 0.1], [True, False]), ("hot", ["No", " Yes"], [0.6, 0.4], [True, True])]
    fig = drawings.distribution_bars(panels)
    cold, hot = fig.axes
    assert [bar.get_width() for bar in (*cold.patches, *hot.patches)] == [0.9, 0.1, 0.6, 0.4]
    assert [bool(bar.get_hatch()) for bar in (*cold.patches, *hot.patches)] == [False, True, False, False]
    assert cold.get_xlim() == hot.get_xlim() and (cold.get_title(), hot.get_title()) == ("cold", "hot")
    assert [text.get_text() for text in hot.texts] == ["60.0 %", "40.0 %"]
    assert [label.get_text() for label in cold.get_yticklabels()] == ["No", "·Yes"]
    assert cold.yaxis_inverted()  # the likeliest on top
