"""What is said of runs: figures read off, and a diagnosis that names each fault of a made-up run and no other."""

import io
import json
import re
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from helpers import reports
from helpers.evaluate import wilson
from helpers.plots import png_bytes, smooth
from helpers.prompts import completion
from helpers.runs import Run

RECORDED = Path(__file__).parents[1] / "recorded"
FINE = "Nothing that these checks look for went wrong or stayed flat."


def lines(path: Path, records) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def make_run(folder: Path, task="syllogism", steps=20, rewards=(0.5, 0.9), no_signal=0.2, entropy=(0.1, 0.08),
             length=(60, 60), answers=("Yes", "No"), greedy=(50, 70), sampled=(40, 70), sound=(30, 60),
             said="Yes", evaluated=("sft", "grpo")) -> Run:  # fmt: skip
    """A run without a fault, of which each argument can make a faulty one; counts are of 100 questions."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"recipe": {"task": task}}))
    ramp = [np.linspace(*pair, steps) if steps else [] for pair in (rewards, entropy, length)]
    grpo = [
        {"stage": "grpo", "step": i + 1, "reward": float(r), "reward_std": 0.3, "no_signal": no_signal,
         "entropy": float(e), "length": float(n)} for i, (r, e, n) in enumerate(zip(*ramp, strict=True))
    ]  # fmt: skip
    lines(folder / "metrics.jsonl", [{"stage": "sft", "step": 1, "loss": 2.0}, *grpo])
    lines(folder / "samples.jsonl", [
        {"stage": "grpo", "step": m["step"], "truth": ("Yes", "No")[m["step"] % 2],
         "completion": completion("x", answers[m["step"] % len(answers)])} for m in grpo
    ])  # fmt: skip
    evals = []
    for stage, *counts in zip(("sft", "grpo"), greedy, sampled, sound, strict=True):
        for decoding, right in zip(("greedy", "sampled"), counts[:2], strict=True):
            if stage not in evaluated:
                continue
            low, high = wilson(right, 100)
            evals.append({"stage": stage, "decoding": decoding, "accuracy": right / 100, "accuracy_low": low,
                          "accuracy_high": high, "baseline": 0.5, "questions": 100,
                          "thinking_rate": counts[2] / 100})  # fmt: skip
            answer = said if isinstance(said, str) else said[stage == "grpo"]
            lines(folder / f"evaluations/{stage}-{decoding}.jsonl", [
                {"correct": float(i < right), "answer": answer, "completion": completion("x", answer)}
                for i in range(100)
            ])  # fmt: skip
    lines(folder / "eval.jsonl", evals)
    return Run.open(folder)


# --- which runs there are ---


def test_runs_are_found_by_name_place_by_place(tmp_path):
    for name in ("kept/b", "kept/a", "mine/a", "mine/c"):
        make_run(tmp_path / name)
    (tmp_path / "kept/no-metrics").mkdir()
    (tmp_path / "kept/no-metrics/config.yaml").write_text("{}")
    (tmp_path / "kept/c.txt").write_text("")
    found = reports.run_folders(tmp_path / "kept", tmp_path / "mine", tmp_path / "not there")
    assert list(found) == ["a", "b", "mine/a", "c"]
    assert found["mine/a"] == tmp_path / "mine/a" and found["a"] == tmp_path / "kept/a"


# --- figures ---


def test_the_band_of_the_reward_is_its_standard_deviation_and_stays_between_0_and_1(tmp_path):
    runs = {"one": make_run(tmp_path / "1"), "two": make_run(tmp_path / "2", rewards=(0.1, 0.2), steps=5)}
    axes = reports.reward_curves(runs).axes
    assert [ax.get_title() for ax in axes] == ["one", "two"]
    for ax, run in zip(axes, runs.values(), strict=True):
        rewards = [m["reward"] for m in reports.grpo_steps(run)]
        dots, line = ax.lines
        assert np.allclose(dots.get_ydata(), rewards) and np.allclose(line.get_ydata(), smooth(rewards))
        [band] = ax.collections
        corners = band.get_paths()[0].vertices
        for step, mean in enumerate(smooth(rewards), start=1):
            heights = corners[corners[:, 0] == step, 1]
            assert heights.min() == pytest.approx(max(mean - 0.3, 0)) and heights.max() == pytest.approx(
                min(mean + 0.3, 1)
            )


def test_rewards_above_1_and_below_0_have_room_and_all_panels_have_one_scale(tmp_path):
    runs = {"paid more": make_run(tmp_path / "1", rewards=(0.7, 1.6)), "usual": make_run(tmp_path / "2"),
            "penalty": make_run(tmp_path / "3", rewards=(-0.2, 0.9))}  # fmt: skip
    axes = reports.reward_curves(runs).axes
    assert [ax.get_ylim() for ax in axes] == [pytest.approx((1.02 * -0.2, 1.02 * 1.6))] * 3
    heights = [ax.collections[0].get_paths()[0].vertices[:, 1] for ax in axes]
    tops, bottoms = [h.max() for h in heights], [h.min() for h in heights]
    assert tops[0] == pytest.approx(1.6) and tops[1] == 1 and bottoms[2] == pytest.approx(-0.2)
    [usual] = reports.reward_curves({"usual": runs["usual"]}).axes
    assert usual.get_ylim() == (0, 1.02)


def test_lines_by_step_have_a_panel_a_metric_and_a_style_a_run(tmp_path):
    runs = {"one": make_run(tmp_path / "1"), "two": make_run(tmp_path / "2", no_signal=0.7, steps=9)}
    fig = reports.step_lines(runs, {"no_signal": "Without signal", "length": "Tokens"})
    assert [ax.get_title() for ax in fig.axes] == ["Without signal", "Tokens"]
    one, two = fig.axes[0].lines
    assert np.allclose(one.get_ydata(), 0.2) and np.allclose(two.get_ydata(), 0.7) and len(two.get_xdata()) == 9
    assert one.get_linestyle() != two.get_linestyle() and one.get_color() != two.get_color()
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["one", "two"]


def test_intervals_stand_where_wilson_puts_them_and_only_for_what_was_evaluated(tmp_path):
    runs = {"whole": make_run(tmp_path / "1"), "half": make_run(tmp_path / "2", evaluated=("sft",))}
    [ax] = reports.accuracy_intervals(runs).axes
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "whole, after the warm-up", "whole, after GRPO", "half, after the warm-up"
    ]  # fmt: skip
    drawn = [segment for lines in ax.collections for segment in lines.get_segments()]
    spans = [tuple(segment[:, 0]) for segment in drawn if segment[0, 1] == segment[1, 1]]
    assert spans == [pytest.approx([100 * x for x in wilson(right, 100)]) for right in (50, 40, 70, 70, 50, 40)]
    constant = [segment[0, 0] for segment in drawn if segment[0, 1] != segment[1, 1]]
    assert constant == [50.0] * 3
    assert [line.get_xdata()[0] for line in ax.lines] == [50, 40, 70, 70, 50, 40]


def test_a_page_shows_the_loop_or_else_the_warm_up(tmp_path):
    fig, numbers = reports.run_page(make_run(tmp_path / "1"))
    assert [ax.get_title() for ax in fig.axes][0] == "Reward of the rollouts" and numbers["GRPO steps"] == 20
    assert numbers["after GRPO, sampled"] == "70.0 % right (60.4 to 78.1; n = 100; constant 50.0 %)"
    assert numbers["what went wrong or stayed flat"] == f"\n- {FINE}"
    fig, numbers = reports.run_page(make_run(tmp_path / "2", steps=0, evaluated=("sft",)))
    assert [ax.get_title() for ax in fig.axes] == ["Loss of the warm-up"] and "warm-up alone" in str(numbers)


# --- words and tables ---

LITERALS = st.lists(st.sampled_from(["P", "Q", "¬R", "~S"]), min_size=2, max_size=6)


@given(LITERALS, st.booleans())
def test_letters_joined_by_or_are_a_disjunction_and_nothing_else_is(literals, brackets):
    answer = " ∨ ".join(literals)
    answer = f"({answer})" if brackets else answer
    assert reports.only_disjunction(answer)
    for sign in ("→", "∧", "↔", ""):
        assert not reports.only_disjunction(answer.replace("∨", sign, 1))
    assert not reports.only_disjunction(answer + " → P")


@pytest.mark.parametrize("answer", [None, "", "P", "¬P", "Yes", "((P ∧ Q) ∨ R)", "P or Q", "∨"])
def test_other_answers_are_no_disjunction(answer):
    assert not reports.only_disjunction(answer)
    assert reports.only_disjunction("((P ∨ ¬Q) ∨ R)")


def test_a_table_of_responses_shows_what_was_written_and_no_mark_up_of_it(tmp_path):
    run = make_run(tmp_path / "1", said=("Yes | *No*\n<b>", "Yes"))
    heads, dashes, row = reports.responses_table(run, 45, ["sft", "grpo"]).splitlines()
    assert heads == "| after the warm-up | after GRPO |" and dashes == "|---|---|"
    left, right = row.strip("| ").split(" | ")
    assert left.endswith("**wrong**") and right.endswith("**right**")
    assert not re.search(r"[<>|]|\*[^*]", left.removesuffix("**wrong**"))
    assert "Yes &#124; &#42;No&#42; &#60;b&#62;" in left
    cut = make_run(tmp_path / "2", said="x" * 900)
    assert len(reports.responses_table(cut, 0, ["sft"]).splitlines()[2]) < 420


# --- the diagnosis ---

FAULTS = {
    "every reward 0": (dict(rewards=(0, 0), no_signal=1.0), ["Every reward in 20 steps is 0"]),
    "only steps paid": (dict(rewards=(0, 0)), ["The reward has no clear trend (first 4 steps 0.00, last 4 steps 0"]),
    "flat": (dict(rewards=(0.5, 0.5)), ["The reward has no clear trend (first 4 steps 0.50, last 4 steps 0.50)"]),
    "fell": (dict(rewards=(0.7, 0.3)), ["The reward fell (first 4 steps 0.67, last 4 steps 0.33)"]),
    "slow": (dict(no_signal=0.6), ["Learning has slowed down: 60 % of the groups of the last 4 steps"]),
    "stopped": (dict(no_signal=1.0), ["Learning has stopped: 100 %"]),
    "constant": (dict(answers=("yes", "Yes")), ["one answer to everything: 100 %", "0.10 at first, 0.08 nats at last"]),
    "narrow": (dict(entropy=(0.1, 0.001)), ["The entropy fell from 0.0"]),
    "longer": (dict(length=(40, 90)), ["Responses went from 44 to 86 tokens"]),
    "greedy flat": (dict(greedy=(60, 61)), ["Greedy accuracy did not clearly change with GRPO (+1.0 points, p = 1)"]),
    "greedy fell": (dict(greedy=(80, 60)), ["Greedy accuracy fell with GRPO (-20.0 points"]),
    "no better": (dict(sampled=(30, 55)), ["not clearly above the constant answer: 55.0 % against 50.0 %"]),
    "muddled": (dict(sound=(30, 35)), ["Right answers rose by 30 points, right derivations by 5"]),
    "shape": (dict(task="propositional_logic", said=("(P → Q)", "(P ∨ Q)")), ["One shape: 100 %"]),
    "not examined": (dict(evaluated=("sft",), sampled=(70, 0)), ["It ended at step 20 without an evaluation"]),
    "at once": (dict(steps=4, rewards=(0.5, 0.5)), ["The reward has no clear trend (first step 0.50, last step 0.50)"]),
    "no loop": (dict(steps=0, evaluated=("sft",), sampled=(70, 0)), ["warm-up alone"]),
}


def test_a_run_without_a_fault_gets_no_other_sentence(tmp_path):
    assert reports.diagnosis(make_run(tmp_path / "1")) == [FINE]


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named_and_nothing_else(fault, tmp_path):
    arguments, expected = FAULTS[fault]
    told = reports.diagnosis(make_run(tmp_path / "1", **arguments))
    assert len(told) == len(expected), told
    for part, sentence in zip(expected, told, strict=True):
        assert part in sentence and sentence.endswith(".")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("smollm2-135m-syllogism-fast-gpu-seed0", ["reward fell", "stopped", "say “yes”", "hides", "without an eval"]),
        ("smollm2-135m-no-warm-up-gpu-seed0", ["Every reward in 15 steps is 0", "not clearly above"]),
        (
            "smollm2-135m-syllogism-seed0",
            ["no clear trend", "slowed down", "Greedy accuracy fell", "Sampled accuracy"],
        ),
        (
            "smollm2-135m-syllogism-derivation-unstratified-fast-seed1",
            ["no clear trend", "slowed down", "say “no”", "entropy fell", "without an eval"],
        ),
        (
            "smollm2-135m-syllogism-derivation-unstratified-seed0",  # 14 steps, one answer from the ninth on
            ["no clear trend", "slowed down", "say “yes”", "hides", "without an eval"],
        ),
        ("smollm2-135m-syllogism-once-fast-seed1", ["no clear trend", "last step", "say “yes”", "hides", "without an"]),
        ("pocket-letter-counting-seed1", ["slowed down", "right derivations by 1"]),
        ("smollm2-135m-propositional-gpu-seed1", ["slowed down", "right derivations by 8", "only join letters"]),
    ],
)
def test_the_recorded_failures_are_recognised(name, expected):
    told = reports.diagnosis(Run.open(RECORDED / name))
    assert len(told) == len(expected), told
    assert all(part in sentence for part, sentence in zip(expected, told, strict=True))


# --- the animation ---

TOKENS = ["<", "think", "> A = ", "$x", "\n", "Yes"]
CHOICES = [[(token, 0.6), ("other\n", 0.3), ("：", 0.1)] for token in TOKENS]  # the last is not in the font


@pytest.mark.filterwarnings("error")
def test_a_moment_shows_the_text_so_far_and_marks_the_token_that_was_taken():
    fig = reports.answer_moment("Is it?\nSay Yes or No", TOKENS, CHOICES, at=4)
    page, bars = fig.axes
    assert [text.get_text() for text in page.texts] == ["Is it?", "Say Yes or No", "", "<think> A = $x▌"]
    assert [label.get_text() for label in bars.get_yticklabels()] == ["$x", "other↵", "▯"]
    assert [patch.get_width() for patch in bars.patches] == pytest.approx([60, 30, 10])
    assert len({patch.get_facecolor() for patch in bars.patches}) == 2
    assert bars.get_title() == "token 4 of 6" and png_bytes(fig)


def test_the_animation_has_a_frame_a_token_rests_and_ends():
    gif = reports.answer_animation("Is it?", TOKENS, CHOICES, fps=5)
    image = Image.open(io.BytesIO(gif))
    assert image.n_frames == len(TOKENS) and image.info["loop"] == 2 and image.size == (640, 288)
    durations, shades = [], []
    for frame in range(image.n_frames):
        image.seek(frame)
        durations.append(image.info["duration"])
        shades.append(np.asarray(image.convert("L")).astype(int))
    assert durations[:-1] == [200] * 5 and durations[-1] == 200 + 15 * 200
    assert all((a != b).any() for a, b in zip(shades, shades[1:], strict=False))


def test_a_gif_is_shown_with_its_alternative_text(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, **more: shown.append((data, more)))
    reports.show_gif(b"GIF89a", "A model writes.")
    [(data, more)] = shown
    assert b64decode(data["image/gif"]) == b"GIF89a" and data["text/plain"] == "A model writes."
    assert more["metadata"]["image/gif"]["alt"] == "A model writes." and more["raw"]
