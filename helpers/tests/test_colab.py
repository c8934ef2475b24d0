"""Colab: the cell and the badge in each notebook, and what the cell does in a copy of Colab's own surroundings."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

from helpers import colab
from helpers.__main__ import main

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
EXPLORED = "02_logprobs_and_the_ppo_loss.ipynb"  # its sliders come before it needs a real model
COLABS_OWN = {"ipython": "7.34.0", "ipywidgets": "7.7.1"}
ABSENT_THERE = ("reasoning_gym", "gguf")


def git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=Ada", "-c", "user.email=ada@example.org", *words]
    return subprocess.check_output(command, text=True, stderr=subprocess.STDOUT).strip()


def notebook(*cells: dict) -> dict:
    return {"cells": list(cells), "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


def words(source: str, **more) -> dict:
    return {"cell_type": "markdown", "metadata": {}, "source": source.splitlines(keepends=True), **more}


def code(source: str, count: int | None = None, outputs: list | None = None) -> dict:
    return {"cell_type": "code", "metadata": {}, "source": [source], "execution_count": count, "outputs": outputs or []}


# --- dressing ---


def test_a_dressed_notebook_has_badge_and_first_cell_and_counts_from_one():
    result = {"output_type": "execute_result", "execution_count": 1, "data": {}, "metadata": {}}
    plain = notebook(words("# 07  Bees\n\n**What you will learn.**"), code("a", 1, [result]), words("b"), code("c", 2))
    made = colab.dressed(plain, "07_bees.ipynb", "ada/rlvr", "0123456789ab")
    title, cell, first, _, last = made["cells"]
    text = "".join(title["source"])
    assert text.startswith("# 07  Bees\n\n[![Open in Colab](") and text.endswith("\n\n**What you will learn.**")
    assert "/github/ada/rlvr/blob/main/notebooks/07_bees.ipynb)" in text
    assert [c["execution_count"] for c in (cell, first, last)] == [1, 2, 3]
    assert first["outputs"][0]["execution_count"] == 2 and cell["outputs"] == []
    source = "".join(cell["source"])
    assert 'REPOSITORY, VERSION = "ada/rlvr", "0123456789ab"' in source and len(source.splitlines()) <= 25
    compile(source, "cell", "exec")


def test_dressing_twice_is_dressing_once_and_another_address_replaces_the_first():
    plain = notebook(words("# Bees\n\ntext"), code("a"))
    once = colab.dressed(plain, "bees.ipynb", "ada/rlvr", "0" * 12)
    assert colab.dressed(once, "bees.ipynb", "ada/rlvr", "0" * 12) == once
    moved = colab.dressed(once, "bees.ipynb", "eve/fork", "1" * 12)
    assert moved == colab.dressed(plain, "bees.ipynb", "eve/fork", "1" * 12) != once
    assert "ada/rlvr" not in json.dumps(moved)


@pytest.mark.parametrize("cells", [[], [code("a")], [words("no title")]])
def test_a_notebook_without_a_title_is_refused(cells):
    with pytest.raises(ValueError, match="bees.ipynb must begin with a Markdown cell"):
        colab.dressed(notebook(*cells), "bees.ipynb", "ada/rlvr", "0" * 12)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_is_dressed_for_helpers_that_a_reader_can_be_given(path):
    stored = json.loads(path.read_text(encoding="utf-8"))
    source = "".join(stored["cells"][1]["source"])
    found = re.search(r'VERSION = "[^"]+", "([0-9a-f]{12})"', source)
    again = "run `python -m helpers set-repository`"
    assert found and colab.dressed(stored, path.name, colab.REPOSITORY, found[1]) == stored, again
    if git(ROOT, "rev-parse", "--is-shallow-repository") == "false":
        assert found[1] in colab.known_versions(), again


@pytest.fixture
def project(tmp_path):
    """A small project of the same form, with one commit."""
    for folder in ("helpers", "notebooks"):
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / "helpers/colab.py", tmp_path / "helpers")
    (tmp_path / ".gitignore").write_text("__pycache__/\n")
    plain = json.dumps(notebook(words("# Bees\n\ntext", id="a"), code("a", 1) | {"id": "b"}))
    (tmp_path / "notebooks/bees.ipynb").write_text(plain)
    badge = colab.BADGE.format(repository="ada/rlvr", branch="main", name="bees.ipynb")
    (tmp_path / "notebooks/README.md").write_text(badge)
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    return tmp_path


def test_the_version_is_git_s_name_of_the_folder_and_nothing_is_staged(project):
    assert colab.helpers_version(project) == git(project, "rev-parse", "HEAD:helpers")[:12]
    (project / "helpers/new.py").write_text("1\n")
    (project / "helpers/__pycache__").mkdir()
    (project / "helpers/__pycache__/new.pyc").write_text("1\n")
    version = colab.helpers_version(project)
    assert git(project, "status", "--porcelain") == "?? helpers/new.py"
    git(project, "add", ".")
    git(project, "commit", "--quiet", "-m", "second")
    assert version == git(project, "rev-parse", "HEAD:helpers")[:12]
    old = git(project, "rev-parse", "HEAD~:helpers")[:12]
    assert {old, version} <= colab.known_versions(project) and "0" * 12 not in colab.known_versions(project)


def test_outside_of_git_there_is_no_version(tmp_path):
    with pytest.raises(RuntimeError, match="is not a git repository"):
        colab.helpers_version(tmp_path)


def test_set_repository_rewrites_the_constant_and_every_notebook_once(project):
    changed = ["helpers/colab.py", "notebooks/README.md", "notebooks/bees.ipynb"]
    assert colab.set_repository("eve/fork.2", project) == changed
    assert "/github/eve/fork.2/blob/main/notebooks/bees.ipynb" in (project / "notebooks/README.md").read_text()
    assert 'REPOSITORY = "eve/fork.2"  #' in (project / "helpers/colab.py").read_text()
    text = (project / "notebooks/bees.ipynb").read_text()
    assert text.count("eve/fork.2") == 2 and colab.helpers_version(project) in text
    nbformat.validate(nbformat.reads(text, 4))
    assert nbformat.writes(nbformat.reads(text, 4)).rstrip() == text.rstrip()  # no difference when Jupyter saves it
    assert colab.set_repository("eve/fork.2", project) == []


@pytest.mark.parametrize("wrong", ["eve", "eve/", "https://github.com/eve/fork", "eve/fork/x", 'eve/"'])
def test_what_is_no_repository_is_refused_before_anything_is_written(wrong, project, capsys):
    with pytest.raises(ValueError, match="OWNER/NAME"):
        colab.set_repository(wrong, project)
    assert git(project, "status", "--porcelain") == ""
    assert main(["set-repository", wrong]) == 2 and "OWNER/NAME" in capsys.readouterr().err


def test_the_command_says_what_it_changed(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(colab, "set_repository", lambda repository: seen.append(repository) or ["a.ipynb"])
    assert main(["set-repository", "eve/fork"]) == main(["set-repository"]) == 0
    assert seen == ["eve/fork", colab.REPOSITORY] and "eve/fork: a.ipynb\n" in capsys.readouterr().out


# --- setting up ---


def test_what_notebooks_need_is_in_the_requirements_without_tools_and_what_colab_guards(tmp_path):
    needed = colab.requirements()
    assert needed["reasoning-gym"] and needed["gguf"] and needed["transformers"]
    assert not {"torch", "numpy", "ipython", "jupyterlab", "pytest", "ruff", "playwright"} & needed.keys()


@pytest.fixture
def setting_up(monkeypatch):
    """Call `set_up` where these packages are missing: (what pip was asked, its constraints, what was said)."""

    def call(*missing: str, tree: str = "aabbccddeeff", returncode: int = 0):
        there = {"torch": "2.9.0+cu126", "numpy": "2.0.2", "ipython": "7.34.0"}
        monkeypatch.setattr(colab, "_installed", lambda name: None if name in missing else there.get(name, "1"))
        asked, said = [], []

        def run(command, **_):
            if command[0] == "git":
                return SimpleNamespace(stdout=f"{tree}00\n{'c' * 40}\n")
            limits = Path(command[command.index("--constraint") + 1]).read_text()
            asked.append((command, limits))
            return SimpleNamespace(returncode=returncode, stderr="noise\nERROR: no such thing\n")

        colab.set_up("aabbccddeeff", say=said.append, run=run)
        return asked, said

    return call


def test_only_what_is_missing_is_installed_and_three_packages_cannot_change(setting_up):
    [(command, limits)], said = setting_up("gguf", "reasoning-gym")
    pins = colab.requirements()
    assert command[-2:] == [f"reasoning-gym=={pins['reasoning-gym']}", f"gguf=={pins['gguf']}"]
    assert limits.split() == ["torch==2.9.0+cu126", "numpy==2.0.2", "ipython==7.34.0"]
    assert "which this notebook was stored with" in said[0] and "reasoning-gym" in said[1]
    assert said[2] == "left as they were: torch 2.9.0+cu126, numpy 2.0.2, ipython 7.34.0"


def test_where_nothing_is_missing_pip_is_not_called(setting_up):
    asked, said = setting_up()
    assert asked == [] and said[1] == "installed: nothing, all was there"


def test_another_version_of_the_project_is_said(setting_up):
    assert "the notebook's own version is not there" in setting_up(tree="ffffffffffff")[1][0]


def test_a_package_that_cannot_be_had_is_one_sentence(setting_up):
    with pytest.raises(RuntimeError, match=r"Could not install gguf==[\d.]+: ERROR: no such thing"):
        setting_up("gguf", returncode=1)


def test_a_gpu_brings_the_article_s_recipe_and_a_t4_its_own_numbers(monkeypatch):
    import torch

    from helpers.recipes import load_recipe

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert colab.gpu_recipe()[0] is None and "no GPU" in colab.gpu_recipe()[1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for card, half in (("Tesla T4", False), ("NVIDIA L4", True)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda card=card: card)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, half=half: half)
        name, sentence = colab.gpu_recipe()
        assert load_recipe(name).model == "smollm-135m" and f"{card}, so the real model is SmolLM-135M" in sentence
        assert ("no bfloat16" in sentence) is not half


# --- an emulated Colab ---


def python_of_colab(folder: Path) -> Path:
    """A Python as on Colab: its own IPython and ipywidgets, a module google.colab, two packages that are not there.

    All else is ours, linked into a folder that the new Python reads but that pip takes for the system's, so that it
    can add packages and take none away.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "python"], check=True)
    python, [site] = folder / "python/bin/python", (folder / "python/lib").glob("*/site-packages")
    ours = folder / "system"
    ours.mkdir()
    hidden = re.compile(rf"(?i)({'|'.join([*COLABS_OWN, *ABSENT_THERE])})(\W|$)|__editable__|helpers|.*\.pth$")
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not hidden.match(entry.name):
            (ours / entry.name).symlink_to(entry)
    (site / "google/colab").mkdir(parents=True)
    (site / "google/colab/__init__.py").touch()
    (site / "colab.pth").write_text(f"{ours}\nimport google.colab\n")
    # What the old versions need beside themselves and the new ones do not.
    old = [*(f"{name}=={exact}" for name, exact in COLABS_OWN.items()), "ipython-genutils", "pickleshare", "backcall",
           "decorator"]  # fmt: skip
    command = [python, "-m", "pip", "install", "--quiet", "--no-deps", *old]
    if subprocess.run(command, capture_output=True, timeout=300).returncode:
        warnings.warn("Colab's IPython and ipywidgets could not be had; the present ones are used.", stacklevel=2)
        for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
            if re.match(rf"(?i)({'|'.join(COLABS_OWN)})(\W|$)", entry.name):
                (ours / entry.name).symlink_to(entry)
    return python


@pytest.fixture(scope="module")
def remote(tmp_path_factory) -> Path:
    """The project on a git server: a commit with the notebook, and a later one whose helpers do not work."""
    folder = tmp_path_factory.mktemp("remote") / colab.REPOSITORY
    left_out = shutil.ignore_patterns("recorded", "tests", "__pycache__")
    shutil.copytree(ROOT / "helpers", folder / "helpers", ignore=left_out)
    (folder / "notebooks").mkdir()
    for name in (f"notebooks/{EXPLORED}", "requirements.txt", "README.md", ".gitignore"):
        shutil.copy(ROOT / name, folder / name)
    git(folder, "init", "--quiet", "--initial-branch=main")
    colab.set_repository(colab.REPOSITORY, folder)
    for later in ("", "raise RuntimeError('newer than the notebook')\n"):
        with open(folder / "helpers/widgets.py", "a") as file:
            file.write(later)
        git(folder, "add", ".")
        git(folder, "commit", "--quiet", "-m", "a state of the project")
    return folder


def test_on_colab_the_first_cell_fetches_installs_and_the_notebook_runs(remote, tmp_path, monkeypatch):
    python, content = python_of_colab(tmp_path), tmp_path / "content"
    content.mkdir()
    (tmp_path / "kernels/colab").mkdir(parents=True)
    argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (tmp_path / "kernels/colab/kernel.json").write_text(json.dumps({"argv": argv, "display_name": "Colab"}))
    for key, value in {
        "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.file://{remote.parents[1]}/.insteadOf",
        "GIT_CONFIG_VALUE_0": "https://github.com/", "PYTHONNOUSERSITE": "1", "IPYTHONDIR": str(tmp_path / "ipython"),
    }.items():  # fmt: skip
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("PYTHONPATH", raising=False)

    stored = nbformat.read(remote / "notebooks" / EXPLORED, 4)
    real = next(i for i, cell in enumerate(stored.cells) if "helpers/recorded" in cell.source)  # not in this copy
    asked = "import IPython, ipywidgets, sys; print(IPython.__version__, ipywidgets.__version__, sys.path[0])"
    cells = [*stored.cells[:2], nbformat.v4.new_code_cell(asked), *stored.cells[2:real], stored.cells[1]]
    fresh = [nbformat.from_dict({**json.loads(json.dumps(cell)), "id": str(i)}) for i, cell in enumerate(cells)]
    run = nbformat.v4.new_notebook(cells=fresh)
    kernels = KernelSpecManager(kernel_dirs=[str(tmp_path / "kernels")])
    manager = KernelManager(kernel_name="colab", kernel_spec_manager=kernels)
    NotebookClient(run, km=manager, timeout=300, resources={"metadata": {"path": str(content)}}).execute()

    said = text_of(run.cells[1])
    assert "which this notebook was stored with" in said, "the newest helpers would have stopped the notebook"
    assert "installed: reasoning-gym==" in said and "gguf==" in said and "left as they were: torch" in said
    versions = text_of(run.cells[2])
    assert versions.endswith(f"{content / remote.name}\n")
    if COLABS_OWN["ipython"] not in versions or COLABS_OWN["ipywidgets"] not in versions:
        warnings.warn(f"emulated with {versions}", stacklevel=1)
    compared = 0
    for ran, kept in zip(run.cells[3:-1], stored.cells[2:real], strict=True):
        if kept.cell_type == "code" and "nbval-ignore-output" not in kept.metadata.get("tags", []):
            assert text_of(ran) == text_of(kept)
            compared += bool(text_of(kept))
    assert compared > 5 and any("Explorer(" in cell.source for cell in run.cells)
    assert text_of(run.cells[-1]) == "", "the second time there is nothing to do"


def text_of(cell) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def test_elsewhere_the_first_cell_does_nothing(tmp_path):
    cell = colab.CELL.format(repository="ada/rlvr", version="0" * 12)
    environment = {**os.environ, "PATH": ""}  # there is no git to call
    done = subprocess.run([sys.executable, "-c", cell], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and list(tmp_path.iterdir()) == []
