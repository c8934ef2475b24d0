"""The memory that a recipe takes on this machine, measured in processes of its own, beside what `sizing` says."""

import argparse
import ctypes
import gc
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from helpers.benchmark import Coin, Sized, peak
from helpers.decoder import sampling_copy
from helpers.grpo import collect, grpo
from helpers.models import add_lora, halve_frozen, load_model
from helpers.recipes import Recipe, build, load_recipe
from helpers.rollout import encode_prompt
from helpers.runs import environment, write_atomically
from helpers.sizing import estimate
from helpers.tasks import load_task

PHASES = ("load", "rollout", "step")
_SMALL = ("questions_per_rollout=2", "group_size=4", "buffer_size=8", "minibatch_size=8", "max_new_tokens=32")
_LARGE = ("questions_per_rollout=4", "group_size=4", "buffer_size=16", "minibatch_size=16", "max_new_tokens=96")
CASES = {  # settings laid over smollm2-135m-cpu
    "8 x 32 tokens": _SMALL,
    "16 x 96 tokens": _LARGE,
    "16 x 96 tokens, checkpointing": (*_LARGE, "gradient_checkpointing=true"),
    "16 x 96 tokens, float32": _LARGE,
}


def case(name: str) -> Recipe:
    """A recipe of `CASES`: one update from one rollout."""
    recipe = load_recipe(
        "smollm2-135m-cpu", [f"grpo.{s}" for s in (*CASES[name], "gradient_accumulation=1", "steps=1")]
    )
    return replace(recipe, mixed_precision="no", sampler_dtype="float32") if "float32" in name else recipe


def forget_peak() -> int:
    """Begin to look for the peak anew, on Linux. Returns the bytes held now."""
    gc.collect()
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")
    return peak()


def give_back_at_once() -> None:
    """Have glibc return freed memory to the system, so that the peak is what is in use; nothing on other systems."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if platform.system() == "Linux" else None
    if mallopt:
        for setting in (-1, -3):  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD, see mallopt(3)
            mallopt(setting, 65536)


def measure(recipe: Recipe, phase: str, keep: bool = False) -> dict[str, int]:
    """Run a phase here: loading the model, one rollout, or a whole step. Every response gets all of its tokens.

    keep: freed memory stays with the process, as it otherwise does in this package (see `keep_freed_memory`).
    Returns "bytes": the peak above what the process held before, with all code loaded and used once; and
    "prompt_length", the mean number of tokens. To be called once a process.
    """
    torch.set_num_threads(1)
    if not keep:
        give_back_at_once()
    first = load_recipe("pocket", ["grpo.steps=1", "grpo.questions_per_rollout=4", "grpo.buffer_size=24"])
    same = {key: getattr(recipe, key) for key in ("lora", "mixed_precision", "sampler_dtype")}
    _run(replace(first, **same), "step", lambda: None)
    before = forget_peak()
    length = _run(recipe, phase, forget_peak)
    return {"bytes": peak() - before, "prompt_length": length}


def _run(recipe: Recipe, phase: str, loaded: Callable[[], Any]) -> int:
    model, tokenizer = load_model(recipe.model, device="cpu", dtype=getattr(torch, recipe.dtype))
    task = load_task(recipe.task, "train", recipe.grpo.questions_per_rollout)
    lengths = [len(encode_prompt(tokenizer, example.question)) for example in task]
    if phase == "load":
        return round(sum(lengths) / len(lengths))
    model.generation_config.eos_token_id, tokenizer = None, Sized(tokenizer, 0)  # no token is the end
    half = recipe.mixed_precision == "bf16"
    policy = add_lora(model, recipe.lora.r, recipe.lora.alpha)
    if half:
        halve_frozen(policy, torch.bfloat16)
    loaded()  # from here on
    sampler_dtype = getattr(torch, recipe.sampler_dtype) if recipe.sampler_dtype else None
    if phase == "rollout":
        collect(sampling_copy(policy, sampler_dtype), tokenizer, task, Coin(), recipe.grpo)
    else:
        grpo(policy, tokenizer, task, recipe.grpo, reward=Coin(), sampler_dtype=sampler_dtype, progress=False,
             accelerator=Accelerator(mixed_precision=recipe.mixed_precision, cpu=True))  # fmt: skip
    return round(sum(lengths) / len(lengths))


def expected(recipe: Recipe, phase: str, prompt_length: int) -> int:
    """What the estimate says about a phase, in bytes."""
    e = estimate(recipe, prompt_length=prompt_length)
    if phase == "step":
        return e.total
    if phase == "rollout":
        held = ("frozen weights", "trained weights", "the sampler's copy")
        return sum(e.always[name] for name in held) + sum(e.rollout.values())
    return e.loading


def check(file: Path, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure every case in fresh processes, compare it with the estimate and keep both in a JSON file.

    A row has "estimate" and "measured" in bytes, and "kept", a step's peak when freed memory stays with the process.
    """

    def ask(name: str, phase: str, *more: str) -> dict[str, int]:
        command = [sys.executable, "-m", "helpers.memory", phase, json.dumps(asdict(case(name))), *more]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    rows = []
    for name, phase in [(next(iter(CASES)), "load"), *((name, phase) for name in CASES for phase in PHASES[1:])]:
        answer = ask(name, phase)
        row = {"case": name, "phase": phase, "prompt_length": answer["prompt_length"],
               "estimate": expected(case(name), phase, answer["prompt_length"]), "measured": answer["bytes"],
               "kept": ask(name, phase, "keep")["bytes"] if phase == "step" else None}  # fmt: skip
        rows.append(row)
        said, measured, kept = (round((row[key] or 0) / 2**20) for key in ("estimate", "measured", "kept"))
        say(f"{name}, {phase}: {said} MiB estimated, {measured} measured, {kept or 'not'} with freed memory kept")
    result = {"machine": environment("cpu"), "rows": rows}
    write_atomically(file, json.dumps(result, indent=1) + "\n")
    return result


def main(arguments: list[str] | None = None) -> None:
    """The command `python -m helpers.sizing`."""
    top = argparse.ArgumentParser(prog="python -m helpers.sizing", description="Compare estimated and measured memory.")
    top.add_argument("command", choices=["check"], help="measure peaks here and keep them beside the estimate")
    top.add_argument("--json", type=Path, required=True, metavar="FILE", help="where the comparison is kept")
    check(top.parse_args(arguments).json)


if __name__ == "__main__":
    print(json.dumps(measure(build(Recipe, json.loads(sys.argv[2])), sys.argv[1], keep="keep" in sys.argv[3:])))
