"""How pages look: every notebook under axe-core in a light and a dark theme, figures, tables, thumbnails."""

import io
import json
import re
from base64 import b64encode
from pathlib import Path

import nbformat
import pytest
from axe_playwright_python.sync_playwright import Axe
from nbconvert import HTMLExporter
from PIL import Image

from helpers import pages
from helpers.plots import figure, png_bytes
from helpers.tests.test_browser import chromium

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAGES = [ROOT / "README.md", ROOT / "notebooks/README.md", ROOT / "helpers/recorded/README.md"]
# The page itself is Jupyter's: the colours of code and of prompts, and links without a line under them.
JUPYTERS_OWN = [[".highlight"], [".jp-InputPrompt"], [".jp-OutputPrompt"]]
RULES = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"],
         "rules": {"link-in-text-block": {"enabled": False}}}  # fmt: skip
# As nbconvert makes it, except that its own template leaves a figure's alternative text out.
TEMPLATE = """{% extends 'lab/index.html.j2' %}
{% block data_png scoped %}
<div class="jp-RenderedImage jp-OutputArea-output" tabindex="0">
<img src="data:image/png;base64,{{ output.data['image/png'] }}"
alt="{{ output | get_metadata('alt', 'image/png') | escape_html }}">
</div>
{% endblock %}"""


@pytest.fixture(scope="module")
def page():
    """A browser's page that can reach nothing but this machine's files."""
    with chromium() as page:
        page.route(re.compile(r"^https?://"), lambda route: route.abort())
        yield page


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_axe_finds_nothing_in_a_notebook(path, theme, page, tmp_path):
    exporter = HTMLExporter(theme=theme)
    exporter.raw_template = TEMPLATE
    html, _ = exporter.from_filename(str(path))
    (tmp_path / "page.html").write_text(html, encoding="utf-8")
    page.goto((tmp_path / "page.html").as_uri(), wait_until="domcontentloaded")
    assert page.locator("img").count() >= len(pages.figures(path)) > 0
    assert page.get_by_alt_text("No description").count() == 0, "what nbconvert says of a figure without a text"
    found = Axe().run(page, context={"exclude": JUPYTERS_OWN}, options=RULES).response
    told = [(v["id"], node["target"], node["html"][:200]) for v in found["violations"] for node in v["nodes"][:3]]
    assert told == []
    used = {check["id"] for check in found["passes"]}
    assert {"image-alt", "heading-order", "color-contrast", "page-has-heading-one"} <= used, "nothing was looked at"


def test_axe_finds_what_is_wrong(page):
    page.set_content("<html lang=en><title>t</title><h1>One</h1><h3>Three</h3><img src=x><p style='color:#ccc'>pale")
    found = Axe().run(page, options=RULES).response["violations"]
    assert {"heading-order", "image-alt", "color-contrast"} <= {violation["id"] for violation in found}


# --- figures ---


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_figures_have_a_light_opaque_ground_that_reads_on_a_dark_page_too(path):
    found = pages.figures(path)
    assert found
    for alt, png in found:
        image = Image.open(io.BytesIO(png))
        assert image.convert("RGBA").getextrema()[3] == (255, 255), f"see-through: {alt}"
        corners = [image.convert("RGB").getpixel((x, y)) for x in (0, image.width - 1) for y in (0, image.height - 1)]
        assert corners == [(255, 255, 255)] * 4, alt
        assert 2 <= image.width / 110 <= 11.1, f"wider than a page: {alt}"
        assert len(alt) > 20 and alt.strip()[-1] in ".!?", f"an alternative text is a sentence: {alt!r}"


# --- tables and folded solutions, as GitHub reads them ---


def tables(text: str) -> list[tuple[str, list[str]]]:
    """The tables of a Markdown text: (the line before it, its lines). What stands in fenced code is no table."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines, found = ["", *text.splitlines()], []
    for before, line in zip(lines, lines[1:], strict=False):
        if line.lstrip().startswith("|"):
            if before.lstrip().startswith("|") and found:
                found[-1][1].append(line)
            else:
                found.append((before, [line]))
    return found


def cells(row: str) -> list[str]:
    return re.split(r"(?<!\\)\|", row.strip().strip("|"))


def faults(text: str) -> list[str]:
    """What in a Markdown text GitHub would not draw as a table, or not fold."""
    wrong = []
    for before, rows in tables(text):
        if before.strip():
            wrong.append(f"a table needs an empty line before it: {rows[0]}")
        if len(rows) < 3 or not all(re.fullmatch(r" *:?-+:? *", cell) for cell in cells(rows[1])):
            wrong.append(f"a table needs a line of dashes and a row: {rows[0]}")
        if not all(cell.strip() for cell in cells(rows[0])):
            wrong.append(f"a column needs a name: {rows[0]}")
        wrong += [f"too many or too few cells: {row}" for row in rows if len(cells(row)) != len(cells(rows[0]))]
    for folded in re.findall(r"<details>.*?(?:</details>|\Z)", text, re.DOTALL):
        if not re.match(r"<details>\s*<summary>[^\n]+</summary>\n\n.*\n\n</details>", folded, re.DOTALL):
            wrong.append(f"a folded part needs a summary and empty lines around what it hides: {folded[:80]}")
    return wrong


@pytest.mark.parametrize("path", [*NOTEBOOKS, *PAGES], ids=lambda path: "-".join(path.relative_to(ROOT).parts))
def test_github_can_draw_every_table_and_fold_every_solution(path):
    texts = [path.read_text(encoding="utf-8")]
    if path.suffix == ".ipynb":
        texts = [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown"]
    assert [fault for text in texts for fault in faults(text)] == []
    if path.suffix == ".md":
        assert tables(texts[0])


@pytest.mark.parametrize(
    "text",
    [
        "words\n| a | b |\n|---|---|\n| 1 | 2 |",
        "| a | b |\n| 1 | 2 |",
        "| a | b |\n|---|---|\n| 1 | 2 | 3 |",
        "| a | |\n|---|---|\n| 1 | 2 |",
        "<details><summary>Solution</summary>\ntext\n</details>",
        "<details><summary>Solution</summary>\n\ntext",
    ],
)
def test_what_github_would_not_draw_is_found(text):
    assert len(faults(text)) == 1
    assert faults("x\n\n| a | `b\\|c` |\n|---|--:|\n| 1 | 2 |\n\n```\n| 1\n```") == []


# --- the contents page and the README's table ---


def test_every_notebook_has_a_small_thumbnail_and_no_other_lies_there():
    folder = ROOT / "notebooks/thumbnails"
    assert {path.stem for path in folder.iterdir()} == {path.stem for path in NOTEBOOKS}
    for path in folder.iterdir():
        image = Image.open(path)
        assert path.stat().st_size <= pages.LARGEST and max(image.size) <= 240 and min(image.size) >= 50, path.name


def test_pages_are_what_the_script_makes_of_the_notebooks():
    readme, measured = (ROOT / "README.md").read_text(encoding="utf-8"), pages.read_measured()
    again = "run `python -m helpers.pages`"
    assert pages.with_table(readme, NOTEBOOKS, measured) == readme, again
    assert pages.contents(readme, NOTEBOOKS, measured) == (ROOT / "notebooks/README.md").read_text("utf-8"), again
    assert pages.rows(readme).keys() == {path.stem for path in NOTEBOOKS}
    unmeasured = [path.stem for path in NOTEBOOKS if "?" in pages.cost(measured, path.stem)]
    assert unmeasured == [], "run `python -m helpers.pages measure` with these names"


def small_project(folder: Path) -> Path:
    """A README with a table of two notebooks, one of which is gone, and a new one beside the other."""
    (folder / "notebooks").mkdir()
    fig, ax = figure(6.0, 3.0)
    ax.plot([0, 1])
    picture = nbformat.v4.new_output("display_data", {"image/png": b64encode(png_bytes(fig)).decode()})
    picture.metadata["image/png"] = {"alt": "A line [rising] | up."}
    for number, title in (("01", "Bees: what they do"), ("02", "Ants")):
        text = f"# {number}  {title}\n\n**What you will learn.** How\nthey work. And rest."
        made = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_markdown_cell(text), nbformat.v4.new_code_cell("1", outputs=[picture])]
        )
        nbformat.write(made, folder / f"notebooks/{number}_it.ipynb")
    table = [pages.HEAD, "|---|---|---|---|", "| [01 All bees](notebooks/01_it.ipynb) | honey | 9 min | much |",
             "| [09 X](notebooks/09_x.ipynb) | x | 1 min | little |"]  # fmt: skip
    (folder / "README.md").write_text("\n".join(["# P", "", *table, "", "after", ""]))
    kept = {"machine": {"processor": "P", "cores": 2, "python": "3", "torch": "2"},
            "notebooks": {"01_it": {"seconds": 90.0, "peak_mb": 1234}}}  # fmt: skip
    (folder / "notebooks/measured.json").write_text(json.dumps(kept))
    return folder


def test_pages_keep_what_was_written_and_fill_in_what_was_measured(tmp_path):
    root = small_project(tmp_path)
    changed = pages.make_pages(root)
    assert changed == ["notebooks/thumbnails/01_it.png", "notebooks/thumbnails/02_it.png", "README.md",
                       "notebooks/README.md"]  # fmt: skip
    readme, contents = (root / "README.md").read_text(), (root / "notebooks/README.md").read_text()
    assert "| [01 All bees](notebooks/01_it.ipynb) | honey | 1.5 min | 1.2 GB |\n" in readme
    assert "| [02 Ants](notebooks/02_it.ipynb) | How they work. | ? | ? |\n\nafter\n" in readme and "09" not in readme
    assert "| [![A line (rising) / up.](thumbnails/01_it.png)](01_it.ipynb) | [01 All bees](01_it.ipynb) |" in contents
    assert "2 cores of P" in contents and faults(readme) == faults(contents) == []
    assert pages.make_pages(root) == []


def test_measuring_runs_the_notebook_and_leaves_its_file_alone(tmp_path):
    path = tmp_path / "short.ipynb"
    hungry = "import time; time.sleep(1); block = bytearray(b'x') * 300_000_000"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(hungry)]), path)
    before, large = path.read_bytes(), bytearray(b"x") * 1_000_000_000  # what this process holds must not count
    found = pages.measure(path)
    assert len(large) > 900 * 2**20
    assert 1 < found["seconds"] < 120 and 300 < found["peak_mb"] < 900 and path.read_bytes() == before


def test_a_readme_without_the_table_and_a_notebook_without_a_figure_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has no table of the notebooks"):
        pages.rows("# Nothing\n")
    nbformat.write(nbformat.v4.new_notebook(), tmp_path / "bare.ipynb")
    with pytest.raises(ValueError, match="bare.ipynb has no stored figure"):
        pages.chosen_figure(tmp_path / "bare.ipynb")


def test_a_thumbnail_of_a_busy_figure_is_small_enough():
    fig, ax = figure(8.0, 5.0)
    ax.imshow([[(i * j) % 97 for i in range(200)] for j in range(100)], cmap="hsv")
    small = pages.thumbnail(png_bytes(fig))
    assert len(small) <= pages.LARGEST and max(Image.open(io.BytesIO(small)).size) == 240
