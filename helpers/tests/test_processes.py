"""Two processes against one: the same questions, the same update, to 1e-5; one run folder, and no word twice."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from helpers.grpo import grpo
from helpers.processes import share
from helpers.runs import Run
from helpers.tests.test_grpo import SMALL, TASK, TOKENIZER, WholeText, tiny_model
from helpers.tests.two_processes import CONFIGS

# On a CPU the launcher starts several processes only if it takes them for GPUs' ones.
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
          "--main_process_port", "0"]  # fmt: skip


def start(command: list[str], folder: Path) -> str:
    """Run a command in the repository's root on one thread; its standard output. Fails with all it said."""
    told = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2]), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=folder, env=os.environ | told, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Of:
    """An accelerator, as far as `share` asks."""

    def __init__(self, number: int, count: int) -> None:
        self.process_index, self.num_processes = number, count


@given(st.lists(st.integers(), max_size=40), st.integers(1, 9))
def test_shares_are_everything_once_and_even(items, count):
    shares = [share(items, Of(number, count)) for number in range(count)]
    assert [item for some in shares for item in some] == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What one process found and what two did, by name."""
    folder = tmp_path_factory.mktemp("processes")
    start([sys.executable, "-m", "helpers.tests.two_processes", "one.safetensors"], folder)
    start([*LAUNCH, "-m", "helpers.tests.two_processes", "two.safetensors"], folder)
    return load_file(folder / "one.safetensors"), load_file(folder / "two.safetensors")


@pytest.mark.parametrize("name", [*CONFIGS, "sft"])
def test_two_processes_make_the_update_of_one(both, name):
    one, two = ({key: x for key, x in found.items() if key.startswith(f"{name}: ")} for found in both)
    assert one.keys() == two.keys()
    gradients = one[f"{name}: gradients"]
    assert (gradients.abs().amax(dim=1) > 1e-3).all()  # there is something to add up in each update
    for key in one:
        assert torch.allclose(one[key], two[key], rtol=1e-5, atol=1e-5), key


def test_a_run_of_two_processes_is_one_run(tmp_path):
    settings = ["sft.traces=64", "sft.epochs=1", "grpo.steps=2", "grpo.questions_per_rollout=4", "grpo.group_size=2",
                "grpo.buffer_size=16", "grpo.minibatch_size=8", "evaluation.size=6", "train_size=64"]  # fmt: skip
    command = ["-m", "helpers", "train", "pocket", "--out", "run", "--set", *settings]
    said = start([*LAUNCH, *command], tmp_path)
    run = Run.open(tmp_path / "run")
    assert [r["step"] for r in run.records("metrics") if r["stage"] == "grpo"] == [1, 2]
    assert len(run.records("eval")) == 6 and run.config["environment"]["processes"] == 2
    assert said.count("the run is kept in") == 1 and said.count("sft -> grpo, greedy") == 1
    again = start([*LAUNCH, "-m", "helpers", "train", "pocket", "--out", "run", "--resume"], tmp_path)
    assert "sft -> grpo, greedy" in again and len(run.records("metrics")) == 4


@pytest.fixture
def two(monkeypatch):
    """An accelerator that says it is one of two processes."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    yield accelerator
    AcceleratorState._reset_state(reset_partial_state=True)


def test_too_few_rollouts_for_the_processes_are_refused_with_the_cure(two):
    with pytest.raises(ValueError, match="2 processes need 2 rollouts a step: set grpo.buffer_size to 16 or more"):
        grpo(tiny_model(), TOKENIZER, TASK, replace(SMALL, steps=1), reward=WholeText(TASK), accelerator=two)


def test_a_server_samples_for_one_process_alone(two):
    class Somewhere:
        refresh = respond = None

    config = replace(SMALL, steps=1, buffer_size=16)
    with pytest.raises(ValueError, match="one process"):
        grpo(tiny_model(), TOKENIZER, TASK, config, reward=WholeText(TASK), accelerator=two, sampler=Somewhere())
