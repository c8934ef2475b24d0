"""When a training run should be stopped or looked at: Ctrl-C, numbers that are none, and figures that bode ill."""

import json
import math
import signal
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from helpers.buffer import PER_TOKEN, Experience


class Stopped(KeyboardInterrupt):
    """What Ctrl-C ends in once the step is done. Its text is one sentence, and all that a notebook shows of it."""

    def _render_traceback_(self) -> list[str]:  # IPython asks an exception for this
        return [str(self)]


class StopAfterStep:
    """While entered, Ctrl-C or a notebook's stop button sets `asked`, for the loop to end after its step.

    A second one interrupts at once. Outside the main thread, where Python handles no signals, nothing is changed.
    """

    def __init__(self, bar: tqdm) -> None:
        self.bar, self.asked, self.before = bar, False, None

    def __enter__(self) -> "StopAfterStep":
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGINT, self._ask) or signal.default_int_handler
        return self

    def _ask(self, *_: Any) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self.before)
        self.bar.set_description("finishing this step")

    def __exit__(self, error: type | None, *_: Any) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)
        if self.asked and error is None:  # too late for the last step
            raise KeyboardInterrupt

    def stopped(self, stage: str, step: int, steps: int, run: Any) -> Stopped:
        """What to raise after a step. run: has a checkpoint of this step; None without one."""
        where = f"{run.folder} has a checkpoint of it: resume that run to go on" if run else "the model keeps it"
        return Stopped(f"Stopped after {stage} step {step} of {steps}; {where}.")


class NotFinite(RuntimeError):
    """A loss, gradient or weight is NaN or infinite. experiences: the responses it was computed from, if known."""

    def __init__(self, what: str, experiences: Sequence[Experience] = (), text: str | None = None) -> None:
        super().__init__(text or f"The {what} is no finite number.")
        self.what, self.experiences = what, list(experiences)

    def __reduce__(self) -> tuple:  # how it comes back from another process
        return NotFinite, (self.what, self.experiences, str(self))

    def kept(self, run: Any, stage: str, step: int, tokenizer: PreTrainedTokenizerBase) -> "NotFinite":
        """The same, saying where, with the responses written into the folder of the run, if there is one."""
        where = f"The {self.what} of {stage} step {step} is no finite number, so training stops before that update"
        if not run:
            text = f"{where}; the responses are in this error's `experiences`."
        else:
            target = save_responses(run.folder / f"not-finite-{stage}-{step:06d}", self.experiences, tokenizer)
            text = f"{where}; its responses are in {target}, and {run.last()}."
        return NotFinite(self.what, self.experiences, text)


def save_responses(folder: Path, experiences: Sequence[Experience], tokenizer: PreTrainedTokenizerBase) -> Path:
    """Write experiences down for inspection: batch.json, a record a response, with its text, and batch.safetensors.

    The tensors are old_logprobs.I and so on, of record I, where there are any. Returns the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    records, tensors = [], {}
    for number, experience in enumerate(experiences):
        record = {"text": tokenizer.decode(experience.response_ids), **vars(experience)}
        for name in PER_TOKEN:
            values = record.pop(name)
            if values is not None:
                tensors[f"{name}.{number}"] = values.detach().cpu().contiguous()
        records.append(record)
    (folder / "batch.json").write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")
    save_file(tensors, folder / "batch.safetensors")
    return folder


def check_finite(what: str, value: float, experiences: Sequence[Experience] = ()) -> float:
    """The value, if it is finite; else raises NotFinite."""
    if not math.isfinite(value):
        raise NotFinite(f"{what} ({value})", experiences)
    return value


def all_finite(weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether no weight is NaN or infinite."""
    return all(bool(torch.isfinite(weight).all()) for weight in weights.values())


# What must be near 1: the ratio in the first update of a buffer, and the trainer's probabilities over the sampler's.
RATIOS = ("first_ratio_min", "first_ratio_max", "sampler_ratio_min", "sampler_ratio_max")


class Watch:
    """Reads each step's metrics and returns, once each, what usually explains a run that goes nowhere, with its cure.

    earlier: the metrics of steps before, for a run that is resumed; what was said then is not said again. credit: the
    run's `grpo.credit`, which says what a group without signal is.
    """

    STEPS = 5  # in a row without signal

    def __init__(self, earlier: Sequence[Mapping[str, Any]] = (), credit: str = "response") -> None:
        self.equal = "equally right steps" if credit == "step" else "equal rewards"
        self.said: set[str] = set()
        self.silent = 0
        for record in earlier:
            self(record)

    def __call__(self, record: Mapping[str, Any]) -> list[str]:
        """New sentences about a step of `grpo`; a figure that the record lacks is passed over."""
        self.silent = self.silent + 1 if record.get("no_signal", 0) >= 0.9 else 0
        ratios = [value for name, value in record.items() if name in RATIOS] or [1.0]
        found = {
            "signal": self.silent >= self.STEPS,
            "format": record.get("step") == 1 and record.get("format_rate", 1) < 0.1,
            "limit": record.get("unfinished", 0) > 0.5,
            "ratio": not all(0.5 <= ratio <= 2 for ratio in ratios),
        }
        sentences = {
            "signal": f"For {self.STEPS} steps 90 % of the groups or more had {self.equal}, which teach nothing: use "
            "questions that are answered right about half the time, a larger group_size or more warm-up.",
            "format": f"Only {100 * record.get('format_rate', 1):.0f} % of the first responses have the format, so the "
            "reward is mostly blind to what they say: warm the model up on worked examples first (sft).",
            "limit": f"At step {record.get('step')} {100 * record.get('unfinished', 0):.0f} % of the responses hit the "
            "token limit before their answer: raise max_new_tokens, or warm up on shorter worked examples.",
            "ratio": f"At step {record.get('step')} the ratio went from {min(ratios):.2g} to {max(ratios):.2g} before "
            "anything was learned from the buffer, where it should be 1: sampler and trainer disagree, so compare "
            "their temperature, weights, dtype, masks and dropout.",
        }
        new = [name for name, true in found.items() if true and name not in self.said]
        self.said.update(new)
        return [sentences[name] for name in new]
