"""The environment check: each finding says what it means, and the verdicts follow from the findings."""

from importlib.metadata import PackageNotFoundError

import pytest

from helpers import checkup as c
from helpers.checkup import Finding, check_packages, check_weights, checkup, fastest, verdict

FINE = [Finding("Python", "3.11.7", "tested"), check_weights(cached=True)]


@pytest.mark.parametrize(
    ("version", "meaning", "stops"),
    [("3.11.7", "tested", ""), ("3.14.0", "should work", ""), ("3.9.18", "too old", "all"), ("2.7", "too old", "all")],
)
def test_python_is_tested_new_or_too_old(version, meaning, stops):
    finding = c.check_python(version)
    assert finding.meaning.startswith(meaning) and finding.stops == stops


def packages(tmp_path, **installed: str) -> Finding:
    """The finding for two pins, a comment and a local folder, when these packages are installed."""
    pins = tmp_path / "requirements.txt"
    pins.write_text("# exact versions\ntorch==2.13.0\nnumpy==2.4.6\n-e .\n")

    def version(name: str) -> str:
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    return check_packages(pins, version)


def test_the_pinned_versions_are_the_tested_set_however_torch_was_built(tmp_path):
    finding = packages(tmp_path, torch="2.13.0+cpu", numpy="2.4.6")
    assert finding.here.startswith("all 2 ") and finding.meaning == "tested" and not finding.stops


def test_a_missing_tool_of_the_tests_is_said_and_stops_nothing(tmp_path):
    pins = tmp_path / "requirements.txt"
    pins.write_text("torch==2.13.0\njupyterlab==4.6.6\n# for the tests\nruff==0.17.6\n")

    def installed(name: str) -> str:
        if name != "torch":
            raise PackageNotFoundError(name)
        return "2.13.0"

    finding = check_packages(pins, installed)
    assert finding.here == "missing, needed by tests alone: jupyterlab, ruff" and not finding.stops


def test_another_version_is_named_beside_the_tested_one_and_stops_nothing(tmp_path):
    finding = packages(tmp_path, torch="2.12.1", numpy="2.4.6")
    assert finding.here == "torch 2.12.1 (tested: 2.13.0)" and not finding.stops


def test_a_missing_package_stops_everything_and_the_command_is_given(tmp_path):
    finding = packages(tmp_path, numpy="2.4.6")
    assert "torch" in finding.here and "numpy" not in finding.here
    assert "pip install -r requirements.txt" in finding.meaning and finding.stops == "all"


def test_little_memory_stops_only_what_loads_the_big_model():
    assert c.check_memory(2.0).stops == "smollm2"
    assert c.check_memory(8.0) == Finding("memory", "8 GB", "enough")


def test_bfloat16_is_called_faster_only_where_it_is():
    assert "7.0 times as fast" in c.check_bfloat16(7.0).here
    assert "no faster" in c.check_bfloat16(0.05).here


def test_weights_on_disk_ask_no_hub():
    def hub() -> bool:
        raise AssertionError("the hub was asked")

    assert check_weights(True, hub).meaning == "no download"


@pytest.mark.parametrize(("hub", "size"), [(True, "270 MB"), (False, "100 MB")])
def test_weights_not_on_disk_name_the_size_of_the_download(hub, size):
    assert size in check_weights(False, lambda: hub).meaning


@pytest.mark.parametrize(("step", "minutes"), [(0.1, 3), (0.105, 3), (0.2, 6), (0.001, 2)])
def test_a_verdict_scales_the_minutes_but_never_below_half(step, minutes):
    assert verdict(3, 2.5, True, FINE, step) == f"yes, {minutes} min"


def test_a_verdict_says_no_with_the_reason_where_something_stops_the_notebook():
    small, old = c.check_memory(2.0), c.check_python("3.9.1")
    assert verdict(3, 2.5, True, [*FINE, small], 0.1).startswith("no: memory, too little")
    assert verdict(3, 1.0, False, [*FINE, small], 0.1) == "yes, 3 min"
    assert verdict(1, 5.0, True, [*FINE, c.check_memory(4.0)], 0.1) == "no: it needs 5.0 GB of memory"
    assert verdict(1, 4.0, True, [*FINE, c.check_memory(4.0)], 0.1) == "yes, 1 min"
    assert verdict(3, 1.0, False, [old], 0.1) == "no: Python, too old: install Python 3.11"


def test_a_download_is_announced_only_where_the_weights_are_used():
    findings = [check_weights(False, lambda: True)]
    assert verdict(2, 2.5, True, findings, 0.1) == "yes, 2 min and a download"
    assert verdict(2, 1.0, False, findings, 0.1) == "yes, 2 min"


def test_the_first_of_the_timed_runs_does_not_count():
    calls = []
    assert fastest(lambda: calls.append(0)) >= 0 and len(calls) == 6


def test_the_whole_check_runs_here_and_every_line_is_filled(monkeypatch):
    monkeypatch.setattr(c, "intact", lambda folder: True)  # no network, no checksums of large files
    findings = checkup()
    assert [f.what for f in findings] == [
        "Python", "packages", "processor", "memory", "GPU", "bfloat16", "SmolLM2-135M",
    ]  # fmt: skip
    assert all(f.here and f.meaning for f in findings)
    assert not any("|" in text for f in findings for text in f), "a bar would break the table's columns"
    assert not any(f.stops == "all" for f in findings)
