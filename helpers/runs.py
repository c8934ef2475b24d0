"""Run folders: configuration, logs a line a step, and checkpoints that are whole or not there."""

import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from helpers.models import sha256

PACKAGES = ("torch", "transformers", "peft", "accelerate", "reasoning-gym", "numpy")
STAGES = ("sft", "grpo")


def environment(device: str) -> dict[str, Any]:
    """What a number depends on beside its seed: package versions, hardware, and the code's git commit."""
    try:
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
        processor = names[0] if names else processor
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "processor": processor,
        "cores": os.cpu_count(),
        "git_commit": commit,
    }


def progress_bar(label: str, total: int, done: int, shown: bool) -> tqdm:
    """A bar with the time left. On standard output: notebooks colour everything on the other stream as an error."""
    return tqdm(total=total, initial=done, desc=label, disable=not shown, file=sys.stdout, mininterval=0.5)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old one or the new one, never a half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_jsonl(path: Path) -> list[dict]:
    """The records of a JSON Lines file; a last line that was cut off while it was written is left out."""
    records = []
    if path.exists():
        lines = path.read_bytes().split(b"\n")  # a cut may go through a character, so each line is decoded alone
        for number, line in enumerate(lines):
            try:
                if line:
                    records.append(json.loads(line))
            except ValueError:
                if number < len(lines) - 1:
                    raise ValueError(f"{path} is damaged in line {number + 1}; take that line out.") from None
    return records


class Run:
    """A folder with config.yaml, metrics.jsonl, eval.jsonl, samples.jsonl, evaluations/ and checkpoints/."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @classmethod
    def start(cls, folder: str | Path, recipe: Any, device: str) -> "Run":
        """A new run folder with its configuration. ValueError if something is there already."""
        run = cls(folder)
        if run.folder.exists() and (not run.folder.is_dir() or any(run.folder.iterdir())):
            raise ValueError(f"{folder} is there already: go on with --resume, or choose another folder with --out.")
        config = {"recipe": asdict(recipe), "environment": environment(device)}
        (run.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        write_atomically(run.folder / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        return run

    @classmethod
    def open(cls, folder: str | Path) -> "Run":
        """A run that exists. ValueError if the folder holds none."""
        if not (Path(folder) / "config.yaml").is_file():
            raise ValueError(f"{folder} holds no run: it has no config.yaml.")
        return cls(folder)

    @property
    def config(self) -> dict[str, Any]:
        """The recipe and the environment the run was started with."""
        return yaml.safe_load((self.folder / "config.yaml").read_text(encoding="utf-8"))

    def log(self, name: str, record: dict[str, Any]) -> None:
        """Append one record to `name`.jsonl."""
        with open(self.folder / f"{name}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def records(self, name: str) -> list[dict]:
        """All records of `name`.jsonl."""
        return read_jsonl(self.folder / f"{name}.jsonl")

    def write_records(self, name: str, records: list[dict]) -> None:
        """Replace `name`.jsonl, whole."""
        path = self.folder / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))

    def mend(self) -> None:
        """Take out last lines that were cut off while they were written, so that the next ones start afresh."""
        for path in self.folder.glob("*.jsonl"):
            self.write_records(path.stem, read_jsonl(path))

    def save_checkpoint(self, stage: str, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Save the weights that train and the optimiser's state after `step`; keep the newest of each stage.

        Only safetensors and JSON. The folder gets its name when all files in it are written, with their checksums.
        """
        final = self.folder / "checkpoints" / f"{stage}-{step:06d}"
        work = final.with_name(f".{final.name}.tmp")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        save_file(trained_weights(model), work / "model.safetensors")
        state = optimizer.state_dict()["state"]
        flat = {f"{i}.{key}": torch.as_tensor(value) for i, entry in state.items() for key, value in entry.items()}
        save_file(flat, work / "optimizer.safetensors")
        sums = {file.name: sha256(file) for file in sorted(work.iterdir())}
        write_atomically(work / "state.json", json.dumps({"stage": stage, "step": step, "sha256": sums}, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(work, final)
        for older in self._checkpoints():
            if older["stage"] == stage and older["step"] < step:
                shutil.rmtree(older["folder"])

    def _checkpoints(self) -> list[dict]:
        """Checkpoints that are whole, oldest first."""
        found = []
        for folder in (self.folder / "checkpoints").glob("[!.]*"):
            try:
                state = json.loads((folder / "state.json").read_text())
                whole = all(sha256(folder / name) == digest for name, digest in state["sha256"].items())
                if whole and folder.name == f"{state['stage']}-{state['step']:06d}":
                    found.append({**state, "folder": folder})
            except (OSError, ValueError, KeyError, TypeError):
                continue  # damaged: an older one is used
        return sorted(found, key=lambda c: (STAGES.index(c["stage"]), c["step"]))

    def newest(self, stage: str | None = None) -> dict | None:
        """The newest whole checkpoint (of a stage): its stage, step and folder; None if there is none."""
        found = [c for c in self._checkpoints() if stage in (None, c["stage"])]
        return found[-1] if found else None

    def load_weights(self, model: torch.nn.Module, stage: str | None = None) -> dict | None:
        """Put the newest checkpoint's weights (of a stage) into the model in place. Returns that checkpoint."""
        checkpoint = self.newest(stage)
        if checkpoint:
            restore_weights(model, load_file(checkpoint["folder"] / "model.safetensors"))
        return checkpoint

    def resume(self, stage: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Steps of `stage` that are done, with weights, optimiser and logs put back to just after the last of them."""
        checkpoint = self.load_weights(model, stage)
        step = checkpoint["step"] if checkpoint else 0
        self.mend()
        if checkpoint:
            state: dict[int, dict] = {}
            for name, tensor in load_file(checkpoint["folder"] / "optimizer.safetensors").items():
                index, key = name.split(".", 1)
                state.setdefault(int(index), {})[key] = tensor
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state, "param_groups": groups})
        for name in ("metrics", "samples"):
            records = self.records(name)
            kept = [r for r in records if r["stage"] != stage or r["step"] <= step]
            if len(kept) < len(records):
                self.write_records(name, kept)
        return step


def trained_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights that training changes, by name: for LoRA the adapter alone."""
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {name: tensor.contiguous() for name, tensor in weights.items()}


@torch.no_grad()
def restore_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Copy saved weights into the model in place. ValueError if they are not this model's."""
    parameters = dict(model.named_parameters())
    for name, tensor in weights.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise ValueError(f"The saved weight {name} does not fit this model: load the one the run was made with.")
        parameters[name].copy_(tensor)
