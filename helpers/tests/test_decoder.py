"""The sampling copy and both kinds of rows against plain forward passes: values, weights, attention, fallbacks."""

import copy
import importlib
import platform
from types import SimpleNamespace
from unittest.mock import Mock, patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel

import helpers
from helpers import decoder as module
from helpers.anymodel import ModelRows
from helpers.decoder import Decoder, Rows, attend, packed_product, rotate, round_up, sampling_copy
from helpers.models import add_lora, bare
from helpers.rollout import end_token_ids, rollout
from helpers.tests.conftest import (
    BUILDS,
    END,
    decoder_logits,
    no_decoder,
    plain_logits,
    plain_logprobs,
    policy_of,
    random_prompts,
    small_model,
)

CLOSE = {"rtol": 0, "atol": 1e-4}
TEXTS = random_prompts([20, 7, 1], seed=4)
IDS = torch.tensor(random_prompts([20, 20, 20], seed=5))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_same_logits(decoder: Decoder, policy) -> None:
    for text in TEXTS:
        assert_close(decoder_logits(decoder, text), plain_logits(policy, text), **CLOSE)


# --- it computes what the policy computes, and follows it ---


@pytest.mark.parametrize("build", BUILDS)
def test_it_computes_what_the_policy_does_and_follows_it(build):
    policy = policy_of(build)
    decoder = sampling_copy(policy, torch.float32)
    assert isinstance(decoder, Decoder)
    assert_same_logits(decoder, policy)
    assert (decoder_logits(decoder, TEXTS[0]) - plain_logits(small_model(build), TEXTS[0])).abs().max() > 0.1
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=0.02)
    for _ in range(3):
        stale = decoder_logits(decoder, TEXTS[0])
        policy(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(decoder_logits(decoder, TEXTS[0]), stale)
        assert (plain_logits(policy, TEXTS[0]) - stale).abs().max() > 0.01
        decoder.refresh(policy)
        assert_same_logits(decoder, policy)


@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize("build", BUILDS)
def test_of_a_policy_without_lora_it_is_a_copy_that_follows_every_weight_when_told(build, dtype):
    policy = small_model(build)
    decoder = sampling_copy(policy, dtype)
    assert_same_logits(decoder, policy)
    before = decoder_logits(decoder, TEXTS[0])
    for name, weight in policy.named_parameters():  # one at a time: none may be missed
        with torch.no_grad():
            weight += 0.5 * torch.randn(weight.shape, generator=generator(2))
        assert torch.equal(decoder_logits(decoder, TEXTS[0]), before), name  # and none is shared
        assert (plain_logits(policy, TEXTS[0]) - before).abs().max() > 1e-3, name
        decoder.refresh(policy)
        before = decoder_logits(decoder, TEXTS[0])
        assert_close(before, plain_logits(policy, TEXTS[0]), **CLOSE)


def test_adapters_that_are_merged_into_the_weights_already_are_not_added_again():
    policy = policy_of("qwen2_biases")
    expected = plain_logits(policy, TEXTS[0])
    decoder = Decoder(policy)
    for change in (policy.merge_adapter, policy.unmerge_adapter):
        change()
        assert_close(plain_logits(policy, TEXTS[0]), expected, **CLOSE)
        decoder.refresh(policy)
        assert_close(decoder_logits(decoder, TEXTS[0]), expected, **CLOSE)
    wrapped = torch.nn.Module()
    wrapped.module = policy  # as DistributedDataParallel holds it
    assert_close(decoder_logits(Decoder(wrapped), TEXTS[0]), expected, **CLOSE)


ODD = {
    "biases everywhere": {"attention_bias": True, "mlp_bias": True},
    "a large epsilon": {"rms_norm_eps": 0.3},
    "stretched positions": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 50.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "scaled rotations": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 50.0, "factor": 4.0}},
}  # fmt: skip


@pytest.mark.parametrize("odd", ODD)
def test_settings_that_change_the_forward_pass_are_heeded(odd):
    usual, policy = small_model(), small_model(**ODD[odd])
    usual.load_state_dict(policy.state_dict(), strict=False)
    assert (plain_logits(usual, TEXTS[0]) - plain_logits(policy, TEXTS[0])).abs().max() > 0.01
    assert_same_logits(Decoder(policy), policy)


@pytest.fixture
def products(monkeypatch) -> list[tuple[Tensor, Tensor | None]]:
    """The weights and biases of all linear products that are made from here on, in order."""
    made = []

    def keep(weight: Tensor, bias: Tensor | None):
        made.append((weight, bias))
        return packed_product(weight, bias)

    monkeypatch.setattr(module, "packed_product", keep)
    return made


@pytest.mark.parametrize("build", ["llama_mha_untied", "qwen2_biases"])
def test_a_bfloat16_copy_is_the_float32_merge_rounded_once_however_often_it_is_refreshed(build, products):
    policy = policy_of(build)
    untouched = {name: p.detach().clone() for name, p in policy.named_parameters()}
    half = Decoder(policy, torch.bfloat16)
    for _ in range(99):
        products.clear()
        half.refresh(policy)
    rounded = list(products)
    products.clear()
    Decoder(policy, torch.float32)
    assert len(products) == len(rounded) == 2 * 4 + 1
    for (exact, bias), (weight, half_bias) in zip(products, rounded, strict=True):
        assert weight.dtype == torch.bfloat16 and torch.equal(exact.bfloat16(), weight)
        assert (bias is None) == (half_bias is None) and (bias is None or torch.equal(bias.bfloat16(), half_bias))
    attention = bare(policy).model.layers[1].self_attn
    parts = []
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):  # written out: W + alpha / r * B A
        a, b = projection.lora_A["default"].weight, projection.lora_B["default"].weight
        parts.append(projection.base_layer.weight + 8 / 4 * b @ a)
    assert_close(products[4][0], torch.cat(parts).detach(), rtol=0, atol=1e-6)
    assert all(torch.equal(p, untouched[name]) for name, p in policy.named_parameters())


def test_rotary_frequencies_are_not_rounded_with_the_weights():
    """In bfloat16 they would turn position 120 by a tenth of a radian too much or too little."""
    policy = small_model(hidden_size=64)
    decoder, positions = Decoder(policy, torch.bfloat16), torch.tensor([0, 1, 77, 120])
    turned = []
    with patch.object(module, "rotate", lambda x, cos, sin: turned.append((cos, sin)) or rotate(x, cos, sin)):
        decoder.forward(torch.tensor([3, 4, 5, 6]), positions, lambda number, q, k, v: q)
    size = policy.model.layers[0].self_attn.head_dim
    frequencies = 10_000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = torch.outer(positions.double(), frequencies).repeat(1, 2)
    for cos, sin in turned:
        assert cos.dtype == sin.dtype == torch.bfloat16
        assert_close(cos[:, 0].double(), angles.cos(), rtol=0, atol=2**-8)
        assert_close(sin[:, 0].double(), angles.sin(), rtol=0, atol=2**-8)


def test_rotating_is_multiplying_complex_numbers():
    x, angles = torch.randn(5, 3, 8, generator=generator()), torch.randn(5, 4, generator=generator(1))
    cos, sin = (f(angles).repeat(1, 2)[:, None] for f in (torch.cos, torch.sin))
    product = torch.complex(x[..., :4], x[..., 4:]) * torch.exp(1j * angles)[:, None]
    assert_close(rotate(x, cos, sin), torch.cat([product.real, product.imag], dim=-1))


def test_it_is_made_once_and_ends_where_the_policy_does(pocket):
    policy = add_lora(copy.deepcopy(pocket[0]), r=2, alpha=4)
    bare(policy).generation_config.eos_token_id = [1, 9]  # more than the model's config names, as Qwen3 has it
    decoder = sampling_copy(policy, torch.float32)
    assert end_token_ids(decoder, pocket[1]) == end_token_ids(policy, pocket[1]) == {1, 9}
    assert sampling_copy(decoder) is sampling_copy(decoder, torch.bfloat16) is decoder


# --- rows: prompts of all lengths, several steps, rows that leave ---


def texts_of(prompts: list[list[int]], copies: int) -> list[list[int]]:
    return [list(prompt) for prompt in prompts for _ in range(copies)]


def assert_rows_follow(rows: Rows | ModelRows, policy, texts: list[list[int]], stays: list[list[int] | None]) -> None:
    """Write a random token to each row as often as `stays` is long; before each, only the rows it names are kept."""

    def check(logits: Tensor) -> None:
        assert logits.shape == (len(texts), 24)
        for text, row in zip(texts, logits, strict=True):
            assert_close(row, plain_logits(policy, text)[-1], **CLOSE)

    random = generator(7)
    check(rows.logits)
    for stay in stays:
        if stay is not None:
            rows.keep(torch.tensor(stay))
            texts = [list(texts[i]) for i in stay]
        tokens = torch.randint(2, 24, (len(texts),), generator=random)
        logits = rows.step(tokens)
        for text, token in zip(texts, tokens.tolist(), strict=True):
            text.append(token)
        check(logits)


def start(kind: type, policy, prompts: list[list[int]], copies: int, room: int) -> Rows | ModelRows:
    with torch.no_grad():
        return kind(Decoder(policy) if kind is Rows else bare(policy), prompts, copies, room)


# Of 4 questions with 3 rows each: uneven groups; the longest prompt's question gone and two rows between; one row left.
STAYS = [None, [0, 1, 2, 3, 6, 7, 9, 10, 11], None, [0, 2, 3, 6], [1, 2], None, [1]]


@torch.no_grad()
@pytest.mark.parametrize("kind", [Rows, ModelRows])
@pytest.mark.parametrize("lengths", [[5, 1, 9, 4], [3, 3, 3, 3]], ids=["ragged", "alike"])
@pytest.mark.parametrize("build", BUILDS)
def test_rows_have_the_logits_of_a_plain_pass_while_others_leave(build, lengths, kind):
    policy = policy_of(build)
    prompts = random_prompts(lengths)
    assert_rows_follow(start(kind, policy, prompts, 3, len(STAYS)), policy, texts_of(prompts, 3), STAYS)


SMALL = small_model("qwen3_gqa_untied")


@torch.no_grad()
@settings(max_examples=40)
@given(st.data())
def test_rows_may_leave_in_any_order(data):
    lengths = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    copies = data.draw(st.integers(1, 3))
    left, stays = len(lengths) * copies, []
    for _ in range(data.draw(st.integers(1, 4))):
        stay = data.draw(st.none() | st.sets(st.integers(0, left - 1), min_size=1).map(sorted))
        left = left if stay is None else len(stay)
        stays.append(stay)
    prompts = random_prompts(lengths, seed=sum(lengths))
    for kind in (Rows, ModelRows):
        assert_rows_follow(start(kind, SMALL, prompts, copies, len(stays)), SMALL, texts_of(prompts, copies), stays)


def test_both_kinds_of_rows_write_the_same(model, monkeypatch):
    prompts = random_prompts([5, 1, 9, 5, 14, 2])
    for temperature in (0.0, 0.8):
        settings = {"group_size": 4, "max_new_tokens": 12, "end_ids": {END, 2, 3}, "temperature": temperature}
        with monkeypatch.context() as forced:
            first = rollout(model, prompts, **settings)
            no_decoder(forced)
            second = rollout(model, prompts, **settings)
        assert len({len(r.token_ids) for group in first for r in group}) > 2
        for a, b in zip(sum(first, []), sum(second, []), strict=True):
            assert (a.token_ids, a.finished) == (b.token_ids, b.finished)
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_a_prompt_s_keys_and_values_are_held_once_a_group_and_go_with_their_question():
    rows = start(Rows, small_model(), random_prompts([6, 4, 9]), 50, 10)
    assert all(x.shape == (3, 2, 9, 8) for x in rows.prompt_keys + rows.prompt_values)
    rows.keep(torch.arange(60))  # the third question and most of the second
    assert all(x.shape == (2, 2, 9, 8) for x in rows.prompt_keys + rows.prompt_values)
    assert all(x.shape == (60, 2, 10, 8) for x in rows.keys + rows.values)


# --- the families that no decoder is written for ---


def gpt2():
    config = GPT2Config(vocab_size=24, n_positions=128, n_embd=32, n_layer=2, n_head=4, pad_token_id=0,
                        bos_token_id=None, eos_token_id=END)  # fmt: skip
    model, random = GPT2LMHeadModel(config).eval(), generator(3)
    for name, weight in model.named_parameters():
        scale = "ln_" in name and name.endswith("weight")
        torch.nn.init.normal_(weight, mean=float(scale), std=0.5, generator=random)
    return model


OTHERS = {
    "gpt2": gpt2,
    "gelu": lambda: small_model(hidden_act="gelu"),
    "mistral, sliding window": lambda: small_model("mistral_wide_heads", sliding_window=4),
    "qwen2, one layer with a sliding window": lambda: small_model(
        "qwen2_biases", use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_sample_through_their_own_forward_pass(name):
    model, prompts = OTHERS[name](), random_prompts([5, 1, 9, 5, 12])
    assert Decoder.supports(model) is False
    policy = model if name == "gpt2" else add_lora(copy.deepcopy(model), r=2, alpha=4)  # a new adapter adds 0
    assert sampling_copy(policy, torch.bfloat16) is bare(policy)
    if name != "gpt2":  # a decoder would be wrong
        assert (decoder_logits(Decoder(model), TEXTS[0]) - plain_logits(model, TEXTS[0])).abs().max() > 0.01
    written = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        text = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=None
        )
        written.append(text[0, len(prompt) :].tolist())
    ends = {END, written[0][3]}  # so that some responses end early
    greedy = rollout(policy, prompts, group_size=2, max_new_tokens=12, end_ids=ends, temperature=0)
    for text, group in zip(written, greedy, strict=True):
        length = next((at + 1 for at, token in enumerate(text) if token in ends), 12)
        assert [r.token_ids for r in group] == [text[:length]] * 2
    assert len({len(group[0].token_ids) for group in greedy}) > 1
    drawn = rollout(policy, prompts, group_size=3, max_new_tokens=8, end_ids={END, 2, 3})
    for prompt, group in zip(prompts, drawn, strict=True):
        for response in group:
            plain = plain_logprobs(model, prompt, response.token_ids)
            assert response.logprobs == pytest.approx(plain.tolist(), abs=1e-4)


def test_every_build_is_supported_and_says_so_plainly():
    assert all(Decoder.supports(small_model(build)) is True for build in BUILDS)
    assert Decoder.supports(policy_of("qwen3_gqa_untied")) is True


# --- attention in two parts ---


class Elsewhere(Tensor):
    """A tensor that says it is not on a CPU."""

    @property
    def device(self):
        return SimpleNamespace(type="elsewhere")


def attend_elsewhere(queries: Tensor, *rest: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(x.as_subclass(Tensor) for x in attend(queries.as_subclass(Elsewhere), *rest))


def tensors(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries (B, H, Q, D), keys and values (B, H, K, D), hidden (B, 1, 1, K) with at least one place to see."""
    b, h, q, k, d = shape
    queries, keys, values = (
        torch.randn(b, h, n, d, generator=generator(seed)).to(dtype) for seed, n in enumerate((q, k, k))
    )
    unseen = torch.rand(b, 1, 1, k, generator=generator(9)) < 0.4
    unseen[..., 0] = False
    return queries, keys, values, torch.zeros(b, 1, 1, k, dtype=dtype).masked_fill(unseen, -torch.inf)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 8), (1, 1, 1, 1, 16), (3, 2, 33, 70, 12)])
def test_attention_is_the_same_on_every_device_and_as_written_out(shape, dtype, atol, masked):
    queries, keys, values, hidden = tensors(*shape, dtype=dtype)
    hidden = hidden if masked else None
    scores = queries.double() @ keys.double().transpose(-1, -2) / shape[-1] ** 0.5
    scores = scores if hidden is None else scores + hidden.double()
    plain, total = scores.softmax(dim=-1) @ values.double(), scores.exp().sum(dim=-1).log()
    with patch("torch.Tensor.logsumexp", side_effect=AssertionError):
        here = attend(queries, keys, values, hidden)  # by the fused operator
    for looked, log_sum in (here, attend_elsewhere(queries, keys, values, hidden)):
        assert looked.dtype == dtype and looked.shape == queries.shape and log_sum.shape == shape[:3]
        assert_close(looked.double(), plain, rtol=0, atol=atol)
        assert_close(log_sum.double(), total, rtol=0, atol=atol)


@torch.no_grad()
def test_rows_are_the_same_on_every_device(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "attend", lambda *given: calls.append(given) or attend_elsewhere(*given))
    policy = policy_of("llama_gqa_tied")
    prompts = random_prompts([5, 1, 9, 4])
    assert_rows_follow(start(Rows, policy, prompts, 3, len(STAYS)), policy, texts_of(prompts, 3), STAYS)
    assert len(calls) == 2 * 2 * len(STAYS)  # two parts in each of two layers


# --- linear products laid out beforehand ---


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows, inputs, outputs", [(1, 32, 48), (7, 576, 100), (70, 33, 5), (3, 1, 1)])
def test_a_packed_product_is_the_linear_layer_s(rows, inputs, outputs, biased):
    weight, bias = torch.randn(outputs, inputs, generator=generator()), torch.randn(outputs, generator=generator(1))
    x, bias = torch.randn(rows, inputs, generator=generator(2)), bias if biased else None
    assert_close(packed_product(weight, bias)(x), F.linear(x, weight, bias), rtol=1e-5, atol=1e-4)
    weight, bias, x = weight.bfloat16(), bias.bfloat16() if biased else None, x.bfloat16()
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    product = packed_product(weight, bias)(x)
    assert product.dtype == torch.bfloat16 and product.shape == (rows, outputs)
    # One rounding of the result, to 8 bits, and whatever the order of float32 additions adds to it.
    assert_close(product.double(), exact, rtol=2**-8, atol=1e-4 * inputs**0.5)
    assert_close(packed_product(weight, bias)(x.expand(2, rows, inputs)), product.expand(2, rows, outputs), **CLOSE)


@pytest.mark.parametrize("missing", ["library", "instructions"])
def test_a_processor_or_a_build_without_it_multiplies_as_ever(monkeypatch, missing):
    weight, x = torch.randn(6, 5).bfloat16(), torch.randn(4, 5).bfloat16()
    laid_out = Mock(side_effect=AssertionError)
    ops = SimpleNamespace(_reorder_linear_weight=laid_out)  # without the library there is no question to ask either
    if missing == "library":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    else:
        ops._is_mkldnn_bf16_supported = lambda: False
    monkeypatch.setattr(torch, "ops", SimpleNamespace(mkldnn=ops, aten=torch.ops.aten))
    assert torch.equal(packed_product(weight, None)(x), F.linear(x, weight))


# --- the C library's memory ---


def test_the_package_can_be_imported_where_the_c_library_is_another(monkeypatch):
    load = Mock(side_effect=OSError)  # as on Windows, where a library without a name cannot be loaded
    monkeypatch.setattr("ctypes.CDLL", load)
    for version in (("", ""), ("musl", "1.2.5"), ("msvcrt", "")):
        monkeypatch.setattr(platform, "libc_ver", lambda version=version: version)
        importlib.reload(helpers)
    load.assert_not_called()


def test_glibc_is_told_to_keep_large_blocks_in_numbers_it_takes(monkeypatch):
    libc = Mock()
    with monkeypatch.context() as m:
        m.setattr("ctypes.CDLL", lambda name: libc)
        m.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
        helpers.keep_freed_memory()
    told = [call.args for call in libc.mallopt.call_args_list]
    assert dict(told) == {-3: 2**25, -1: 2**31 - 1}  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD: C ints
    if platform.libc_ver()[0] == "glibc":
        import ctypes

        assert [ctypes.CDLL(None).mallopt(*call) for call in told] == [1, 1]  # 1: done


# --- numbers of rows ---


@given(st.integers(0, 100_000))
def test_rows_are_rounded_up_by_a_16th_or_to_a_multiple_of_16(rows):
    up = round_up(rows)
    assert 0 <= up - rows < max(16, rows / 16 + 1e-9) and round_up(up) == up and (up % 16 == 0 or rows < 16)


def test_few_numbers_of_rows_are_left_and_each_sequence_is_computed_as_before():
    assert len({round_up(rows) for rows in range(1, 4096)}) < 100
    decoder = Decoder(small_model())
    for length in (15, 16, 17, 40, 100):
        [ids] = random_prompts([length], seed=length)
        assert_close(decoder_logits(decoder, ids), plain_logits(small_model(), ids), **CLOSE)
