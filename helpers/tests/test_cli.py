"""The command line: help with an example, one sentence and exit code 2 for what is wrong, and a run from end to end."""

import io
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState

from helpers import models, pipeline, recipes
from helpers.__main__ import EXAMPLES, load_target, main, parser
from helpers.decoder import Decoder
from helpers.hygiene import Stopped
from helpers.models import MODELS, add_lora, load_model, save_adapter
from helpers.recipes import load_recipe, recipe_names
from helpers.runs import Run
from helpers.tasks import load_task

torch.set_num_threads(1)
# So short a warm-up earns no reward: a length term moves the loop's weights away from it.
TINY = [
    "sft.traces=24", "sft.epochs=1", "sft.batch_size=12", "grpo.steps=2", "grpo.questions_per_rollout=2",
    "grpo.group_size=4", "grpo.buffer_size=8", "grpo.max_new_tokens=12", "grpo.learning_rate=1e-2", "train_size=20",
    "reward.length=0.5", "reward.length_target=8", "evaluation.size=6", "evaluation.max_new_tokens=4",
]  # fmt: skip
SHORT = ["--max-new-tokens", "4"]


@pytest.fixture(autouse=True)
def one_accelerator_a_test():
    """accelerate keeps the first accelerator's settings for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)


def lines(printed):
    """What was printed, without progress bars, empty lines and the warnings that so short a run gets."""
    aside = ("Only ", "At step ")
    return [s for s in printed.splitlines() if s.strip() and "%|" not in s and not s.startswith(aside)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny run made by the command line: (its folder, the lines the command printed)."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    command = [sys.executable, "-m", "helpers", "train", "pocket", "--set", *TINY, "--set", "seed=1", "--out", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, lines(done.stdout)


# --- help ---


@pytest.mark.parametrize("command", EXAMPLES)
def test_each_command_s_help_shows_an_example_that_can_be_copied(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"example: {EXAMPLES[command]}\n" in capsys.readouterr().out
    assert EXAMPLES[command].startswith(f"python -m helpers {command}")
    parsed = parser().parse_args(EXAMPLES[command].split()[3:])
    assert parsed.command == command
    if command == "train":
        assert load_recipe(parsed.recipe, parsed.settings).grpo.steps == 50


def test_the_top_help_names_the_commands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert set(re.findall(r"^ {4}([\w-]+)", shown, re.MULTILINE)) == EXAMPLES.keys()
    assert EXAMPLES.keys() >= {"train", "evaluate", "chat", "recipes"}


def test_recipes_lists_recipes_and_models(capsys):
    assert main(["recipes"]) == 0
    shown = capsys.readouterr().out
    for name in [*recipe_names(), *MODELS]:
        about = MODELS[name].about if name in MODELS else load_recipe(name).about
        assert re.search(rf"^{re.escape(name)} +{re.escape(about)}$", shown, re.MULTILINE)


# --- what is wrong ---


def refused(arguments, capsys):
    """The one sentence a wrong command gets."""
    assert main([str(a) for a in arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("helpers: ") and said.err.count("\n") == 1
    return said.err.removeprefix("helpers: ").strip()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "poket"], "There is no recipe 'poket'; did you mean 'pocket'?"),
        (["train", "pocket", "--set", "grpo.stepz=5"], "There is no setting 'grpo.stepz'; did you mean 'grpo.steps'?"),
        (["train", "pocket", "--set", "grpo.steps=x"], "grpo.steps must be a whole number, not 'x'."),
        (["train", "pocket", "--set", "task=syl", "--set", "model=pockets"],
         "There is no model 'pockets'; did you mean 'pocket'?"),
        (["train", "pocket", "--set", "grpo.steps"],
         "A setting has the form key=value, for example grpo.steps=50, not 'grpo.steps'."),
        (["train", "pocket", "--resume", "--set", "seed=1"],
         "--resume goes on with the run's own settings; leave out --set, or start anew."),
        (["evaluate", "pockte"], "There is no model 'pockte'; did you mean 'pocket'?"),
        (["chat", "pocket@sft"], "There is no model 'pocket@sft'; did you mean 'pocket'?"),
        (["evaluate", "pocket", "--task", "sylogism"], "There is no task 'sylogism'; did you mean 'syllogism'?"),
        (["evaluate", "pocket", "--size", "0"], "Ask for a size of 1 or more with a seed of 0 or more, not 0 with 0."),
        (["evaluate", "pocket", "--adapter", "nowhere"],
         "nowhere holds no adapter_model.safetensors: give the folder that peft saved."),
        (["datagen", "sylogism", "--out", "traces.jsonl"], "There is no task 'sylogism'; did you mean 'syllogism'?"),
        (["chat", "pocket", "--adapter", "nowhere"],
         "nowhere holds no adapter_model.safetensors: give the folder that peft saved."),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_and_exit_code_2(arguments, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused(arguments, capsys) == sentence
    assert list(tmp_path.iterdir()) == []


def test_folders_that_will_not_do(trained, tmp_path, capsys):
    folder, _ = trained
    (tmp_path / "notes").write_text("mine")
    Run.start(tmp_path / "new", load_recipe("pocket"), "cpu")
    cases = [
        (["train", "pocket", "--out", folder], "is there already: go on with --resume, or choose another folder"),
        (["train", "pocket", "--out", tmp_path / "notes"], "is there already"),
        (["train", "pocket", "--out", tmp_path / "notes" / "run"], "Not a directory"),
        (["train", "pocket", "--out", tmp_path / "none", "--resume"], "holds no run: it has no config.yaml"),
        (["evaluate", tmp_path], "holds no run: it has no config.yaml"),
        (["results", tmp_path], "holds no run: it has no config.yaml"),
        (["evaluate", f"{folder}@grop"], "There is no stage 'grop'; did you mean 'grpo'?"),
        (["evaluate", f"{folder}@base"], "There is no stage 'base'; choose one of: sft, grpo."),
        (["evaluate", tmp_path / "new"], "has no checkpoint yet."),
        (["chat", f"{tmp_path / 'new'}@sft"], "has no checkpoint of stage sft yet."),
        (["evaluate", folder, "--adapter", tmp_path], "--adapter goes on a named model"),
    ]
    for arguments, sentence in cases:
        assert sentence in refused(arguments, capsys)


def test_the_exit_code_is_the_process_s(monkeypatch, capsys):
    for arguments, code in ((["train", "poket"], 2), (["recipes"], 0)):
        monkeypatch.setattr(sys, "argv", ["helpers", *arguments])
        monkeypatch.delitem(sys.modules, "helpers.__main__", raising=False)
        with pytest.raises(SystemExit) as end:
            runpy.run_module("helpers", run_name="__main__")
        assert end.value.code == code
    assert capsys.readouterr().err == "helpers: There is no recipe 'poket'; did you mean 'pocket'?\n"


def test_a_model_that_cannot_be_had_is_one_sentence_too(capsys, monkeypatch, tmp_path):
    def missing(*_, **__):
        raise OSError("not in the cache")

    monkeypatch.setenv("RLVR_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "snapshot_download", missing)
    monkeypatch.setattr(models, "hub_answers", lambda: False)
    sentence = refused(["evaluate", "smollm-360m"], capsys)
    assert sentence.startswith("smollm-360m is not in the cache") and "available here: pocket, " in sentence
    assert refused(["train", "article-smollm-360m", "--out", tmp_path / "run"], capsys) == sentence
    assert not (tmp_path / "run").exists()  # so the same command works where there is a hub


def test_an_error_that_is_not_ours_keeps_its_traceback(monkeypatch):
    def broken():
        raise RuntimeError("sizes differ:\n  3\n  4")

    monkeypatch.setattr(recipes, "recipe_names", broken)
    with pytest.raises(RuntimeError, match="sizes differ"):
        main(["recipes"])


def test_a_run_that_is_stopped_says_how_to_go_on(monkeypatch, capsys, tmp_path):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "train", stopped)
    for out in ([], ["--out", str(tmp_path / "run")]):
        with pytest.raises(SystemExit) as end:
            main(["train", "pocket", *out])
        assert end.value.code == 130
        command = " ".join(["python -m helpers train pocket --resume", *out])
        assert capsys.readouterr().err == f"\nStopped. The last checkpoint is kept; go on with: {command}\n"
        assert parser().parse_args(command.split()[3:]).resume


def test_an_ablation_that_is_stopped_ends_in_one_sentence(monkeypatch, capsys, tmp_path):
    def stopped(*_, **__):
        raise Stopped("Stopped; what is done is kept.")

    monkeypatch.setattr("helpers.ablation.ablate", stopped)
    with pytest.raises(SystemExit) as end:
        main(["ablation", "--out", str(tmp_path)])
    assert end.value.code == 130 and capsys.readouterr().err == "\nStopped; what is done is kept.\n"


# --- from end to end ---


def test_train_tells_what_it_does_and_keeps_the_run(trained):
    folder, said = trained
    assert said[0] == f"pocket on letter_counting, seed 1; the run is kept in {folder}"
    assert [line.split(":")[0].strip() for line in said[1:7]] == ["base", "base", "sft", "sft", "grpo", "grpo"]
    assert all("n = 6" in line and "33.3 %" in line for line in said[1:7])  # the constant answer beside it
    assert all("McNemar p = " in line for line in said[7:]) and len(said) == 9
    run = Run.open(folder)
    assert (run.config["recipe"]["grpo"]["steps"], run.config["recipe"]["seed"]) == (2, 1)
    assert len(run.records("metrics")) == 4 and len(run.records("eval")) == 6


def test_train_resumes_a_run_with_its_own_settings(trained, capsys):
    folder, said = trained
    before = (folder / "metrics.jsonl").read_bytes()
    assert main(["train", "pocket", "--resume", "--out", str(folder)]) == 0
    assert lines(capsys.readouterr().out) == [said[0], *said[-2:]]
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_evaluating_two_stages_ends_with_a_paired_test(trained, capsys):
    folder, _ = trained
    targets = [f"{folder}@sft", f"{folder}@grpo"]
    assert main(["evaluate", *targets, "--size", "9", *SHORT]) == 0
    first, its_answers, second, _, paired = capsys.readouterr().out.splitlines()
    for target, line in zip(targets, (first, second), strict=True):
        assert line.startswith(f"{target} on letter_counting: ")
        assert all(part in line for part in ("n = 9", "greedy", "33.3 %"))
    assert its_answers.startswith("  balanced accuracy ") and "answers: " in its_answers
    assert re.fullmatch(r"second against first: \d gained, \d lost; McNemar p = \S+", paired)


def test_a_stage_is_evaluated_with_its_own_weights(trained, capsys, monkeypatch):
    """What the run wrote of its greedy answers comes out again; without a stage the newest weights are taken."""
    folder, _ = trained
    run = Run.open(folder)
    seen, evaluate = [], pipeline.evaluate

    def keep(*arguments, **settings):
        seen.append(evaluate(*arguments, **settings))
        return seen[-1]

    monkeypatch.setattr("helpers.evaluate.evaluate", keep)
    assert main(["evaluate", f"{folder}@sft", f"{folder}@grpo", str(folder), "--size", "6", *SHORT]) == 0
    stages = [run.records(f"evaluations/{stage}-greedy") for stage in ("sft", "grpo", "grpo")]
    assert stages[0] != stages[1]
    assert [json.loads(json.dumps(result.records)) for result in seen] == stages
    assert "McNemar" not in capsys.readouterr().out  # three targets


def test_other_held_out_questions_and_every_answer_kept(trained, capsys, tmp_path):
    folder, _ = trained
    kept = tmp_path / "new" / "answers.jsonl"
    command = ["evaluate", f"{folder}@sft", f"{folder}@grpo", "--size", "6", "--questions", "1", "--out", str(kept)]
    assert main([*command, *SHORT]) == 0
    answers = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [a["target"] for a in answers] == [f"{folder}@sft"] * 6 + [f"{folder}@grpo"] * 6
    asked = [example.answer for example in load_task("letter_counting", "test", 6, seed=1)]
    assert [a["truth"] for a in answers] == asked * 2
    assert not {e.question for e in load_task("letter_counting", "test", 6, seed=1)} & {
        e.question for e in load_task("letter_counting", "test", 6)}  # fmt: skip
    capsys.readouterr()
    before = kept.read_bytes()
    assert refused([*command, *SHORT], capsys) == f"{kept} exists: choose another --out, or delete it."
    assert kept.read_bytes() == before


def test_a_run_that_samples_in_bfloat16_is_evaluated_and_asked_in_it(trained, capsys, monkeypatch, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["recipe"]["sampler_dtype"] = "bfloat16"
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    model, _, task = load_target(str(folder), None)
    assert isinstance(model, Decoder) and model.dtype == torch.bfloat16 and task == "letter_counting"
    assert main(["evaluate", str(folder), "--size", "6", *SHORT]) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert main(["chat", str(folder), *SHORT]) == 0
    shown = capsys.readouterr().out
    assert f"{folder} on letter_counting: " in shown and "(true answer: " in shown


def test_results_are_those_the_run_logged(trained, capsys, tmp_path):
    folder, said = trained
    Run.start(tmp_path / "new", load_recipe("pocket"), "cpu")
    assert main(["results", str(folder), str(tmp_path / "new")]) == 0
    head, _, *rows, greedy, sampled = lines(capsys.readouterr().out)
    logged = Run.open(folder).records("eval")
    assert head.startswith("| run | stage | greedy | sampled | stock scorer | constant answer |")
    assert [row.split(" | ")[:2] for row in rows] == [["| run", stage] for stage in ("base", "sft", "grpo")]
    for row, (one, other) in zip(rows, zip(logged[::2], logged[1::2], strict=True), strict=True):
        columns = row.split(" | ")
        assert columns[2].startswith(f"{100 * one['accuracy']:.1f} (") and columns[5] == "33.3"
        assert columns[3].startswith(f"{100 * other['accuracy']:.1f} (") and columns[8] == "6 |"
    assert [greedy, sampled] == [f"run: {line}" for line in said[-2:]]


def test_results_of_a_run_without_a_warm_up_are_against_the_model_as_it_came(capsys):
    folder = str(Path(__file__).parents[1] / "recorded/smollm2-135m-no-warm-up-gpu-seed0")
    assert main(["results", folder, folder]) == 0
    greedy, sampled, *again = lines(capsys.readouterr().out)[-4:]
    assert again == [greedy, sampled] and greedy.startswith("smollm2-135m-no-warm-up-gpu-seed0: base -> grpo, greedy: ")


def test_several_samples_show_pass_at_k_and_no_paired_test(trained, capsys):
    folder, _ = trained
    options = ["--samples", "4", "--temperature", "1", "--size", "3", "--task", "syllogism", "--unbalanced"]
    assert main(["evaluate", f"{folder}@sft", str(folder), *options, *SHORT]) == 0
    shown = capsys.readouterr().out
    assert shown.count("pass@1 ") == shown.count("pass@2 ") == shown.count("pass@4 ") == 2
    assert f"{folder} on syllogism: " in shown and "sampled" in shown and "McNemar" not in shown


def test_a_named_model_takes_an_adapter(tmp_path, capsys, monkeypatch):
    policy = add_lora(load_model("pocket")[0], r=2, alpha=4)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    save_adapter(policy, tmp_path / "adapter")
    said = []
    for adapter in ([], ["--adapter", str(tmp_path / "adapter")], []):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
        assert main(["chat", "pocket", "--task", "letter_counting", *SHORT, *adapter]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[2] != said[1]
    assert all(text.startswith("How many times") for text in said)


def test_chat_answers_a_question_and_asks_a_held_out_one_itself(trained, capsys, monkeypatch):
    folder, _ = trained
    question = 'How many times does the letter "r" appear in the text: "strawberry"?'
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{question}\n\n\n"))
    assert main(["chat", str(folder), *SHORT]) == 0
    shown = capsys.readouterr().out
    held_out = load_task("letter_counting", "test", 300)
    before, *rest = re.split(r"^How many times", shown, flags=re.MULTILINE)
    assert question not in shown and len(rest) == 2 and before.strip()  # what was typed is not said again
    assert "(true answer" not in before
    for example, said in zip(held_out[1:3], rest, strict=True):
        assert f"How many times{said}".startswith(f"{example.question}\n")
        assert said.rstrip().endswith(f"(true answer: {example.answer})")
