"""Evaluation: accuracy with its interval, beside the constant answer; paired comparison of two policies."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import binomtest
from torch import nn
from transformers import PreTrainedTokenizerBase

from helpers.prompts import extract_answer, extract_thinking
from helpers.rewards import format_reward
from helpers.rollout import encode_prompt, end_token_ids, rollout
from helpers.tasks import Task


def wilson(right: int, total: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion, as shares in [0, 1]."""
    interval = binomtest(right, total).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> dict[str, float]:
    """Exact McNemar test of two policies on the same questions: did as many turn right as turned wrong?

    before, after: right or not, question by question. Returns counts "gained" and "lost" and the two-sided "p".
    Raises ValueError if the lengths differ. Source: McNemar 1947; the exact form is a binomial test.
    """
    if len(before) != len(after):
        raise ValueError(f"Compare results on the same questions: {len(before)} came with {len(after)}.")
    gained = sum(bool(b) and not a for a, b in zip(before, after, strict=True))
    lost = sum(bool(a) and not b for a, b in zip(before, after, strict=True))
    p = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    return {"gained": gained, "lost": lost, "p": float(p)}


def pass_at_k(right: int, samples: int, k: int) -> float:
    """Chance that at least one of k samples is right, unbiased from `samples` >= k of which `right` are.

    Source: Chen et al. 2021 (arXiv 2107.03374), eq. 1.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@k needs k between 1 and the {samples} samples taken, not {k}.")
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


@dataclass(frozen=True)
class Evaluation:
    """One policy on one task. `records`: a dict a response, `samples` of them a question, questions in order."""

    task: Task
    temperature: float
    samples: int
    seed: int
    records: list[dict[str, Any]]

    @property
    def right(self) -> list[bool]:
        """Right or not, response by response, in order."""
        return [record["correct"] == 1.0 for record in self.records]

    def summary(self) -> dict[str, Any]:
        """The figures to report together; shares are in [0, 1], length is in tokens.

        With several samples a question, the interval still counts questions, not responses: responses to one
        question are not independent. balanced_accuracy is the mean over true answers (None if a task has no classes).
        """
        rows, n = self.records, len(self.records)
        accuracy = sum(self.right) / n
        low, high = wilson(round(accuracy * len(self.task)), len(self.task))
        by_truth = [[r["correct"] for r in rows if r["truth"] == truth] for truth in self.task.classes]
        recalls = [sum(group) / len(group) for group in by_truth if group]
        baseline = self.task.constant_baseline()
        answers = Counter(r["answer"] if r["answer"] is not None else "(none)" for r in rows)
        groups = [self.right[i : i + self.samples] for i in range(0, n, self.samples)]
        ks = [k for k in (1, 2, 4, 8, 16, 32) if k <= self.samples]
        return {
            "task": self.task.name,
            "questions": len(self.task),
            "samples": self.samples,
            "temperature": self.temperature,
            "seed": self.seed,
            "accuracy": accuracy,
            "accuracy_low": low,
            "accuracy_high": high,
            "balanced_accuracy": sum(recalls) / len(recalls) if recalls else None,
            "baseline": baseline.accuracy,
            "baseline_answer": baseline.answer,
            "answers": {answer: count / n for answer, count in answers.most_common(6)},
            "format_rate": sum(r["format"] for r in rows) / n,
            "thinking_rate": sum(r["thinking_right"] for r in rows) / n,
            "mean_length": sum(r["length"] for r in rows) / n,
            "unfinished": sum(not r["finished"] for r in rows) / n,
            "pass_at_k": {k: sum(pass_at_k(sum(g), self.samples, k) for g in groups) / len(groups) for k in ks},
        }


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    samples: int = 1,
    max_new_tokens: int = 300,
    seed: int = 0,
    max_rows: int = 384,
    on_progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Let a policy answer every question of a task: greedy at temperature 0, else `samples` responses each."""
    prompts = [encode_prompt(tokenizer, example.question) for example in task]
    groups = rollout(
        model,
        prompts,
        group_size=samples,
        max_new_tokens=max_new_tokens,
        end_ids=end_token_ids(model, tokenizer),
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        max_rows=max_rows,
        on_progress=on_progress,
    )
    records = []
    for number, (example, group) in enumerate(zip(task, groups, strict=True)):
        for response in group:
            text = tokenizer.decode(response.token_ids, skip_special_tokens=True)
            answer = extract_answer(text)
            records.append(
                {
                    "question": number,
                    "truth": example.answer,
                    "answer": answer,
                    "correct": task.score(answer, example),
                    "format": format_reward(text),
                    "thinking_right": task.check_thinking(extract_thinking(text), example, answer),
                    "length": len(response.token_ids),
                    "finished": response.finished,
                    "completion": text,
                }
            )
    return Evaluation(task, temperature, samples, seed, records)


def report(summary: dict[str, Any]) -> str:
    """One line for a person: accuracy with interval and n, the constant answer beside it, format and thinking."""
    s = summary
    how = {0: "greedy", 1: "sampled"}.get(s["temperature"], f"sampled at temperature {s['temperature']:g}")
    return (
        f"{100 * s['accuracy']:.1f} % right ({100 * s['accuracy_low']:.1f} to {100 * s['accuracy_high']:.1f}), "
        f"n = {s['questions']}, {how}; constant answer {100 * s['baseline']:.1f} %; "
        f"format {100 * s['format_rate']:.0f} %, derivation {100 * s['thinking_rate']:.0f} %"
    )
