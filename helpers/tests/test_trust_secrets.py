"""A key is nowhere but in the environment, files are safetensors and text, and nothing that is read can run code."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import helpers
from helpers.models import sha256
from helpers.recipes import load_recipe
from helpers.runs import Run
from helpers.tests.test_pipeline import TINY
from helpers.tests.test_runs import new_model, trained

PACKAGE = Path(helpers.__file__).parent
ROOT = PACKAGE.parent
KEY = "sk-planted-0123456789abcdef"
# What keys and tokens look like: OpenAI's, the model hub's, GitHub's, a cloud's, a private key's first line.
SECRETS = re.compile(
    rb"sk-[A-Za-z0-9_-]{20,}|hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|AKIA[A-Z0-9]{16}"
    rb"|-----BEGIN [A-Z ]*PRIVATE KEY"
)


def files_of_the_project() -> list[Path]:
    """All files of the project, as git lists them where it can, else those of its own folders."""
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True
    )
    if listed.returncode == 0:
        return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    return [path for folder in (PACKAGE, ROOT / "notebooks") for path in folder.rglob("*") if path.is_file()]


def test_a_planted_key_is_in_nothing_that_commands_write_or_say(tmp_path):
    """Training, evaluating, chatting, traces by the teacher, an API that is not there, and a wrong recipe."""
    environment = os.environ | {"OPENAI_API_KEY": KEY, "HF_TOKEN": KEY[3:], "OPENAI_BASE_URL": "http://127.0.0.1:9/v1"}
    small = [*TINY, "sft.epochs=1", "grpo.steps=1", "evaluation.size=3"]
    script = f"""
import sys
from helpers.__main__ import main
print(main(["train", "pocket", "--set", *{small!r}, "--out", "run"]))
print(main(["evaluate", "run", "--size", "3", "--max-new-tokens", "3"]))
print(main(["results", "run"]))
print(main(["datagen", "letter_counting", "--size", "3", "--out", "traces.jsonl"]))
api = ["--api-model", "m", "--max-retries", "0"]
print(main(["datagen", "letter_counting", "--size", "6", "--out", "api.jsonl", *api]))
print(main(["train", "poket"]))
from helpers.sft import sft
sft(None, None, None, None)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert re.findall(r"^\d$", done.stdout, re.MULTILINE) == list("000022"), done.stderr
    assert "Traceback" in done.stderr  # the last call's, with all that an exception shows
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    names = {path.name for path in written}
    assert {"config.yaml", "metrics.jsonl", "samples.jsonl", "traces.jsonl", "model.safetensors"} <= names
    for what in (done.stdout.encode(), done.stderr.encode(), *written.values()):
        assert KEY[3:].encode() not in what
    # The key was there to be leaked.
    assert subprocess.run(["env"], env=environment, capture_output=True, text=True).stdout.count(KEY[3:]) == 2
    for path, content in written.items():
        assert path.suffix in (".safetensors", ".json", ".jsonl", ".yaml"), path
        assert not content.startswith((b"\x80", b"PK"))  # a pickle, torch's zip archive of pickles


def test_no_file_of_the_project_holds_a_key():
    files = files_of_the_project()
    assert sum(path.suffix == ".ipynb" for path in files) >= 5 and len(files) > 60
    for path in files:
        found = SECRETS.search(path.read_bytes().replace(KEY.encode(), b""))
        assert found is None, path
    assert SECRETS.search(b"x = 'sk-" + b"a1" * 24 + b"'")  # it would be found


def test_the_environment_alone_is_asked_for_a_key():
    """No function or setting takes a key: only what is read from the environment is handed to the API's own client."""
    given = []
    for source in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.arg | ast.keyword):
                name = node.arg or ""
            elif isinstance(node, ast.AnnAssign):  # a setting
                name = ast.unparse(node.target)
            else:
                continue
            if re.search("api_?key|access_?token|secret|password|credential", name, re.IGNORECASE):
                given.append((source.name, type(node).__name__, name))
    assert sorted(given) == [("completions.py", "keyword", "api_key"), ("datagen.py", "keyword", "api_key")]
    assert "key" not in "".join(path.read_text() for path in (PACKAGE / "recipes").glob("*.yaml")).lower()


def test_nothing_is_unpickled_or_run():
    """No call or import in the package, the notebooks or their setup cells that reads a pickle or runs a text."""
    sources = {path: path.read_text(encoding="utf-8") for path in PACKAGE.glob("*.py")}
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = "".join("".join(cell["source"]) + "\n" for cell in cells if cell["cell_type"] == "code")
        sources[path] = re.sub(r"^(\s*)[!%].*$", r"\1pass", code, flags=re.MULTILINE)
    assert len(sources) > 25
    for path, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = {alias.name for alias in node.names} | {getattr(node, "module", "") or ""}
                assert not modules & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("torch.load", "torch.save", "eval", "exec", "yaml.load", "os.system"), (
                    path,
                    called,
                )
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given.get("trust_remote_code", "False") == "False" and given.get("shell", "False") == "False", (
                    path
                )
                assert given.get("allow_pickle", "False") == "False", path


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_pickle_in_a_checkpoint_s_place_is_not_read(tmp_path, name):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    run = Run.start(tmp_path / "run", load_recipe("pocket"), "cpu")
    trained(run, "sft", [1])
    file = run.folder / "checkpoints" / "sft-000001" / name
    torch.save({"a": Trap()}, file)
    assert run.resume("sft", *new_model(), say=str) == 0
    state = file.parent / "state.json"  # even if its checksum has been put right
    about = json.loads(state.read_text())
    state.write_text(json.dumps(about | {"sha256": about["sha256"] | {name: sha256(file)}}))
    with pytest.raises(Exception, match="[Hh]eader"):
        run.resume("sft", *new_model(), say=str)
    assert not (tmp_path / "sprung").exists()
