"""The benchmark's arithmetic and its contestants on the pocket model; no timing is judged."""

import json
from dataclasses import replace

import pytest
import torch

from helpers.benchmark import (
    Coin,
    Job,
    Sized,
    alternate,
    best_ratio,
    growth,
    ours_growing,
    profile_table,
    prompts_of,
    summary,
    table,
)
from helpers.hotspots import KINDS, OUTSIDE, REST, hotspots, kind_of, shares
from helpers.limits import Shape, Work, limits, operations, seen
from helpers.models import load_model
from helpers.plots import benchmark_bars

POCKET = Job("pocket", "letter_counting", questions=2, group_size=2, length=4, minibatch=2, lora_r=4, threads=1)
TOY = Shape(layers=2, hidden=8, heads=4, groups=2, width=3, mlp=16, vocabulary=50, lora_r=2)
WORK = Work(prompt_lengths=(5, 3), group_size=3, length=4)


def test_products_are_those_of_a_real_model():
    model, _ = load_model("pocket", device="cpu")
    shape = Shape.of(model.config, lora_r=4)
    linear = sum(m.weight.numel() for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear))
    assert shape.layers * sum(a * b for a, b in shape.products) == linear


def test_lora_products_are_the_adapter_s_weights():
    from helpers.models import add_lora

    model, _ = load_model("pocket", device="cpu")
    shape = Shape.of(model.config, lora_r=4)
    policy = add_lora(model, r=4, alpha=8)
    assert shape.layers * shape.lora_products == sum(p.numel() for p in policy.parameters() if p.requires_grad)


def test_pairs_are_counted_as_a_mask_would():
    prompts, responses = seen(WORK)
    assert prompts == 15 + 6
    mask = sum(p + t + 1 for p in WORK.prompt_lengths for _ in range(WORK.group_size) for t in range(WORK.length))
    assert responses == mask


def test_operations_by_hand():
    read = 8 + 24 - 6  # prompts once, and all response tokens but each last
    products = 2 * (8 * 24 + 12 * 8 + 8 * 32 + 16 * 8)  # qkv, out, gate and up, down
    pair = 4 * 4 * 3 * 2
    found = operations(WORK, TOY)
    pairs = sum(seen(WORK))
    assert found["rollouts"] == 2 * products * read + pair * pairs + 2 * 8 * 50 * (2 + 24 - 6)
    lora = 2 * ((8 + 12) + 2 * (8 + 6) + (12 + 8) + 2 * (8 + 16) + (16 + 8))
    update = 2 * 2 * products * read + 6 * 2 * lora * read + 3 * pair * pairs + 2 * 2 * 8 * 50 * 24
    assert found["update"] == update


def test_a_shared_prompt_costs_once():
    alone = operations(Work((100,), 1, 4), TOY)["rollouts"]
    four = operations(Work((100,), 4, 4), TOY)["rollouts"]
    assert four < 2 * alone


def test_limits_are_positive_and_grow_with_the_work(monkeypatch):
    monkeypatch.setattr("helpers.limits.product_time", lambda rows, a, b, dtype, copies=4: rows * a * b * 1e-9)
    monkeypatch.setattr("helpers.limits.bandwidth", lambda: 1e9)
    small = limits(WORK, TOY, torch.float32, 2)
    large = limits(replace(WORK, length=8), TOY, torch.float32, 2)
    assert all(0 < small[k] < large[k] for k in ("rollouts", "update"))
    layers = 2 * sum(a * b for a, b in TOY.products) * 1e-9
    cached = (3 * 8 + 6 * (1 + 2 + 3)) * 2 * 2 * 2 * 3 * 4 / 1e9
    assert small["rollouts"] == pytest.approx(8 * layers + 3 * 6 * (layers + 8 * 50 * 1e-9) + cached)


def test_summary_leaves_the_warm_up_out_of_the_median_but_not_of_the_memory():
    answers = [{"seconds": s, "peak_bytes": m, "sampling": n} for s, m, n in ((9, 7, None), (2, 5, 1), (4, 6, 3))]
    assert summary(answers, 1) == {"seconds": 3, "times": [2, 4], "peak_bytes": 7, "sampling_seconds": 2}


def test_prompts_can_be_given_a_length_and_nothing_is_the_end():
    _, tokenizer = load_model("pocket", device="cpu")
    for length in (3, 100):
        assert {len(p) for p in prompts_of(replace(POCKET, prompt_length=length), tokenizer)} == {length}
    assert Sized(tokenizer, 0).eos_token_id is None
    assert {Coin().parts(text)["total"] for text in ("a", "bc")} == {0.0, 1.0}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("ours_rollouts", "bfloat16"), ("transformers_generate", "float32"), ("ours_step", "float32"),
     ("ours_step", "bfloat16"), ("trl_step", "bfloat16")],
)  # fmt: skip
def test_contestants_do_the_work_in_processes_of_their_own(name, dtype):
    found = alternate([name], replace(POCKET, dtype=dtype), 1, lambda text: None)[name]
    assert len(found["times"]) == 1 and found["seconds"] > 0 and found["peak_bytes"] > 10**7
    assert (found["sampling_seconds"] is not None) == (name == "ours_step")


def test_growth_times_a_step_at_each_size(monkeypatch):
    monkeypatch.setattr("helpers.benchmark.alternate", lambda names, job, rounds, say, warm_up: {
        names[0]: {"times": list(range(rounds))}})  # fmt: skip
    found = growth(POCKET, lambda text: None)
    assert found["group_size"] == [(2, 1), (8, 3), (32, 5)] and found["prompt_length"][-1] == (1024, 17)


def test_each_size_is_made_ready_and_then_timed(monkeypatch):
    seen = []

    def step(job):
        while True:
            seen.append((job.length, job.group_size))
            yield

    monkeypatch.setattr("helpers.benchmark.SIZES", {"length": (5, 3), "group_size": (4,)})
    monkeypatch.setattr("helpers.benchmark.ours_step", step)
    after = [list(seen) for _ in ours_growing(POCKET)]
    ready_and_timed = [(5, 2), (5, 2), (3, 2), (3, 2), (4, 4), (4, 4)]
    assert after == [ready_and_timed[:n] for n in range(7)]


def test_what_stopped_a_contestant_is_told():
    wrong = alternate(["ours_rollouts"], replace(POCKET, task="chess"), 1, lambda text: None)["ours_rollouts"]
    assert wrong["error"].startswith("ValueError") and "chess" in wrong["error"]


def result() -> dict:
    one = {"seconds": 2.0, "times": [2.0], "peak_bytes": 2**30, "sampling_seconds": None}
    found = {"limits": {"rollouts": 1.0, "update": 3.0}, "ours_rollouts": one,
             "transformers_generate": one | {"seconds": 8.0}, "transformers_batching": {"error": "no"},
             "ours_step": one | {"seconds": 5.0}, "trl_step": one | {"seconds": 20.0}}  # fmt: skip
    growth = {name: [(1, 1.0), (2, 1.5)] for name in ("group_size", "length", "prompt_length")}
    faster = {n: f | {"seconds": f["seconds"] / 2} if "seconds" in f else f for n, f in found.items()}
    return {"job": {"questions": 2, "group_size": 2, "length": 4}, "dtypes": {"float32": found, "bfloat16": faster},
            "growth": growth, "pocket": None}  # fmt: skip


def test_the_table_has_ratios_limits_and_failures():
    text = table(json.loads(json.dumps(result())))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert len(rows) == 2 + 2 * 5 and len({len(r) for r in rows}) == 1
    assert rows[2] == ["our rollouts", "float32", "2.0", "8", "", "1.0 s (50 %)", "1.0 GiB"]
    assert rows[3][4] == "4.0 x" and rows[6][4] == "4.0 x" and rows[5][5] == "4.0 s (80 %)"
    assert "did not run: no" in rows[4][2]
    assert best_ratio(result()) == 4.0


def test_the_figure_draws_what_ran():
    fig = benchmark_bars(result())
    bars, growth, memory = fig.axes
    assert sorted(p.get_height() for p in bars.patches) == [1, 2, 2.5, 4, 5, 8, 10, 20]
    assert len(growth.lines) == 4 and len(memory.patches) == 4


# --- where the time goes ---


@pytest.mark.parametrize(
    ("name", "kind"),
    [("aten::addmm", "matrix products"), ("mkldnn::_linear_pointwise", "matrix products"),
     ("aten::copy_", "copies and conversions"), ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
     ("aten::silu", REST)],
)  # fmt: skip
def test_operations_are_told_apart_by_name(name, kind):
    assert kind_of(name) == kind


def test_shares_add_up_to_the_whole():
    found = shares([("aten::mm", 2.0), ("aten::bmm", 1.0), ("aten::mul", 1.0)], 8.0)
    assert found == {**dict.fromkeys(KINDS, 0.0), "matrix products": 0.375, REST: 0.125, OUTSIDE: 0.5}


def test_a_contestant_is_profiled_in_a_process_of_its_own():
    found = hotspots("ours_rollouts", POCKET)
    assert sum(found.values()) == pytest.approx(1, abs=0.2) and found["matrix products"] > 0
    told = profile_table({"profile": {"ours_rollouts": found, "ours_step": found}})
    assert len(told.splitlines()) == 2 + len(found)
