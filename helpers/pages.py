"""Pages that are made from the notebooks: a contents page with thumbnails, and the README's measured table.

python -m helpers.pages             makes both anew from what is stored
python -m helpers.pages measure     runs every notebook first, and keeps its time and memory in notebooks/measured.json
python -m helpers.pages measure 02  the same for the notebooks whose names begin so
"""

import io
import json
import re
import sys
import time
from base64 import b64decode
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat

from helpers.colab import BADGE, BRANCH, REPOSITORY, ROOT
from helpers.runs import environment, write_atomically

# The figure that stands for a notebook, counted from 0; the first one if it is not here.
CHOSEN = {"00_start_here": 2, "01_rlvr_concepts": 2, "02_logprobs_and_the_ppo_loss": 3, "03_experience_collection": 3,
          "05_grpo_training": 2, "06_results": 2}  # fmt: skip
LARGEST = 30_000  # bytes of a thumbnail
# In the unit of ru_maxrss. That figure of one's own begins at what the parent process had, /proc's does not.
MEASURE = """import os, re, resource
own, children = (resource.getrusage(who).ru_maxrss for who in (0, -1))
if os.path.exists("/proc/self/status"):
    own = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
print(max(own, children))"""
HEAD = "| notebook | what you leave with | time | memory |"
_HEADS = re.compile(r"^\| notebook \| what you leave with \|.*\n\|[-|]+\n((?:\|.*\n)+)", re.MULTILINE)


def figures(path: Path) -> list[tuple[str, bytes]]:
    """The figures of a stored notebook, in order: (alternative text, bytes of the PNG)."""
    found = []
    for cell in nbformat.read(path, as_version=4).cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                alt = output.metadata.get("image/png", {}).get("alt", "")
                found.append((alt, b64decode(output.data["image/png"])))
    return found


def thumbnail(png: bytes, size: tuple[int, int] = (240, 160)) -> bytes:
    """A figure made small enough for a table: at most `size` pixels, and few enough colours for `LARGEST` bytes."""
    from PIL import Image

    image = Image.open(io.BytesIO(png)).convert("RGB")
    image.thumbnail(size, Image.Resampling.LANCZOS)
    for colours in (128, 32, 8):
        small = io.BytesIO()
        image.quantize(colours, dither=Image.Dither.NONE).save(small, format="png", optimize=True)
        if len(small.getvalue()) <= LARGEST:
            break
    return small.getvalue()


def heading(path: Path) -> str:
    """A notebook's number and title, without what comes after a colon: "05 Training with GRPO"."""
    first = nbformat.read(path, as_version=4).cells[0].source.splitlines()[0]
    return " ".join(first.strip("# ").split(":")[0].split())


def promise(path: Path) -> str:
    """What a notebook says you will learn: the first sentence of it."""
    text = " ".join(nbformat.read(path, as_version=4).cells[0].source.split())
    found = re.search(r"\*\*What you will learn\.\*\* (.*?[.?!])(?: |$)", text)
    return found[1] if found else heading(path)


# --- the README's table ---


def rows(readme: str) -> dict[str, tuple[str, str]]:
    """What the README's table says of each notebook: (title, what you leave with), by the file's stem."""
    table = _HEADS.search(readme)
    if not table:
        raise ValueError(f"README.md has no table of the notebooks; its head is: {HEAD}")
    cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in table[1].splitlines())
    found = {}
    for link, leave, *_ in cells:
        title, stem = re.fullmatch(r"\[(.*)\]\(notebooks/(.*)\.ipynb\)", link).groups()
        found[stem] = (title, leave)
    return found


def cost(measured: Mapping[str, Any], stem: str) -> tuple[str, str]:
    """A notebook's time and peak memory in words, "?" where it has not been measured."""
    here = measured.get("notebooks", {}).get(stem)
    if here is None:
        return "?", "?"
    seconds = here["seconds"]
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s", f"{here['peak_mb'] / 1000:.1f} GB"


def with_table(readme: str, notebooks: list[Path], measured: Mapping[str, Any]) -> str:
    """The README with a row for each notebook: titles and promises as they are, time and memory as measured."""
    known, lines = rows(readme), [HEAD, "|---|---|---|---|"]
    for path in notebooks:
        title, leave = known.get(path.stem, (heading(path), promise(path)))
        lines.append(f"| [{title}](notebooks/{path.name}) | {leave} | {' | '.join(cost(measured, path.stem))} |")
    return _HEADS.sub(lambda _: "\n".join(lines) + "\n", readme, count=1)


# --- the contents page ---


def contents(readme: str, notebooks: list[Path], measured: Mapping[str, Any]) -> str:
    """The text of notebooks/README.md: a row for each notebook, with a figure of it."""
    known = rows(readme)
    lines = [
        "# The notebooks",
        "",
        "Read them in this order, or begin anywhere: each runs on its own. A click on a figure, one of those that the",
        "notebook draws, opens the notebook with all results as they were stored. The badge opens it on Colab, where",
        "it runs without installing anything.",
        "",
        "| a figure | notebook | what you leave with | time and memory | run it |",
        "|---|---|---|---|---|",
    ]
    for path in notebooks:
        title, leave = known.get(path.stem, (heading(path), promise(path)))
        alt, _ = chosen_figure(path)
        alt = alt.translate(str.maketrans("[]|", "()/"))  # what would end the link or the cell
        picture = f"[![{alt}](thumbnails/{path.stem}.png)]({path.name})"
        badge = BADGE.format(repository=REPOSITORY, branch=BRANCH, name=path.name)
        spent = ", ".join(cost(measured, path.stem))
        lines.append(f"| {picture} | [{title}]({path.name}) | {leave} | {spent} | {badge} |")
    machine = measured.get("machine")
    if machine:
        where = f"{machine['cores']} cores of {machine['processor']}, torch {machine['torch']}"
        lines += ["", f"Time and peak memory were measured on {where}, with the models already fetched, by"]
        lines += ["`python -m helpers.pages measure`. This page is made by `python -m helpers.pages`."]
    return "\n".join(lines) + "\n"


def chosen_figure(path: Path) -> tuple[str, bytes]:
    """The figure that stands for a notebook, (alternative text, PNG). Raises ValueError if the notebook has none."""
    found = figures(path)
    if not found:
        raise ValueError(f"{path.name} has no stored figure: run it and save it first.")
    return found[min(CHOSEN.get(path.stem, 0), len(found) - 1)]


def make_pages(root: Path = ROOT) -> list[str]:
    """Write thumbnails, contents page and the README's table anew. Returns the names of the files that changed."""
    notebooks = sorted((root / "notebooks").glob("*.ipynb"))
    readme, measured = (root / "README.md").read_text(encoding="utf-8"), read_measured(root)
    made: dict[str, bytes] = {f"notebooks/thumbnails/{p.stem}.png": thumbnail(chosen_figure(p)[1]) for p in notebooks}
    made["README.md"] = with_table(readme, notebooks, measured).encode()
    made["notebooks/README.md"] = contents(readme, notebooks, measured).encode()
    (root / "notebooks/thumbnails").mkdir(exist_ok=True)
    changed = []
    for name, data in made.items():
        if not (root / name).exists() or (root / name).read_bytes() != data:
            (root / name).write_bytes(data)
            changed.append(name)
    return changed


# --- measuring ---


def read_measured(root: Path = ROOT) -> dict[str, Any]:
    """What `measure` has kept: the machine, and each notebook's seconds and peak memory in MB."""
    path = root / "notebooks/measured.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"machine": None, "notebooks": {}}


def measure(path: Path) -> dict[str, float]:
    """Run a notebook from a clean kernel: its seconds, and the most memory (MB) its process or a child had at once.

    The notebook's file stays as it is. Raises nbclient's CellExecutionError if a cell fails.
    """
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(MEASURE))
    start = time.perf_counter()
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(path.parent)}}).execute()
    kib = int(notebook.cells[-1].outputs[-1].text)
    return {"seconds": round(time.perf_counter() - start, 1), "peak_mb": round(kib * 1024 / 1e6)}


def main(words: list[str]) -> None:
    """Measure if asked to, then write the pages, and say what changed."""
    if words and words[0] != "measure":
        raise SystemExit(__doc__)
    if words:
        kept = read_measured()
        machine = environment("cpu")
        kept["machine"] = {key: machine[key] for key in ("processor", "cores", "python", "torch")}
        for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
            if len(words) == 1 or any(path.stem.startswith(word) for word in words[1:]):
                kept["notebooks"][path.stem] = measure(path)
                print(path.stem, *cost(kept, path.stem), flush=True)
        stems = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
        kept["notebooks"] = {stem: kept["notebooks"][stem] for stem in sorted(stems & kept["notebooks"].keys())}
        write_atomically(ROOT / "notebooks/measured.json", json.dumps(kept, indent=1) + "\n")
    print("changed:", ", ".join(make_pages()) or "nothing")


if __name__ == "__main__":
    main(sys.argv[1:])
