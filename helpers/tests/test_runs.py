"""Run folders: whole files or none, checkpoints that are checked, logs that survive being cut off."""

import json
import os
import re
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from helpers import runs
from helpers.recipes import Recipe, build, load_recipe
from helpers.runs import PACKAGES, Run, read_jsonl, restore_weights, write_atomically

torch.set_num_threads(1)


def new_model():
    """A model small enough to train in a millisecond, and its optimiser."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def update(model, optimizer, step):
    """The training step with this number: like those of sft and grpo, a function of weights, state and number."""
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture
def run(tmp_path):
    return Run.start(tmp_path / "run", load_recipe("pocket"), "cpu")


def trained(run, stage, steps):
    """A model trained for some steps of a stage, with a checkpoint after each number in `steps`."""
    model, optimizer = new_model()
    for step in range(1, max(steps) + 1):
        update(model, optimizer, step)
        if step in steps:
            run.save_checkpoint(stage, step, model, optimizer)
    return model, optimizer


# --- files ---


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, failing):
    path = tmp_path / "config.yaml"
    write_atomically(path, "old → whole")

    def fail(*_):
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, fail)
        with pytest.raises(OSError, match="disk is full"):
            write_atomically(path, "new")
    assert path.read_text(encoding="utf-8") == "old → whole"
    write_atomically(path, "new")
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_config_says_what_the_numbers_depend_on(run):
    recipe, environment = run.config["recipe"], run.config["environment"]
    assert build(Recipe, recipe) == load_recipe("pocket") and recipe["seed"] == 0
    assert {name: environment[name] for name in PACKAGES} == {name: version(name) for name in PACKAGES}
    assert environment["device"] == "cpu" and environment["processor"] and environment["cores"] == os.cpu_count()
    assert environment["python"].startswith("3.") and "git_commit" in environment
    assert sorted(p.name for p in run.folder.iterdir()) == ["checkpoints", "config.yaml"]


def test_the_commit_is_git_s_own_and_none_without_git(monkeypatch):
    here = Path(runs.__file__).parent
    git = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True)
    commit = runs.environment("cpu")["git_commit"]
    if git.returncode:
        assert commit is None
    else:  # a tag in front and "-dirty" behind are git's own additions
        assert git.stdout.strip()[:12] in commit

    def missing(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", missing)
    assert runs.environment("cpu")["git_commit"] is None


def test_a_folder_in_use_is_refused_and_left_alone(run, tmp_path):
    before = (run.folder / "config.yaml").read_bytes()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    for folder in (run.folder, tmp_path / "notes", tmp_path / "notes" / "mine.txt"):
        with pytest.raises(ValueError, match="is there already: go on with --resume, or choose another folder"):
            Run.start(folder, load_recipe("pocket"), "cpu")
    assert (run.folder / "config.yaml").read_bytes() == before
    assert [p.name for p in (tmp_path / "notes").iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    assert Run.start(tmp_path / "empty", load_recipe("pocket"), "cpu").config


def test_only_a_run_is_opened(run, tmp_path):
    assert Run.open(run.folder).config == run.config
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ValueError, match="holds no run"):
            Run.open(folder)


# --- logs ---

RECORDS = [{"step": 1, "text": "(P → Q)"}, {"step": 2, "text": "¬Q\n\u2028"}, {"step": 3, "text": ""}]


def test_logs_come_back(run):
    assert run.records("metrics") == []
    for record in RECORDS:
        run.log("metrics", record)
    assert run.records("metrics") == RECORDS
    run.write_records("evaluations/sft-greedy", RECORDS[:1])
    assert run.records("evaluations/sft-greedy") == RECORDS[:1]


def test_a_log_cut_off_anywhere_keeps_its_whole_lines_and_goes_on(run):
    """Cut at every byte, inside a character of several bytes too."""
    for record in RECORDS:
        run.log("samples", record)
    path = run.folder / "samples.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    ends = [len(b"".join(lines[: i + 1])) - 1 for i in range(3)]  # a line that lacks its line feed alone is whole
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        kept = RECORDS[: sum(cut >= end for end in ends)]
        assert read_jsonl(path) == kept
        run.mend()
        run.log("samples", {"step": 9})
        assert run.records("samples") == [*kept, {"step": 9}]


def test_a_damaged_line_in_the_middle_is_one_sentence(run):
    for record in RECORDS:
        run.log("metrics", record)
    path = run.folder / "metrics.jsonl"
    first, second, third = path.read_bytes().splitlines(keepends=True)
    for damaged in (second[:9] + b"\n", b"\xff" + second, b"{}}\n"):
        path.write_bytes(first + damaged + third)
        with pytest.raises(ValueError, match=r"metrics.jsonl is damaged in line 2; take that line out\.$"):
            run.records("metrics")


# --- checkpoints ---


def test_checkpoints_hold_safetensors_and_json_only_the_newest_of_each_stage(run):
    trained(run, "sft", [1, 2])
    trained(run, "grpo", [1, 3])
    run.log("metrics", {"step": 1})
    folder = run.folder / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["grpo-000003", "sft-000002"]
    for checkpoint in folder.iterdir():
        assert sorted(p.name for p in checkpoint.iterdir()) == [
            "model.safetensors", "optimizer.safetensors", "state.json",
        ]  # fmt: skip
    for file in run.folder.rglob("*"):
        if file.is_file():
            assert file.suffix in (".safetensors", ".json", ".jsonl", ".yaml")
            # A pickle begins with the byte 0x80, torch's file of pickles is a zip archive.
            assert not file.read_bytes().startswith((b"\x80", b"PK"))


def test_no_module_writes_or_reads_pickles():
    sources = list(Path(runs.__file__).parent.glob("*.py"))
    assert len(sources) > 10
    for source in sources:
        assert not re.search(r"torch\.(save|load)\(|import pickle|import joblib|trust_remote_code", source.read_text())


def test_the_newest_is_the_later_stage_s(run):
    assert run.newest() is None and run.newest("sft") is None
    trained(run, "grpo", [2])
    trained(run, "sft", [5])
    assert (run.newest()["stage"], run.newest()["step"]) == ("grpo", 2)
    assert (run.newest("sft")["stage"], run.newest("sft")["step"]) == ("sft", 5)


@pytest.fixture
def two(run):
    """A run with two checkpoints of one stage, as a process killed before it took the older one out leaves it."""
    model, optimizer = trained(run, "grpo", [2])
    older, aside = run.folder / "checkpoints" / "grpo-000002", run.folder / "aside"
    shutil.copytree(older, aside)
    update(model, optimizer, 3)
    run.save_checkpoint("grpo", 3, model, optimizer)
    os.replace(aside, older)
    assert run.newest()["step"] == 3
    return run


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("harm", ["cut", "emptied", "taken away"])
def test_a_damaged_checkpoint_gives_way_to_the_older_one(two, name, harm):
    file = two.folder / "checkpoints" / "grpo-000003" / name
    if harm == "taken away":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1] if harm == "cut" else b"")
    model, optimizer = new_model()
    assert two.newest()["step"] == 2 and two.resume("grpo", model, optimizer) == 2
    right, _ = new_model()
    for step in (1, 2):
        update(right, _, step)
    assert all(map(torch.equal, model.parameters(), right.parameters()))


def test_a_checkpoint_with_any_one_byte_altered_gives_way_to_the_older_one(two):
    for name, step in (("state.json", 1), ("model.safetensors", 37), ("optimizer.safetensors", 97)):
        file = two.folder / "checkpoints" / "grpo-000003" / name
        whole = file.read_bytes()
        for place in range(0, len(whole), step):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            assert two.newest()["step"] == 2, (name, place)
        file.write_bytes(whole)
    assert two.newest()["step"] == 3
    for text in ("null", "[]", "{}", '{"sha256": {}, "stage": "grpo", "step": "3"}'):
        (two.folder / "checkpoints" / "grpo-000003" / "state.json").write_text(text)
        assert two.newest()["step"] == 2


@pytest.mark.parametrize("last", ["save_file", "write_atomically", "replace"])
def test_a_save_that_is_killed_leaves_the_older_checkpoint(run, monkeypatch, last):
    """The save stops at its second tensor file, at the checksums, or just before the folder gets its name."""
    model, optimizer = trained(run, "sft", [1])
    update(model, optimizer, 2)
    calls = []
    place = os if last == "replace" else runs
    original = getattr(place, last)

    def stop(*args):
        calls.append(args)
        if len(calls) == (1 if last == "write_atomically" else 2):
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(place, last, stop)
        with pytest.raises(KeyboardInterrupt):
            run.save_checkpoint("sft", 2, model, optimizer)
    assert sorted(p.name for p in (run.folder / "checkpoints").iterdir()) == [".sft-000002.tmp", "sft-000001"]
    assert run.newest()["step"] == 1
    run.save_checkpoint("sft", 2, model, optimizer)
    assert [p.name for p in (run.folder / "checkpoints").iterdir()] == ["sft-000002"]


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("deletion", range(1, 5))
def test_a_kill_while_what_was_replaced_is_deleted_leaves_nothing_behind(run, monkeypatch, deletion, again):
    """The last save of a run is killed at any of its deletions (three files, their folder): mending ends them."""
    model, optimizer = trained(run, "grpo", [3])
    calls = []

    def killed(original):
        def delete(*arguments, **named):
            calls.append(arguments)
            if len(calls) == deletion:
                raise KeyboardInterrupt
            return original(*arguments, **named)

        return delete

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        for name in ("unlink", "rmdir"):
            patch.setattr(os, name, killed(getattr(os, name)))
        run.save_checkpoint("grpo", 3 if again else 4, model, optimizer)
    assert len(list((run.folder / "checkpoints").iterdir())) == 2
    run.mend()
    assert [p.name for p in (run.folder / "checkpoints").iterdir()] == ["grpo-000003" if again else "grpo-000004"]
    assert run.newest()["step"] == (3 if again else 4)


def test_mending_keeps_the_only_whole_checkpoint_whatever_it_is_called(run):
    """Killed between the two renames of a save of the same step, the whole one ends in .old."""
    trained(run, "grpo", [3])
    folder = run.folder / "checkpoints"
    os.replace(folder / "grpo-000003", folder / "grpo-000003.old")
    (folder / "grpo-000003").mkdir()
    (folder / ".grpo-000004.tmp").mkdir()
    run.mend()
    assert sorted(p.name for p in folder.iterdir()) == ["grpo-000003", "grpo-000003.old"]
    assert run.newest()["step"] == 3


def test_resuming_goes_on_exactly(run):
    trained(run, "sft", [5])
    straight, its_optimizer = new_model()
    for step in range(1, 10):
        update(straight, its_optimizer, step)
    model, optimizer = new_model()
    assert run.resume("sft", model, optimizer) == 5
    for step in range(6, 10):
        update(model, optimizer, step)
    assert all(map(torch.equal, model.parameters(), straight.parameters()))
    for a, b in zip(optimizer.state.values(), its_optimizer.state.values(), strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_resuming_cuts_the_logs_of_its_stage_back_to_the_checkpoint(run):
    for stage, step in [("sft", 1), ("sft", 2), ("sft", 3), ("grpo", 1), ("grpo", 2)]:
        run.log("metrics", {"stage": stage, "step": step})
        run.log("samples", {"stage": stage, "step": step})
    run.log("eval", {"stage": "base", "decoding": "greedy"})
    with open(run.folder / "eval.jsonl", "a") as file:
        file.write('{"stage": "s')
    trained(run, "sft", [2])
    assert run.resume("sft", *new_model()) == 2
    for name in ("metrics", "samples"):
        steps = [(r["stage"], r["step"]) for r in run.records(name)]
        assert steps == [("sft", 1), ("sft", 2), ("grpo", 1), ("grpo", 2)]
    assert (run.folder / "eval.jsonl").read_text() == json.dumps({"stage": "base", "decoding": "greedy"}) + "\n"
    assert run.resume("grpo", *new_model()) == 0  # no checkpoint: that stage begins anew
    assert [r["stage"] for r in run.records("metrics")] == ["sft", "sft"]


def test_another_model_s_weights_are_refused():
    model, _ = new_model()
    for weights in ({"3.weight": torch.zeros(2, 8)}, {"0.weight": torch.zeros(8, 3)}):
        with pytest.raises(ValueError, match=r"does not fit this model: load the one the run was made with\.$"):
            restore_weights(model, weights)
