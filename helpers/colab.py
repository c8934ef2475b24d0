"""Notebooks on Colab: the badge and the first cell that each one carries, and what that cell does there."""

import copy
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[1]
REPOSITORY = "OWNER/NAME"  # where the project lives on GitHub; `python -m helpers set-repository` rewrites it
BRANCH = "main"
UNTOUCHED = ("torch", "numpy", "ipython")  # Colab's own work with its drivers and pages; others could break the runtime
CELL_ID = "colab"

BADGE = """[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]\
(https://colab.research.google.com/github/{repository}/blob/{branch}/notebooks/{name})"""
_ANY_BADGE = re.compile(r"\[!\[Open in Colab\]\([^)]*\)\]\([^)]*\)\n\n")
CELL = """\
# On Colab this cell fetches the project, as it was when this notebook was stored. Elsewhere it does nothing.
import os
import subprocess
import sys

REPOSITORY, VERSION = "{repository}", "{version}"
if "google.colab" in sys.modules and not os.path.isdir("../helpers"):
    folder = os.path.abspath(REPOSITORY.split("/")[1])
    if not os.path.isdir(folder):
        address = f"https://github.com/{{REPOSITORY}}"
        subprocess.run(["git", "clone", "--quiet", "--filter=blob:none", address, folder], check=True)

    def git(*words):
        return subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True).stdout.strip()

    for commit in git("log", "--format=%H", "origin/HEAD", "--", "helpers").split():
        if git("rev-parse", f"{{commit}}:helpers").startswith(VERSION):
            git("checkout", "--quiet", commit)
            break
    os.chdir(f"{{folder}}/notebooks")
    sys.path.insert(0, folder)
    from helpers.colab import set_up
    set_up(VERSION)"""


# --- in the notebooks ---


def helpers_version(root: Path = ROOT) -> str:
    """Git's name for the contents of helpers/ as it lies there now, in 12 hexadecimal digits.

    The commit that a notebook is in cannot be written into the notebook; what its code imports can. So a copy of a
    notebook that somebody saved a year ago still finds the helpers it was written for. Raises RuntimeError outside of
    a git repository.
    """
    with tempfile.TemporaryDirectory() as work:  # an index of its own, so that nothing is staged
        environment = {**os.environ, "GIT_INDEX_FILE": f"{work}/index"}
        for words in (["add", "--all", "helpers"], ["write-tree", "--prefix=helpers/"]):
            done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, env=environment)
            if done.returncode:
                raise RuntimeError(f"{root} is not a git repository, so its notebooks cannot be given a version.")
    return done.stdout.strip()[:12]


def known_versions(root: Path = ROOT) -> set[str]:
    """The versions of helpers/ that a reader can be given: of each commit, and of the folder as it lies there."""
    git = ["git", "-C", str(root)]
    commits = subprocess.check_output([*git, "log", "--format=%H", "--", "helpers"], text=True).split()
    names = "\n".join(f"{commit}:helpers" for commit in commits)
    found = subprocess.check_output([*git, "cat-file", "--batch-check=%(objectname)"], text=True, input=names).split()
    return {name[:12] for name in found} | {helpers_version(root)}


def dressed(notebook: dict, name: str, repository: str, version: str) -> dict:
    """A notebook (its JSON) with badge and first cell, its code cells counted from 1 again. Dressing twice is once.

    name: of its file. Raises ValueError if it does not begin with a Markdown cell that holds its title.
    """
    cells = [copy.deepcopy(cell) for cell in notebook["cells"] if cell.get("id") != CELL_ID]
    if not cells or cells[0]["cell_type"] != "markdown" or not "".join(cells[0]["source"]).startswith("# "):
        raise ValueError(f"{name} must begin with a Markdown cell whose first line is its title.")
    title, _, text = _ANY_BADGE.sub("", "".join(cells[0]["source"])).partition("\n")
    badge = BADGE.format(repository=repository, branch=BRANCH, name=name)
    first = {**cells[0], "source": _lines(f"{title}\n\n{badge}\n\n{text.lstrip()}".rstrip())}
    source = _lines(CELL.format(repository=repository, version=version))
    cell = {"cell_type": "code", "execution_count": 1, "id": CELL_ID, "metadata": {}, "outputs": [], "source": source}
    cells, count = [first, cell, *cells[1:]], 0
    for each in cells:
        if each["cell_type"] == "code":
            count += 1
            each["execution_count"] = count
            for output in each["outputs"]:
                if "execution_count" in output:
                    output["execution_count"] = count
    return {**notebook, "cells": cells}


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def dress(path: Path, repository: str | None = None, version: str | None = None) -> bool:
    """Give a notebook's file its badge and its first cell, in place; whether that changed it."""
    before = path.read_text(encoding="utf-8")
    made = dressed(json.loads(before), path.name, repository or REPOSITORY, version or helpers_version())
    after = json.dumps(made, indent=1, ensure_ascii=False, sort_keys=True) + "\n"  # as nbformat writes it
    if after != before:
        path.write_text(after, encoding="utf-8")
    return after != before


def set_repository(repository: str, root: Path = ROOT) -> list[str]:
    """Write the project's address (OWNER/NAME on GitHub) into this file, every notebook and the badges on other pages.

    Run it again after a change of helpers/, and commit both together. Returns the names of the files that changed.
    """
    if not re.fullmatch(r"[A-Za-z0-9-]+/[A-Za-z0-9._-]+", repository):
        raise ValueError(f"Give the repository as OWNER/NAME, as in its address on GitHub, not {repository!r}.")
    changed = []
    for name, pattern in (
        ("helpers/colab.py", r'(?m)(^REPOSITORY = ")[^"]*(")'),
        ("notebooks/README.md", r"(colab\.research\.google\.com/github/)[^/]+/[^/]+(/blob/)"),
        ("README.md", r"(colab\.research\.google\.com/github/)[^/]+/[^/]+(/blob/)"),
    ):
        before = (root / name).read_text(encoding="utf-8") if (root / name).exists() else ""
        after = re.sub(pattern, rf"\g<1>{repository}\g<2>", before)
        if after != before:
            (root / name).write_text(after, encoding="utf-8")
            changed.append(name)
    version = helpers_version(root)  # after the change above, which is a part of it
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        if dress(path, repository, version):
            changed.append(f"notebooks/{path.name}")
    return changed


# --- on Colab ---


def requirements(path: Path = ROOT / "requirements.txt") -> dict[str, str]:
    """The exact version of each package that notebooks import; what only tests need comes later in that file."""
    lines = path.read_text(encoding="utf-8").partition("# for the tests")[0].splitlines()
    pins = dict(line.strip().split("==") for line in lines if "==" in line)
    return {name: exact for name, exact in pins.items() if name not in (*UNTOUCHED, "jupyterlab", "nbval")}


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def set_up(wanted: str, say: Callable[[str], None] = print, run=subprocess.run) -> None:
    """Install what is missing and say what was done. The first cell calls this, on Colab alone.

    wanted: the version of helpers/ that the notebook was stored with. Packages that are there stay at their version,
    and torch, numpy and IPython could not be changed even by what others depend on. Raises RuntimeError, in one
    sentence, if a package cannot be installed.
    """
    found = run(["git", "-C", str(ROOT), "rev-parse", "HEAD:helpers", "HEAD"], capture_output=True, text=True).stdout
    here, commit = (found.split() + ["", ""])[:2]
    if here.startswith(wanted):
        say(f"fetched: {REPOSITORY}, commit {commit[:12]}, which this notebook was stored with")
    else:
        say(f"fetched: {REPOSITORY}, commit {commit[:12]}, the newest; the notebook's own version is not there")
    missing = [f"{name}=={exact}" for name, exact in requirements().items() if _installed(name) is None]
    kept = {name: _installed(name) for name in UNTOUCHED}
    if missing:
        with tempfile.TemporaryDirectory() as work:
            fixed = Path(work) / "constraints.txt"
            fixed.write_text("".join(f"{name}=={here}\n" for name, here in kept.items() if here), encoding="utf-8")
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", str(fixed), *missing]
            done = run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise RuntimeError(f"Could not install {', '.join(missing)}: {reason}")
    say(f"installed: {', '.join(missing) or 'nothing, all was there'}")
    say("left as they were: " + ", ".join(f"{name} {here}" for name, here in kept.items() if here))
    say(gpu_recipe()[1])


def gpu_recipe(name: str = "article-smollm-135m") -> tuple[str | None, str]:
    """The recipe for a real model that suits this machine's GPU, None without one; and a sentence that says so."""
    import torch

    if not torch.cuda.is_available():
        return None, "no GPU: every notebook runs on the CPU, and long runs are shown from their records"
    card, half = torch.cuda.get_device_name(), torch.cuda.is_bf16_supported(including_emulation=False)
    numbers = "" if half else "; it has no bfloat16, so training is in float32 and sampling in float16"
    return name, f"GPU: {card}, so the real model is SmolLM-135M with the article's recipe, {name}{numbers}"
