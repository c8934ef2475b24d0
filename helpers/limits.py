"""What a machine allows: the operations and bytes that a GRPO step needs, over its measured throughput."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.decoder import packed_product


@dataclass(frozen=True)
class Work:
    """The work that is timed. prompt_lengths: tokens of each question's prompt; responses have `length` tokens each."""

    prompt_lengths: tuple[int, ...]
    group_size: int
    length: int

    @property
    def rows(self) -> int:
        """Responses."""
        return len(self.prompt_lengths) * self.group_size

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, each once."""
        return sum(self.prompt_lengths)

    @property
    def response_tokens(self) -> int:
        """Tokens of all responses."""
        return self.rows * self.length


@dataclass(frozen=True)
class Shape:
    """A Llama-family model as sizes: what its matrix products are made of."""

    layers: int
    hidden: int
    heads: int
    groups: int
    width: int
    mlp: int
    vocabulary: int
    lora_r: int

    @classmethod
    def of(cls, config, lora_r: int) -> "Shape":
        """From a transformers config."""
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(config.num_hidden_layers, config.hidden_size, config.num_attention_heads,
                   config.num_key_value_heads, width, config.intermediate_size, config.vocab_size, lora_r)  # fmt: skip

    @property
    def products(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of a layer's matrix products, those of one input joined: qkv, out, gate and up, down."""
        attention = self.heads * self.width
        return ((self.hidden, attention + 2 * self.groups * self.width), (attention, self.hidden),
                (self.hidden, 2 * self.mlp), (self.mlp, self.hidden))  # fmt: skip

    @property
    def lora_products(self) -> int:
        """Multiply-adds a token in one layer's LoRA products: r (inputs + outputs) for each of the seven matrices."""
        attention, keys = self.heads * self.width, self.groups * self.width
        pairs = [(self.hidden, attention), (self.hidden, keys), (self.hidden, keys), (attention, self.hidden),
                 (self.hidden, self.mlp), (self.hidden, self.mlp), (self.mlp, self.hidden)]  # fmt: skip
        return self.lora_r * sum(a + b for a, b in pairs)


def seen(work: Work) -> tuple[int, int]:
    """Query-key pairs inside all prompts and of all responses, once each: what causal attention must score."""
    prompts = sum(p * (p + 1) // 2 for p in work.prompt_lengths)
    own = work.length * (work.length + 1) // 2
    responses = sum(work.group_size * (p * work.length + own) for p in work.prompt_lengths)
    return prompts, responses


def operations(work: Work, shape: Shape) -> dict[str, float]:
    """Floating-point operations of the rollouts and of one update, where nothing is computed twice or in vain.

    The prompt of a group is computed once; the vocabulary projection only behind a prompt and behind each response
    token that is not the last. An update goes forward, then backward to the activations and the LoRA matrices alone.
    """
    layer = 2 * sum(a * b for a, b in shape.products)
    head = 2 * shape.hidden * shape.vocabulary
    pair = 4 * shape.heads * shape.width * shape.layers  # a score and a weighted value
    read = work.prompt_tokens + work.response_tokens - work.rows  # a response's last token is only predicted
    attention = pair * sum(seen(work))
    linear = shape.layers * layer * read
    rollouts = linear + attention + head * (len(work.prompt_lengths) + work.response_tokens - work.rows)
    lora = 3 * 2 * shape.layers * shape.lora_products * read
    update = 2 * linear + lora + 3 * attention + 2 * head * work.response_tokens
    return {"rollouts": float(rollouts), "update": float(update)}


def stopwatch(call: Callable[[], object], seconds: float = 0.15) -> float:
    """Median seconds of a call over about `seconds`, after two to warm up."""
    call(), call()
    times, start = [], time.perf_counter()
    while not times or time.perf_counter() - start < seconds:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return median(times)


def product_time(rows: int, inputs: int, outputs: int, dtype: torch.dtype, copies: int = 4) -> float:
    """Seconds of a (rows, inputs) x (inputs, outputs) product, each weight used in turn, the fastest way known."""
    weights = [torch.randn(outputs, inputs, dtype=dtype) for _ in range(copies)]
    x = torch.randn(rows, inputs, dtype=dtype)

    def cycle(products: Sequence[Callable[[Tensor], Tensor]]) -> float:
        return stopwatch(lambda: [product(x) for product in products]) / copies

    plain = cycle([lambda x, w=w: F.linear(x, w) for w in weights])
    return min(plain, cycle([packed_product(w, None) for w in weights]))


def bandwidth() -> float:
    """Bytes a second that memory gives to a sum over 256 MB."""
    data = torch.ones(64 * 2**20)
    return data.nbytes / stopwatch(data.sum, 0.5)


@torch.no_grad()
def limits(work: Work, shape: Shape, dtype: torch.dtype, minibatch: int) -> dict[str, float]:
    """Seconds that the rollouts and one update cannot fall below here: products and memory traffic alone.

    Each matrix product at the number of rows it occurs with, attention at the bandwidth its keys and values need (in
    rollouts) or at the products' throughput (in an update). No sampling, no norm, no optimiser.
    """
    size, speed = torch.finfo(dtype).bits // 8, bandwidth()

    def layers(rows: int) -> float:
        return shape.layers * sum(product_time(rows, a, b, dtype) for a, b in shape.products)

    def head(rows: int) -> float:
        return product_time(rows, shape.hidden, shape.vocabulary, dtype, copies=2)

    token = 2 * shape.layers * shape.groups * shape.width * size  # bytes of one token's keys and values
    cached = sum(work.prompt_tokens + work.rows * at for at in range(1, work.length)) * token
    rollouts = layers(work.prompt_tokens) + (work.length - 1) * (layers(work.rows) + head(work.rows)) + cached / speed
    needed = operations(work, shape)
    read = work.prompt_tokens + work.response_tokens - work.rows
    tokens = max(1, round(read * minibatch / work.rows))  # that go through the model at once
    products = layers(tokens)
    throughput = 2 * tokens * shape.layers * sum(a * b for a, b in shape.products) / products
    projection = 2 * work.response_tokens * shape.hidden * shape.vocabulary * 2 / (
        2 * 128 * shape.hidden * shape.vocabulary / head(128))  # fmt: skip
    rest = needed["update"] - 4 * work.response_tokens * shape.hidden * shape.vocabulary
    return {"rollouts": rollouts, "update": rest / throughput + projection}
