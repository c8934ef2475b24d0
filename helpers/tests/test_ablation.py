"""Ablations: what is run, what is not run again, and the arithmetic of their table."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from helpers import ablation
from helpers.ablation import BASELINE, VARIANTS, ablate, ablation_table, against_baseline, mean_interval
from helpers.hygiene import Stopped
from helpers.recipes import load_recipe
from helpers.runs import read_jsonl

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


def test_without_a_baseline_there_is_a_table_without_differences():
    rows = [record("GSPO", s, 0.5) for s in range(3)]
    [row] = against_baseline(rows)
    assert [row[key] for key in ("gain", "gain_low", "gain_high", "differs")] == [None] * 4 and row["mean"] == 0.5
    assert ablation_table(rows).splitlines()[2:] == ["| GSPO | 50.0 |  | no baseline | 3 |"]
    elsewhere = ablation_table([*rows, record(BASELINE, 7, 0.9)])  # on no seed that GSPO has
    assert elsewhere.splitlines()[2:] == ["| baseline | 90.0 |  |  | 1 |", "| GSPO | 50.0 |  | no baseline | 3 |"]
    assert len(ablation_table([]).splitlines()) == 2


def test_seeds_without_a_baseline_do_not_count_towards_three():
    rows = [record("BNPO", s, 0.8) for s in range(4)] + [record(BASELINE, s, 0.9) for s in range(2)]
    by_name = {row["variant"]: row for row in against_baseline(rows)}
    assert by_name["BNPO"]["differs"] is None and by_name["BNPO"]["gain"] == pytest.approx(-0.1)
    assert {r["variant"]: r for r in against_baseline([*rows, record(BASELINE, 2, 0.9)])}["BNPO"]["differs"]


class Runs:
    """Stands in for the runs, in threads: `begun` are those that were; `events` maps a variant to what it does."""

    def __init__(self, monkeypatch, **events):
        self.begun, self.events = [], events
        monkeypatch.setattr(ablation, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(workers))
        monkeypatch.setattr(ablation, "_warm_up", lambda recipe, settings, seed, folder: self.run("warm-up", seed))
        monkeypatch.setattr(ablation, "_one", lambda recipe, settings, name, seed, folder: self.run(name, seed))
        monkeypatch.setattr(ablation, "_check_recipes", lambda *_: None)

    def run(self, name, seed):
        self.begun.append(name)
        self.events.get(name, lambda: None)()
        return [record(name, seed, 0.5)]


def fail(error):
    raise error


@pytest.mark.parametrize("error, raised", [(RuntimeError("It broke."), RuntimeError), (KeyboardInterrupt(), Stopped)])
def test_after_an_error_no_run_is_begun_and_what_is_done_is_kept(tmp_path, monkeypatch, error, raised):
    runs, said = Runs(monkeypatch, BNPO=lambda: fail(error)), []
    with pytest.raises(raised) as stopped:
        ablate(tmp_path, [0], [BASELINE, "BNPO", "GSPO", "CISPO"], say=said.append)
    assert str(tmp_path) in str(stopped.value) or stopped.value is error
    assert runs.begun == ["warm-up", BASELINE, "BNPO"]
    assert (said[-1] == "seed 0, BNPO: failed") == (raised is RuntimeError)
    assert [r["variant"] for r in read_jsonl(tmp_path / "results.jsonl")] == ["warm-up", BASELINE]
    runs.events = {}
    more = ablate(tmp_path, [0], [BASELINE, "BNPO", "GSPO", "CISPO"], say=said.append)
    assert [r["variant"] for r in more] == ["warm-up", BASELINE, "BNPO", "GSPO", "CISPO"]


def test_what_is_under_way_beside_an_error_is_kept(tmp_path, monkeypatch):
    told = threading.Event()
    runs = Runs(monkeypatch, GSPO=lambda: told.wait(60), BNPO=lambda: fail(RuntimeError("It broke.")))
    with pytest.raises(RuntimeError, match="It broke"):
        ablate(tmp_path, [0], ["GSPO", "BNPO", "CISPO"], workers=2, say=lambda text: "waiting" in text and told.set())
    assert told.is_set() and "CISPO" not in runs.begun
    assert [r["variant"] for r in read_jsonl(tmp_path / "results.jsonl")] == ["warm-up", "GSPO"]


def test_ctrl_c_between_two_runs_loses_none(tmp_path, monkeypatch):
    runs = Runs(monkeypatch)
    with pytest.raises(Stopped):
        ablate(tmp_path, [0], [BASELINE, "GSPO"], say=lambda text: BASELINE in text and fail(KeyboardInterrupt()))
    assert runs.begun == ["warm-up", BASELINE]
    assert [r["variant"] for r in read_jsonl(tmp_path / "results.jsonl")] == ["warm-up", BASELINE]


@pytest.mark.parametrize("settings, sentence", [
    (["grpo.stepz=5"], "There is no setting 'grpo.stepz'"),
    (["grpo.credit=step"], "grpo.credit=step needs"),  # some variants are at odds with it, the baseline is not
    (["task=propositional_logic", "grpo.stratified=true"], "leave out grpo.stratified"),
])  # fmt: skip
def test_a_setting_that_will_not_do_is_told_before_anything_is_run(tmp_path, monkeypatch, settings, sentence):
    monkeypatch.setattr(ablation, "ProcessPoolExecutor", None)  # not to be called
    with pytest.raises(ValueError, match=sentence) as refusal:
        ablate(tmp_path / "a", settings=[*settings, "train_size=96", "evaluation.size=6"])
    assert "\n" not in str(refusal.value) and not (tmp_path / "a").exists()


def test_results_of_another_recipe_or_other_settings_are_not_mixed(tmp_path, monkeypatch):
    runs = Runs(monkeypatch)
    again = {"out": tmp_path, "seeds": [0], "say": lambda text: None}
    first = ablate(variants=[BASELINE], settings=("grpo.steps=5",), **again)
    for other, sentence in (
        (
            {"settings": ["grpo.steps=6"]},
            r"the settings \['grpo.steps=5'\], not \['grpo.steps=6'\]: choose another --out",
        ),
        ({}, r"the settings \['grpo.steps=5'\], not \[\]"),
        ({"settings": ["grpo.steps=5"], "recipe": "smollm2-135m-cpu"}, "the recipe 'pocket', not 'smollm2-135m-cpu'"),
    ):
        with pytest.raises(ValueError, match=sentence) as refusal:
            ablate(variants=["GSPO"], **other, **again)
        assert "\n" not in str(refusal.value)
    assert runs.begun == ["warm-up", BASELINE] and read_jsonl(tmp_path / "results.jsonl") == first
    more = ablate(variants=[BASELINE, "GSPO"], settings=["grpo.steps=5"], **again)
    assert more[: len(first)] == first and more[-1]["variant"] == "GSPO"


@pytest.mark.parametrize(
    "text", [b"", b"recipe: pocket\nsettings:\n- grpo.st", b"- a", b"recipe: [", b"\xff\x00", b"a"]
)
def test_a_damaged_account_of_an_ablation_is_one_sentence(tmp_path, text):
    (tmp_path / "ablation.yaml").write_bytes(text)
    with pytest.raises(ValueError, match="ablation.yaml is damaged, .*: choose another --out, or delete") as refusal:
        ablate(tmp_path, [0], [BASELINE])
    assert "\n" not in str(refusal.value) and [path.name for path in tmp_path.iterdir()] == ["ablation.yaml"]


@pytest.mark.parametrize("name", ["ablation", "ablation-credit"])
def test_a_recorded_ablation_can_go_on_though_it_knew_fewer_variants(name):
    ablation._check_same(Path(ablation.__file__).parent / "recorded" / name / "ablation.yaml", "pocket", ())
