"""Killed, interrupted, out of room: what a run has done is kept, and resumed it ends as if nothing had happened."""

import errno
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from jupyter_client.manager import KernelManager
from safetensors import SafetensorError

from helpers import grpo as grpo_module
from helpers import pipeline, runs
from helpers import sft as sft_module
from helpers.__main__ import main
from helpers.grpo import grpo
from helpers.hygiene import StopAfterStep, Stopped
from helpers.pipeline import train
from helpers.recipes import load_recipe
from helpers.runs import Run, progress_bar
from helpers.tasks import load_task
from helpers.tests.test_grpo import SMALL, TASK, TOKENIZER, WholeText, tiny_model
from helpers.tests.test_pipeline import LORA, TINY, assert_same, left_by
from helpers.tests.test_runs import new_model, trained, update

torch.set_num_threads(1)
SETTINGS = [*TINY, "sft.checkpoint_every=1", "grpo.checkpoint_every=1"]
KILLS = 20
(
    load_task("letter_counting", "train", 1),
    load_task("letter_counting", "test", 1),
)  # once, for all processes forked below
SENTENCE = r"[A-Z/][^\n]*\.\n?"  # one line that ends in a full stop


@pytest.fixture(autouse=True)
def one_accelerator_a_test():
    """accelerate keeps the first accelerator's settings for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)


def silent(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing stopped."""
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path_factory.mktemp("whole") / "run"
    return train(load_recipe("pocket", SETTINGS), folder, say=silent, progress=False)


# --- killed ---


def work(folder: Path, kind: str, number: int) -> None:
    """Start or resume the run, in a process that kills itself right before one of its writes.

    kind: "save" counts files made, renamed and deleted while a checkpoint is saved, "file" all of them; at the
    `number`th the process sends itself SIGKILL. "time" leaves that to the parent, "none" lets the run end.
    """
    left = number

    def hook(event: str, arguments: tuple) -> None:
        nonlocal left
        if event == "open":
            if not set("wax+") & set(arguments[1] or "r"):
                return
        elif event not in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            return
        frame = sys._getframe()
        while kind == "save" and frame and frame.f_code.co_name != "save_checkpoint":
            frame = frame.f_back
        if frame:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    if kind in ("save", "file"):
        sys.addaudithook(hook)
    resume = (folder / "config.yaml").is_file()
    train(load_recipe("pocket", SETTINGS), folder, resume=resume, say=silent, progress=False)


def test_a_run_killed_at_20_random_moments_ends_as_one_that_was_not(whole, tmp_path):
    """A run that gets to its end before 20 kills are used up is compared, and another one started."""
    context = multiprocessing.get_context("forkserver")  # each process starts with all modules loaded
    context.set_forkserver_preload(["helpers.tests.test_trust_runs"])
    rng, killed, runs_ended, seconds = random.Random(0), {"save": 0, "file": 0, "time": 0}, 0, 3.0
    folder = tmp_path / "run0"
    for attempt in range(4 * KILLS):
        kind = ("save", "time", "file")[attempt % 3] if sum(killed.values()) < KILLS else "none"
        process = context.Process(target=work, args=(folder, kind, rng.randint(1, 30)))
        start = time.perf_counter()
        process.start()
        process.join(rng.uniform(0, 1.2 * seconds) if kind == "time" else None)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        if process.exitcode:
            killed[kind] += 1
            continue
        seconds = min(seconds, time.perf_counter() - start)
        assert_same(Run(folder), whole)
        runs_ended += 1
        if kind == "none":
            break
        folder = tmp_path / f"run{runs_ended}"
    assert sum(killed.values()) == KILLS and min(killed.values()) >= 3 and kind == "none", killed


# --- interrupted ---


def interrupting(monkeypatch, module, name, at, times=1):
    """From here on the `at`th call of a module's function begins with Ctrl-C."""
    original, calls = getattr(module, name), []

    def pressed(*arguments, **named):
        calls.append(name)
        if len(calls) == at:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return original(*arguments, **named)

    monkeypatch.setattr(module, name, pressed)


def loop(run, model=None, progress=False):
    return grpo(model or tiny_model(), TOKENIZER, TASK, SMALL, reward=WholeText(TASK), run=run, progress=progress)


def small_run(folder):
    return Run.start(folder, load_recipe("pocket"), "cpu")


def test_ctrl_c_ends_the_loop_after_its_step_with_a_checkpoint(tmp_path, monkeypatch):
    straight = small_run(tmp_path / "straight")
    loop(straight)
    run, handler = small_run(tmp_path / "run"), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        interrupting(patch, grpo_module, "learn", 2)
        with pytest.raises(Stopped) as stopped:
            loop(run)
    assert signal.getsignal(signal.SIGINT) is handler
    told = f"Stopped after grpo step 2 of 3; {run.folder} has a checkpoint of it: resume that run to go on."
    assert str(stopped.value) == told and stopped.value._render_traceback_() == [told]
    assert run.newest()["step"] == 2 and [r["step"] for r in run.records("metrics")] == [1, 2]
    assert [r["step"] for r in loop(run)] == [3]
    assert_same(run, straight)


def test_ctrl_c_ends_the_warm_up_after_its_update_with_a_checkpoint(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupting(patch, sft_module, "collate", 3)  # in the second update
        with pytest.raises(
            Stopped, match=r"^Stopped after sft step 2 of 4; .* has a checkpoint of it: resume that run"
        ):
            recipe = load_recipe("pocket", [*SETTINGS, "sft.checkpoint_every=3"])
            train(recipe, tmp_path / "run", say=silent, progress=False)
    assert (Run(tmp_path / "run").newest()["stage"], Run(tmp_path / "run").newest()["step"]) == ("sft", 2)
    assert_same(train(None, tmp_path / "run", resume=True, say=silent, progress=False), whole)


def test_a_second_ctrl_c_does_not_wait(tmp_path, monkeypatch):
    run, handler = small_run(tmp_path / "run"), signal.getsignal(signal.SIGINT)
    interrupting(monkeypatch, grpo_module, "learn", 2, times=2)
    with pytest.raises(KeyboardInterrupt) as stopped:
        loop(run)
    assert not isinstance(stopped.value, Stopped) and signal.getsignal(signal.SIGINT) is handler
    assert [r["step"] for r in run.records("metrics")] == [1] and run.newest() is None


def test_without_a_run_the_model_keeps_what_it_learned(monkeypatch):
    model, start = tiny_model(), tiny_model()
    interrupting(monkeypatch, grpo_module, "learn", 1)
    with pytest.raises(Stopped, match=r"^Stopped after grpo step 1 of 3; the model keeps it\.$"):
        loop(None, model)
    assert not model.training and not all(map(torch.equal, model.parameters(), start.parameters()))


def test_ctrl_c_that_comes_too_late_for_a_step_is_not_lost():
    with pytest.raises(KeyboardInterrupt), StopAfterStep(progress_bar("", 1, 0, False)):
        signal.raise_signal(signal.SIGINT)


def test_training_in_a_thread_leaves_signals_alone():
    handler, ended = signal.getsignal(signal.SIGINT), []
    thread = threading.Thread(target=lambda: ended.append(len(loop(None))))
    thread.start()
    thread.join()
    assert ended == [3] and signal.getsignal(signal.SIGINT) is handler


def wait_for_step(folder: Path, still_there) -> None:
    until = time.monotonic() + 120
    while not (folder / "samples.jsonl").exists():
        assert still_there() and time.monotonic() < until
        time.sleep(0.02)


LONG = [*SETTINGS, "grpo.steps=400", "grpo.checkpoint_every=400"]


def test_ctrl_c_in_a_shell(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "helpers", "train", "pocket", "--set", *LONG, "--out", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_step(folder, lambda: process.poll() is None)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    run = Run.open(folder)
    assert process.returncode == 130
    again = f"python -m helpers train pocket --resume --out {folder}"
    assert said == f"\nStopped. The last checkpoint is kept; go on with: {again}\n"
    assert 0 < run.newest("grpo")["step"] == run.records("metrics")[-1]["step"] < 400


CELL = """
import torch
torch.set_num_threads(1)
from helpers.pipeline import train
from helpers.recipes import load_recipe
train(load_recipe("pocket", {settings}), {folder!r}, progress=False)
"""


def test_the_stop_button_of_a_notebook(tmp_path):
    """A kernel is interrupted as Jupyter does it; the cell shows one sentence, and the kernel goes on."""
    folder, manager = tmp_path / "run", KernelManager(kernel_name="python3")
    manager.start_kernel()
    client = manager.client()
    try:
        client.start_channels()
        client.wait_for_ready(timeout=60)
        client.execute(CELL.format(settings=LONG, folder=str(folder)))
        wait_for_step(folder, manager.is_alive)
        manager.interrupt_kernel()
        shown = []
        while True:
            message = client.get_iopub_msg(timeout=60)
            if message["msg_type"] == "error":
                shown.append(message["content"])
            if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle" and shown:
                break
        [error] = shown
        assert error["ename"] == "Stopped"
        [told] = error["traceback"]
        assert re.fullmatch(rf"Stopped after grpo step \d+ of 400; {folder} has a checkpoint of it: resume .*\.", told)
        assert f"step {Run.open(folder).newest()['step']} of" in told
        assert client.execute("1 + 1", reply=True, timeout=60)["content"]["status"] == "ok"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


# --- no room, no permission ---


@pytest.mark.parametrize("number", range(1, 12))
def test_a_checkpoint_without_room_for_it_leaves_the_one_before(tmp_path, monkeypatch, number):
    """The disk is full at each of the writes that a checkpoint takes, in turn."""
    run = small_run(tmp_path / "run")
    model, optimizer = trained(run, "grpo", [1, 2])
    update(model, optimizer, 3)
    before, calls = left_by(run), []

    def filling(original):
        def full(*arguments, **named):
            calls.append(original.__name__)
            if len(calls) == number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors")
            return original(*arguments, **named)

        return full

    with monkeypatch.context() as patch:
        for place, name in ((runs, "save_file"), (os, "fsync"), (os, "replace"), (runs, "sha256"), (Path, "mkdir")):
            patch.setattr(place, name, filling(getattr(place, name)))
        if number == 11:
            run.save_checkpoint("grpo", 3, model, optimizer)
            assert len(calls) == 10
            return
        with pytest.raises(OSError) as error:
            run.save_checkpoint("grpo", 3, model, optimizer)
    assert str(error.value) == (
        f"{run.folder} cannot be written to (No space left on device): mend that and resume the run; its last "
        "checkpoint is grpo step 2."
    )
    assert left_by(run) == before  # what it had written is taken out again
    assert run.resume("grpo", *new_model(), say=pytest.fail) == 2
    run.save_checkpoint("grpo", 3, model, optimizer)
    assert run.newest()["step"] == 3


@pytest.mark.parametrize("number", range(1, 4))
def test_a_checkpoint_saved_anew_stands_until_the_new_one_does(tmp_path, monkeypatch, number):
    """Killed at each rename: before it, between the two of them, and behind them."""
    run = small_run(tmp_path / "run")
    model, optimizer = trained(run, "grpo", [2])
    update(model, optimizer, 3)
    replace, calls = os.replace, []

    def killed(source, target):
        calls.append(target)
        if len(calls) == number:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            run.save_checkpoint("grpo", 2, model, optimizer)
    assert run.newest()["step"] == 2 and run.resume("grpo", *new_model(), say=pytest.fail) == 2
    run.save_checkpoint("grpo", 2, model, optimizer)
    assert [path.name for path in (run.folder / "checkpoints").iterdir()] == ["grpo-000002"]


def test_a_log_without_room_is_one_sentence(tmp_path, monkeypatch):
    run = small_run(tmp_path / "run")
    run.log("metrics", {"stage": "sft", "step": 1})

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(runs.json, "dumps", full)
        for write in (lambda: run.log("metrics", {}), lambda: run.write_records("eval", [{}])):
            with pytest.raises(
                OSError, match=r"cannot be written to \(No space left on device\): .*it has no checkpoint"
            ):
                write()
    assert run.records("metrics") == [{"stage": "sft", "step": 1}]
    assert not list(run.folder.glob(".*"))


def test_an_adapter_without_room_is_one_sentence_and_written_when_there_is(tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    recipe = load_recipe("pocket", LORA)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "save_adapter", full)
        with pytest.raises(
            OSError, match=r"written to \(No space left on device\): .*its last checkpoint is grpo step 2\.$"
        ):
            train(recipe, tmp_path / "run", say=silent, progress=False)
    train(None, tmp_path / "run", resume=True, say=silent, progress=False)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.fixture
def disk(tmp_path):
    """A function that makes a disk of so many MB, or changes it: real ones, where this user may mount them."""
    place, mounted = tmp_path / "disk", []
    place.mkdir()

    def mount(options: str) -> Path:
        again = "remount," if mounted else ""
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", again + options, "tmpfs", place], capture_output=True)
        if done.returncode:
            pytest.skip("mounting a small disk takes root")
        mounted.append(options)
        return place

    yield mount
    if mounted:
        subprocess.run(["umount", "-l", place], check=True)


def refused(arguments, capsys):
    """The one sentence on stderr of a command that cannot go on."""
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main([str(a) for a in arguments]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(rf"helpers: {SENTENCE}", said), said
    return said.removeprefix("helpers: ").strip()


def test_a_disk_that_fills_up_and_one_that_is_read_only(whole, disk, capsys):
    """Room for two checkpoints of 7.3 MB and half of a third; later for all, but without the right to write."""
    place = disk("size=18m")
    command = ["train", "pocket", "--set", *SETTINGS, "--out", place / "run"]
    full = "cannot be written to (No space left on device): mend that and resume the run; its last checkpoint is"
    assert refused(command, capsys) == f"{place / 'run'} {full} grpo step 1."
    resume = ["train", "pocket", "--resume", "--out", place / "run"]
    assert refused(resume, capsys) == f"{place / 'run'} {full} grpo step 1."  # still full
    disk("size=40m,ro")
    read_only = "cannot be written to (Read-only file system): mend that and resume the run; its last checkpoint is"
    assert refused(resume, capsys) == f"{place / 'run'} {read_only} grpo step 1."
    other = refused(["train", "pocket", "--set", *SETTINGS, "--out", place / "other"], capsys)
    assert other == f"{place / 'other'} cannot be made (Read-only file system): choose another folder with --out."
    disk("size=40m,rw")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main([str(a) for a in resume]) == 0
    assert_same(Run(place / "run"), whole)


# --- damaged ---


def test_a_damaged_checkpoint_is_told_in_one_sentence_and_the_last_good_one_used(tmp_path):
    run, said = small_run(tmp_path / "run"), []
    trained(run, "sft", [4])
    model, optimizer = trained(run, "grpo", [1])
    older = run.folder / "checkpoints" / "grpo-000001"
    os.rename(older, run.folder / "aside")
    update(model, optimizer, 2)
    run.save_checkpoint("grpo", 2, model, optimizer)
    shutil.copytree(run.folder / "aside", older)
    assert run.resume("grpo", *new_model(), say=said.append) == 2 and said == []
    assert not older.exists()  # to resume ends a deletion that was cut off
    os.rename(run.folder / "aside", older)
    newest = run.folder / "checkpoints" / "grpo-000002"
    (newest / "model.safetensors").write_bytes((newest / "model.safetensors").read_bytes()[:-1])
    assert run.resume("grpo", *new_model(), say=said.append) == 1
    assert said.pop() == f"The checkpoint {newest} is damaged; grpo step 1 is used."
    assert run.load_weights(new_model()[0], "sft", said.append)["step"] == 4 and said == []
    (older / "state.json").write_text("{}")
    assert run.load_weights(new_model()[0], say=said.append)["stage"] == "sft"
    assert said.pop() == f"The checkpoint {newest} is damaged; sft step 4 is used."
    assert run.resume("grpo", *new_model(), say=said.append) == 0
    assert said.pop() == f"The checkpoint {newest} is damaged; no other is there."
    for step in (1, 2):  # what is saved next takes the damaged ones' place
        run.save_checkpoint("grpo", step, model, optimizer)
        assert [c.name for c in run._folders("grpo")] == [f"grpo-00000{step}"]
    assert run.resume("grpo", *new_model(), say=said.append) == 2 and said == []


@pytest.mark.parametrize(
    "state", ['{"stage": "other", "step": 1, "sha256": {}}', '{"stage": "sft", "step": 1, "sha256": {}}']
)
def test_a_state_that_names_no_files_or_no_stage_is_no_checkpoint(tmp_path, state):
    run = small_run(tmp_path / "run")
    for name in ("other-000001", "sft-000001", "notes"):
        (run.folder / "checkpoints" / name).mkdir()
        (run.folder / "checkpoints" / name / "state.json").write_text(state)
    assert run.newest() is None


# --- where a run may be ---


def test_a_link_is_refused_and_left_alone(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for target in (tmp_path / "elsewhere", tmp_path / "nowhere"):
        link = tmp_path / "link"
        link.symlink_to(target)
        with pytest.raises(ValueError, match=r"link is a link to somewhere else: choose another folder with --out\.$"):
            small_run(link)
        assert (
            link.is_symlink() and list((tmp_path / "elsewhere").iterdir()) == [] and not target.name.startswith("run")
        )
        link.unlink()


def test_no_name_leads_out_of_the_run_s_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("../outside", "/tmp/outside", "pocket/../../outside", "..", "."):
        assert "There is no recipe" in refused(["train", name], capsys)
    assert list(tmp_path.iterdir()) == []
    run = small_run(tmp_path / "run")
    (run.folder / "linked.jsonl").symlink_to(tmp_path / "outside.jsonl")
    for name in ("../outside", str(tmp_path / "outside"), "evaluations/../../outside", "linked"):
        for use in (run.records, lambda n: run.log(n, {}), lambda n: run.write_records(n, [{}])):
            with pytest.raises(ValueError, match=rf"would lie outside of {run.folder}; use a plain name and no links"):
                use(name)
    with pytest.raises(ValueError, match="There is no stage '../sft'; did you mean 'sft'"):
        run.save_checkpoint("../sft", 1, *new_model())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_process_killed_before_the_configuration_is_whole_is_in_nobody_s_way(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.yaml.tmp").write_text("recipe:\n  ab")
    assert small_run(tmp_path / "run").config["recipe"]["model"] == "pocket"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoints", "config.yaml"]
