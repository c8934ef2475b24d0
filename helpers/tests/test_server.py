"""Rollouts from a server: against the policy's own, over real sockets, and every way in which a reply can be wrong."""

import asyncio
import json
import signal
import socket
import threading
import time
import traceback
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.completions import read_reply
from helpers.local_server import NAME, running, serve
from helpers.logprobs import completion_logprobs
from helpers.models import add_lora, load_model
from helpers.rollout import Response, encode_prompt, end_token_ids, rollout
from helpers.server import Server
from helpers.tests.conftest import disturb

KEY = "sk-planted-0123456789"
QUESTIONS = ('How many times does the letter "a" appear in the text: "banana"?', "Does it logically follow that?")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """No key and no server of the person who runs the tests."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def asked():
    """The settings of a rollout, with few questions of unlike length."""
    model, tokenizer = load_model("pocket", "cpu")
    prompts = [encode_prompt(tokenizer, question) for question in QUESTIONS]
    return {"prompts": prompts, "group_size": 4, "max_new_tokens": 12, "end_ids": end_token_ids(model, tokenizer)}


@pytest.fixture(scope="module")
def local():
    """The base_url of a server for the pocket model."""
    with serve(*load_model("pocket", "cpu")) as url:
        yield url


def ids(groups: list[list[Response]]) -> list[list[list[int]]]:
    return [[response.token_ids for response in group] for group in groups]


def policy_of(seed: int = 0, std: float = 0.1):
    """The pocket model with an adapter that changes what it says."""
    policy = add_lora(load_model("pocket", "cpu")[0], r=4, alpha=8, seed=seed)
    disturb(policy, std)
    return policy.eval()


def quick(url: str, **more) -> Server:
    return Server(url, NAME, **{"max_retries": 0, "timeout": 20} | more)


# --- what is sampled ---


def test_greedy_responses_are_those_of_rollout(local, asked):
    model, _ = load_model("pocket", "cpu")
    done = []
    theirs = rollout(quick(local), temperature=0, on_progress=done.append, **asked)
    ours = rollout(model, temperature=0, **asked)
    assert ids(theirs) == ids(ours) and done == [1, 1]
    for group, own in zip(theirs, ours, strict=True):
        assert group[0].logprobs == pytest.approx(own[0].logprobs, abs=1e-4)


def test_log_probs_are_the_trainers_at_the_sampling_temperature(local, asked):
    model, _ = load_model("pocket", "cpu")
    groups = quick(local).respond(temperature=0.7, seed=3, **asked)
    for prompt, group in zip(asked["prompts"], groups, strict=True):
        assert len({tuple(response.token_ids) for response in group}) > 1
        for response in group:
            rows = torch.tensor([prompt + response.token_ids])
            mask = torch.ones(1, len(response.token_ids), dtype=torch.bool)
            with torch.no_grad():
                exact, _ = completion_logprobs(model, rows, torch.tensor([len(prompt)]), mask, 0.7)
            assert response.logprobs == pytest.approx(exact[0].tolist(), abs=1e-4)
            wrong, _ = completion_logprobs(model, rows, torch.tensor([len(prompt)]), mask, 1.0)
            assert response.logprobs != pytest.approx(wrong[0].tolist(), abs=1e-2)


def test_responses_end_with_the_end_token_or_at_the_limit(local, asked):
    [end] = asked["end_ids"]
    settings = asked | {"group_size": 100, "max_new_tokens": 40}
    responses = [r for group in quick(local).respond(**settings) for r in group]
    assert {r.finished for r in responses} == {True, False}
    for response in responses:
        assert response.finished == (response.token_ids[-1] == end) and end not in response.token_ids[:-1]
        assert response.finished or len(response.token_ids) == 40
        assert len(response.logprobs) == len(response.token_ids)


def test_without_end_tokens_a_response_goes_on_to_the_limit(local, asked):
    groups = quick(local).respond(**asked | {"end_ids": (), "group_size": 60, "max_new_tokens": 20})
    assert {len(r.token_ids) for group in groups for r in group} == {20}


def test_a_seed_repeats_itself_and_no_two_prompts_share_one(local, asked):
    server, same = quick(local), asked | {"prompts": asked["prompts"][:1] * 2}
    first = ids(server.respond(seed=1, **same))
    assert first == ids(server.respond(seed=1, **same)) != ids(server.respond(seed=2, **same))
    assert first[0] != first[1]


def test_a_bias_is_told_and_a_lower_precision_computed(asked):
    model, tokenizer = load_model("pocket", "cpu")
    plain = rollout(model, temperature=0, **asked)[0][0]
    with serve(model, tokenizer, log_bias=-0.5) as url:
        biased = quick(url).respond(temperature=0, **asked)[0][0]
    assert biased.logprobs == pytest.approx([x - 0.5 for x in plain.logprobs], abs=1e-4)
    with serve(model, tokenizer, dtype=torch.bfloat16) as url:
        rounded = quick(url).respond(temperature=0, **asked)[0][0]
    assert rounded.logprobs[0] != plain.logprobs[0] and rounded.logprobs[0] == pytest.approx(plain.logprobs[0], abs=0.1)


# --- the policy's weights ---


def test_refresh_has_the_server_sample_from_the_policy(local, asked, tmp_path):
    server = quick(local, adapters=tmp_path / "new")
    base, names = ids(server.respond(temperature=0, **asked)), []
    for std in (0.1, 0.3):
        policy = policy_of(std=std)
        state = torch.get_rng_state()
        server.refresh(policy)
        assert torch.equal(state, torch.get_rng_state())  # a resumed run draws the same numbers
        assert [path.name for path in (tmp_path / "new").iterdir()] == [server.adapter.name]  # whole, and alone
        theirs, ours = (rollout(x, temperature=0, **asked) for x in (server, policy))
        assert ids(theirs) == ids(ours) != base
        assert theirs[1][0].logprobs == pytest.approx(ours[1][0].logprobs, abs=1e-4)
        assert end_token_ids(server, load_model("pocket", "cpu")[1]) == asked["end_ids"]
        names.append(server.adapter.name)
    assert len(set(names)) == 2  # vLLM would go on with keys and values that it holds for a name
    with pytest.raises(RuntimeError, match="404: The model `policy-"):  # the first was unloaded
        Server(local, names[0], max_retries=0).respond(**asked)


def test_a_server_that_lost_the_adapter_gets_the_next_and_says_so_until_then(asked, tmp_path):
    with serve(*load_model("pocket", "cpu")) as first, serve(*load_model("pocket", "cpu")) as second:
        server = quick(first, adapters=tmp_path)
        server.refresh(policy_of())
        server.base_url = second
        with pytest.raises(RuntimeError, match="404: The model `policy-"):
            server.respond(**asked)
        server.refresh(policy_of())
        assert len(server.respond(**asked)) == 2


def test_refresh_says_what_is_missing(local, asked, tmp_path, pocket):
    with pytest.raises(ValueError, match="^Give the server `adapters`, a folder .* old weights.$"):
        quick(local).refresh(policy_of())
    with pytest.raises(ValueError, match="^A server takes over LoRA adapters alone: train with lora, or .*process.$"):
        quick(local, adapters=tmp_path).refresh(pocket[0])
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="^No adapter can be written to .*/file .*: choose another folder.$"):
        quick(local, adapters=tmp_path / "file").refresh(policy_of())
    with scripted([(404, {"detail": "Not Found"}, {})]) as server:
        unready = quick(server.url, adapters=tmp_path)
        with pytest.raises(RuntimeError, match=r"refuses /load_lora_adapter \(404: .*\): start it as .* where it sees"):
            unready.refresh(policy_of())
        with pytest.raises(RuntimeError):  # and does not go on with the base model
            unready.respond(**asked)
        assert server.log[-1][1]["model"] == unready.adapter.name


# --- faults ---


class Scripted(BaseHTTPRequestHandler):
    """Gives the answers of `script` one after the other: status, body (a text or what becomes JSON), headers."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.log.append((self.path, request, self.headers["Authorization"]))
            status, body, headers = self.server.script.pop(0) if len(self.server.script) > 1 else self.server.script[0]
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(data), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@contextmanager
def scripted(script):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    server.script, server.log, server.lock = list(script), [], threading.Lock()
    server.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    with running(server):
        yield server


def choice(token_ids=(5, 1), logprobs=(-0.5, -0.1), **more):
    """A choice as vLLM writes it."""
    told = {"tokens": [f"token_id:{i}" for i in token_ids], "token_logprobs": list(logprobs)}
    return {"index": 0, "text": "", "finish_reason": "stop", "logprobs": told, "token_ids": list(token_ids)} | more


ASK = {"prompts": [[3, 4]], "group_size": 1, "max_new_tokens": 3, "end_ids": {1}}
SOON = {"retry-after-ms": "1"}


def test_what_vllm_is_asked():
    with scripted([(200, {"choices": [choice(), choice((5, 6, 7), (-1, -1, -1))]}, {})]) as server:
        [group] = quick(server.url).respond([[3, 4]], group_size=2, max_new_tokens=3, end_ids={1, 0}, temperature=0.7)
    assert group == [Response([5, 1], [-0.5, -0.1], True), Response([5, 6, 7], [-1, -1, -1], False)]
    [(path, request, authorization)] = server.log
    assert (path, authorization) == ("/v1/completions", "Bearer none") and 0 <= request.pop("seed") < 2**30
    assert request == {
        "model": NAME, "prompt": [3, 4], "n": 2, "max_tokens": 3, "temperature": 0.7, "top_p": 1, "top_k": -1,
        "min_p": 0, "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0, "logprobs": 1,
        "return_token_ids": True, "return_tokens_as_token_ids": True, "skip_special_tokens": False,
        "stop_token_ids": [0, 1], "ignore_eos": False,
    }  # fmt: skip


def test_it_works_where_an_event_loop_is_running():
    """As in Jupyter."""

    async def cell(url):
        return quick(url).respond(**ASK)

    with scripted([(200, {"choices": [choice()]}, {})]) as server:
        assert asyncio.run(cell(server.url)) == [[Response([5, 1], [-0.5, -0.1], True)]]


def test_an_interrupt_ends_the_requests():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        threading.Timer(0.5, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT]).start()
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            quick(url, timeout=30).respond(**ASK)
        assert time.monotonic() - start < 10


def test_greedy_asks_for_one_response_of_a_group():
    with scripted([(200, {"choices": [choice()]}, {})]) as server:
        [group] = quick(server.url).respond(**ASK | {"group_size": 3}, temperature=0)
    assert len(group) == 3 and server.log[0][1]["n"] == 1


def test_passing_faults_are_tried_again():
    away = [(500, "oops", SOON), (429, {"error": {"message": "slow down"}}, SOON)]
    with scripted([*away, (200, {"choices": [choice()]}, {})]) as server:
        assert quick(server.url, max_retries=2).respond(**ASK) == [[Response([5, 1], [-0.5, -0.1], True)]]
        assert len(server.log) == 3


def test_one_failed_request_ends_the_others_and_its_sentence_is_raised():
    with scripted([(400, {"error": {"message": "too\nlong."}}, {})]) as server:
        with pytest.raises(RuntimeError, match=r"refuses /completions \(400: too long\): base_url must end in /v1, .*"):
            quick(server.url).respond(**ASK | {"prompts": [[3]] * 5})


@pytest.mark.parametrize(
    ("body", "sentence"),
    {
        "<html>": "The reply is no completion", "[" * 100_000: "The reply is no completion",
        "{}": "The reply is no completion", '{"choices": []}': "The server sent 0 responses, not 1",
        json.dumps({"choices": [choice(), choice()]}): "The server sent 2 responses, not 1",
        json.dumps({"choices": [choice() | {"token_ids": None, "logprobs": None}]}): "The server tells no token ids",
    }.items(),
)  # fmt: skip
def test_a_reply_that_is_none(body, sentence):
    with scripted([(200, body, {})]) as server, pytest.raises(ValueError, match=f"^{sentence}") as caught:
        quick(server.url).respond(**ASK)
    assert_one_sentence(caught.value)


FAULTS = {
    "no ids": (choice() | {"token_ids": None, "logprobs": {"tokens": ["a", "b"]}}, "The server tells no token ids"),
    "empty": (choice((), ()), "The server tells no token ids"),
    "no logprobs": (choice() | {"logprobs": None}, "The server tells no log-prob of each"),
    "one too few": (choice(logprobs=(-1,)), "The server tells no log-prob of each"),
    "NaN": (choice(logprobs=(-1, float("nan"))), "What the server tells are no log-probs"),
    "infinite": (choice(logprobs=(float("-inf"), -1)), "What the server tells are no log-probs"),
    "logits": (choice(logprobs=(12.5, 8.0)), "What the server tells are no log-probs"),
    "vLLM's -inf": (choice(logprobs=(-9999.0, -1)), "What the server tells are no log-probs"),
    "null": (choice(logprobs=(None, -1)), "What the server tells are no log-probs"),
    "end cut off": (choice((5, 6), (-1, -1)), "A response stops after 2 of 3 tokens"),
    "too long": (choice((5, 6, 7, 8), (-1,) * 4), "The server wrote on behind the end"),
    "behind the end": (choice((5, 1, 7), (-1,) * 3), "The server wrote on behind the end"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_choice_that_cannot_be_right(fault):
    wrong, sentence = FAULTS[fault]
    with pytest.raises(ValueError, match=f"^{sentence}") as caught:
        read_reply(json.dumps({"choices": [wrong]}), 1, 3, {1})
    assert_one_sentence(caught.value)


def test_token_ids_are_found_in_either_place():
    for thing in (choice(token_ids=(5, 1)), choice() | {"token_ids": None}):
        assert read_reply(json.dumps({"choices": [thing]}), 1, 3, {1}) == [Response([5, 1], [-0.5, -0.1], True)]


def assert_one_sentence(error: Exception) -> None:
    text = str(error)
    assert text[0].isupper() and text.endswith(".") and "\n" not in text and ". " not in text, text


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NUMBERS = st.lists(st.integers(-1, 8) | st.floats() | ANYTHING, max_size=4) | ANYTHING
CHOICES = st.fixed_dictionaries(
    {},
    optional={
        "token_ids": NUMBERS,
        "logprobs": ANYTHING
        | st.fixed_dictionaries(
            {}, optional={"token_logprobs": NUMBERS, "tokens": st.lists(st.just("token_id:5") | ANYTHING, max_size=4)}
        ),
    },
)


@settings(max_examples=150)
@given(
    ANYTHING | st.fixed_dictionaries({"choices": st.lists(CHOICES | ANYTHING, max_size=2) | ANYTHING}),
    st.integers(1, 2),
)
def test_any_reply_is_responses_or_one_sentence(reply, n):
    try:
        responses = read_reply(json.dumps(reply), n, 3, {1})
    except ValueError as error:
        assert type(error) is ValueError
        assert_one_sentence(error)
    else:
        assert len(responses) == n
        for response in responses:
            assert 1 <= len(response.token_ids) == len(response.logprobs) <= 3
            assert response.finished or len(response.token_ids) == 3


def test_settings_that_a_server_cannot_sample_with():
    server = quick("http://127.0.0.1:1/v1")
    with pytest.raises(ValueError, match="set top_p to 1.$"):
        server.respond(**ASK, top_p=0.95)
    with pytest.raises(ValueError, match="temperature below 0.01"):
        server.respond(**ASK, temperature=0.005)
    for url in ("localhost:8000/v1", "http://me:secret@localhost/v1", ""):
        with pytest.raises(ValueError, match="^base_url must be like http://localhost:8000/v1") as caught:
            Server(url, "m")
        assert "secret" not in str(caught.value)


def test_nobody_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(RuntimeError, match=f"^The server at {url} cannot be reached: start it, or correct base_url.$"):
        quick(url).respond(**ASK)


def test_a_server_that_hangs():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        server = quick(f"http://127.0.0.1:{silent.getsockname()[1]}/v1", timeout=0.2)
        with pytest.raises(RuntimeError, match="does not answer within 0.2 seconds"):
            server.respond(**ASK)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 500])
def test_the_key_is_in_no_error(status, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")  # as it comes out of a file
    with scripted([(status, {"error": {"message": f"{KEY} is\nbad"}}, SOON)]) as server:
        with pytest.raises(RuntimeError, match=str(status)) as caught:
            quick(server.url, max_retries=1).respond(**ASK)
    assert {authorization for *_, authorization in server.log} == {f"Bearer {KEY}"}
    error = caught.value
    shown = "".join(traceback.format_exception(error)) + repr(error) + repr(error.__context__)
    assert "planted" not in shown and "\n" not in str(error)
    assert error.__cause__ is None and error.__context__ is None
    assert ("set OPENAI_API_KEY" in str(error)) == (status in (401, 403))


def test_a_key_that_is_none(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}ä")
    with pytest.raises(ValueError, match="^OPENAI_API_KEY holds a character that no key has; set it anew.$"):
        quick("http://127.0.0.1:1/v1").respond(**ASK)
