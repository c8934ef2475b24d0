"""Traces for the warm-up, from an OpenAI-compatible API or the offline teacher; the verifier decides which are kept."""

import asyncio
import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from helpers.completions import api_key, in_a_loop_of_its_own
from helpers.prompts import completion, extract_answer, extract_thinking, messages
from helpers.rewards import format_reward
from helpers.runs import progress_bar, read_jsonl, write_atomically
from helpers.tasks import Example, Task

TEACHER = "the offline teacher"
PRICES = {"gpt-4.1-mini": (0.40, 1.60)}  # USD for a million tokens in and out: OpenAI's list price in 2025
GIVE_UP = 5  # questions in a row without a reply in spite of all retries: nobody is there
SILENT = "timeout or broken connection"
HINT = (
    "For the writer's eyes: a right answer is {answer}. Work it out again from the question alone, in short steps that "
    "each follow from what stands before them, and come to the answer last. Write as if this note were not here."
)
QUOTE = 5  # words in a row that a reply shares with HINT make a quotation
_ANSWER = r"(?:(?:correct|right|true|final|actual) ){0,2}(?:answer|solution|verdict)"
_GIVEN = "(?:given|provided|supplied|stated|specified|indicated|known|told|disclosed|revealed)"
LEAKS = (
    rf"(?:{_GIVEN}|reference|expected|target|desired|required|official|gold) {_ANSWER}",  # the provided answer
    # The correct answer is given; but not: the answer, given these premises, or: the answer is given by the count.
    rf"{_ANSWER} (?:(?:that|which|is|was|has been|had been|we were|i was|already) ){{0,3}}{_GIVEN}"
    r"(?! (?:that|the|these|this|those|both|our|by|all|no|some|premises?)\b)",
    rf"(?:told|given|informed|already know|knew|knowing)(?: me| us| that| of| about| beforehand){{0,3}} the {_ANSWER}",
    rf"{_ANSWER} is supposed to be|(?:match|matches|agrees? with|consistent with|in line with|justify) the {_ANSWER}",
    r"hints?|answer key|ground truth|work(?:ing)? backwards?|reverse[- ]engineer(?:ing)?|as (?:instructed|requested)",
    r"(?:in|from|by|to|per) (?:the|this|your) (?:prompt|note|instructions?|system message|user)",
    r"the (?:prompt|note|instructions?|user) (?:already |has |have ){0,2}"
    r"(?:says?|said|states?|stated|gives?|gave|given|tells?|told|mentions?|provides?|provided|indicates?|specifies)",
)
_LEAK = re.compile(rf"\b(?:{'|'.join(LEAKS)})\b")
_KEYS = {"task", "question", "by", "kept", "prompt_tokens", "completion_tokens"}  # of each line of a file


class Reply(NamedTuple):
    """A reply's text, what is wrong with it whatever it says, and its tokens in and out (None: it did not tell)."""

    text: str
    fault: str | None = None
    tokens: tuple[int | None, int | None] = (0, 0)


def trace_messages(example: Example) -> list[dict[str, str]]:
    """The chat that asks for a trace: the usual one, with the true answer as a note under the question."""
    system, user = messages(example.question)
    return [system, {"role": "user", "content": f"{user['content']}\n\n{HINT.format(answer=example.answer)}"}]


def read_reply(answer: Any) -> Reply:
    """A chat completion as a Reply. Never raises, whatever a server put into it."""
    usage = getattr(answer, "usage", None)
    tokens = (getattr(usage, "prompt_tokens", None), getattr(usage, "completion_tokens", None))
    tokens = tokens if all(isinstance(n, int) for n in tokens) else (None, None)
    try:
        choice = answer.choices[0]
        text, refusal, end = choice.message.content, getattr(choice.message, "refusal", None), choice.finish_reason
    except (AttributeError, IndexError, TypeError):
        return Reply("", "unreadable", tokens)
    said = str(text or refusal or "").encode("utf-8", "replace").decode()  # no file holds one half of a surrogate pair
    fault = "refusal" if refusal or end == "content_filter" else "cut off" if end == "length" else None
    return Reply(said, fault, tokens)


def leaks_hint(text: str, example: Example) -> bool:
    """True when `text` quotes HINT, five words in a row, or speaks of an answer, a note or a prompt it got (LEAKS).

    It knows English phrases only, rejects a good trace rather than keep a bad one, and cannot see a hint that is used
    without a word. What the question itself says is no leak.
    """

    def runs(words: list[str]) -> set[tuple[str, ...]]:
        return {tuple(words[i : i + QUOTE]) for i in range(len(words) - QUOTE + 1)}

    said = runs(re.findall(r"\w+", text.lower()))
    if any(said & runs(re.findall(r"\w+", part)) for part in HINT.lower().split("{answer}")):  # the answer may be said
        return True
    plain = " ".join(re.sub(r"[*_`\"“”]", "", text).lower().split())
    return any(found[0] not in example.question.lower() for found in _LEAK.finditer(plain))


def reject(text: str, task: Task, example: Example) -> str | None:
    """Why a reply is no trace to learn from; None for a good one."""
    if not text.strip():
        return "empty"
    if format_reward(text) != 1.0:
        return "wrong format"
    if not extract_thinking(text):
        return "no thinking"
    if task.score(extract_answer(text), example) != 1.0:
        return "wrong answer"
    return "hint leaked" if leaks_hint(text, example) else None


class TraceFile:
    """One writer's traces for one task: an append-only JSON Lines file, a line a reply, kept or rejected.

    kept: question -> (thinking, answer). replies: question -> how many. left_out: question -> why. failures: this
    session's requests without a reply, by HTTP status; a server may bill SILENT ones. ValueError for a file of another
    task or writer, and where held-out questions would be written; without a writer (`by`) the file is only read.
    """

    def __init__(self, path: str | Path, task: Task, by: str | None = None, prices=None) -> None:
        self.path, self.task, self.by, self.prices = Path(path), task, by, prices
        self.kept: dict[str, tuple[str, str]] = {}
        self.left_out = {example.question: "not asked" for example in task}
        self.replies, self.rejected, self.failures, self.tokens = Counter(), Counter(), Counter(), Counter()
        records = read_jsonl(self.path)
        for number, record in enumerate(records, 1):
            if not isinstance(record, dict) or not _KEYS <= record.keys():
                raise ValueError(f"{path} is no file of traces: line {number} is something else; choose another file.")
            for what, mine in (("task", task.name), ("by", by or record["by"])):
                if record[what] != mine:
                    raise ValueError(f"{path} holds traces of {record[what]}; give {mine} a file of its own.")
            self._count(record)
        if by:
            self._prepare(records)

    def _count(self, record: dict[str, Any]) -> None:
        question = record["question"]
        self.replies[question] += 1
        for side in ("prompt_tokens", "completion_tokens"):
            self.tokens[side] += record[side] or 0
        self.tokens["untold"] += record["prompt_tokens"] is None
        if record["kept"]:
            self.kept[question] = (record["thinking"], record["answer"])
            self.left_out.pop(question, None)
        else:
            self.rejected[record["reason"]] += 1
            if question in self.left_out:
                self.left_out[question] = record["reason"]

    def _prepare(self, records: list[dict[str, Any]]) -> None:
        if self.task.split != "train":
            raise ValueError(f"Traces are for training questions; these are of the {self.task.split} split.")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab+") as file:  # a path that cannot be written to shows before anything is paid for
            file.seek(0)
            lines = file.read().split(b"\n")
        if lines[-1]:  # the file does not end with a line's end
            write_atomically(self.path, "".join(map(_line, records)))
            if sum(map(bool, lines)) > len(records):
                print(f"The last line of {self.path} was cut off while it was written, and is taken out.")

    def add(self, example: Example, reply: Reply) -> bool:
        """Write a reply down. True when it is kept."""
        reason = reply.fault or reject(reply.text, self.task, example)
        record = {"task": self.task.name, "question": example.question, "by": self.by, "kept": reason is None}
        if reason is None:
            record |= {"thinking": extract_thinking(reply.text), "answer": extract_answer(reply.text)}
        else:
            record |= {"reason": reason, "reply": reply.text}
        record |= {"prompt_tokens": reply.tokens[0], "completion_tokens": reply.tokens[1]}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(_line(record))
        self._count(record)
        return record["kept"]

    @property
    def cost(self) -> float | None:
        """USD for all replies in the file that told their tokens; None without prices."""
        counts = (self.tokens["prompt_tokens"], self.tokens["completion_tokens"])
        return sum(n * price for n, price in zip(counts, self.prices, strict=True)) / 1e6 if self.prices else None

    def __str__(self) -> str:
        """The summary for a person."""
        n = len(self.task)
        lines = [f"{n - len(self.left_out)} of {n} questions have a trace by {self.by} in {self.path}"]
        reasons = {
            "questions left out": Counter(self.left_out.values()),
            "replies rejected": self.rejected,
            "requests without a reply": +self.failures,
        }
        for title, counts in reasons.items():
            lines += [f"{title}: {', '.join(f'{n} {why}' for why, n in counts.most_common())}"] if counts else []
        if self.by != TEACHER:
            lines += ["tokens: {prompt_tokens:,} in, {completion_tokens:,} out".format_map(self.tokens)]
            lines[-1] += f" (not told in replies: {self.tokens['untold']})" if self.tokens["untold"] else ""
        if self.prices:
            lines += [f"cost: {self.cost:.4f} USD at {self.prices[0]:g} in, {self.prices[1]:g} out a million tokens"]
        return "\n".join(lines)

    __repr__ = __str__


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def load_traces(path: str | Path, task: Task) -> tuple[list[tuple[str, str]], Task]:
    """The (thinking, answer) pairs in a file for a task's questions, and the task with just these, both for `sft`.

    ValueError when there is none.
    """
    kept = TraceFile(path, task).kept
    examples = [example for example in task if example.question in kept]
    if not examples:
        command = f"python -m helpers datagen {task.name} --size {len(task)} --out {path}"
        raise ValueError(f"{path} has no trace for these questions; write them, with the same --seed: {command}")
    return [kept[example.question] for example in examples], type(task)(examples, task.split, task.classes)


@dataclass(frozen=True)
class ApiConfig:
    """How an API is asked. The key comes from the environment (OPENAI_API_KEY) alone and goes to `base_url`.

    base_url: none is OpenAI's own. concurrency: open requests at most. attempts: replies one question may cost, over
    all sessions. max_retries: of a request without a reply (429, 5xx, a broken connection, `timeout` seconds of
    silence); openai does them and waits as Retry-After says. prices: USD for a million tokens in and out.
    """

    model: str = "gpt-4.1-mini"
    base_url: str | None = None
    concurrency: int = 50
    attempts: int = 3
    max_retries: int = 5
    timeout: float = 60.0
    max_tokens: int = 600
    temperature: float = 0.7
    prices: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name in ("concurrency", "attempts", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}.")
        if not (min(self.max_retries, self.temperature, *(self.prices or ())) >= 0 and self.timeout > 0):
            raise ValueError("max_retries, temperature and prices must be 0 or more, and timeout above 0.")
        if not re.match("https?://.", self.base_url or "http://-"):
            raise ValueError("base_url must start with http:// or https://, as in http://localhost:8000/v1.")


def make_traces(task: Task, path: str | Path, api: ApiConfig | None = None, *, progress: bool = True) -> TraceFile:
    """Write the traces that a file does not have yet, by an API, or by the offline teacher if that is None.

    An API is asked by `ask_api` in a thread of its own, so this works where an event loop is running, as in Jupyter;
    an interrupt ends it. Print the result for a summary.
    """
    if api is None:
        file = TraceFile(path, task, TEACHER)
        for example in task:
            if not file.replies[example.question]:
                file.add(example, Reply(completion(task.thinking(example), example.answer)))
        return file
    return in_a_loop_of_its_own(lambda: ask_api(task, path, api, progress=progress))


async def ask_api(task: Task, path: str | Path, api: ApiConfig, *, progress: bool = True) -> TraceFile:
    """Ask an API for the traces that a file does not have yet, up to `concurrency` at a time.

    A reply is in the file before its question is asked again, so what is lost when this is stopped are the replies to
    the requests that are open. ValueError where a key is needed and there is none. RuntimeError, one sentence, as soon
    as asking again is no use (400, 401, 403, 404, no credit) and when GIVE_UP questions in a row get no reply.
    """
    import openai

    key = api_key()
    own = not (api.base_url or os.environ.get("OPENAI_BASE_URL"))  # OpenAI's own server
    if own and not key:
        raise ValueError("Set the environment variable OPENAI_API_KEY, or name a server that needs no key as base_url.")
    file = TraceFile(path, task, api.model, api.prices or (PRICES.get(api.model) if own else None))
    asked = [e for e in task if e.question not in file.kept and file.replies[e.question] < api.attempts]
    bar = progress_bar("traces", len(task), len(task) - len(asked), progress)
    gate = asyncio.Semaphore(api.concurrency)
    in_a_row = 0

    async def sent(_) -> None:
        file.failures[SILENT] += 1  # until there is a reply

    async def received(response) -> None:
        if not response.is_success:
            file.failures[SILENT] -= 1
            file.failures[f"HTTP {response.status_code}"] += 1

    async def trace(example: Example) -> None:
        nonlocal in_a_row
        while file.replies[example.question] < api.attempts:
            async with gate:
                reply = await _ask(client, api, key, example)
            if isinstance(reply, str):
                file.left_out[example.question] = f"no reply ({reply})"
                in_a_row += 1
                if in_a_row >= GIVE_UP:
                    raise RuntimeError(f"{in_a_row} questions in a row got no reply ({reply}); run this again later.")
                break
            in_a_row = 0
            file.failures[SILENT] -= 1
            if file.add(example, reply):
                break
        bar.set_postfix_str(f"replies rejected: {file.rejected.total()}", refresh=False)
        bar.update()

    http = openai.DefaultAsyncHttpxClient(event_hooks={"request": [sent], "response": [received]})
    settings = {"base_url": api.base_url, "max_retries": api.max_retries, "timeout": api.timeout, "http_client": http}
    try:
        async with openai.AsyncOpenAI(api_key=key or "none", **settings) as client, asyncio.TaskGroup() as group:
            for example in asked:
                group.create_task(trace(example))
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    finally:
        bar.close()
    return file


async def _ask(client, api: ApiConfig, key: str, example: Example) -> Reply | str:
    """The reply to one request, or in a word why there is none. RuntimeError when asking again is no use."""
    import openai

    request = {"model": api.model, "messages": trace_messages(example)}
    request |= {"max_tokens": api.max_tokens, "temperature": api.temperature}
    try:
        reply = read_reply(await client.chat.completions.create(**request))
        return reply._replace(text=_without(key, reply.text))
    except ValueError:  # the body is no JSON
        return Reply("", "unreadable", (None, None))
    except openai.APIConnectionError as error:
        return "timeout" if isinstance(error, openai.APITimeoutError) else "no connection"
    except openai.APIStatusError as error:
        status, said = error.status_code, error.body.get("message") if isinstance(error.body, dict) else None
        if error.code != "insufficient_quota" and (status in (408, 409, 429) or status >= 500):
            return f"HTTP {status}"
    # Raised out here it has no link to openai's error, which holds the request and with it the key.
    words = " ".join(_without(key, str(said or "no reason given")).split())[:200]
    raise RuntimeError(
        {
            401: "The server refuses the key (401); set OPENAI_API_KEY to one that it knows.",
            403: f"The server forbids this key the use of {api.model!r} (403).",
            404: f"The server has no model {api.model!r} or no such address (404): {words}",
            429: "The account has no credit left (429, insufficient_quota).",
        }.get(status, f"The server does not accept the request ({status}): {words}")
    )


def _without(key: str, text: str) -> str:
    """`text` without the key, which a server may say back. A short one, for a local server, is no secret."""
    return text.replace(key, "***") if len(key) >= 12 else text
