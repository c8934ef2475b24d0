"""The reward: is the answer right, is the format right, and, where asked for, the derivation; is the reply too long."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from helpers.prompts import extract_answer, extract_thinking
from helpers.tasks import Example, Task

_BODY = r"(?:(?!</?(?:think|answer)>).)*"  # text without a tag in it
_FORMAT = re.compile(rf"\s*<think>{_BODY}</think>\s*<answer>{_BODY}</answer>\s*", re.DOTALL)


def format_reward(completion: str) -> float:
    """1.0 for exactly one think block, then exactly one answer block, only white space around; else 0.0."""
    return float(_FORMAT.fullmatch(completion) is not None)


@dataclass(frozen=True)
class RewardConfig:
    """What a response is paid for: the weights of the parts of its total.

    total = correct * [right] + format * [well formed] + derivation * [sound] + steps * share - length * excess
    sound: every step of the thinking is right and leads to the answer, as the task's `check_thinking` says: a process
    reward beside the outcome's (Lightman et al., arXiv 2305.20050, with a program in place of their reward model).
    share: of the steps, those that are right before the first mistake (`right_steps`): pay for getting further.
    excess = min(1, max(0, words / length_target - 1)): 0 up to `length_target` words, then a straight line
    to 1 at twice as many, the shape of DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13).
    ValueError for a negative or infinite number and for a `length` without a `length_target`.
    """

    correct: float = 0.85
    format: float = 0.15
    derivation: float = 0.0
    steps: float = 0.0
    length: float = 0.0
    length_target: int = 0  # words of a whole completion

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
                raise ValueError(f"The reward's {name} must be a number of 0 or more, not {value!r}.")
        if self.length and not self.length_target:
            raise ValueError("A reward with a length weight needs a length_target of 1 word or more.")


@dataclass(frozen=True)
class Reward:
    """A task's reward, called alike by our loop and by TRL's GRPOTrainer: `reward(completions, example)`."""

    task: Task
    config: RewardConfig = field(default_factory=RewardConfig)

    @property
    def __name__(self) -> str:
        """What TRL logs the reward under."""
        return f"{self.task.name}_reward"

    def parts(self, completion: str, example: Example) -> dict[str, float]:
        """correct and format in {0, 1}, length (the excess) in [0, 1], and the total they make.

        derivation, in {0, 1}, and steps, in [0, 1], are there where one of them has a weight: checking each step takes
        time and the example's metadata.
        """
        weights = self.config
        answer = extract_answer(completion)
        correct = self.task.score(answer, example)
        well_formed = format_reward(completion)
        target = weights.length_target
        excess = min(1.0, max(0.0, len(completion.split()) / target - 1)) if target else 0.0
        total = weights.correct * correct + weights.format * well_formed - weights.length * excess
        parts = {"correct": correct, "format": well_formed, "length": excess}
        if weights.derivation or weights.steps:
            share = self.task.right_steps(extract_thinking(completion), example, answer)
            sound = float(share == 1.0)
            parts |= {"derivation": sound, "steps": share}
            total += weights.derivation * sound + weights.steps * share
        return {**parts, "total": total}

    def steps(self, completion: str, example: Example) -> list[tuple[int, bool]]:
        """(where it ends, in characters; is it right) for each step up to the first mistake, the answer the last one.

        The first step begins with the completion. The answer is right if it is in the asked format, too. A mistake
        in what is the last step of the thinking reaches to the end, since the answer only repeats it.
        """
        thinking = extract_thinking(completion)
        if thinking is None:
            return [(len(completion), False)]
        begin = completion.index("<think>") + len("<think>")
        begin += len(completion[begin:]) - len(completion[begin:].lstrip())
        steps = self.task.read_steps(thinking, example)
        found = [(begin + end, True) for end in steps.ends[: steps.right]]
        if steps.right < min(len(steps.ends), steps.wanted - 1):
            return [*found, (begin + steps.ends[steps.right], False)]
        answer = self.task.score(extract_answer(completion), example) * format_reward(completion)
        return [*found, (len(completion), steps.sound and answer == 1.0)]

    def __call__(
        self,
        completions: Sequence[str] | Sequence[Sequence[Mapping[str, str]]],
        example: Example | Sequence[Example | Mapping[str, Any]],
        **columns: Any,
    ) -> list[float]:
        """The total of each completion.

        A completion is a string, or TRL's list of messages, of which the last counts. `example` is one
        Example for all completions, or one each; a data set's dictionaries with the same fields will do. Of
        TRL's other columns only `log_metric` is used: it gets the accuracy and the format rate. ValueError
        when the numbers of completions and examples differ.
        """
        examples = [example] * len(completions) if isinstance(example, Example) else example
        if len(examples) != len(completions):
            raise ValueError(f"Give {len(completions)} completions as many examples, not {len(examples)}.")
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        examples = [e if isinstance(e, Example) else Example(**e) for e in examples]
        parts = [self.parts(text, e) for text, e in zip(texts, examples, strict=True)]
        if parts and "log_metric" in columns:
            columns["log_metric"]("accuracy", sum(p["correct"] for p in parts) / len(parts))
            columns["log_metric"]("format_rate", sum(p["format"] for p in parts) / len(parts))
        return [p["total"] for p in parts]
