"""Does training need more and more memory? Recorded step by step: python -m helpers.leaks [FILE]."""

import ctypes
import gc
import json
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from matplotlib.figure import Figure

from helpers.benchmark import Coin
from helpers.grpo import grpo
from helpers.models import halve_frozen
from helpers.pipeline import start_model
from helpers.plots import BLUE, ORANGE, figure
from helpers.recipes import load_recipe
from helpers.rewards import Reward
from helpers.runs import environment, write_atomically
from helpers.sft import sft
from helpers.tasks import load_task

RECORD = Path(__file__).parent / "recorded" / "leaks.json"
# recipe -> (steps, how many of them come first and are left out, settings)
JOBS = {
    "pocket": (200, 20, ()),
    "smollm2-135m-cpu": (20, 4, ("threads=1", "sft.epochs=0", "grpo.questions_per_rollout=4", "grpo.buffer_size=32")),
}


class _Mallinfo(ctypes.Structure):
    _fields_ = [("fields", ctypes.c_size_t * 10)]  # 4: bytes in mapped blocks; 7: bytes in use elsewhere


def held() -> dict[str, float]:
    """What this process holds: MB "resident", MB "in_use" (asked of the C library, not freed), "tensors", "objects".

    tensors are those of Python; in_use has what no Python object owns as well, such as a library's caches. objects are
    blocks of Python's own allocator. RuntimeError where the system is not Linux with glibc 2.33 or later.
    """
    gc.collect()
    tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
        [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
    except (OSError, AttributeError):
        raise RuntimeError("What a process holds is read from Linux and glibc 2.33 or later, not found here.") from None
    mallinfo.restype = _Mallinfo
    fields = mallinfo().fields
    return {"resident": round(int(line.split()[1]) / 2**10, 1), "in_use": round((fields[4] + fields[7]) / 2**20, 1),
            "tensors": tensors, "objects": sys.getallocatedblocks()}  # fmt: skip


def growth(values: Sequence[float], first: int) -> float:
    """How much higher the last fifth's median is than that of the first fifth after `first` values, as a share."""
    part = (len(values) - first) // 5
    if part < 1:
        raise ValueError(f"To see a growth takes 5 steps or more after the first {first}, not {len(values) - first}.")
    return median(values[-part:]) / median(values[first : first + part]) - 1


def watch(name: str, steps: int, settings: Sequence[str] = (), progress: bool = False) -> list[dict[str, float]]:
    """Train with a recipe, warm-up included, and return `held` behind each step of the loop, and its "grad_norm".

    Without a warm-up (sft.epochs=0) the reward is `benchmark.Coin`: there are no right answers to learn from yet, and
    a step without a gradient would prove nothing.
    """
    recipe = load_recipe(name, [*settings, f"grpo.steps={steps}"])
    model, tokenizer = start_model(recipe)
    if recipe.lora and recipe.mixed_precision == "bf16":
        halve_frozen(model, torch.bfloat16)
    accelerator = Accelerator(mixed_precision=recipe.mixed_precision, cpu=True)
    traces = load_task(recipe.task, "train", recipe.sft.traces, recipe.seed, recipe.balanced)
    task = load_task(recipe.task, "train", recipe.train_size, recipe.seed + 1000, recipe.balanced)
    sft(model, tokenizer, traces, recipe.sft, accelerator=accelerator, seed=recipe.seed, progress=progress)
    rows: list[dict[str, float]] = []
    reward = Reward(task, recipe.reward) if recipe.sft.epochs else Coin()
    dtype = getattr(torch, recipe.sampler_dtype) if recipe.sampler_dtype else None
    grpo(model, tokenizer, task, recipe.grpo, reward=reward, accelerator=accelerator, sampler_dtype=dtype,
         seed=recipe.seed, progress=progress,
         on_step=lambda step: rows.append({**held(), "grad_norm": step["grad_norm"]}))  # fmt: skip
    return rows


def chart(kept: Mapping[str, Any]) -> Figure:
    """MB behind each step of recorded runs, resident and in use. kept: what `main` writes, with two runs."""
    fig, axes = figure(8.0, 2.8, columns=2)
    for ax, run in zip(axes, kept["runs"], strict=True):
        for key, color in (("resident", BLUE), ("in_use", ORANGE)):
            label = f"{key.replace('_', ' ')}, {100 * growth(run[key], run['first']):+.1f} %"
            ax.plot(range(1, run["steps"] + 1), run[key], color=color, label=label)
        ax.set(title=run["recipe"], xlabel="step", ylabel="MB", ylim=(0, None))
        ax.legend(frameon=False, title=f"after the first {run['first']} steps")
    return fig


def main(path: Path = RECORD) -> None:
    """Record all of JOBS, each in a process of its own, in a JSON file, with a figure of the same name beside it."""
    kept: dict[str, Any] = {"environment": environment("cpu"), "runs": []}
    for name, (steps, first, settings) in JOBS.items():
        with get_context("spawn").Pool(1) as pool:
            rows = pool.apply(watch, (name, steps, settings, True))
        run = {"recipe": name, "seed": load_recipe(name, settings).seed, "settings": list(settings), "steps": steps,
               "first": first, **{key: [row[key] for row in rows] for key in rows[0]}}  # fmt: skip
        kept["runs"].append(run)
        print(f"{name}: {run['resident'][0]:.0f} MB resident behind step 1, {run['resident'][-1]:.0f} behind {steps}; "
              f"after the first {first} {100 * growth(run['resident'], first):+.1f} %")  # fmt: skip
    write_atomically(path, json.dumps(kept) + "\n")
    chart(kept).savefig(path.with_suffix(".png"))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
