"""Requests to an OpenAI-compatible server, and its completions as responses; every fault is one sentence."""

import asyncio
import json
import os
import re
from collections.abc import Awaitable, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from helpers.rollout import Response

Post = Callable[[str, dict[str, Any], str], Awaitable[str]]  # path, body and advice if it is refused -> the answer


def in_a_loop_of_its_own(work: Callable[[], Awaitable[Any]]) -> Any:
    """What `await work()` returns, in a thread of its own: in Jupyter this one has an event loop already.

    An interrupt cancels the work.
    """
    running = []

    async def start() -> Any:
        running.append((asyncio.get_running_loop(), asyncio.current_task()))
        return await work()

    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(asyncio.run, start())
        try:
            return result.result()
        except KeyboardInterrupt:
            with suppress(RuntimeError):  # its loop is closed: it was just done
                for loop, asking in running:
                    loop.call_soon_threadsafe(asking.cancel)
            raise


def api_key() -> str:
    """The key in OPENAI_API_KEY, "" if there is none. ValueError, without it, if it can be no key."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError("OPENAI_API_KEY holds a character that no key has; set it anew.")
    return key


def exchange(base_url: str, timeout: float, max_retries: int, work: Callable[[Post], Awaitable[Any]]) -> Any:
    """What `work(post)` returns, run by `in_a_loop_of_its_own`. The key is `api_key`'s.

    post raises RuntimeError if the server does not answer or refuses.
    """
    import openai

    key = api_key()

    async def start() -> Any:
        settings = {"timeout": openai.Timeout(timeout, connect=10), "max_retries": max_retries}
        # openai insists on a key, which a server that was started without one does not read.
        async with openai.AsyncOpenAI(base_url=base_url, api_key=key or "none", **settings) as client:

            async def post(path: str, body: dict[str, Any], advice: str) -> str:
                try:
                    return await client.post(path, cast_to=str, body=body)
                except openai.APITimeoutError:
                    problem = f"does not answer within {timeout:g} seconds: see that it runs, or raise the timeout"
                except openai.APIConnectionError:
                    problem = "cannot be reached: start it, or correct base_url"
                except openai.APIStatusError as error:
                    said = error.body.get("message") if isinstance(error.body, dict) else None
                    said = str(said or "no reason given")
                    said = said.replace(key, "***") if len(key) >= 12 else said  # a short one is no secret
                    if error.status_code in (401, 403):
                        advice = "set OPENAI_API_KEY to the key that it knows"
                    words = " ".join(said.split())[:200].rstrip(".")
                    problem = f"refuses {path} ({error.status_code}: {words}): {advice}"
                # Raised out here it has no link to openai's error, which holds the request and with it the key.
                raise RuntimeError(f"The server at {base_url} {problem}.")

            return await work(post)

    return in_a_loop_of_its_own(start)


def read_reply(text: str, n: int, max_new_tokens: int, end_ids: Collection[int]) -> list[Response]:
    """The n responses in the JSON of a completion. ValueError, one sentence, for whatever cannot be right."""
    try:
        choices = _part(json.loads(text), "choices")
    except (ValueError, RecursionError):
        choices = None
    if not isinstance(choices, list):
        raise ValueError("The reply is no completion: base_url must be the /v1 of an OpenAI-compatible server.")
    if len(choices) != n:
        raise ValueError(f"The server sent {len(choices)} responses, not {n}: use one that knows n, such as vLLM.")
    return [_read_choice(choice, max_new_tokens, end_ids) for choice in choices]


def _part(thing: Any, name: str) -> Any:
    return thing.get(name) if isinstance(thing, dict) else None


def _read_choice(choice: Any, max_new_tokens: int, end_ids: Collection[int]) -> Response:
    told = _part(choice, "logprobs")
    ids, logprobs, tokens = _part(choice, "token_ids"), _part(told, "token_logprobs"), _part(told, "tokens")
    if ids is None and isinstance(tokens, list):  # vLLM says it in both places, other servers in one of them
        found = [re.fullmatch("token_id:([0-9]{1,9})", str(token)) for token in tokens]
        ids = [int(match[1]) for match in found] if all(found) else None
    if not (isinstance(ids, list) and ids and all(type(i) is int and 0 <= i < 2**31 for i in ids)):
        raise ValueError("The server tells no token ids: use one that knows return_token_ids, as vLLM 0.10.2 does.")
    if not (isinstance(logprobs, list) and len(logprobs) == len(ids)):
        raise ValueError("The server tells no log-prob of each token: use one that does for logprobs=1, such as vLLM.")
    if not all(type(x) in (int, float) and -9999 < x < 1e-3 for x in logprobs):  # vLLM writes -9999 for -inf
        raise ValueError("What the server tells are no log-probs: start vLLM with --logprobs-mode processed_logprobs.")
    if len(ids) > max_new_tokens or any(i in end_ids for i in ids[:-1]):
        raise ValueError("The server wrote on behind the end: use one that knows stop_token_ids and max_tokens.")
    finished = ids[-1] in end_ids
    if not finished and len(ids) < max_new_tokens:
        raise ValueError(
            f"A response stops after {len(ids)} of {max_new_tokens} tokens without an end-of-text token: raise the "
            "server's --max-model-len, or use a server that leaves that token in token_ids."
        )
    return Response(ids, [float(x) for x in logprobs], finished)
