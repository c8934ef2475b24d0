"""A run that computes nonsense stops before it is learned; one that goes nowhere says why, once."""

import json
import pickle
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from helpers import grpo as grpo_module
from helpers import sft as sft_module
from helpers.__main__ import main
from helpers.buffer import Experience
from helpers.grpo import grpo
from helpers.hygiene import NotFinite, Watch, all_finite, check_finite, save_responses
from helpers.losses import LossConfig
from helpers.models import add_lora, load_model
from helpers.recipes import load_recipe
from helpers.runs import Run
from helpers.sft import SFTConfig, sft
from helpers.tasks import load_task
from helpers.tests.conftest import disturb
from helpers.tests.test_grpo import SMALL, TASK, TOKENIZER, WholeText, tiny_model
from helpers.tests.test_runs import new_model, trained

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_accelerator_a_test():
    """accelerate keeps the first accelerator's settings for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def run(tmp_path):
    return Run.start(tmp_path / "run", load_recipe("pocket"), "cpu")


# --- no numbers ---


def spoiled(loss, how):
    """The loss made NaN or infinite, or with a gradient that is no number though it is one itself."""
    return {"nan": loss * float("nan"), "inf": loss + float("inf"), "gradient": loss + (loss * 0).sqrt()}[how]


def spoil(monkeypatch, module, name, at, how):
    """From here on the `at`th result of a module's function is spoiled."""
    original, calls = getattr(module, name), []

    def spoiling(*arguments, **named):
        first, second = original(*arguments, **named)
        calls.append(name)
        return (spoiled(first, how) if len(calls) == at else first), second

    monkeypatch.setattr(module, name, spoiling)


CONFIG = replace(SMALL, minibatch_size=4, checkpoint_every=1, loss=LossConfig(beta=0.01))  # two updates a step


@pytest.mark.parametrize("how", ["nan", "inf", "gradient"])
def test_the_loop_stops_before_an_update_that_is_no_number(run, monkeypatch, how):
    spoil(monkeypatch, grpo_module, "policy_loss", 4, how)  # in the second update of the second step
    model = tiny_model()
    with pytest.raises(NotFinite) as stopped:
        grpo(model, TOKENIZER, TASK, CONFIG, reward=WholeText(TASK), run=run, progress=False)
    told, kept = str(stopped.value), run.folder / "not-finite-grpo-000002"
    what = {"nan": "loss (nan)", "inf": "loss (inf)", "gradient": "gradient (nan)"}[how]
    assert told == (
        f"The {what} of grpo step 2 is no finite number, so training stops before that update; its responses are in "
        f"{kept}, and its last checkpoint is grpo step 1."
    )
    assert run.newest()["step"] == 1 and [r["step"] for r in run.records("metrics")] == [1]
    assert all(p.isfinite().all() for p in model.parameters())
    # The batch is the one that the loss was computed from, with all that it was computed from.
    records, tensors = json.loads((kept / "batch.json").read_text()), load_file(kept / "batch.safetensors")
    assert sorted(path.name for path in kept.iterdir()) == ["batch.json", "batch.safetensors"]
    assert 1 <= len(records) <= 4 and len(tensors) == 2 * len(records)
    for number, (record, experience) in enumerate(zip(records, stopped.value.experiences, strict=True)):
        assert record["text"] == TOKENIZER.decode(experience.response_ids)
        for name in ("prompt_ids", "response_ids", "advantage"):
            assert record[name] == getattr(experience, name)
        for name in ("old_logprobs", "reference_logprobs"):
            assert torch.equal(tensors[f"{name}.{number}"], getattr(experience, name))


def test_advantages_of_tokens_are_kept_with_the_batch(tmp_path):
    rows = [Experience([5], [6, 7], 0.5, token_advantages=torch.tensor([0.1, -0.2])), Experience([5], [6], 0.0)]
    kept = save_responses(tmp_path / "batch", rows, TOKENIZER)
    assert [record["advantage"] for record in json.loads((kept / "batch.json").read_text())] == [0.5, 0.0]
    tensors = load_file(kept / "batch.safetensors")
    assert list(tensors) == ["token_advantages.0"] and torch.equal(
        tensors["token_advantages.0"], rows[0].token_advantages
    )


def test_the_warm_up_stops_before_an_update_that_is_no_number(run, monkeypatch):
    model, tokenizer = load_model("pocket", device="cpu")
    task, config = load_task("letter_counting", "train", 6), SFTConfig(epochs=3, batch_size=3, checkpoint_every=2)
    spoil(monkeypatch, sft_module, "completion_logprobs", 4, "nan")
    with pytest.raises(NotFinite, match=r"^The loss \(nan\) of sft step 4 is .* its last checkpoint is sft step 2\.$"):
        sft(model, tokenizer, task, config, run=run, progress=False)
    texts = [r["text"] for r in json.loads((run.folder / "not-finite-sft-000004" / "batch.json").read_text())]
    assert len(texts) == 3 and all(text.startswith("<think>") for text in texts)
    assert all(p.isfinite().all() and p.grad is None for p in model.parameters())
    monkeypatch.undo()
    history = sft(model, tokenizer, task, config, run=run, progress=False)  # the same, mended
    assert [r["step"] for r in history] == [3, 4, 5, 6]


def test_without_a_run_the_batch_comes_with_the_error(monkeypatch):
    spoil(monkeypatch, grpo_module, "policy_loss", 1, "nan")
    with pytest.raises(NotFinite, match=r"the responses are in this error's `experiences`\.$") as stopped:
        grpo(tiny_model(), TOKENIZER, TASK, SMALL, reward=WholeText(TASK), progress=False)
    assert 1 <= len(stopped.value.experiences) <= 8


def test_weights_that_are_no_numbers_are_not_kept(run):
    model, optimizer = trained(run, "grpo", [1])
    for value in (float("nan"), float("-inf")):
        with torch.no_grad():
            model[2].bias[1] = value
        with pytest.raises(NotFinite) as stopped:
            run.save_checkpoint("grpo", 2, model, optimizer)
        told = "A weight after grpo step 2 is no finite number, so it is not kept; its last checkpoint is grpo step 1."
        assert str(stopped.value) == told
    assert [path.name for path in (run.folder / "checkpoints").iterdir()] == ["grpo-000001"]
    assert run.resume("grpo", *new_model()) == 1


def test_the_command_line_says_it_in_one_sentence(tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, sft_module, "completion_logprobs", 1, "inf")
    settings = ["sft.traces=4", "evaluation.size=3", "evaluation.max_new_tokens=2", "train_size=4"]
    assert main(["train", "pocket", "--set", *settings, "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("helpers: The loss (-inf) of sft step 1 is no finite number") and said.count("\n") == 1
    assert said.endswith("not-finite-sft-000001, and it has no checkpoint.\n")


@given(st.floats())
def test_what_is_finite(value):
    finite = value - value == 0
    assert all_finite({"a": torch.ones(3), "b": torch.tensor([0.0, value], dtype=torch.float64)}) == finite
    if finite:
        assert check_finite("loss", value) == value
    else:
        with pytest.raises(NotFinite, match="^The loss .* is no finite number.$"):
            check_finite("loss", value)


# --- figures that bode ill ---

GOOD = {"no_signal": 0.5, "format_rate": 0.9, "unfinished": 0.1, "first_ratio_min": 0.99, "first_ratio_max": 1.01}


def said(*records, earlier=()):
    """What a watch says: (step, the first words of a sentence)."""
    watch = Watch(earlier)
    return [(r["step"], " ".join(sentence.split()[:2])) for r in records for sentence in watch(r)]


def steps(n, first=1, **figures):
    return [{**GOOD, "step": first + i, **figures} for i in range(n)]


def test_a_good_run_gets_no_word():
    assert said(*steps(50)) == []
    assert said(*steps(9, no_signal=0.89), *steps(9, unfinished=0.5), *steps(9, format_rate=0.1)) == []
    assert said(*steps(9, first_ratio_min=0.5, first_ratio_max=2.0)) == []
    assert said(*({"stage": "sft", "step": i, "loss": 1.0} for i in range(1, 9))) == []  # the warm-up's figures


def test_five_steps_in_a_row_without_no_signalare_told_once():
    assert said(*steps(20, no_signal=0.9)) == [(5, "For 5")]
    broken = [*steps(4, no_signal=1.0), *steps(1, first=5), *steps(4, first=6, no_signal=1.0)]
    assert said(*broken) == [] and said(*broken, *steps(1, first=10, no_signal=0.95)) == [(10, "For 5")]


def test_what_is_equal_where_there_is_no_signal_depends_on_the_credit():
    """By the step, rewards that differ may go with no signal."""
    *earlier, last = steps(5, no_signal=1.0, reward_std=0.3)
    for credit, equal in (("response", "equal rewards"), ("step", "equally right steps")):
        [sentence] = Watch(earlier, credit)(last)
        assert f"had {equal}, which teach nothing: " in sentence


def test_an_error_comes_back_whole_from_another_process():
    for error in (NotFinite("loss (nan)", [1]), NotFinite("weight", text="A weight is no finite number.")):
        again = pickle.loads(pickle.dumps(error))
        assert (str(again), again.what, again.experiences) == (str(error), error.what, error.experiences)


def test_a_missing_format_is_told_at_the_start_alone():
    assert said(*steps(3, format_rate=0.09)) == [(1, "Only 9")]
    assert said(*steps(3), *steps(3, first=4, format_rate=0.0)) == []


def test_the_token_limit_and_the_ratio_are_told_once_whenever_it_is():
    assert said(*steps(3), *steps(9, first=4, unfinished=0.51)) == [(4, "At step")]
    for ratio in ({"first_ratio_min": 0.49}, {"first_ratio_max": 2.01}, {"first_ratio_max": float("nan")}):
        assert said(*steps(3), *steps(9, first=4, **ratio)) == [(4, "At step")]


def test_what_was_said_before_a_run_was_stopped_is_not_said_again():
    assert said(*steps(9, first=4, no_signal=1.0), earlier=steps(3, no_signal=1.0)) == [(5, "For 5")]
    assert said(*steps(9, first=7, no_signal=1.0), earlier=steps(6, no_signal=1.0)) == []


@given(st.lists(st.dictionaries(st.sampled_from([*GOOD, "step"]), st.floats(0, 3)), max_size=30))
def test_each_sentence_comes_at_most_once_on_one_line_with_a_cure(records):
    watch = Watch()
    sentences = [sentence for record in records for sentence in watch(record)]
    assert len({sentence[:6] + sentence[-9:] for sentence in sentences}) == len(sentences) <= 4
    assert all("\n" not in s and s.endswith(".") and s.count(". ") == 0 and ": " in s for s in sentences)


def told_by(config, reward=None, **more):
    lines = []
    more = {"reward": reward or WholeText(TASK), "progress": False, "say": lines.append, **more}
    grpo(tiny_model(), TOKENIZER, TASK, config, **more)
    return lines


class Same(WholeText):
    """Every response is worth the same, and has the format."""

    def parts(self, completion, example):
        return {"correct": 1.0, "format": 1.0, "length": 0.0, "total": 1.0}


def test_the_loop_says_what_its_watch_finds():
    config = replace(SMALL, steps=6, max_new_tokens=40)
    [no_signal] = [line for line in told_by(config, Same(TASK)) if "token limit" not in line]
    assert no_signal.startswith("For 5 steps 90 % of the groups or more had equal rewards")
    assert any(line.startswith("Only 0 % of the first responses have the format") for line in told_by(config))
    [limit] = told_by(replace(SMALL, steps=2, max_new_tokens=1), Same(TASK))
    assert limit.startswith("At step 1 ") and "token limit" in limit


@pytest.mark.parametrize("several", [{}, {"updates_per_buffer": 2}], ids=["on-policy", "two updates"])
def test_a_sampler_that_disagrees_with_the_trainer_is_told(monkeypatch, several):
    config, rollout = replace(SMALL, steps=2, **several), grpo_module.rollout
    agreed = dict(reward=Same(TASK), sampler_dtype=torch.bfloat16)
    assert not any("disagree" in line for line in told_by(config, **agreed))
    monkeypatch.setattr(grpo_module, "rollout", lambda *a, **named: rollout(*a, **{**named, "temperature": 0.3}))
    [line] = [line for line in told_by(config, **agreed) if "disagree" in line]
    assert line.startswith("At step 1 the ratio went from ")


def test_dropout_that_moves_the_ratio_is_told(monkeypatch):
    """Old log-probs and first update draw their dropout apart; the sampler has none."""
    policy = add_lora(tiny_model(), r=8, alpha=64, dropout=0.9)
    disturb(policy, 1.0)
    lines = []
    config = replace(SMALL, steps=1, updates_per_buffer=2)
    [record] = grpo(policy, TOKENIZER, TASK, config, reward=WholeText(TASK), progress=False, say=lines.append)
    assert record["first_ratio_min"] < 0.5 or record["first_ratio_max"] > 2
    assert any("disagree" in line for line in lines)


def test_silence_where_no_progress_is_shown_and_a_printed_line_where_it_is(capsys):
    config = replace(SMALL, steps=1, max_new_tokens=1)
    for progress in (False, True):
        grpo(tiny_model(), TOKENIZER, TASK, config, reward=WholeText(TASK), progress=progress)
        shown = capsys.readouterr()
        assert ("Only 0 % of the first responses" in shown.out) == progress and shown.err == ""


def test_the_check_at_the_start_leaves_random_numbers_and_metrics_as_they_are(run, tmp_path):
    """Or a resumed run, which checks once more, would not go on exactly."""

    def policy():
        return add_lora(tiny_model(), r=4, alpha=8, dropout=0.3)

    straight = grpo(policy(), TOKENIZER, TASK, SMALL, reward=WholeText(TASK), progress=False)
    short = replace(SMALL, steps=2)
    grpo(policy(), TOKENIZER, TASK, short, reward=WholeText(TASK), run=run, progress=False)
    [resumed] = grpo(policy(), TOKENIZER, TASK, SMALL, reward=WholeText(TASK), run=run, progress=False)
    timings = {"tokens_per_second", "seconds_sampling", "seconds_learning"}
    assert {k: v for k, v in resumed.items() if k not in timings} == {
        k: v for k, v in straight[2].items() if k not in timings
    }
