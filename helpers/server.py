"""Rollouts from a server, vLLM's or another that is OpenAI-compatible, in place of a model in this process."""

import asyncio
import os
import random
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from helpers.completions import Post, exchange, read_reply
from helpers.models import bare, save_adapter
from helpers.rollout import Response
from helpers.runs import one_sentence

CONCURRENCY = 64  # open requests at most, so that `timeout` is not spent in the server's queue
# Nothing but the temperature shapes the distribution, whatever the model's generation settings say.
NEUTRAL = {"top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}
TELL = {"logprobs": 1, "return_token_ids": True, "return_tokens_as_token_ids": True, "skip_special_tokens": False}


@dataclass
class Server:
    """Sampling by an OpenAI-compatible server, such as vLLM's, in place of a model in this process.

    model: the base model's name there. adapters: a folder that trainer and server see under one path, for `refresh`.
    timeout: seconds for the responses to one prompt. max_retries: of a request without answer, or with 429 or 5xx. The
    key, if the server wants one, comes from OPENAI_API_KEY alone. Start vLLM, 0.10.2 or later, where no stranger gets:

        VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve HuggingFaceTB/SmolLM2-135M-Instruct \\
            --logprobs-mode processed_logprobs --enable-lora --max-lora-rank 32 --enable-prefix-caching

    The mode matters: vLLM's default gives log-probs at temperature 1, whatever the temperature, and no reply shows it;
    `grpo` warns of a large error in its first step. A seed gives the same responses only as far as the server's
    kernels repeat them.
    """

    base_url: str
    model: str
    adapters: Path | None = None
    timeout: float = 600
    max_retries: int = 5
    adapter: Path | None = field(default=None, init=False)  # that in use: the server knows it by the folder's name
    generation_config: Any = field(default=None, init=False, repr=False)  # the policy's: which tokens end a response

    def __post_init__(self) -> None:
        if not re.fullmatch(r"https?://[^@\s]+", self.base_url):
            raise ValueError("base_url must be like http://localhost:8000/v1, without a password in it.")

    def respond(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        group_size: int,
        max_new_tokens: int,
        end_ids: Collection[int],
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[list[Response]]:
        """What `rollout` returns for these settings. A request a prompt: each has its seed, a group shares the prefix.

        ValueError for settings and replies that cannot be right, RuntimeError if the server does not answer or refuses.
        """
        if top_p != 1:
            raise ValueError("A server's log-probs are those after top_p, the policy's those before: set top_p to 1.")
        if 0 < temperature < 0.01:
            raise ValueError("vLLM makes any temperature below 0.01 that one: set it to 0.01, or to 0 for greedy ones.")
        n = 1 if temperature == 0 else group_size  # greedy, all are the same, and vLLM refuses to write several
        settings = {"model": self.adapter.name if self.adapter else self.model, "n": n, "temperature": temperature}
        ends = {"max_tokens": max_new_tokens, "stop_token_ids": sorted(end_ids), "ignore_eos": not end_ids}
        advice = "base_url must end in /v1, the model be one that it serves and --max-model-len long enough"

        async def ask(post: Post, gate: asyncio.Semaphore, number: int) -> list[Response]:
            # Far apart: vLLM counts up from the seed for the responses of a group.
            own = {"prompt": list(prompts[number]), "seed": random.Random(f"{seed} {number}").getrandbits(30)}
            async with gate:
                text = await post("/completions", NEUTRAL | TELL | settings | ends | own, advice)
            group = read_reply(text, n, max_new_tokens, end_ids)
            if on_progress:
                on_progress(1)
            return group * (group_size // n)

        async def ask_all(post: Post) -> list[list[Response]]:
            gate = asyncio.Semaphore(CONCURRENCY)
            return await asyncio.gather(*[ask(post, gate, number) for number in range(len(prompts))])

        return exchange(self.base_url, self.timeout, self.max_retries, ask_all)

    def refresh(self, policy: nn.Module) -> None:
        """Sample from the policy's present weights from here on: write its LoRA adapter, and have the server load it.

        Always under a new name: vLLM keeps a prompt's keys and values by the adapter's name, and would go on with those
        of the old weights. The adapter before is unloaded and deleted; the last one stays. ValueError without
        `adapters` or LoRA, OSError if it cannot be written, RuntimeError if the server does not take it.
        """
        policy = getattr(policy, "module", policy)
        if self.adapters is None:
            raise ValueError("Give the server `adapters`, a folder that it sees too: else it samples from old weights.")
        if not getattr(policy, "peft_config", None):
            raise ValueError("A server takes over LoRA adapters alone: train with lora, or sample in this process.")
        shared, before = Path(self.adapters).resolve(), self.adapter
        number = int(before.name.rpartition("-")[2]) + 1 if before else 0
        folder = shared / f"policy-{uuid.uuid4().hex[:12]}-{number:06d}"
        with one_sentence(lambda reason: f"No adapter can be written to {shared} ({reason}): choose another folder."):
            shared.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=shared, prefix=".") as work:
                save_adapter(policy, Path(work) / "whole", torch.float32)  # the server rounds it to its own dtype
                os.replace(Path(work) / "whole", folder)
        self.generation_config = bare(policy).generation_config
        self.adapter = folder  # already here: a server that fails to load it then refuses to sample from other weights
        advice = f"start it as the documentation of helpers.server.Server says, where it sees {shared}"

        async def load(post: Post) -> None:
            await post("/load_lora_adapter", {"lora_name": folder.name, "lora_path": str(folder)}, advice)

        async def unload(post: Post) -> None:
            await post("/unload_lora_adapter", {"lora_name": before.name}, advice)

        if before:
            with suppress(RuntimeError):  # one that was started anew does not know it
                exchange(self.base_url, self.timeout, 0, unload)
        exchange(self.base_url, self.timeout, self.max_retries, load)
        if before:
            shutil.rmtree(before, ignore_errors=True)
