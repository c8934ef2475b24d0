"""An OpenAI-compatible server for one local model: for trying `helpers.server` out where there is no vLLM."""

import copy
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from helpers.decoder import sampling_copy
from helpers.models import load_adapter
from helpers.rollout import end_token_ids, rollout

NAME = "local"  # what the server calls its base model
NEUTRAL = {"top_k": (-1, 0), "min_p": (0,), "repetition_penalty": (1,), "presence_penalty": (0,),
           "frequency_penalty": (0,), "stop": ([],), "echo": (False,), "stream": (False,)}  # fmt: skip


class _Models:
    """A base model and its adapters by name. A method a path: LookupError stands for 404, ValueError for 400."""

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, dtype, log_bias: float) -> None:
        self.base, self.tokenizer, self.dtype, self.log_bias = copy.deepcopy(model), tokenizer, dtype, log_bias
        self.samplers, self.ends = {NAME: sampling_copy(self.base, dtype)}, end_token_ids(model, tokenizer)

    def load_lora_adapter(self, request: dict[str, Any]) -> str:
        if request["lora_name"] in self.samplers:
            raise ValueError(f"The lora adapter '{request['lora_name']}' has already been loaded.")
        with torch.random.fork_rng(devices=[]):  # peft draws weights before it reads them, and the trainer is near
            policy = load_adapter(copy.deepcopy(self.base), request["lora_path"])
        self.samplers[request["lora_name"]] = sampling_copy(policy, self.dtype)
        return f"Success: LoRA adapter '{request['lora_name']}' added successfully."

    def unload_lora_adapter(self, request: dict[str, Any]) -> str:
        if request["lora_name"] == NAME or not self.samplers.pop(request["lora_name"], None):
            raise LookupError(f"The lora adapter '{request['lora_name']}' cannot be found.")
        return f"Success: LoRA adapter '{request['lora_name']}' removed successfully."

    def completions(self, request: dict[str, Any]) -> dict[str, Any]:
        """As vLLM's with processed log-probs: token_ids with the end-of-text token, a log-prob for each of them."""
        for name, neutral in NEUTRAL.items():
            if request.get(name, neutral[0]) not in neutral:
                raise ValueError(f"This server does not know {name}.")
        n, temperature = request.get("n", 1), request.get("temperature", 1.0)
        if n > 1 and temperature == 0:
            raise ValueError(f"n must be 1 when using greedy sampling, got {n}.")
        if request["model"] not in self.samplers:
            raise LookupError(f"The model `{request['model']}` does not exist.")
        ids = request["prompt"] if isinstance(request["prompt"], list) else self.tokenizer.encode(request["prompt"])
        [group] = rollout(
            self.samplers[request["model"]], [ids], group_size=n, max_new_tokens=request.get("max_tokens", 16),
            temperature=temperature, top_p=request.get("top_p", 1.0), seed=request.get("seed", 0),
            end_ids={*request.get("stop_token_ids", []), *(() if request.get("ignore_eos") else self.ends)},
        )  # fmt: skip
        choices = [self._choice(index, response, request) for index, response in enumerate(group)]
        return {"object": "text_completion", "model": request["model"], "choices": choices}

    def _choice(self, index: int, response, request: dict[str, Any]) -> dict[str, Any]:
        text = self.tokenizer.decode(response.token_ids, skip_special_tokens=request.get("skip_special_tokens", True))
        choice = {"index": index, "text": text, "finish_reason": "stop" if response.finished else "length"}
        if request.get("logprobs") is not None:
            by_id = request.get("return_tokens_as_token_ids")
            tokens = [f"token_id:{i}" if by_id else self.tokenizer.decode(i) for i in response.token_ids]
            choice["logprobs"] = {"tokens": tokens, "token_logprobs": [x + self.log_bias for x in response.logprobs]}
        return choice | ({"token_ids": response.token_ids} if request.get("return_token_ids") else {})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay open, as they do at a real server

    def do_POST(self) -> None:
        status, name = 200, self.path.removeprefix("/v1/")
        try:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if name not in ("completions", "load_lora_adapter", "unload_lora_adapter"):
                raise LookupError("Not Found")
            with self.server.lock:  # one request is computed at a time
                answer = getattr(self.server.models, name)(request)
        except Exception as error:
            status = next((s for kind, s in ((LookupError, 404), (ValueError, 400)) if isinstance(error, kind)), 500)
            answer = {"error": {"message": str(error), "type": type(error).__name__, "code": status}}
        body = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(answer, str) else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing: a notebook would show it."""


class _Http(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128

    def handle_error(self, *_: Any) -> None:
        """Nothing: a client that has gone."""


@contextmanager
def running(server: ThreadingHTTPServer) -> Iterator[ThreadingHTTPServer]:
    """A server at work in a thread of its own; closed at the end."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def serve(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, dtype: torch.dtype | None = None, log_bias: float = 0.0
) -> Iterator[str]:
    """Serve a copy of a model as `NAME` on this machine alone; yields the base_url, which ends in /v1.

    dtype: sample from weights in it, say bfloat16 where the trainer has float32. log_bias: nats added to each log-prob
    that is told, to play a server that is wrong about itself. It answers as vLLM does to what `helpers.server` asks,
    a request at a time; its log-probs are those before top_p.
    """
    http = _Http(("127.0.0.1", 0), _Handler)
    http.models, http.lock = _Models(model, tokenizer, dtype, log_bias), threading.Lock()
    with running(http):
        yield f"http://127.0.0.1:{http.server_address[1]}/v1"
