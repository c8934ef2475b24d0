"""The files around the code say what is true: pins, environments, commands, recorded numbers."""

import json
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import nbformat
import pytest
import yaml

from helpers.benchmark import best_ratio, profile_table, table
from helpers.evaluate import wilson
from helpers.pipeline import compare, results_table
from helpers.runs import Run
from helpers.tasks import load_task

ROOT = Path(__file__).parents[2]
RECORDED = sorted(path.parent for path in (ROOT / "helpers/recorded").glob("*/config.yaml"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TRAINS_LIVE = {"05_grpo_training"}  # what it prints comes from a training run of its own, in more than a cell in ten


def pins() -> list[str]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_every_requirement_is_pinned_to_the_installed_version():
    *packages, last = pins()
    assert last == "-e ."
    for line in packages:
        name, exact = line.split("==")
        assert version(name).split("+")[0] == exact, name


def test_conda_gets_the_same_set():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    [pip] = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert pip == pins()


def test_the_readme_gives_set_up_and_tests_as_single_lines_that_ci_runs():
    readme = (ROOT / "README.md").read_text()
    set_up = "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && "
    commands = re.findall(rf"^{re.escape(set_up)}(.*)$", readme, re.M)
    assert [c.split()[0] for c in commands] == [".venv/bin/jupyter", ".venv/bin/pytest"]
    notebook = commands[0].split()[-1]
    assert (ROOT / notebook).is_file()
    assert ".venv/bin/python -m helpers train pocket" in readme
    assert "README.md" in (ROOT / ".ci/run").read_text()


@pytest.mark.parametrize("page", ["README.md", "helpers/recorded/README.md"])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), target


def test_recorded_tables_are_what_the_recorded_runs_say():
    assert RECORDED
    page = (ROOT / "helpers/recorded/README.md").read_text()
    assert results_table(RECORDED) in page
    whole = [f for f in RECORDED if {e["stage"] for e in Run.open(f).records("eval")} >= {"sft", "grpo"}]
    assert results_table(whole) in (ROOT / "README.md").read_text()
    for folder in whole:
        for decoding in ("greedy", "sampled"):
            assert compare(Run.open(folder), "sft", "grpo", decoding) in page


def test_what_is_said_of_other_questions_is_what_was_answered():
    readme = (ROOT / "README.md").read_text().replace(" %", "")
    files = sorted(RECORDED[0].parent.glob("*/fresh-*.jsonl"))
    assert len(files) == 4
    for file in files:
        run = Run.open(file.parent)
        asked = load_task(run.config["recipe"]["task"], "test", 600, seed=1)
        answers = [r for r in run.records(file.stem) if r["target"].endswith("@grpo")]
        assert [r["truth"] for r in answers] == [example.answer for example in asked]
        assert all(r["correct"] == asked.score(r["answer"], asked[r["question"]]) for r in answers)
        right = sum(r["correct"] == 1 for r in answers)
        low, high = (100 * end for end in wilson(right, 600))
        assert f"{right / 6:.1f} ({low:.1f} to {high:.1f})" in readme
    before = {e.question for e in load_task("syllogism", "test", 300)}
    assert not before & {e.question for e in load_task("syllogism", "test", 600, seed=1)}


@pytest.mark.parametrize("folder", RECORDED, ids=lambda path: path.name)
def test_recorded_runs_are_whole(folder):
    run = Run.open(folder)
    recipe, environment = run.config["recipe"], run.config["environment"]
    page = (ROOT / "helpers/recorded/README.md").read_text()
    assert environment["git_commit"]
    assert "dirty" not in environment["git_commit"] or ("gpu" in folder.name and "committed afterwards, as" in page)
    steps = [m["step"] for m in run.records("metrics") if m["stage"] == "grpo"]
    assert steps == list(range(1, len(steps) + 1))
    ended = {e["stage"] for e in run.records("eval")}
    assert len(steps) == recipe["grpo"]["steps"] or ("grpo" not in ended and "without an evaluation" in page)
    for e in run.records("eval"):
        records = run.records(f"evaluations/{e['stage']}-{e['decoding']}")
        assert len(records) == e["questions"] >= 300
        assert sum(r["correct"] for r in records) / len(records) == pytest.approx(e["accuracy"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_stored_as_their_reader_should_get_them(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1)), "run it from a clean kernel"
    assert "widgets" not in notebook.metadata, "strip the widget state"
    assert sum(bool(c.outputs) for c in code) > 0.6 * len(code), "a notebook without outputs checks nothing"
    assert not any(o.output_type == "error" for c in code for o in c.outputs)
    for output in (o for c in code for o in c.outputs if "image/png" in o.get("data", {})):
        assert output.metadata["image/png"]["alt"], "every figure has an alternative text"
    printed = ["".join(o.text for o in c.outputs if o.output_type == "stream") for c in code]
    assert all(text.count("%|") <= 1 for text in printed), "of a progress bar only its last state"
    ignored = sum("nbval-ignore-output" in c.metadata.get("tags", []) for c in code)
    assert ignored <= len(code) / 10 or path.stem in TRAINS_LIVE, "what is ignored is not tested"
    assert max(len(c.source.splitlines()) for c in code) <= 25
    titles = [line for c in notebook.cells if c.cell_type == "markdown" for line in c.source.splitlines()]
    assert sum(line.startswith("# ") for line in titles) == 1
    later = NOTEBOOKS[NOTEBOOKS.index(path) + 1 :]
    assert not later or f"]({later[0].name})" in notebook.cells[-1].source, "it ends with a link to the next one"
    text = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert "://" in target or (path.parent / target).exists(), target


def test_no_file_names_a_package_registry_or_a_home_folder():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert files
    # Joined here, so that this file does not find itself.
    forbidden = re.compile("|".join(["pypi" + r"\.org", "python" + "hosted", "/ro" + "ot/", "/ho" + "me/"]))
    for file in files:
        if not file.endswith((".safetensors", ".png")):
            assert not forbidden.search((ROOT / file).read_text(encoding="utf-8")), file


def test_the_speed_that_is_told_is_the_speed_that_was_measured():
    result = json.loads((ROOT / "helpers/recorded/benchmark.json").read_text())
    page, machine = (ROOT / "README.md").read_text(), result["machine"]
    assert table(result) in page and profile_table(result) in page and "helpers/recorded/benchmark.png" in page
    assert f"{best_ratio(result):.1f} times" in page and machine["processor"] in page and machine["git_commit"] in page
    assert "dirty" not in machine["git_commit"]
