"""Run folders: configuration, logs a line a step, and checkpoints that are whole or not there."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from helpers.hygiene import NotFinite, all_finite
from helpers.models import sha256
from helpers.names import unknown

PACKAGES = ("torch", "transformers", "peft", "accelerate", "reasoning-gym", "numpy")
STAGES = ("sft", "grpo")
TENSORS = ("model.safetensors", "optimizer.safetensors")  # of a checkpoint


def environment(device: str, processes: int = 1) -> dict[str, Any]:
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
        "processes": processes,
        "git_commit": commit,
    }


def progress_bar(label: str, total: int, done: int, shown: bool) -> tqdm:
    """A bar with the time left. On standard output: notebooks colour everything on the other stream as an error."""
    return tqdm(total=total, initial=done, desc=label, disable=not shown, file=sys.stdout, mininterval=0.5)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old one or the new one, never a half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)  # a full disk needs the room
        raise


@contextmanager
def one_sentence(sentence: Callable[[str], str]) -> Iterator[None]:
    """An OSError of one sentence, made of the system's reason, for whatever cannot be written inside."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = re.search(r"os error (\d+)", str(error))  # all that safetensors tells
        reason = os.strerror(int(number[1])) if number else getattr(error, "strerror", None) or str(error)
        raise OSError(sentence(reason)) from error


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
        self.also: Callable[[str, dict[str, Any]], None] | None = None  # is called with all that is logged
        self.writes = True  # of several processes that share a run, the first alone writes

    @classmethod
    def start(cls, folder: str | Path, recipe: Any, device: str, processes: int = 1) -> "Run":
        """A new run folder with its configuration.

        ValueError if something is there already, OSError if it cannot be made, each one sentence.
        """
        run, config = cls(folder), {"recipe": asdict(recipe), "environment": environment(device, processes)}
        if run.folder.is_symlink():
            raise ValueError(f"{folder} is a link to somewhere else: choose another folder with --out.")
        with one_sentence(lambda reason: f"{folder} cannot be made ({reason}): choose another folder with --out."):
            # The configuration comes first: a process killed before it is whole leaves nothing that is in the way.
            names = {path.name for path in run.folder.iterdir()} if run.folder.is_dir() else set()
            if names - {".config.yaml.tmp"} or run.folder.is_file():
                raise ValueError(
                    f"{folder} is there already: go on with --resume, or choose another folder with --out."
                )
            run.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(run.folder / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
            (run.folder / "checkpoints").mkdir()
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
        if not self.writes:
            return
        with self.writing(), open(self._log(name), "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        if self.also:
            self.also(name, record)

    def records(self, name: str) -> list[dict]:
        """All records of `name`.jsonl."""
        return read_jsonl(self._log(name))

    def _log(self, name: str) -> Path:
        path = self.folder / f"{name}.jsonl"
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise ValueError(f"The log {name!r} would lie outside of {self.folder}; use a plain name and no links.")
        return path

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Whatever cannot be written inside becomes an OSError of one sentence, which says where to go on."""

        def sentence(reason: str) -> str:
            return f"{self.folder} cannot be written to ({reason}): mend that and resume the run; {self.last()}."

        with one_sentence(sentence):
            yield

    def last(self) -> str:
        """Half a sentence for a person: what the last whole checkpoint is."""
        newest = self.newest()
        return f"its last checkpoint is {newest['stage']} step {newest['step']}" if newest else "it has no checkpoint"

    def write_records(self, name: str, records: list[dict]) -> None:
        """Replace `name`.jsonl, whole."""
        if not self.writes:
            return
        path = self._log(name)
        with self.writing():
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))

    def mend(self) -> None:
        """Take out what a killed process left half written or half deleted.

        These are temporary files, lines that were cut off, and checkpoints older than a whole one of their stage.
        """
        if not self.writes:
            return
        for path in self.folder.rglob(".*.tmp"):
            if path.is_file():
                path.unlink()
            else:
                shutil.rmtree(path, ignore_errors=True)
        for stage in STAGES:
            folders = self._folders(stage)
            newest = self.newest(stage) if len(folders) > 1 else None  # which reads all of it
            for older in folders[: folders.index(newest["folder"])] if newest else ():
                shutil.rmtree(older, ignore_errors=True)
        for path in self.folder.glob("*.jsonl"):
            self.write_records(path.stem, read_jsonl(path))

    def save_checkpoint(self, stage: str, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Save the weights that train and the optimiser's state after `step`; keep the newest of each stage.

        Only safetensors and JSON. The folder gets its name when all files in it are written, with their checksums, and
        what it replaces goes last, so that one whole checkpoint is there at any moment. NotFinite for weights that are
        no numbers, OSError in one sentence where there is no room: the checkpoint before is then still there.
        """
        if stage not in STAGES:
            raise ValueError(unknown("stage", stage, STAGES))
        if not self.writes:
            return
        weights = trained_weights(model)
        if not all_finite(weights):
            text = f"A weight after {stage} step {step} is no finite number, so it is not kept; {self.last()}."
            raise NotFinite("weight", text=text)
        final = self.folder / "checkpoints" / f"{stage}-{step:06d}"
        work, aside = final.with_name(f".{final.name}.tmp"), final.with_name(f"{final.name}.old")
        with self.writing():
            try:
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir(parents=True)
                save_file(weights, work / "model.safetensors")
                state = optimizer.state_dict()["state"]
                flat = {f"{i}.{k}": torch.as_tensor(value) for i, entry in state.items() for k, value in entry.items()}
                save_file(flat, work / "optimizer.safetensors")
                for name in TENSORS:
                    with open(work / name, "rb+") as file:
                        os.fsync(file.fileno())
                about = {"stage": stage, "step": step, "sha256": {name: sha256(work / name) for name in TENSORS}}
                write_atomically(work / "state.json", json.dumps(about, indent=1))
                if final.exists():
                    shutil.rmtree(aside, ignore_errors=True)
                    os.replace(final, aside)
                os.replace(work, final)
            except (OSError, SafetensorError):
                shutil.rmtree(work, ignore_errors=True)  # a full disk needs the room
                raise
        for other in final.parent.iterdir():  # also what a killed process left half written or half deleted
            if other != final and other.name.lstrip(".").startswith(f"{stage}-"):
                shutil.rmtree(other, ignore_errors=True)

    def _folders(self, stage: str | None = None) -> list[Path]:
        """Folders with a checkpoint's name (of a stage), whole or not, oldest first."""
        found = []
        for folder in (self.folder / "checkpoints").glob("[!.]*"):
            name = re.fullmatch(r"(\w+)-(\d{6,})(\.old)?", folder.name)
            if name and name[1] in STAGES and stage in (None, name[1]):
                found.append((STAGES.index(name[1]), int(name[2]), not name[3], folder))
        return [folder for *_, folder in sorted(found)]

    def _checkpoints(self, stage: str | None = None) -> list[dict]:
        """Checkpoints (of a stage) that are whole, oldest first."""
        found = []
        for folder in self._folders(stage):
            try:
                state = json.loads((folder / "state.json").read_text())
                named = folder.name.removesuffix(".old") == f"{state['stage']}-{state['step']:06d}"
                if named and all(sha256(folder / name) == state["sha256"][name] for name in TENSORS):
                    found.append({**state, "folder": folder})
            except (OSError, ValueError, KeyError, TypeError):
                continue  # damaged: an older one is used
        return found

    def newest(self, stage: str | None = None) -> dict | None:
        """The newest whole checkpoint (of a stage): its stage, step and folder; None if there is none."""
        found = self._checkpoints(stage)
        return found[-1] if found else None

    def load_weights(
        self, model: torch.nn.Module, stage: str | None = None, say: Callable[[str], None] = tqdm.write
    ) -> dict | None:
        """Put the newest checkpoint's weights (of a stage) into the model in place. Returns that checkpoint.

        `say` gets one sentence where there is a newer one that is damaged.
        """
        checkpoint, folders = self.newest(stage), self._folders(stage)
        if folders and not (checkpoint and checkpoint["folder"] == folders[-1]):
            used = f"{checkpoint['stage']} step {checkpoint['step']} is used" if checkpoint else "no other is there"
            say(f"The checkpoint {folders[-1]} is damaged; {used}.")
        if checkpoint:
            restore_weights(model, load_file(checkpoint["folder"] / "model.safetensors"))
        return checkpoint

    def resume(
        self,
        stage: str,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        say: Callable[[str], None] = tqdm.write,
    ) -> int:
        """Steps of `stage` that are done, with weights, optimiser and logs put back to just after the last of them."""
        checkpoint = self.load_weights(model, stage, say)
        step = checkpoint["step"] if checkpoint else 0
        self.mend()
        if checkpoint:
            state: dict[int, dict] = {}
            for name, tensor in load_file(checkpoint["folder"] / "optimizer.safetensors").items():
                index, key = name.split(".", 1)
                state.setdefault(int(index), {})[key] = tensor.clone()  # the file goes, and its memory with it
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
