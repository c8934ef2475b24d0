"""Our questions and our reward as a taskset of `verifiers`, which prime-rl trains on. Importing it needs `verifiers`.

`verifiers` looks a taskset up as a module of its own; these two lines, in a file questions_v1.py on the Python path of
prime-rl, make it the taskset `questions-v1`:

    from helpers.taskset import Questions
    __all__ = ["Questions"]
"""

from dataclasses import fields
from typing import Any

import verifiers.v1 as vf

from helpers.bridges import chat_fields, verifier
from helpers.rewards import Reward, RewardConfig
from helpers.tasks import Example, load_task


class QuestionData(vf.TaskData):
    """One question and what its verifier needs."""

    question: str
    answer: str
    metadata: dict[str, Any]
    task: str  # its name in `helpers.tasks`


class QuestionConfig(vf.TaskConfig):
    """The weights of `RewardConfig`."""

    correct: float = 0.85
    format: float = 0.15
    derivation: float = 0.0
    steps: float = 0.0
    length: float = 0.0
    length_target: int = 0


class Question(vf.Task[QuestionData, vf.State, QuestionConfig]):
    """A question, scored by `Reward`: the total is the reward, its parts are metrics."""

    def parts(self, trace: vf.Trace) -> dict[str, float]:
        """`Reward.parts` of the model's reply."""
        weights = {f.name: getattr(self.config, f.name) for f in fields(RewardConfig)}
        example = Example(self.data.question, self.data.answer, self.data.metadata)
        return Reward(verifier(self.data.task), RewardConfig(**weights)).parts(trace.last_reply, example)

    @vf.reward
    async def total(self, trace: vf.Trace) -> float:
        """What the policy is trained on."""
        return self.parts(trace)["total"]

    @vf.metric
    async def rates(self, trace: vf.Trace) -> dict[str, float]:
        """What is logged beside it."""
        return {name: value for name, value in self.parts(trace).items() if name != "total"}


class QuestionsConfig(vf.TasksetConfig):
    """As `load_task` takes them."""

    questions: str = "letter_counting"
    split: str = "train"
    size: int = 500
    seed: int = 0
    balanced: bool = True
    task: QuestionConfig = QuestionConfig()


class Questions(vf.Taskset[Question, QuestionsConfig]):
    """The questions of one split."""

    def load(self) -> list[Question]:
        """A task of `verifiers` for each question."""
        c = self.config
        return [
            Question(QuestionData(**fields), c.task)
            for fields in chat_fields(load_task(c.questions, c.split, c.size, c.seed, c.balanced))
        ]


__all__ = ["Questions"]
