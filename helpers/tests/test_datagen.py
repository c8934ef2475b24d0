"""Traces: what is kept and why, the file and its mending, an API that misbehaves in every way, over real sockets."""

import asyncio
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
import urllib.request
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch

from helpers import pipeline
from helpers.__main__ import main
from helpers.datagen import (
    HINT,
    TEACHER,
    ApiConfig,
    ask_api,
    leaks_hint,
    load_traces,
    make_traces,
    read_reply,
    reject,
    trace_messages,
)
from helpers.local_server import running
from helpers.models import load_model
from helpers.prompts import SYSTEM_PROMPT, completion
from helpers.recipes import load_recipe
from helpers.sft import encode_traces
from helpers.tasks import TASK_NAMES, Example, load_task

TASK = load_task("letter_counting", "train", 12)
KEY = "sk-planted-0123456789"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """No key and no server of the person who runs the tests."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


# --- a server that plays an API ---


def good(example):
    """A trace to keep."""
    return completion(TASK.thinking(example), example.answer)


def chat(content, finish_reason="stop", usage=(100, 20), **message):
    """The JSON of a chat completion."""
    choice = {
        "index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": content, **message}
    }  # fmt: skip
    body = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    if usage:
        body["usage"] = dict(zip(("prompt_tokens", "completion_tokens"), usage, strict=True), total_tokens=sum(usage))
    return body


def send(handler, body, status=200, kind="application/json", **headers):
    """One HTTP response; what is no text already goes out as JSON."""
    data = (body if isinstance(body, str) else json.dumps(body)).encode()
    handler.send_response(status)
    for name, value in {"Content-Type": kind, "Content-Length": len(data), **headers}.items():
        handler.send_header(name.replace("_", "-"), str(value))
    handler.end_headers()
    handler.wfile.write(data)


def says(text, **parts):
    """The act of answering with a text, or with what a function makes of the example."""
    return lambda handler, example: send(handler, chat(text(example) if callable(text) else text, **parts))


def fails(status, code=None, message="no", **headers):
    """The act of answering with an HTTP error."""
    body = {"error": {"message": message, "type": "error", "code": code}}
    return lambda handler, _: send(handler, body, status, **headers)


def reset(handler, _):
    """Break the connection off, as a crashed server does."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True


def slow(seconds):
    """The act of answering well, but late."""

    def late(handler, example):
        time.sleep(seconds)
        send(handler, chat(good(example)))

    return late


RIGHT = says(good)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay open, as they do at a real API

    def do_POST(self):
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = request["messages"][-1]["content"]
        example = next(e for e in server.task if asked.startswith(f"{e.question}\n"))
        with server.lock:
            server.log.append((example.question, request, self.headers["Authorization"]))
            server.open += 1
            server.peak = max(server.peak, server.open)
            acts = server.script.get(example.question)
            act = acts.pop(0) if acts else server.default
        try:
            self.request_said = request
            act(self, example)
        except OSError:  # the client has gone
            self.close_connection = True
        finally:
            with server.lock:
                server.open -= 1

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    """`script`: question -> what to do at each request for it; after that, `default`. `log`: what was asked."""

    daemon_threads, request_queue_size = True, 128

    def __init__(self, task, default):
        super().__init__(("127.0.0.1", 0), Handler)
        self.task, self.default = task, default
        self.script, self.log, self.lock, self.open, self.peak = {}, [], threading.Lock(), 0, 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, *_):
        pass  # a client that has gone

    def asked(self):
        """question -> how often it was asked."""
        return Counter(question for question, *_ in self.log)


def serving(task=TASK, default=RIGHT):
    return running(Server(task, default))


@pytest.fixture
def server():
    with serving() as server:
        yield server


def first(size, task=TASK):
    return type(task)(task[:size], task.split, task.classes)


def ask(server, path, size=12, task=None, **settings):
    """Ask the server for the first questions' traces."""
    settings = {"model": "m", "base_url": server.url, "max_retries": 2, "timeout": 20, **settings}
    return make_traces(task or first(size), path, ApiConfig(**settings), progress=False)


def records(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- the offline teacher ---


@pytest.mark.parametrize("name", TASK_NAMES)
def test_the_teacher_writes_a_trace_a_question_and_sft_takes_them_all(name, tmp_path, pocket):
    task = load_task(name, "train", 30)
    path = tmp_path / "new" / "traces.jsonl"
    file = make_traces(task, path)
    assert str(file) == f"30 of 30 questions have a trace by the offline teacher in {path}" == repr(file)
    lines = records(path)
    assert [line["question"] for line in lines] == [e.question for e in task]
    for line in lines:
        assert list(line) == [
            "task", "question", "by", "kept", "thinking", "answer", "prompt_tokens", "completion_tokens",
        ]  # fmt: skip
        assert (line["task"], line["by"], line["kept"], line["prompt_tokens"]) == (name, TEACHER, True, 0)
    traces, sub_task = load_traces(path, task)
    assert traces == [(task.thinking(e), e.answer) for e in task] and sub_task[:] == task[:]
    assert len(encode_traces(pocket[1], sub_task, traces)) == 30
    before = path.read_bytes()
    make_traces(task, path)
    assert path.read_bytes() == before
    make_traces(load_task(name, "train", 40), path)  # more of the same seed: the first ones are among them
    assert path.read_bytes().startswith(before) and 40 <= len(records(path)) <= 70


def test_load_traces_fits_traces_and_questions_together_whatever_the_order_of_lines(tmp_path):
    path = tmp_path / "traces.jsonl"
    make_traces(TASK, path)
    lines = path.read_text().splitlines(keepends=True)
    random.Random(0).shuffle(lines)
    path.write_text("".join(lines[2:]))
    traces, sub_task = load_traces(path, TASK)
    missing = {json.loads(line)["question"] for line in lines[:2]}
    assert [e for e in TASK if e.question not in missing] == list(sub_task)
    assert traces == [(TASK.thinking(e), e.answer) for e in sub_task]
    assert (type(sub_task), sub_task.split, sub_task.classes) == (type(TASK), TASK.split, TASK.classes)
    make_traces(TASK, path)
    assert sorted(path.read_text().splitlines(keepends=True)) == sorted(lines)


# --- the question that is asked ---


@pytest.mark.parametrize("name", TASK_NAMES)
def test_the_true_answer_is_in_the_prompt(name):
    for example in load_task(name, "train", 20):
        system, user = trace_messages(example)
        assert system == {"role": "system", "content": SYSTEM_PROMPT} and user["role"] == "user"
        assert user["content"] == f"{example.question}\n\n{HINT.format(answer=example.answer)}"
        assert f"a right answer is {example.answer}. " in user["content"] and "None" not in user["content"]


# --- which replies are kept ---

LEAKING = [
    "The correct answer is given.", "As stated in the hint, it is 2.", "This matches the provided answer.",
    "We were given the answer 2, so count.", "The answer was already provided, so I only confirm it.",
    "Since the known answer is 2, there are two.", "I was told that the correct answer is 2.",
    "According to the note, a right answer is 2.", "The prompt says 2.", "The answer is supposed to be 2.",
    "Working backwards from 2.", "It agrees with the correct answer.", "As the instructions already state, 2.",
    "The answer that was told is 2.", "the **given** answer", "The expected answer is 2.", "As requested, I hide it.",
    "The user provided 2.", "Knowing the answer, we\ncount.", "The answer given is 2.", "ground truth: 2",
    "The   correct\nanswer is   specified.", "For the writer's eyes: a right answer is 2.",
    "I write as if this note were not here.", HINT.format(answer="2"), HINT.format(answer="2").upper(),
]  # fmt: skip
INNOCENT = [
    "So the answer is 2.", "Therefore the correct answer is 2.", "Given the letters above, the answer is 2.",
    "The answer given the two premises is Yes.", "It is given that all cats are dogs.", "The given premises say so.",
    "The stated conclusion does not follow.", "As stated in premise 1, all A are B.", "We are told that no A are B.",
    "The answer is given by the last count.", "Provided that P holds, Q holds.", "A right answer is 2.",
    "The claim is known to fail when there are no A.", "This supports the claim.", "What the question says is clear.",
    "The user's word has 6 letters.", "The letters of the word are given by its spelling.", "1 + 1 = 2, noteworthy",
]  # fmt: skip


@pytest.mark.parametrize("text", LEAKING)
def test_a_hint_that_leaks_is_seen(text):
    example = TASK[0]
    assert leaks_hint(f"First r, then a. {text} Then b.", example)
    assert reject(completion(text, example.answer), TASK, example) == "hint leaked"


@pytest.mark.parametrize("text", INNOCENT)
def test_plain_reasoning_is_no_leak(text):
    assert not leaks_hint(f"First r, then a. {text} Then b.", TASK[0])


@pytest.mark.parametrize("name", TASK_NAMES)
def test_no_trace_of_the_teacher_leaks_and_any_of_them_does_with_the_hint_in_it(name):
    task = load_task(name, "train", 100)
    for example in task:
        assert reject(completion(task.thinking(example), example.answer), task, example) is None
        note = HINT.format(answer=example.answer)
        assert leaks_hint(f"{note} {task.thinking(example)}", example)
        assert not leaks_hint(f"So the answer is {example.answer}, a right answer is {example.answer}.", example)


def test_a_long_reply_takes_no_long_time():
    """A pattern that backtracks would take minutes for this."""
    for words in ("correct ", "answer is already that ", "told me that of ", "the user has already "):
        assert not leaks_hint(words * 30_000, TASK[0])


def test_what_the_question_says_is_no_leak():
    example = Example('How many times does the letter "t" appear in the text: "hint"?', "1", {"word": "hint"})
    assert not leaks_hint("The word hint has h, i, n and t.", example)
    assert leaks_hint("The word hint: as the hints say.", example)
    assert leaks_hint("The word hint.", TASK[0])


REPLIES = {
    "": "empty", " \n": "empty", "no tags": "wrong format", "<think> a </think>": "wrong format",
    "Sure! <think> a </think> <answer> X </answer>": "wrong format",
    "<think> </think> <answer> X </answer>": "no thinking",
    "<think> a </think> <answer> 9 </answer>": "wrong answer", "<think> a </think> <answer> </answer>": "wrong answer",
    "<think>a</think><answer>X.</answer>": None,
}  # fmt: skip


@pytest.mark.parametrize(("reply", "reason"), REPLIES.items())
def test_why_a_reply_is_rejected(reply, reason):
    assert reject(reply.replace("X", TASK[0].answer), TASK, TASK[0]) == reason


def test_any_right_conclusion_is_kept_not_only_the_one_in_the_prompt():
    task = load_task("propositional_logic", "train", 20)
    example = next(e for e in task if "∨" not in e.answer)
    other = f"({example.answer} ∨ {example.answer})"
    assert reject(completion("So it is.", other), task, example) is None
    premise = example.metadata["premises"][0]
    assert reject(completion("So it is.", premise), task, example) == "wrong answer"


@pytest.mark.parametrize(
    "answer",
    [None, "<html>", {}, SimpleNamespace(choices=None), SimpleNamespace(choices=[]), SimpleNamespace(choices=[None]),
     SimpleNamespace(choices=[SimpleNamespace(message=None, finish_reason="stop")], usage="many")],
)  # fmt: skip
def test_nothing_a_server_says_breaks_the_reading(answer):
    assert read_reply(answer) == ("", "unreadable", (None, None))


# --- an API that misbehaves ---


def test_a_server_that_answers_well(server, tmp_path):
    path = tmp_path / "traces.jsonl"
    file = ask(server, path)
    assert server.asked() == Counter(e.question for e in TASK)
    _, request, authorization = server.log[0]
    assert request["model"] == "m" and request["max_tokens"] == 600 and request["temperature"] == 0.7
    example = next(e for e in TASK if e.question == server.log[0][0])
    assert request["messages"] == trace_messages(example)
    assert authorization == "Bearer none"  # no key in the environment
    traces, sub_task = load_traces(path, TASK)
    assert traces == [(TASK.thinking(e), e.answer) for e in TASK] and len(sub_task) == len(TASK)
    assert file.by == "m" and not file.left_out and not file.rejected and not +file.failures
    assert str(file) == f"12 of 12 questions have a trace by m in {path}\ntokens: 1,200 in, 240 out"
    assert str(ask(server, path)) == str(file) and len(server.log) == 12  # nothing is paid for twice


def leaking(example):
    return completion(f"The provided answer is {example.answer}. {TASK.thinking(example)}", example.answer)


def quoting(example):
    return completion(f"{HINT.format(answer=example.answer)} {TASK.thinking(example)}", example.answer)


def half_a_sign(handler, example):
    """A reply cut inside a character that JSON writes as two."""
    body = json.dumps(chat("cut here: X", "length")).replace("X", "\\ud83d")
    send(handler, body)


HTML = "<html>busy</html>"
# What the server does first, why it is not kept (None: no reply was rejected), what failed on the way.
FAULTS = {
    "429": ([fails(429, Retry_After="0.05")], None, {"HTTP 429": 1}),
    "429 twice": ([fails(429, "rate_limit_exceeded", Retry_After="0.05")] * 2, None, {"HTTP 429": 2}),
    "500": ([fails(500, Retry_After="0.05")], None, {"HTTP 500": 1}),
    "503, no JSON": ([lambda h, _: send(h, HTML, 503, "text/html", Retry_After="0.05")], None, {"HTTP 503": 1}),
    "reset": ([reset], None, {"timeout or broken connection": 1}),
    "timeout": ([slow(1.5)], None, {"timeout or broken connection": 1}),
    "refusal": ([says(None, refusal="I will not.")], "refusal", {}),
    "filtered": ([says("<think>", finish_reason="content_filter")], "refusal", {}),
    "empty": ([says("")], "empty", {}),
    "null": ([says(None)], "empty", {}),
    "cut off": ([says(good, finish_reason="length")], "cut off", {}),
    "cut inside a sign": ([half_a_sign], "cut off", {}),
    "wrong answer": ([says(completion("s = 0", "17"))], "wrong answer", {}),
    "no tags": ([says(lambda e: f"The answer is {e.answer}.")], "wrong format", {}),
    "leaked": ([says(leaking)], "hint leaked", {}),
    "quoted": ([says(quoting)], "hint leaked", {}),
    "broken JSON": ([lambda h, _: send(h, '{"id": "1", "choi')], "unreadable", {}),
    "a page": ([lambda h, _: send(h, HTML, kind="text/html")], "unreadable", {}),
    "no choices": ([lambda h, _: send(h, {"error": "busy"})], "unreadable", {}),
}


@pytest.mark.parametrize(("acts", "reason", "failures"), FAULTS.values(), ids=FAULTS)
def test_each_fault_is_counted_and_the_question_asked_again(acts, reason, failures, server, tmp_path):
    path = tmp_path / "traces.jsonl"
    server.script[TASK[0].question] = list(acts)
    file = ask(server, path, 2, timeout=1 if acts[0].__name__ == "late" else 20)
    assert dict(+file.failures) == failures
    assert file.rejected == ({reason: 1} if reason else {}) and not file.left_out
    assert server.asked() == {TASK[0].question: 2 + (len(acts) - 1), TASK[1].question: 1}
    assert len(load_traces(path, TASK)[0]) == 2
    bad = [line for line in records(path) if not line["kept"]]
    assert [line["reason"] for line in bad] == ([reason] if reason else [])
    for line in bad:
        assert list(line) == [
            "task", "question", "by", "kept", "reason", "reply", "prompt_tokens", "completion_tokens",
        ]  # fmt: skip
        assert line["prompt_tokens"] == (None if reason == "unreadable" else 100)
    for title, counts in (("replies rejected", file.rejected), ("requests without a reply", failures)):
        for why, n in counts.items():
            assert f"{title}: {n} {why}" in str(file)


def test_a_budget_of_replies_holds_over_all_sessions(server, tmp_path):
    """What was rejected is paid for too: it is written down, and not asked for again beyond the budget."""
    path = tmp_path / "traces.jsonl"
    stubborn = [e.question for e in TASK[:2]]
    server.script = {q: [says("no")] * 9 for q in stubborn}
    file = ask(server, path, 4, attempts=2)
    assert [server.asked()[e.question] for e in TASK[:4]] == [2, 2, 1, 1]
    assert file.left_out == dict.fromkeys(stubborn, "wrong format") and len(file.kept) == 2
    assert "questions left out: 2 wrong format\nreplies rejected: 4 wrong format\ntokens: 600 in" in str(file)
    before = path.read_bytes()
    assert str(ask(server, path, 4, attempts=2)) == str(file)
    assert path.read_bytes() == before and len(server.log) == 6
    server.script = {}
    assert not ask(server, path, 4, attempts=3).left_out and len(server.log) == 8
    assert path.read_bytes().startswith(before)  # lines are only ever added


def test_a_question_without_a_reply_is_left_out_and_asked_for_next_time(server, tmp_path):
    path = tmp_path / "traces.jsonl"
    away = [fails(429, Retry_After="0.02"), fails(502, Retry_After="0.02"), fails(500, Retry_After="0.02")]
    server.script[TASK[0].question] = list(away)
    server.script[TASK[1].question] = [slow(1.5)]
    file = ask(server, path, 3, timeout=1, max_retries=0)
    assert file.left_out == {TASK[0].question: "no reply (HTTP 429)", TASK[1].question: "no reply (timeout)"}
    assert "questions left out: 1 no reply (HTTP 429), 1 no reply (timeout)\n" in str(file)
    assert file.failures == {"HTTP 429": 1, "timeout or broken connection": 1} and len(records(path)) == 1
    server.script[TASK[0].question] = list(away)
    file = ask(server, path, 3)
    assert file.left_out == {TASK[0].question: "no reply (HTTP 500)"}
    assert +file.failures == {"HTTP 429": 1, "HTTP 502": 1, "HTTP 500": 1}
    assert not ask(server, path, 3).left_out and len(records(path)) == 3


def test_nobody_there_ends_it_soon(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    api = ApiConfig(base_url=url, max_retries=0)
    sentence = "5 questions in a row got no reply (no connection); run this again later."
    with pytest.raises(RuntimeError, match=f"^{re.escape(sentence)}$"):
        make_traces(TASK, tmp_path / "traces.jsonl", api, progress=False)
    assert make_traces(first(4), tmp_path / "traces.jsonl", api, progress=False).failures.total() == 4


def test_replies_between_failures_keep_it_going(server, tmp_path):
    for e in TASK[:10:2]:
        server.script[e.question] = [fails(500)]
    file = ask(server, tmp_path / "traces.jsonl", concurrency=1, max_retries=0)
    assert len(file.left_out) == 5 and len(file.kept) == 7
    with serving(default=fails(500)) as broken, pytest.raises(RuntimeError, match="5 questions in a row"):
        ask(broken, tmp_path / "others.jsonl", concurrency=1, max_retries=0)
    assert len(broken.log) == 5


STOPS = {
    401: "The server refuses the key (401); set OPENAI_API_KEY to one that it knows.",
    403: "The server forbids this key the use of 'm' (403).",
    404: "The server has no model 'm' or no such address (404): it said why",
    400: "The server does not accept the request (400): it said why",
    422: "The server does not accept the request (422): it said why",
    429: "The account has no credit left (429, insufficient_quota).",
}


@pytest.mark.parametrize(("status", "sentence"), STOPS.items())
def test_what_no_retry_can_mend_stops_at_once_with_one_sentence(status, sentence, server, tmp_path):
    path = tmp_path / "traces.jsonl"
    code = "insufficient_quota" if status == 429 else None
    server.script[TASK[2].question] = [fails(status, code, "it said\nwhy", Retry_After="0.02")] * 3
    with pytest.raises(RuntimeError, match=f"^{re.escape(sentence)}$"):
        ask(server, path, concurrency=1)
    again = 3 if status == 429 else 1  # openai's own retries know no empty account
    assert server.asked() == {TASK[0].question: 1, TASK[1].question: 1, TASK[2].question: again}
    assert len(records(path)) == 2
    server.script = {}
    assert not ask(server, path).left_out and server.asked()[TASK[0].question] == 1


@pytest.mark.parametrize("body", ["{", '{"error": null}', '{"error": {"message": null}}', "[1]", ""])
def test_an_error_without_words_is_one_sentence_too(body, server, tmp_path):
    server.script[TASK[0].question] = [lambda h, _: send(h, body, 400)]
    with pytest.raises(RuntimeError, match=r"^The server does not accept the request \(400\): no reason given$"):
        ask(server, tmp_path / "traces.jsonl", 1)


def test_no_more_requests_are_open_than_asked_for(tmp_path):
    task = load_task("letter_counting", "train", 24)
    for concurrency in (1, 4, 50):
        expected = min(concurrency, 24)

        def when_all_are_there(handler, example, expected=expected):
            until = time.monotonic() + 10
            while handler.server.peak < expected and time.monotonic() < until:
                time.sleep(0.01)
            time.sleep(0.03)  # for one too many to show
            RIGHT(handler, example)

        with serving(task, when_all_are_there) as server:
            ask(server, tmp_path / f"{concurrency}.jsonl", task=task, concurrency=concurrency)
        assert server.peak == expected and len(server.log) == 24


# --- the key ---


def test_the_key_goes_to_the_server_and_nowhere_else(server, tmp_path, monkeypatch, capfd, caplog):
    """A server that says the key back, in a reply and in each of its errors, tells it to nobody."""
    caplog.set_level("INFO")
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")  # as it comes out of a file
    path = tmp_path / "traces.jsonl"
    server.script[TASK[0].question] = [says(f"Bearer {KEY}"), says(completion(KEY, TASK[0].answer))]
    print(ask(server, path, 2))
    assert {authorization for *_, authorization in server.log} == {f"Bearer {KEY}"}
    shown = ""
    for number, status in enumerate((400, 401, 403, 404, 418, 429)):
        server.script[TASK[3 + number].question] = [fails(status, "insufficient_quota", f"{KEY} is bad")] * 3
        with pytest.raises(RuntimeError) as error:
            ask(server, path, 4 + number, max_retries=0)
        shown += "".join(traceback.format_exception(error.value)) + repr(error.value)
        links, seen = [error.value], []
        while links:  # nor is it to be found behind the error, whatever a debugger shows of it
            link = links.pop()
            seen.append(type(link).__module__)
            links += [e for e in (link.__cause__, link.__context__) if e is not None]
            links += [e for e in getattr(link, "exceptions", ()) if e not in (error.value,)]
        assert not any(name.startswith(("openai", "httpx")) for name in seen)
        server.script = {}
    shown += "".join(capfd.readouterr()) + caplog.text + path.read_text()
    assert KEY not in shown and "planted" not in shown
    assert "*** is bad" in shown and '"Bearer ***"' in path.read_text()


def test_a_server_of_one_s_own_needs_no_key(server, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="^Set the environment variable OPENAI_API_KEY, or name a server"):
        make_traces(TASK, tmp_path / "traces.jsonl", ApiConfig())
    assert not (tmp_path / "traces.jsonl").exists()
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    file = make_traces(TASK, tmp_path / "traces.jsonl", ApiConfig(), progress=False)
    assert len(file.kept) == 12 and file.cost is None  # another server's price is not OpenAI's


def test_a_local_server_s_key_that_is_a_common_word_harms_no_trace(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "1")
    assert len(ask(server, tmp_path / "traces.jsonl").kept) == 12
    assert load_traces(tmp_path / "traces.jsonl", TASK)[0] == [(TASK.thinking(e), e.answer) for e in TASK]


def test_a_key_that_cannot_be_one_is_not_shown(tmp_path, monkeypatch):
    for key in (f"{KEY}ä", f"{KEY}\nx"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(ValueError, match="^OPENAI_API_KEY holds a character that no key has; set it anew.$"):
            make_traces(TASK, tmp_path / "traces.jsonl", ApiConfig())


# --- tokens and cost ---


def test_tokens_and_cost_are_those_of_every_reply_kept_or_not(server, tmp_path, monkeypatch):
    path = tmp_path / "traces.jsonl"
    server.script[TASK[0].question] = [says("no", usage=(1_000, 7))]
    server.script[TASK[1].question] = [says(good, usage=None)]
    file = ask(server, path, 3, prices=(2.0, 10.0))
    assert (file.tokens["prompt_tokens"], file.tokens["completion_tokens"]) == (1_200, 47)
    assert file.cost == pytest.approx((1_200 * 2 + 47 * 10) / 1e6)
    *_, tokens, cost = str(file).splitlines()
    assert tokens == "tokens: 1,200 in, 47 out (not told in replies: 1)"
    assert cost == "cost: 0.0029 USD at 2 in, 10 out a million tokens"
    assert "cost: " not in str(ask(server, path, 3))


def test_the_list_price_is_openai_s_own(monkeypatch, tmp_path):
    """No request leaves: there is nothing to ask for."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for model, prices in (("gpt-4.1-mini", (0.4, 1.6)), ("other", None)):
        path = tmp_path / f"{model}.jsonl"
        line = {"task": TASK.name, "question": TASK[0].question, "by": model, "kept": True}
        line |= {"thinking": "", "answer": "", "prompt_tokens": 1_000_000, "completion_tokens": 1_000_000}
        path.write_text(json.dumps(line) + "\n")
        file = make_traces(first(1), path, ApiConfig(model=model), progress=False)
        assert file.prices == prices and file.cost == (2.0 if prices else None)


# --- the file ---


def stopped_at(path, cut):
    """Make traces, then cut the file off `cut` bytes before its end."""
    make_traces(TASK, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    return whole


@pytest.mark.parametrize("cut", [1, 2, 3, 40, 90])
def test_a_torn_last_line_is_taken_out_and_asked_for_again(cut, server, tmp_path, capsys):
    path = tmp_path / "traces.jsonl"
    whole = stopped_at(path, cut)
    make_traces(TASK, path)
    said = capsys.readouterr().out
    assert path.read_bytes() == whole
    torn = f"The last line of {path} was cut off while it was written, and is taken out.\n"
    assert said == (torn if cut > 1 else "")  # without its line's end it is whole still


def test_a_line_torn_inside_a_character_is_taken_out_too(tmp_path, capsys):
    task, path = load_task("propositional_logic", "train", 5), tmp_path / "traces.jsonl"
    make_traces(task, path)
    whole = path.read_bytes()
    at = whole.rindex("∧".encode()) if "∧".encode() in whole.splitlines()[-1] else whole.rindex("→".encode())
    path.write_bytes(whole[: at + 1])
    assert len(load_traces(path, task)[0]) == 4  # reading leaves the file as it is
    assert len(path.read_bytes()) == at + 1
    make_traces(task, path)
    assert path.read_bytes() == whole and capsys.readouterr().out.count("cut off") == 1


def test_files_that_will_not_do(server, tmp_path):
    path, other = tmp_path / "traces.jsonl", load_task("syllogism", "train", 4)
    make_traces(TASK, path)
    before = path.read_bytes()
    held_out = load_task("letter_counting", "test", 4)
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "metrics.jsonl").write_text('{"task": "letter_counting", "loss": 1}\n')
    (tmp_path / "broken.jsonl").write_bytes(before[:9] + b"\n" + before)
    no_file = "is no file of traces: line 1 is something else; choose another file."
    api = ApiConfig(model="m", base_url=server.url)
    cases = [
        (lambda: make_traces(other, path), "holds traces of letter_counting; give syllogism a file of its own."),
        (lambda: load_traces(path, other), "holds traces of letter_counting; give syllogism a file of its own."),
        (lambda: make_traces(TASK, path, api), "holds traces of the offline teacher; give m a file of its own."),
        (lambda: make_traces(held_out, tmp_path / "new.jsonl"), "these are of the test split."),
        (lambda: make_traces(TASK, tmp_path / "list.jsonl"), no_file),
        (lambda: load_traces(tmp_path / "metrics.jsonl", TASK), no_file),
        (lambda: make_traces(TASK, tmp_path / "broken.jsonl"), "is damaged in line 1; take that line out."),
        (lambda: load_traces(tmp_path / "none.jsonl", TASK),
         f"has no trace for these questions; write them, with the same --seed: python -m helpers datagen "
         f"letter_counting --size 12 --out {tmp_path / 'none.jsonl'}"),
        (lambda: load_traces(path, held_out), "has no trace for these questions"),
    ]  # fmt: skip
    for wrong, sentence in cases:
        with pytest.raises(ValueError) as error:
            wrong()
        assert sentence in str(error.value) and "\n" not in str(error.value)
    assert path.read_bytes() == before and not server.log
    assert not (tmp_path / "new.jsonl").exists() and not (tmp_path / "none.jsonl").exists()
    with pytest.raises(OSError):
        ask(server, tmp_path)
    assert not server.log  # a place that cannot be written to costs nothing


# --- stopping and going on ---


def test_killed_and_interrupted_runs_go_on_without_paying_twice(tmp_path):
    """One session is interrupted, the next one killed with signal 9, the last one goes on to the end."""
    path, task = tmp_path / "traces.jsonl", load_task("letter_counting", "train", 40)
    with serving(task, slow(0.04)) as server:
        for _ in range(2):
            server.script[task[0].question] = [says("no")]
        command = [sys.executable, "-m", "helpers", "datagen", "letter_counting", "--size", "40", "--out", str(path)]
        command += ["--api-model", "m", "--base-url", server.url, "--concurrency", "3"]
        for number, (how, enough) in enumerate([(signal.SIGINT, 8), (signal.SIGKILL, 20)]):
            told = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            process = subprocess.Popen(command, **told, env=os.environ | {"OPENAI_API_KEY": KEY})
            while path.read_bytes().count(b"\n") < enough if path.exists() else True:
                assert process.poll() is None, process.communicate()
                time.sleep(0.005)
            process.send_signal(how)
            out, err = process.communicate(timeout=20)
            assert KEY not in out + err + path.read_text()
            if how == signal.SIGINT:
                assert process.returncode == 130
                assert err.endswith(f"\nStopped. What is in {path} is kept; the same command goes on from there.\n")
                assert "Traceback" not in err and "never" not in err
            else:
                assert process.returncode == -9
            time.sleep(0.2)  # the server ends what was open
            finished = Counter(json.loads(line)["question"] for line in path.read_bytes().split(b"\n")[:-1])
            assert enough <= finished.total() < 41
            lost = server.asked() - finished
            assert lost.total() <= 3 * (number + 1)  # what was open, `concurrency` at the most, each time
        file = ask(server, path, task=task, concurrency=3)
    assert not file.left_out and file.replies.total() == 41
    for question, n in finished.items():
        assert server.asked()[question] - lost[question] == n + (question == task[0].question and n == 1)
    assert (server.asked() - file.replies).total() <= 6


def test_it_works_inside_a_running_event_loop(server, tmp_path):
    """As in a notebook: the plain call, which blocks, and the one that is awaited."""

    async def cell():
        file = ask(server, tmp_path / "blocked.jsonl", 3)
        awaited = await ask_api(first(3), tmp_path / "awaited.jsonl", ApiConfig("m", server.url), progress=False)
        return file, awaited

    for file in asyncio.run(cell()):
        assert len(file.kept) == 3
    assert {"m"} == {line["by"] for line in records(tmp_path / "awaited.jsonl")}


def test_an_interrupt_ends_the_call_that_blocks(tmp_path):
    def interrupt():
        while len(server.log) < 3:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)

    with serving(default=slow(0.1)) as server:
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            ask(server, tmp_path / "traces.jsonl", concurrency=1)
        time.sleep(0.15)
        n = len(records(tmp_path / "traces.jsonl"))
        assert 2 <= n < 12 and len(server.log) <= n + 1  # nothing goes on behind
        assert not [t for t in threading.enumerate() if t.name.startswith("ThreadPool")]


# --- from end to end ---


def test_the_command_writes_the_teacher_s_traces_and_goes_on_with_them(tmp_path, capsys):
    out = tmp_path / "traces.jsonl"
    assert main(["datagen", "syllogism", "--size", "40", "--seed", "3", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"40 of 40 questions have a trace by the offline teacher in {out}\n"
    task = load_task("syllogism", "train", 40, 3)
    assert load_traces(out, task)[0] == [(task.thinking(e), e.answer) for e in task]
    balanced = out.read_bytes()
    assert main(["datagen", "syllogism", "--size", "40", "--seed", "3", "--unbalanced", "--out", str(out)]) == 0
    assert out.read_bytes().startswith(balanced) and len(out.read_bytes()) > len(balanced)


def test_the_command_asks_an_api(tmp_path, capsys):
    out = tmp_path / "traces.jsonl"
    command = ["datagen", "letter_counting", "--size", "12", "--out", str(out), "--prices", "1", "10"]
    command += ["--max-tokens", "99", "--temperature", "0.5", "--concurrency", "2", "--attempts", "1"]
    with serving(default=slow(0.02)) as server:
        server.script[TASK[0].question] = [says("no")]
        assert main([*command, "--base-url", server.url, "--api-model"]) == 0
        *_, (_, request, _) = server.log
        assert server.peak <= 2 and len(server.log) == 12
    assert (request["max_tokens"], request["temperature"], request["model"]) == (99, 0.5, "gpt-4.1-mini")
    shown = capsys.readouterr().out
    assert "traces: " in shown and "12/12" in shown and "replies rejected: 1" in shown  # the bar
    assert [line for line in shown.splitlines() if "%|" not in line and line.strip()] == [
        f"11 of 12 questions have a trace by gpt-4.1-mini in {out}",
        "questions left out: 1 wrong format",
        "replies rejected: 1 wrong format",
        "tokens: 1,200 in, 240 out",
        "cost: 0.0036 USD at 1 in, 10 out a million tokens",
    ]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--concurrency", "3"], "--concurrency is for an API; add --api-model or --base-url."),
        (["--max-tokens", "3"], "--max-tokens is for an API; add --api-model or --base-url."),
        (["--api-model"],
         "Set the environment variable OPENAI_API_KEY, or name a server that needs no key as base_url."),
        (["--api-model", "m", "--concurrency", "0"], "concurrency must be 1 or more, not 0."),
        (["--api-model", "m", "--attempts", "0"], "attempts must be 1 or more, not 0."),
        (["--api-model", "m", "--timeout", "0"],
         "max_retries, temperature and prices must be 0 or more, and timeout above 0."),
        (["--api-model", "m", "--prices", "1", "-1"],
         "max_retries, temperature and prices must be 0 or more, and timeout above 0."),
        (["--base-url", "localhost:8000"],
         "base_url must start with http:// or https://, as in http://localhost:8000/v1."),
        (["--size", "0"], "Ask for a size of 1 or more with a seed of 0 or more, not 0 with 0."),
    ],
)  # fmt: skip
def test_a_mistake_on_the_command_line_is_one_sentence(options, sentence, tmp_path, capsys):
    out = tmp_path / "traces.jsonl"
    assert main(["datagen", "syllogism", "--out", str(out), *options]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", f"helpers: {sentence}\n")
    assert not out.exists()


TINY = ["sft.traces=12", "sft.epochs=1", "grpo.steps=1", "grpo.max_new_tokens=4", "train_size=4", "evaluation.size=2",
        "evaluation.max_new_tokens=2", "grpo.questions_per_rollout=2", "grpo.group_size=2"]  # fmt: skip


def test_a_recipe_names_its_traces_file(tmp_path, monkeypatch):
    path, seen = tmp_path / "traces.jsonl", {}
    make_traces(first(12), path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[4:]).replace("</think>", ""))

    class Stop(Exception):
        pass

    def warm_up(model, tokenizer, task, config, *, traces, **_):
        seen.update(task=task, traces=traces, encoded=encode_traces(tokenizer, task, traces))
        raise Stop

    monkeypatch.setattr(pipeline, "sft", warm_up)
    with pytest.raises(Stop):
        pipeline.train(load_recipe("pocket", [*TINY, f"sft.traces_file={path}"]), tmp_path / "run", say=lambda _: None)
    assert seen["task"][:] == TASK[4:] and len(seen["encoded"]) == 8
    assert seen["traces"] == [(TASK.thinking(e), e.answer) for e in TASK[4:]]
    other = load_recipe("pocket", [*TINY, f"sft.traces_file={path}", "seed=1"])  # other questions
    with pytest.raises(ValueError, match="has no trace for these questions"):
        pipeline.train(other, tmp_path / "other", say=lambda _: None)
    assert not (tmp_path / "other").exists()


# --- a real model behind the server ---


@pytest.fixture(scope="module")
def memory():
    """The pocket model after a few seconds in which it learned two traces by heart, and its tokenizer."""
    model, tokenizer = load_model("pocket", device="cpu")
    rows, labels = [], []
    for example in TASK[:2]:
        prompt = tokenizer.apply_chat_template(trace_messages(example), add_generation_prompt=True, return_dict=False)
        response = [*tokenizer(good(example), add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        rows.append(torch.tensor(prompt + response))
        labels.append(torch.tensor([-100] * len(prompt) + response))
    pad = torch.nn.utils.rnn.pad_sequence
    batch = {"input_ids": pad(rows, True), "labels": pad(labels, True, -100)}
    optimizer, steps = torch.optim.AdamW(model.parameters()), 140
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, (step + 1) / 10, (steps - step) / 80)
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.05
    return model.eval(), tokenizer


def check_traces_of_the_model(url, model, path):
    """Two questions are answered by heart; to the third the model has no answer, whatever it says."""
    api = ApiConfig(model, url, attempts=2, temperature=0.1, max_tokens=60, timeout=60, concurrency=2)
    file = make_traces(first(3), path, api, progress=False)
    traces, sub_task = load_traces(path, first(3))
    assert sub_task[:] == TASK[:2] and [answer for _, answer in traces] == [e.answer for e in TASK[:2]]
    assert all(TASK.check_thinking(text, e, e.answer) for (text, _), e in zip(traces, TASK[:2], strict=True))
    assert set(file.left_out) == {TASK[2].question} and file.replies[TASK[2].question] == 2
    assert file.tokens["prompt_tokens"] > 400 and file.tokens["completion_tokens"] > 80 and not file.tokens["untold"]


def test_a_real_model_behind_a_server_writes_traces(memory, tmp_path):
    (model, tokenizer), one_at_a_time = memory, threading.Lock()

    def generate(handler, _):
        request = handler.request_said
        ids = tokenizer.apply_chat_template(
            request["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        with one_at_a_time, torch.no_grad():
            torch.manual_seed(0)
            new = model.generate(
                ids, max_new_tokens=request["max_tokens"], do_sample=True, temperature=request["temperature"]
            )[0, ids.shape[1] :]
        finish = "stop" if new[-1] == tokenizer.eos_token_id else "length"
        text = tokenizer.decode(new, skip_special_tokens=True)
        send(handler, chat(text, finish, (ids.shape[1], len(new))))

    with serving(default=generate) as server:
        check_traces_of_the_model(server.url, "pocket", tmp_path / "traces.jsonl")


def test_transformers_serve_writes_traces(memory, tmp_path):
    """The server that comes with transformers, which needs two more packages than this project does."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    model, tokenizer = memory
    model.save_pretrained(tmp_path / "pocket")
    tokenizer.save_pretrained(tmp_path / "pocket")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--host", "127.0.0.1", "--device", "cpu"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=log, stderr=log)
    try:
        while True:
            assert process.poll() is None, (tmp_path / "log").read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        check_traces_of_the_model(f"http://127.0.0.1:{port}/v1", str(tmp_path / "pocket"), tmp_path / "traces.jsonl")
    finally:
        process.terminate()
        process.wait(20)
