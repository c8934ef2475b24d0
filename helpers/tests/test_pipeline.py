"""The main job in small: base -> warm-up -> GRPO; a run killed anywhere, once resumed, ends as if it had not been."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from accelerate.state import AcceleratorState

from helpers import pipeline
from helpers.evaluate import mcnemar
from helpers.local_server import NAME, serve
from helpers.models import load_adapter, load_model
from helpers.pipeline import compare, held_out, start_model, train
from helpers.recipes import load_recipe
from helpers.runs import Run
from helpers.tasks import load_task

torch.set_num_threads(1)

# So short a warm-up earns no reward: a length term gives the loop something to learn from.
TINY = [
    "sft.traces=24", "sft.epochs=2", "sft.batch_size=12", "sft.minibatch_size=8", "sft.checkpoint_every=2",
    "grpo.steps=4", "grpo.questions_per_rollout=2", "grpo.group_size=4", "grpo.buffer_size=8",
    "grpo.minibatch_size=4", "grpo.gradient_accumulation=1", "grpo.updates_per_buffer=2", "grpo.max_new_tokens=12",
    "grpo.checkpoint_every=2", "grpo.learning_rate=1e-3", "grpo.measure_kl=true", "reward.length=0.5",
    "reward.length_target=8", "train_size=40", "evaluation.size=9", "evaluation.max_new_tokens=8",
]  # fmt: skip
# All that draws random numbers or rounds differently: dropout, a merged copy in bfloat16, mixed precision.
LORA = [*TINY, "lora.r=4", "lora.alpha=8", "lora.dropout=0.2", "sampler_dtype=bfloat16", "mixed_precision=bf16",
        "sft.epochs=1", "sft.checkpoint_every=1", "grpo.steps=2", "grpo.checkpoint_every=1",
        "evaluation.size=3"]  # fmt: skip
TIMINGS = {"tokens_per_second", "seconds_sampling", "seconds_learning"}
SILENT = {"say": lambda line: None}


@pytest.fixture(autouse=True)
def one_accelerator_a_test():
    """accelerate keeps the first accelerator's settings for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing stopped, and the lines it said."""
    AcceleratorState._reset_state(reset_partial_state=True)
    said = []
    run = train(load_recipe("pocket", TINY), tmp_path_factory.mktemp("whole") / "run", say=said.append)
    warnings = [line for line in said if line.startswith(("Only ", "At step "))]  # of so short a warm-up
    assert ["format" in warnings[0], "token limit" in warnings[1]] == [True, True] and len(warnings) == 2
    return run, [line for line in said if line not in warnings]


def left_by(run):
    """All that a run leaves but its clock: file name -> bytes, or records without timings."""
    found = {}
    for file in sorted(run.folder.rglob("*")):
        if file.is_file() and file.name != "config.yaml":
            name = str(file.relative_to(run.folder))
            if name == "metrics.jsonl":
                found[name] = [{k: v for k, v in r.items() if k not in TIMINGS} for r in run.records("metrics")]
            else:
                found[name] = file.read_bytes()
    return found


def assert_same(run, other):
    mine, theirs = left_by(run), left_by(other)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert mine[name] == theirs[name], name


# --- a run ---


def test_what_a_run_leaves(whole):
    run, said = whole
    assert sorted(left_by(run)) == [
        *(f"checkpoints/{stage}-000004/{name}" for stage in ("grpo", "sft")
          for name in ("model.safetensors", "optimizer.safetensors", "state.json")),
        "eval.jsonl",
        *(f"evaluations/{stage}-{decoding}.jsonl" for stage in ("base", "grpo", "sft")
          for decoding in ("greedy", "sampled")),
        "metrics.jsonl", "samples.jsonl",
    ]  # fmt: skip
    stages = [(r["stage"], r["step"]) for r in run.records("metrics")]
    assert stages == [(stage, step) for stage in ("sft", "grpo") for step in (1, 2, 3, 4)]
    evaluated = [(r["stage"], r["decoding"], r["temperature"], r["questions"]) for r in run.records("eval")]
    assert evaluated == [
        (stage, decoding, temperature, 9)
        for stage in ("base", "sft", "grpo")
        for decoding, temperature in (("greedy", 0.0), ("sampled", 1.0))
    ]
    samples = run.records("samples")
    assert [r["step"] for r in samples] == [step for step in (1, 2, 3, 4) for _ in range(4)]
    assert {"question", "truth", "completion", "correct", "format", "length", "total"} <= samples[0].keys()
    assert said[0] == f"pocket on letter_counting, seed 0; the run is kept in {run.folder}"
    assert [line[:5] for line in said[1:7]] == ["base:", "base:", " sft:", " sft:", "grpo:", "grpo:"]
    assert [line.partition(":")[0] for line in said[7:]] == ["sft -> grpo, greedy", "sft -> grpo, sampled"]


def test_both_stages_moved_the_weights(whole):
    """Or the tests of resuming below would show nothing."""
    run, _ = whole
    files = left_by(run)
    assert files["checkpoints/sft-000004/model.safetensors"] != files["checkpoints/grpo-000004/model.safetensors"]
    metrics = run.records("metrics")
    assert metrics[3]["loss"] < metrics[0]["loss"] and sum(r["grad_norm"] > 0 for r in metrics[4:]) >= 3
    assert metrics[7]["kl"] > metrics[4]["kl"]


def test_a_run_made_longer_is_evaluated_again_and_only_where_it_changed(whole, tmp_path):
    old, folder, said = whole[0], tmp_path / "run", []
    shutil.copytree(old.folder, folder)
    text = (folder / "config.yaml").read_text()
    assert text.count("    steps: 4\n") == 1
    (folder / "config.yaml").write_text(text.replace("    steps: 4\n", "    steps: 6\n"))
    run = train(load_recipe("pocket", TINY), folder, resume=True, say=said.append)
    assert [line[:5] for line in said if line[4:5] == ":"] == ["grpo:", "grpo:"]
    assert [(e["stage"], e["step"]) for e in run.records("eval")[::2]] == [("base", 0), ("sft", 4), ("grpo", 6)]
    assert run.records("eval")[:4] == old.records("eval")[:4]
    for decoding in ("greedy", "sampled"):
        assert len(run.records(f"evaluations/grpo-{decoding}")) == 9
    assert said[-1] == compare(run, "sft", "grpo", "sampled")
    before = (folder / "eval.jsonl").read_bytes()
    train(load_recipe("pocket", TINY), folder, resume=True, **SILENT)
    assert (folder / "eval.jsonl").read_bytes() == before


def test_an_evaluation_s_summary_is_that_of_its_responses(whole):
    run, _ = whole
    for r in run.records("eval"):
        responses = run.records(f"evaluations/{r['stage']}-{r['decoding']}")
        assert [x["truth"] for x in responses] == [e.answer for e in held_out(load_recipe("pocket", TINY))]
        assert r["accuracy"] == sum(x["correct"] for x in responses) / 9
        assert r["mean_length"] == sum(x["length"] for x in responses) / 9


def test_comparing_two_stages(tmp_path):
    run = Run(tmp_path)
    for stage, rights in (("sft", "0000011"), ("grpo", "1111110")):
        run.write_records(f"evaluations/{stage}-greedy", [{"correct": float(r)} for r in rights])
    assert mcnemar([0] * 5 + [1, 1], [1] * 6 + [0])["p"] == pytest.approx(0.21875)
    assert compare(run, "sft", "grpo", "greedy") == (
        "sft -> grpo, greedy: +57.1 points (5 gained, 1 lost of 7; McNemar p = 0.22)"
    )


def test_every_seed_is_asked_the_same_held_out_questions_none_of_them_trained_on():
    first, other = (held_out(load_recipe("pocket", [f"seed={seed}"])) for seed in (0, 1))
    assert [e.question for e in first] == [e.question for e in other] and len(first) == 300
    assert max(sum(e.answer == a for e in first) for a in first.classes) <= 150
    for seed in (0, 1000):
        words = {e.metadata["word"] for e in load_task("letter_counting", "train", 4000, seed)}
        assert not words & {e.metadata["word"] for e in first}


# --- refusals, none of which leaves a folder behind ---


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("sft.traces=1000000", "letter_counting offers .* such train questions; ask for up to that many"),
        ("train_size=1000000", "letter_counting offers .* such train questions"),
        ("evaluation.size=1000000", "letter_counting offers .* such test questions"),
        ("task=propositional_logic grpo.stratified=true", "leave out grpo.stratified"),
    ],
)
def test_a_recipe_that_cannot_run_leaves_no_folder(tmp_path, setting, sentence):
    with pytest.raises(ValueError, match=sentence):
        train(load_recipe("pocket", setting.split()), tmp_path / "run", **SILENT)
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_is_refused_and_nothing_is_resumed_where_there_is_none(whole, tmp_path):
    run, _ = whole
    before = left_by(run)
    with pytest.raises(ValueError, match="is there already: go on with --resume"):
        train(load_recipe("pocket", TINY), run.folder, **SILENT)
    assert left_by(run) == before
    with pytest.raises(ValueError, match="holds no run"):
        train(load_recipe("pocket", TINY), tmp_path / "none", resume=True, **SILENT)
    assert not (tmp_path / "none").exists()


# --- killed and resumed ---


class Killed(BaseException):
    """What no handler in the code catches."""


def train_and_kill(recipe, folder, monkeypatch, points):
    """Start a run and kill it at each of these points in turn, resuming it after each. Returns the finished run.

    A point is (log, stage, step or decoding): killed while half of that line is written, inside a character where it
    has one of several bytes. ("checkpoint", stage, step): killed when its files are written, before it has its name.
    """
    points, log, replace = list(points), Run.log, os.replace

    def killing_log(run, name, record):
        if points and points[0] == (name, record["stage"], record.get("decoding", record.get("step"))):
            points.pop(0)
            with open(run.folder / f"{name}.jsonl", "ab") as file:
                file.write((json.dumps({"text": "→", **record}, ensure_ascii=False)).encode()[:11])
            raise Killed
        log(run, name, record)

    def killing_replace(source, target):
        if points and points[0][0] == "checkpoint" and str(target).endswith(f"{points[0][1]}-{points[0][2]:06d}"):
            points.pop(0)
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", killing_log)
        patch.setattr(os, "replace", killing_replace)
        for turn in range(len(points)):
            with pytest.raises(Killed):
                train(recipe, folder, resume=turn > 0, **SILENT)
        assert not points
        return train(None, folder, resume=True, **SILENT)


EVERYWHERE = [
    ("eval", "base", "greedy"), ("eval", "base", "sampled"),
    ("metrics", "sft", 1), ("metrics", "sft", 2), ("checkpoint", "sft", 2), ("metrics", "sft", 4),
    ("checkpoint", "sft", 4), ("eval", "sft", "greedy"), ("eval", "sft", "sampled"),
    ("metrics", "grpo", 1), ("samples", "grpo", 2), ("checkpoint", "grpo", 2), ("metrics", "grpo", 4),
    ("checkpoint", "grpo", 4), ("eval", "grpo", "sampled"),
]  # fmt: skip


def test_a_run_killed_at_every_turn_ends_as_one_that_was_not(whole, tmp_path, monkeypatch):
    resumed = train_and_kill(load_recipe("pocket", TINY), tmp_path / "run", monkeypatch, EVERYWHERE)
    assert_same(resumed, whole[0])


def test_a_damaged_checkpoint_costs_time_but_changes_nothing(whole, tmp_path, monkeypatch):
    """Both stages' checkpoints are cut off: the warm-up starts anew, then the loop does."""
    run = train_and_kill(load_recipe("pocket", TINY), tmp_path / "run", monkeypatch, [("metrics", "grpo", 3)])
    for stage in ("sft", "grpo"):
        file = run.folder / "checkpoints" / f"{stage}-000004" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    assert_same(train(None, run.folder, resume=True, **SILENT), whole[0])


def test_lora_with_dropout_and_a_bfloat16_copy_resumes_exactly_too(tmp_path, monkeypatch):
    recipe = load_recipe("pocket", LORA)
    straight = train(recipe, tmp_path / "straight", **SILENT)
    points = [("metrics", "sft", 2), ("metrics", "grpo", 2)]
    resumed = train_and_kill(recipe, tmp_path / "resumed", monkeypatch, points)
    assert_same(resumed, straight)
    files = left_by(straight)
    assert {"adapter/adapter_model.safetensors", "adapter/adapter_config.json"} <= files.keys()
    sft, grpo = (files[f"checkpoints/{stage}-000002/model.safetensors"] for stage in ("sft", "grpo"))
    assert sft != grpo and len(grpo) < 300_000  # the adapter alone
    # What the adapter says is what the run's last checkpoint says, but for its rounding to bfloat16.
    policy, tokenizer = start_model(recipe)
    straight.load_weights(policy)
    base, _ = start_model(load_recipe("pocket", TINY))
    ids = torch.tensor([tokenizer("How many times does the letter").input_ids])
    with torch.no_grad():
        plain, right = base(input_ids=ids).logits, policy.eval()(input_ids=ids).logits
        loaded = load_adapter(base, straight.folder / "adapter")(input_ids=ids).logits
    assert (right - loaded).abs().max() < 0.02 * (right - plain).abs().max()


KILL = """
import os, signal, sys
from helpers.pipeline import train
from helpers.recipes import load_recipe
from helpers.runs import Run

log = Run.log
def kill(run, name, record):
    if (name, record["stage"], record.get("step")) == ("metrics", "grpo", 3):
        with open(run.folder / "metrics.jsonl", "a") as file:
            file.write('{"stage": "grpo", "st')
        os.kill(os.getpid(), signal.SIGKILL)
    log(run, name, record)
Run.log = kill
train(load_recipe("pocket", sys.argv[2:]), sys.argv[1])
"""


def test_a_process_that_is_killed_for_good_is_gone_on_with(whole, tmp_path):
    command = [sys.executable, "-c", KILL, str(tmp_path / "run"), *TINY]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "run" / "metrics.jsonl").read_text().endswith('{"stage": "grpo", "st')
    assert_same(train(None, tmp_path / "run", resume=True, **SILENT), whole[0])


def test_resuming_a_finished_run_changes_nothing(whole):
    run, said = whole
    before, config, again = left_by(run), (run.folder / "config.yaml").read_bytes(), []
    train(None, run.folder, resume=True, say=again.append)
    assert left_by(run) == before and (run.folder / "config.yaml").read_bytes() == config
    assert again == [said[0], *said[-2:]]


# --- devices and trackers ---


def test_a_gpu_without_bfloat16_trains_in_float32_and_samples_in_float16(monkeypatch):
    recipe = load_recipe("article-smollm-135m")
    assert (recipe.sampler_dtype, recipe.mixed_precision) == ("bfloat16", "bf16")
    for half in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, half=half: half)
        assert pipeline.fitted(recipe, "cpu") == recipe
        fitted = pipeline.fitted(recipe, "cuda")
        assert (fitted == recipe) is half
    assert (fitted.dtype, fitted.sampler_dtype, fitted.mixed_precision) == ("float32", "float16", "no")
    assert pipeline.fitted(load_recipe("pocket"), "cuda").sampler_dtype is None


def test_a_tracker_gets_every_number_under_its_stage(tmp_path):
    class Tracker:
        def __init__(self):
            self.seen = []

        def init_trackers(self, name):
            self.seen.append(name)

        def log(self, numbers, step):
            self.seen.append((numbers, step))

    run, tracker = Run(tmp_path), Tracker()
    pipeline.send_to_tracker(run, tracker)
    run.log("metrics", {"stage": "grpo", "step": 3, "reward": 0.5, "note": "x"})
    run.log("eval", {"stage": "sft", "decoding": "greedy", "accuracy": 0.7})
    run.log("samples", {"stage": "grpo", "step": 3, "total": 1.0})
    assert tracker.seen == ["tracker", ({"grpo/reward": 0.5}, 3), ({"sft/greedy/accuracy": 0.7}, 0)]
    assert len(run.records("metrics")) == 1


def test_without_the_package_a_tracker_is_refused_before_a_folder_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "is_tensorboard_available", lambda: False)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        train(load_recipe("pocket", [*TINY, "tracker=tensorboard"]), tmp_path / "run", **SILENT)
    assert not (tmp_path / "run").exists()


def through(url, folder):
    """Settings for a run whose loop is sampled for by a server."""
    return [*TINY, "lora.r=4", "lora.alpha=8", "grpo.updates_per_buffer=1", "grpo.minibatch_size=8",
            "grpo.loss.correction=token_truncate", f"server.url={url}", f"server.model={NAME}",
            f"server.adapters={folder}"]  # fmt: skip


def test_a_server_samples_from_the_policy_of_each_step(tmp_path):
    model, tokenizer = load_model("pocket", seed=0)
    with serve(model, tokenizer) as url:
        run = train(load_recipe("pocket", through(url, tmp_path / "adapters")), tmp_path / "run", **SILENT)
    steps = [record for record in run.records("metrics") if record["stage"] == "grpo"]
    assert len(steps) == 4 and sum(step["grad_norm"] for step in steps) > 0
    # Trainer over sampler, after a warm-up and after each update: a policy that lags behind would be far from 1.
    assert all(step["correction"] == pytest.approx(1, abs=1e-4) for step in steps if step["grad_norm"])
    assert len(list((tmp_path / "adapters").iterdir())) == 1


def test_a_server_that_is_wrong_about_itself_is_told_and_corrected(tmp_path):
    model, tokenizer = load_model("pocket", seed=0)
    said = []
    with serve(model, tokenizer, log_bias=-1.0) as url:
        recipe = load_recipe("pocket", [*through(url, tmp_path / "adapters"), "grpo.steps=1"])
        run = train(recipe, tmp_path / "run", say=said.append)
    assert run.records("metrics")[-1]["correction"] == pytest.approx(2.718, abs=1e-2)
    assert any("sampler and trainer disagree" in line for line in said)


@pytest.mark.parametrize(
    "setting, cure",
    [
        ("lora=null", "needs lora"),
        ("grpo.loss.correction=null", "a grpo.loss.correction"),
        ("grpo.top_p=0.9", "top_p=1"),
    ],
)
def test_what_a_server_needs_is_said_before_the_run_begins(setting, cure):
    settings = [s for s in through("http://localhost:1/v1", "x") if not s.startswith("lora")]
    load_recipe("pocket", [*settings, "lora.r=4"])
    with pytest.raises(ValueError, match=cure):
        load_recipe("pocket", [*settings, "lora.r=4", setting])
