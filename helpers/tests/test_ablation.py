"""Ablations: what is run, what is not run again, and the arithmetic of their table."""

import math

import numpy as np
import pytest
from scipy import stats

from helpers import ablation
from helpers.ablation import BASELINE, VARIANTS, ablate, ablation_table, against_baseline, mean_interval
from helpers.recipes import load_recipe

TINY = ("sft.traces=32", "sft.epochs=1", "grpo.steps=1", "train_size=96", "evaluation.size=6",
        "evaluation.max_new_tokens=4", "grpo.max_new_tokens=4")  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_a_recipe_and_changes_something_unless_it_is_the_baseline(variant):
    assert (load_recipe("pocket", VARIANTS[variant]) == load_recipe("pocket")) == (variant == BASELINE)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.startswith("G =")])
def test_group_sizes_are_compared_at_the_same_number_of_responses(variant):
    config = load_recipe("pocket", VARIANTS[variant]).grpo
    assert (
        config.questions_per_rollout * config.group_size == config.buffer_size == load_recipe("pocket").grpo.buffer_size
    )


def test_a_second_call_runs_what_is_missing_alone(tmp_path):
    said = []
    records = ablate(tmp_path / "a", [0], [BASELINE], settings=TINY, say=said.append)
    assert [(r["variant"], r["seed"]) for r in records] == [("base", 0), ("warm-up", 0), (BASELINE, 0)]
    assert all(r["questions"] == 6 and 0 <= r["accuracy"] <= 1 for r in records)
    assert len(records[2]["curves"]["accuracy"]) == 1 and len(said) == 3
    with open(tmp_path / "a/results.jsonl", "a") as file:
        file.write('{"variant": "cut o')  # the machine stopped while this was written
    more = ablate(tmp_path / "a", [0], [BASELINE, "no warm-up"], settings=TINY, say=said.append)
    assert more[:3] == records and [r["variant"] for r in more[3:]] == ["no warm-up"] and len(said) == 4
    assert ablate(tmp_path / "a", [0], [BASELINE, "no warm-up"], settings=TINY, say=said.append) == more
    assert len(said) == 4


def test_an_unknown_variant_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"^There is no variant 'GSOP'; did you mean 'GSPO'") as refusal:
        ablate(tmp_path / "a", variants=["GSOP"])
    assert "\n" not in str(refusal.value) and not (tmp_path / "a").exists()


def test_the_interval_is_student_s():
    values = np.random.default_rng(0).normal(size=5)
    mean, low, high = mean_interval(values)
    right = stats.t.interval(0.95, 4, loc=values.mean(), scale=stats.sem(values))
    assert (mean, low, high) == pytest.approx((values.mean(), *right))
    assert mean_interval([0.3]) == (0.3, -math.inf, math.inf)


def record(variant, seed, accuracy):
    return {"variant": variant, "seed": seed, "accuracy": accuracy}


def test_differences_are_paired_by_seed():
    rows = [record(BASELINE, s, a) for s, a in enumerate((0.5, 0.7, 0.9))]
    rows += [record("BNPO", s, a) for s, a in enumerate((0.6, 0.8, 1.0))]  # 10 points more on each seed
    rows += [record("GSPO", s, a) for s, a in enumerate((0.9, 0.7, 0.5))]  # the same mean as the baseline
    by_name = {row["variant"]: row for row in against_baseline(rows)}
    assert list(by_name) == [BASELINE, "BNPO", "GSPO"]
    assert by_name["BNPO"]["gain"] == pytest.approx(0.1) and by_name["BNPO"]["differs"]
    assert by_name["GSPO"]["gain"] == pytest.approx(0.0) and not by_name["GSPO"]["differs"]
    assert not by_name[BASELINE]["differs"] and by_name[BASELINE]["mean"] == pytest.approx(0.7)
    table = ablation_table(rows).splitlines()
    assert len(table) == 2 + 3 and table[3].startswith("| BNPO | 80.0 | +10.0 (+10.0 to +10.0) | yes | 3 |")


def test_two_seeds_that_agree_prove_nothing():
    rows = [record(v, s, a) for v, a in ((BASELINE, 0.9), ("BNPO", 0.8), ("GSPO", 0.8)) for s in range(3)]
    by_name = {row["variant"]: row for row in against_baseline(rows[:-1])}
    assert by_name["BNPO"]["differs"] and by_name["GSPO"]["differs"] is None
    assert by_name["GSPO"]["gain_high"] == pytest.approx(by_name["GSPO"]["gain_low"])
    assert ablation_table(rows[:-1]).splitlines()[-1].endswith("| too few seeds | 2 |")


def test_a_warm_up_that_every_run_has_is_not_made_again(tmp_path, monkeypatch):
    done = [record(v, 0, 0.5) for v in ("base", "warm-up", BASELINE)]
    run = ablation.Run(tmp_path)
    run.write_records("results", done)
    monkeypatch.setattr(ablation, "ProcessPoolExecutor", None)  # not to be called
    assert ablate(tmp_path, [0], [BASELINE]) == done


def test_the_reward_of_the_settings_is_what_is_paid(tmp_path, monkeypatch):
    paid = []
    monkeypatch.setattr(ablation, "grpo", lambda *_, reward, **__: paid.append(reward.config) or [])
    ablation._one("pocket", (*TINY, "sft.epochs=0", "reward.steps=0.5", "reward.correct=0"), BASELINE, 0, tmp_path)
    assert [(config.steps, config.correct) for config in paid] == [(0.5, 0.0)]
