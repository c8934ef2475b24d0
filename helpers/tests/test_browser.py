"""The notebooks in a reader's hands: a real browser, JupyterLab, mouse and keyboard.

Three notebooks by default, since every one is run cell by cell elsewhere; RLVR_BROWSER="00 01 02" opens those.
Screenshots in a light and a dark theme are left in runs/browser.
"""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import nbformat
import pytest
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SCREENSHOTS = ROOT / "runs/browser"
OPENED_HERE = os.environ.get("RLVR_BROWSER", "00 02 06").split()
WITH_SLIDERS = ("02", "06")
MINUTES = 60_000  # milliseconds

OPENED = """name => {
  const panel = window.jupyterapp?.shell.currentWidget;
  const kernel = panel?.sessionContext?.session?.kernel;
  return panel?.context?.path === name && panel.context.isReady && kernel?.status === 'idle';
}"""
# The cells that have run and all cells, and the errors they left.
STATE = """() => {
  const cells = window.jupyterapp.shell.currentWidget.content.widgets.filter(cell => cell.model.type === 'code');
  const outputs = cells.flatMap(cell => cell.model.outputs.toJSON());
  return {
    ran: cells.filter(cell => cell.model.executionCount !== null).length, all: cells.length,
    errors: outputs.filter(output => output.output_type === 'error').map(error => `${error.ename}: ${error.evalue}`),
    texts: outputs.filter(output => output.output_type === 'stream').map(output => output.text).flat().join(''),
  };
}"""
FINISHED = f"() => {{ const s = ({STATE})(); return s.errors.length > 0 || s.ran === s.all; }}"
# The picture that follows a slider, as a digest of what the browser shows.
PICTURE = """async handle => {
  let box = handle;
  while (!box.querySelector('img.widget-image')) box = box.parentElement;
  const bytes = await (await fetch(box.querySelector('img.widget-image').src)).arrayBuffer();
  const digest = await crypto.subtle.digest('SHA-256', bytes);
  return [...new Uint8Array(digest)].map(byte => byte.toString(16)).join('');
}"""


@contextmanager
def chromium():
    """A page of the Chromium that is installed here. Without one the test is skipped, and on CI it fails."""
    names = ("chromium", "chromium-browser", "google-chrome")
    program = os.environ.get("RLVR_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if program is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("No Chromium here; RLVR_CHROMIUM can say where one is.")
    with sync_playwright() as playwright:
        # A container's root has no sandbox to give, and its /dev/shm is small.
        options = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=program, args=options)
        page = browser.new_page(viewport={"width": 1280, "height": 1600})
        page.set_default_timeout(2 * MINUTES)
        yield page
        browser.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab on this machine alone, behind a token, over copies without outputs: (page, url)."""
    home = tmp_path_factory.mktemp("lab")
    # All of the folder: a notebook may read what lies beside it.
    shutil.copytree(ROOT / "notebooks", home / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints", "runs"))
    (home / "helpers").symlink_to(ROOT / "helpers")
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, home / "notebooks" / path.name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    places = {f"JUPYTER_{kind}_DIR": str(home / kind.lower()) for kind in ("CONFIG", "RUNTIME", "DATA")}
    with open(home / "log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser",
             "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0",
             f"--ServerApp.root_dir={home}", f"--IdentityProvider.token={token}", "--LabApp.news_url=None",
             "--LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate"],
            # One thread for the kernels: two would wait for each other while the browser draws.
            env={**os.environ, **places, "IPYTHONDIR": str(home / "ipython"), "OMP_NUM_THREADS": "1"},
            stdout=log, stderr=log,
        )  # fmt: skip
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(240):
            assert server.poll() is None, (home / "log").read_text()[-2000:]
            try:
                urlopen(f"{address}/api", timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        with chromium() as page:
            page.goto(f"{address}/lab?token={token}")  # the browser keeps it as a cookie
            page.wait_for_function("() => window.jupyterapp?.started")
            yield page, address
    finally:
        server.terminate()
        server.wait(60)


def open_and_run(lab, path: Path) -> dict:
    """Open a notebook and run all of it by the keyboard alone; its state when it has ended."""
    page, address = lab
    page.goto(f"{address}/lab/tree/notebooks/{path.name}?reset")
    page.wait_for_function(OPENED, arg=f"notebooks/{path.name}")
    page.keyboard.press("Control+Shift+C")  # the palette of commands
    palette = page.locator(".jp-ModalCommandPalette")
    palette.locator("input").wait_for()
    page.keyboard.type("Run All Cells")
    palette.locator(".lm-CommandPalette-item.lm-mod-active[data-command='notebook:run-all-cells']").wait_for()
    page.keyboard.press("Enter")
    page.wait_for_function(FINISHED, timeout=10 * MINUTES, polling=1000)
    return page.evaluate(STATE)


def close(page: Page) -> None:
    """End the notebook's kernel, so that the next one has the machine for itself."""
    page.evaluate("async () => { await window.jupyterapp.shell.currentWidget.sessionContext.shutdown(); }")


def move_and_look(page: Page, place: int) -> tuple[bool, bool]:
    """Drag a slider to its far end, then step back with an arrow key: whether the picture and the number followed."""
    handle = page.locator(".jupyter-widgets .noUi-handle").nth(place)
    handle.scroll_into_view_if_needed()
    start = handle.evaluate(PICTURE)
    low, high, now = (float(handle.get_attribute(f"aria-value{end}")) for end in ("min", "max", "now"))
    right = now - low < high - now
    rail = handle.locator("xpath=ancestor::*[contains(@class, 'noUi-target')]")
    box = None
    while box != rail.bounding_box():  # cells above that are drawn late push it down
        box = rail.bounding_box()
        page.wait_for_timeout(500)
    handle.hover()
    page.mouse.down()
    page.mouse.move(box["x"] + (box["width"] - 1 if right else 1), box["y"] + box["height"] / 2, steps=2)
    page.mouse.up()
    redrawn = changes(page, lambda: handle.evaluate(PICTURE), start)
    readout = handle.locator("xpath=ancestor::*[contains(@class, 'widget-slider')]").locator(".widget-readout")
    there = readout.inner_text()  # not aria-valuenow, which has one decimal
    handle.focus()
    page.keyboard.press("ArrowLeft" if right else "ArrowRight")
    return redrawn, changes(page, readout.inner_text, there)


def changes(page: Page, look, before, seconds: int = 60) -> bool:
    """Whether something looks other than before within that time."""
    for _ in range(4 * seconds):
        if look() != before:
            return True
        page.wait_for_timeout(250)
    return False


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_reader_opens_a_notebook_runs_it_all_and_moves_its_sliders(lab, path):
    if path.name[:2] not in OPENED_HERE:
        pytest.skip(f'set RLVR_BROWSER="{path.name[:2]}"')
    page, _ = lab
    state = open_and_run(lab, path)
    assert state["errors"] == [] and state["ran"] == state["all"] > 5
    sliders = page.locator(".jupyter-widgets .noUi-handle").count()
    assert sliders or path.name[:2] not in WITH_SLIDERS
    stuck = {place: moved for place in range(sliders) if not all(moved := move_and_look(page, place))}
    assert stuck == {}, "sliders by their place: (picture changed after a drag, number changed after an arrow key)"
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    grounds = []
    for theme in ("Light", "Dark"):
        page.evaluate(f"window.jupyterapp.commands.execute('apputils:change-theme', {{theme: 'JupyterLab {theme}'}})")
        page.locator(f"body[data-jp-theme-light='{str(theme == 'Light').lower()}']").wait_for(state="attached")
        page.wait_for_timeout(500)
        page.screenshot(path=SCREENSHOTS / f"{path.stem}-{theme.lower()}.png")
        grounds.append(page.locator(".jp-Notebook").evaluate("cells => getComputedStyle(cells).backgroundColor"))
    assert grounds[0] != grounds[1]
    close(page)
