"""Memory: the record of long runs holds what the README says of it, and a short run holds no more than it did."""

import gc
import json
import platform
from multiprocessing import get_context

import pytest
import torch
from accelerate.state import AcceleratorState

from helpers import grpo as grpo_module
from helpers import leaks
from helpers.decoder import Decoder
from helpers.leaks import JOBS, RECORD, growth, held, watch
from helpers.packing import lay_out, packed_states
from helpers.tests.conftest import decoder_logits, small_model

LIMIT = 0.05  # growth after the first steps
SHORT = ["sft.epochs=0", "sft.traces=10", "train_size=50", "grpo.questions_per_rollout=8", "grpo.buffer_size=48",
         "grpo.minibatch_size=48", "grpo.max_new_tokens=16"]  # fmt: skip
LORA = ["lora.r=4", "lora.alpha=8", "grpo.loss.beta=0.01", "grpo.updates_per_buffer=2", "sampler_dtype=bfloat16"]
glibc = pytest.mark.skipif(
    tuple(map(int, (platform.libc_ver()[1] or "0.0").split(".")[:2])) < (2, 33) or platform.libc_ver()[0] != "glibc",
    reason="memory is read from Linux with glibc 2.33 or later",
)


@pytest.fixture(autouse=True)
def one_accelerator_a_test():
    """accelerate keeps the first accelerator's settings for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def only_new_objects_are_counted():
    """Those that were there before are many, and to look through them behind each step takes most of the time."""
    gc.freeze()
    yield
    gc.unfreeze()


def leaks_found(rows) -> set[str]:
    """Which counts are higher behind step 12 than behind step 4: tensors by one, Python's objects by 200 a step.

    MB in use by 4: a number of rows that no step before had costs 2.
    """
    assert len(rows) == 12 and all(row["grad_norm"] > 0 for row in rows)
    room = {"tensors": 0, "in_use": 4.0, "objects": 1600}
    return {key for key in room if rows[11][key] - rows[3][key] > room[key]}


# --- the record ---


def test_growth_checked_by_hand():
    assert growth([1, 50, *[100] * 8, 110, 110], 2) == pytest.approx(0.1)
    assert growth([100] * 9 + [900] + [100] * 20, 5) == 0  # one high step is no growth
    assert growth([100 + step for step in range(100)], 5) > LIMIT
    with pytest.raises(ValueError, match="5 steps or more after the first 2, not 4"):
        growth([1] * 6, 2)


def test_the_recorded_runs_did_not_grow():
    kept = json.loads(RECORD.read_text())
    assert {run["recipe"]: (run["steps"], run["first"], tuple(run["settings"])) for run in kept["runs"]} == JOBS
    for run in kept["runs"]:
        assert len(run["resident"]) == len(run["in_use"]) == len(run["grad_norm"]) == run["steps"]
        assert min(run["grad_norm"]) > 0  # each step learned something
        assert min(run["resident"]) > 100 and all(a > b for a, b in zip(run["resident"], run["in_use"], strict=True))
        assert growth(run["resident"], run["first"]) < LIMIT
        after, tensors = run["resident"][run["first"] :], run["tensors"][run["first"] :]
        assert max(after) < (1 + LIMIT) * after[0]  # no step in between either
        assert tensors[-1] <= tensors[0]  # where more is in use, it is oneDNN's code, in memory that is there already
    assert {"git_commit", "processor", "torch"} <= kept["environment"].keys()
    assert RECORD.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_command_writes_what_it_saw_and_a_figure(tmp_path, monkeypatch, capsys):
    row = {"resident": 100.0, "in_use": 50.0, "tensors": 7, "objects": 9, "grad_norm": 1.0}

    class Pool:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def apply(self, function, arguments):
            name, steps, settings, progress = arguments
            assert function is watch and JOBS[name][0] == steps and JOBS[name][2] == settings and progress
            return [row | {"resident": 100.0 + (step > steps / 2)} for step in range(steps)]

    monkeypatch.setattr(leaks, "get_context", lambda kind: type("Context", (), {"Pool": lambda self, n: Pool()})())
    leaks.main(tmp_path / "leaks.json")
    assert "pocket: 100 MB resident behind step 1, 101 behind 200; after the first 20 +1.0 %" in capsys.readouterr().out
    kept = json.loads((tmp_path / "leaks.json").read_text())
    assert kept.keys() == json.loads(RECORD.read_text()).keys() and len(kept["runs"][0]["in_use"]) == 200
    assert [text.get_text() for text in leaks.chart(kept).axes[0].get_legend().get_texts()] == [
        "resident, +1.0 %", "in use, +0.0 %",
    ]  # fmt: skip


# --- a short run, and leaks that were planted ---


def hold() -> list[dict[str, float]]:
    """What is held before some tensors are made, while they are there, and once they are gone."""
    before, kept = held(), torch.ones(50 * 2**18)  # 50 MB, in a block of its own
    small = [torch.ones(100_000) for _ in range(100)]  # 40 MB, in blocks of the heap
    after = held()
    del kept, small
    return [before, after, held()]


def in_a_new_process(function, *arguments):
    """What it returns where nothing was freed before, whose room new memory would go to."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


@glibc
def test_what_is_held_is_counted():
    before, after, again = in_a_new_process(hold)
    assert after["tensors"] - before["tensors"] == 101
    assert after["in_use"] - before["in_use"] == pytest.approx(50 + 38.1, abs=2)
    assert after["resident"] - before["resident"] > 45
    assert again["tensors"] == before["tensors"] and again["in_use"] == pytest.approx(before["in_use"], abs=2)


@glibc
@pytest.mark.parametrize("settings", [[], LORA], ids=["all weights", "lora, KL, two updates, bfloat16"])
def test_twelve_steps_hold_no_more_than_four(settings):
    assert leaks_found(watch("pocket", 12, [*SHORT, *settings])) == set()


def plant(kept: str) -> set[str]:
    """The leaks that are found in a run in which something of each step or minibatch is kept."""
    collect, policy_loss, leaked = grpo_module.collect, grpo_module.policy_loss, []

    def collecting(*arguments):
        collected = collect(*arguments)
        leaked.append(collected.parts if kept == "the rewards' parts" else None)
        return collected

    def leaking(new, *arguments, **named):
        loss, stats = policy_loss(new, *arguments, **named)
        leaked.append({"a tensor": new.detach(), "a graph": loss, "bytes": bytes(10**6)}.get(kept))
        return loss, stats

    grpo_module.collect, grpo_module.policy_loss = collecting, leaking
    torch.set_num_threads(1)
    gc.freeze()
    return leaks_found(watch("pocket", 12, SHORT))


@glibc
@pytest.mark.parametrize(
    ("kept", "found"),
    [("a tensor", {"tensors"}), ("a graph", {"tensors", "in_use"}), ("bytes", {"in_use"}),
     ("the rewards' parts", {"objects"})],
)  # fmt: skip
def test_a_leak_that_was_planted_is_found(kept, found):
    assert in_a_new_process(plant, kept) == found


@glibc
@pytest.mark.parametrize("computed_by", ["the decoder", "the policy, packed"])
def test_numbers_of_tokens_not_met_before_add_nothing(computed_by):
    """Without `round_up` each of them adds code to oneDNN's caches, 100 MB or more here."""
    policy = small_model(hidden_size=128, intermediate_size=384).bfloat16()
    decoder, generator = Decoder(policy), torch.Generator().manual_seed(0)

    def compute(length: int) -> None:
        ids = torch.randint(2, 24, (1, length), generator=generator)
        if computed_by == "the decoder":
            decoder_logits(decoder, ids[0].tolist())
        else:
            packed_states(policy, lay_out(ids, torch.tensor([length // 2]), torch.tensor([length - length // 2])))

    for length in range(32, 129, 16):
        compute(length)
    compute(128 + 1)
    before = held()["in_use"]
    for length in range(17, 128):
        compute(length)
    assert held()["in_use"] - before < 10


def test_elsewhere_one_sentence_says_so(monkeypatch):
    monkeypatch.setattr(leaks.ctypes, "CDLL", lambda name: object())
    with pytest.raises(RuntimeError, match="^What a process holds is read from Linux and glibc 2.33 or later, [^\n]*$"):
        held()
