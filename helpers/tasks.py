"""Questions whose answers a program can verify: three tasks over reasoning-gym, with held-out test splits."""

import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from itertools import chain, combinations, product
from random import Random
from typing import Any, ClassVar, NamedTuple

import numpy as np
from reasoning_gym.data import read_data_file
from reasoning_gym.logic.propositional_logic import PropositionalLogicConfig, PropositionalLogicDataset
from reasoning_gym.logic.syllogisms import SyllogismConfig, SyllogismDataset

from helpers import logic, teacher
from helpers.names import unknown

SPLITS = ("train", "test")
DRAWN_LIMIT = 200_000  # questions a split for the two tasks drawn at random, so that drawing stays quick
SEED_STRIDE = 10**10  # reasoning-gym seeds item i with seed + i; this far apart, two seeds share no item
MAX_ANSWER = 1000  # characters; a longer answer is wrong


@dataclass(frozen=True)
class Example:
    """A question, a true answer, and what the scorer and the teacher need to know of the question."""

    question: str
    answer: str
    metadata: dict[str, Any] = field(default_factory=dict)


class Baseline(NamedTuple):
    """The best answer to give always, without reading the question, and the accuracy that gets."""

    answer: str
    accuracy: float


class Task(Sequence[Example]):
    """The questions of one split, and how answers and derivations are checked.

    `classes` lists the possible true answers, () where they are too many to list. `stepwise`: whether a question
    has one derivation, whose steps `read_steps` tells apart.
    """

    name: ClassVar[str]
    stepwise: ClassVar[bool] = False

    def __init__(self, examples: Sequence[Example], split: str, classes: tuple[str, ...]) -> None:
        self.split, self.classes, self._examples = split, classes, tuple(examples)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index):
        """The example at an integer `index`, or the tuple of them at a slice."""
        return self._examples[index]

    @classmethod
    @abstractmethod
    def draw(cls, split: str, size: int, seed: int, balanced: bool) -> "Task":
        """The task with `size` questions of `split`; ValueError when it has fewer. Called by `load_task`."""

    @staticmethod
    @abstractmethod
    def key(metadata: Mapping[str, Any]) -> str:
        """What makes a question that question, however it is worded. Its hash decides the split."""

    @abstractmethod
    def score(self, answer: str | None, example: Example) -> float:
        """1.0 for a right answer, else 0.0. Never raises on any text."""

    @abstractmethod
    def thinking(self, example: Example) -> str:
        """The teacher's derivation of `example.answer`."""

    @abstractmethod
    def check_thinking(self, text: str | None, example: Example, answer: str | None = None) -> bool:
        """True when each step of the derivation `text` is right and leads to a right answer.

        With the `answer` given beside it, that must be the one it leads to. Never raises on any text.
        """

    def right_steps(self, text: str | None, example: Example, answer: str | None = None) -> float:
        """The share of the steps that are right before the first mistake, the answer being the last of them.

        1.0 where `check_thinking` holds, else less; a task that is not `stepwise` knows only 1.0 and 0.0. Never raises
        on any text.
        """
        if not self.stepwise:
            return float(self.check_thinking(text, example, answer))
        steps = self.read_steps(text or "", example)
        reached = steps.sound and (answer is None or self.score(answer, example) == 1.0)
        return (steps.right + reached) / (steps.wanted + 1)

    def read_steps(self, text: str, example: Example) -> teacher.Steps:
        """The steps of a derivation. Never raises on any text; NotImplementedError unless the task is `stepwise`."""
        raise NotImplementedError(f"{self.name}'s derivations have no given steps.")

    def constant_baseline(self) -> Baseline:
        """The most frequent true answer and its share."""
        answer, count = Counter(example.answer for example in self).most_common(1)[0]
        return Baseline(answer, count / len(self))


def split_of(key: str) -> str:
    """The split that the question with this key belongs to: the hash of the key decides.

    This parts the space of questions itself, so no seed and no size can put a question into both splits.
    """
    return "test" if key == "strawberry" else SPLITS[sha256(key.encode()).digest()[0] % 2]


def _bare(answer: str | None) -> str:
    """`answer` without white space and one full stop at its ends; "" when it is too long to be one."""
    return "" if answer is None or len(answer) > MAX_ANSWER else answer.strip().removesuffix(".").strip()


def _check_size(task: type[Task], split: str, size: int, limit: int) -> None:
    if size > limit:
        raise ValueError(f"{task.name} offers {limit:,} such {split} questions; ask for up to that many.")


class Syllogism(Task):
    """reasoning-gym's `syllogism`: does the third statement follow from the first two?

    Labels are recomputed by brute force (`logic.follows`) under existential import: every kind that is named
    has members. The stock labels, about 11 % of them wrong, stay in metadata["stock_label"]. Balanced: as many Yes
    as No, give or take one; otherwise the stock mix.
    """

    name = "syllogism"
    stepwise = True

    @classmethod
    def draw(cls, split: str, size: int, seed: int, balanced: bool) -> "Syllogism":
        _check_size(cls, split, size, DRAWN_LIMIT)
        stock = SyllogismDataset(SyllogismConfig(seed=seed * SEED_STRIDE, size=size))
        room = {"Yes": (size + 1) // 2, "No": size // 2} if balanced else {"Yes": size, "No": size}
        found: dict[str, Example] = {}
        index = 0
        while len(found) < size:
            item = stock[index]
            index += 1
            metadata = {part: item["metadata"][part] for part in ("premise1", "premise2", "conclusion")}
            key = cls.key(metadata)
            if key in found or split_of(key) != split:
                continue
            *premises, claim = map(logic.parse_statement, metadata.values())
            answer = "Yes" if logic.follows(premises, claim) else "No"
            if room[answer]:
                room[answer] -= 1
                found[key] = Example(item["question"], answer, metadata | {"stock_label": item["answer"]})
        examples = list(found.values())
        Random(seed).shuffle(examples)  # or the rarer answer would pile up at the end
        return cls(examples, split, ("Yes", "No"))

    @staticmethod
    def key(metadata: Mapping[str, Any]) -> str:
        premises = sorted([metadata["premise1"], metadata["premise2"]])
        return " | ".join([*premises, metadata["conclusion"]])

    def score(self, answer: str | None, example: Example) -> float:
        """1.0 when `answer` is the true word; case, white space and a full stop do not matter."""
        word = _bare(answer).lower()
        return float(word in ("yes", "no") and word == example.answer.lower())

    def thinking(self, example: Example) -> str:
        """The kinds named A, B, C, the premises, what follows for A and C, the claim, the verdict."""
        m = example.metadata
        return teacher.syllogism_derivation(m["premise1"], m["premise2"], m["conclusion"])

    def check_thinking(self, text: str | None, example: Example, answer: str | None = None) -> bool:
        return self.right_steps(text, example, answer) == 1.0

    def read_steps(self, text: str, example: Example) -> teacher.Steps:
        m = example.metadata
        return teacher.syllogism_steps(text, m["premise1"], m["premise2"], m["conclusion"])


class PropositionalLogic(Task):
    """reasoning-gym's `propositional_logic`: conclude something new from the premises.

    The premises are the stock ones; sets that contradict themselves, and sets for which the teacher finds no
    answer, are dropped. Many answers are right, so there is nothing to balance; `example.answer` is one.
    """

    name = "propositional_logic"

    @classmethod
    def draw(cls, split: str, size: int, seed: int, balanced: bool) -> "PropositionalLogic":
        _check_size(cls, split, size, DRAWN_LIMIT)
        found: dict[str, Example] = {}
        for premises in _stock_premises(seed):
            if len(found) == size:
                break
            key = cls.key({"premises": premises})
            if key in found or split_of(key) != split or not logic.consistent(premises):
                continue
            derived = teacher.propositional_derivation(premises)
            if derived is not None:
                variables = list(logic.variables_of(premises))
                question = "\n".join([
                    "Given:",
                    *(f"{i}. {premise}" for i, premise in enumerate(premises, 1)),
                    "What can we conclude? Answer with one formula that follows, can be false, uses only "
                    f"{', '.join(variables)}, "
                    "and is not equivalent to a premise or any conjunction of premises.",
                ])  # fmt: skip
                found[key] = Example(question, derived[1], {"premises": premises, "variables": variables})
        return cls(list(found.values()), split, ())

    @staticmethod
    def key(metadata: Mapping[str, Any]) -> str:
        return " | ".join(sorted(metadata["premises"]))

    def score(self, answer: str | None, example: Example) -> float:
        """1.0 when `answer` follows, can be false, and is not equivalent to premises, one or several joined.

        White space and a full stop do not matter; the case of the variables does.
        """
        return float(logic.is_conclusion(_bare(answer), example.metadata["premises"]))

    def thinking(self, example: Example) -> str:
        """The premises used and what one rule makes of them: "From 1: (P → Q). From 2: P. So Q."."""
        thinking, _ = teacher.propositional_derivation(example.metadata["premises"])
        return thinking

    def check_thinking(self, text: str | None, example: Example, answer: str | None = None) -> bool:
        end = None if answer is None else _bare(answer)
        return teacher.check_propositional_derivation(text or "", example.metadata["premises"], end)

    def constant_baseline(self) -> Baseline:
        """The best of P, Q, R, S, their negations and any two of these joined, on up to 1,000 questions."""
        literals = [(v, f"¬{v}") for v in "PQRS"]
        pairs = chain.from_iterable(product(a, b) for a, b in combinations(literals, 2))
        formulas = [*chain(*literals), *(f"({a} {op} {b})" for a, b in pairs for op in "∨∧↔")]
        shares = {f: float(np.mean([self.score(f, example) for example in self[:1000]])) for f in formulas}
        best = max(shares, key=shares.__getitem__)
        return Baseline(best, shares[best])


def _stock_premises(seed: int) -> Iterator[list[str]]:
    """The premises of one stock item after another, a repeated one named once.

    The random numbers are drawn in the stock order. A whole stock item would also search for a conclusion,
    which takes most of its time and is now and then wrong.
    """
    config = PropositionalLogicConfig(seed=seed * SEED_STRIDE)
    stock = PropositionalLogicDataset(config)
    index = 0
    while True:
        rng = Random(stock.seed + index)
        index += 1
        variables = [chr(ord("P") + i) for i in range(rng.randint(config.min_vars, config.max_vars))]
        statements = rng.randint(config.min_statements, config.max_statements)
        yield list(dict.fromkeys(map(str, stock._generate_premises(rng, variables, statements))))


class LetterCounting(Task):
    """reasoning-gym's `letter_counting`, asked of single words: how many r's are in "strawberry"?

    The words are reasoning-gym's list of 3 to 10 letters. Test words are held out whole, "strawberry" is one.
    Balanced: 1, 2 and 3 equally often, give or take one; otherwise the stock mix, a letter of a word.
    """

    name = "letter_counting"
    stepwise = True

    @classmethod
    def draw(cls, split: str, size: int, seed: int, balanced: bool) -> "LetterCounting":
        pairs, rng = _letter_pairs(split), np.random.default_rng(seed)
        if balanced:
            pools = [np.flatnonzero(pairs.counts == count) for count in (1, 2, 3)]
            _check_size(cls, split, size, 3 * min(map(len, pools)))
            rows = [rng.choice(pool, (size + 2 - i) // 3, replace=False) for i, pool in enumerate(pools)]
            rows = rng.permutation(np.concatenate(rows))
        else:
            _check_size(cls, split, size, len(pairs.letters))
            # Whoever rings first: exponential times draw rows without replacement, each with its own chance.
            rows = np.argsort(rng.exponential(size=len(pairs.chances)) / pairs.chances)[:size]
        examples = []
        for row in rows:
            word, letter, count = pairs.words[row], pairs.letters[row], str(pairs.counts[row])
            question = f'How many times does the letter "{letter}" appear in the text: "{word}"?'
            examples.append(Example(question, count, {"word": word, "letter": letter}))
        return cls(examples, split, tuple(map(str, range(1, 4 if balanced else pairs.counts.max() + 1))))

    @staticmethod
    def key(metadata: Mapping[str, Any]) -> str:
        return metadata["word"]

    def score(self, answer: str | None, example: Example) -> float:
        """1.0 when `answer` is the true whole number; white space and a full stop do not matter."""
        number = re.fullmatch("[0-9]{1,4}", _bare(answer))
        return float(number is not None and str(int(number[0])) == example.answer)

    def thinking(self, example: Example) -> str:
        """The word letter by letter, with the running count: "s = 0 t = 0 r = 1 ..."."""
        return teacher.letter_derivation(example.metadata["word"], example.metadata["letter"])

    def check_thinking(self, text: str | None, example: Example, answer: str | None = None) -> bool:
        return self.right_steps(text, example, answer) == 1.0

    def read_steps(self, text: str, example: Example) -> teacher.Steps:
        return teacher.letter_steps(text, example.metadata["word"], example.metadata["letter"])


class _Pairs(NamedTuple):
    """Every word of a split with every letter of it, one row each."""

    words: list[str]
    letters: list[str]
    counts: np.ndarray  # (rows,) how often the letter is in the word
    chances: np.ndarray  # (rows,) of the letter once the word is drawn: 1 / different letters in the word


@cache
def _letter_pairs(split: str) -> _Pairs:
    unique = dict.fromkeys(read_data_file("words3to10.txt").lower().split())
    letters_of = {word: sorted(set(word)) for word in unique if split_of(word) == split}
    words = [word for word, letters in letters_of.items() for _ in letters]
    letters = list(chain.from_iterable(letters_of.values()))
    counts = np.array([word.count(letter) for word, letter in zip(words, letters, strict=True)])
    return _Pairs(words, letters, counts, np.array([1 / len(letters_of[word]) for word in words]))


_TASKS: dict[str, type[Task]] = {task.name: task for task in (Syllogism, PropositionalLogic, LetterCounting)}
TASK_NAMES = tuple(_TASKS)


def load_task(name: str, split: str = "train", size: int = 500, seed: int = 0, balanced: bool = True) -> Task:
    """`size` unique questions of one split of the task `name`; the same arguments give the same questions.

    No question of a test split is in any train split, whatever the seeds and sizes (see `split_of`).
    `balanced` makes the true answers equally frequent, where a task has classes. ValueError for an unknown
    name or split and for a size that the task does not have.
    """
    if name not in _TASKS:
        raise ValueError(unknown("task", name, TASK_NAMES))
    if split not in SPLITS:
        raise ValueError(f"There is no split {split!r}; use 'train' or 'test'.")
    if size < 1 or seed < 0:
        raise ValueError(f"Ask for a size of 1 or more with a seed of 0 or more, not {size} with {seed}.")
    return _TASKS[name].draw(split, size, seed, balanced)
