"""What several test files need: one thread, the pocket model, and small models of other builds."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from helpers.decoder import Decoder
from helpers.models import add_lora
from helpers.pocket import pocket_model

settings.register_profile("no clock", deadline=None)  # a busy machine must not fail a test
settings.load_profile("no clock")

END = 1  # the end-of-text token of the small models, as of the pocket model
# Keys and values shared between heads or not, embeddings tied to the output head or not, biases in the projections.
BUILDS: dict[str, tuple[type, type, dict]] = {
    "llama_gqa_tied": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama_mha_untied": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "qwen2_biases": (Qwen2Config, Qwen2ForCausalLM, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3_gqa_untied": (
        Qwen3Config, Qwen3ForCausalLM, {"num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": False},
    ),
    "mistral_wide_heads": (
        MistralConfig, MistralForCausalLM,
        {"num_key_value_heads": 2, "head_dim": 12, "sliding_window": None, "tie_word_embeddings": False},
    ),
}  # fmt: skip


def small_model(build: str = "llama_gqa_tied", vocabulary: int = 24, spread: float = 0.25, seed: int = 0, **more):
    """A random model of two layers in evaluation mode. `spread`: of the weights; the larger, the more it prefers.

    more: settings of its configuration, which overrule the build's.
    """
    config_class, model_class, settings = BUILDS[build]
    common = dict(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, pad_token_id=0, bos_token_id=None, eos_token_id=END,
    )  # fmt: skip
    config = config_class(**common | settings | more)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).eval()
        for weight in model.parameters():  # biases too, which a new model has at 0
            torch.nn.init.normal_(weight, mean=float(weight.dim() == 1), std=spread)
    return model


def disturb(policy, std: float = 0.1) -> None:
    """Give an adapter B matrices other than 0, as training does."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=std)


def policy_of(build: str):
    """A small model with an adapter that changes what it computes."""
    policy = add_lora(small_model(build), r=4, alpha=8)
    disturb(policy)
    return policy


def random_prompts(lengths: list[int], vocabulary: int = 24, seed: int = 0) -> list[list[int]]:
    """Prompts of these lengths, without the padding and end-of-text tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, vocabulary, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def plain_logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """The logits (len(ids), V) of one text, read in one piece, alone and without a cache: what all else must equal."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


def plain_logprobs(model: PreTrainedModel, prompt: list[int], response: list[int], temperature: float = 1.0) -> Tensor:
    """The log-prob of each response token at a temperature, (len(response),), from `plain_logits`."""
    logits = plain_logits(model, prompt + response)[len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(dim=-1).gather(1, torch.tensor(response)[:, None])[:, 0]


@torch.no_grad()
def decoder_logits(decoder: Decoder, ids: list[int]) -> Tensor:
    """The same by a `Decoder`: one text in one piece, each token looking back at all before it."""

    def look(_: int, *tensors: Tensor) -> Tensor:
        queries, keys, values = (x.transpose(0, 1)[None] for x in tensors)
        looked = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
        return looked[0].transpose(0, 1)

    return decoder.forward(torch.tensor(ids), torch.arange(len(ids)), look).float()


def no_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on every model is treated as one of a family that no `Decoder` is written for."""
    monkeypatch.setattr(Decoder, "supports", staticmethod(lambda policy: False))


def inputs_of(module: torch.nn.Module, run: Callable[[], object]) -> list[Tensor]:
    """The first input of a module at each of its calls while `run` ran."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    try:
        run()
    finally:
        handle.remove()
    return seen


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pocket():
    """The pocket model, untrained, and its tokenizer."""
    model, tokenizer = pocket_model(0)
    return model.eval(), tokenizer


@pytest.fixture(params=["a decoder", "the model"])
def sampled_by(request, monkeypatch) -> str:
    """What computes the rollouts of a test, which runs twice: a `Decoder`, then the model's own forward pass."""
    if request.param == "the model":
        no_decoder(monkeypatch)
    return request.param


@pytest.fixture(scope="session", params=BUILDS)
def model(request):
    """A small random model of each build."""
    return small_model(request.param)
