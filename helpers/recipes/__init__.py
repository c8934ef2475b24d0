"""Recipes: a YAML file each, read into checked dataclasses."""

import dataclasses
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import yaml

from helpers.grpo import GRPOConfig
from helpers.models import MODELS
from helpers.names import unknown
from helpers.rewards import RewardConfig
from helpers.sft import SFTConfig
from helpers.tasks import TASK_NAMES

DTYPES = ("float32", "bfloat16", "float16")
TRACKERS = ("tensorboard",)


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on all linear layers; the defaults are the article's."""

    r: int = 32
    alpha: int = 64
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not (self.r >= 1 and self.alpha >= 1 and 0 <= self.dropout < 1):
            raise ValueError("lora needs r and alpha of 1 or more and a dropout from 0 to below 1.")


@dataclass(frozen=True)
class EvalConfig:
    """Held-out questions after each stage, answered greedily and sampled at `temperature`."""

    size: int = 300
    temperature: float = 1.0
    max_new_tokens: int = 300

    def __post_init__(self) -> None:
        if not (self.size >= 1 and self.max_new_tokens >= 1 and self.temperature >= 0):
            raise ValueError("evaluation needs size and max_new_tokens of 1 or more and a temperature of 0 or more.")


@dataclass(frozen=True)
class ServerConfig:
    """An OpenAI-compatible server that samples: its address, the model's name there, a folder that both can read."""

    url: str
    model: str
    adapters: str


@dataclass(frozen=True)
class Recipe:
    """All that a run depends on.

    train_size: questions the loop draws from. dtype: of the weights. sampler_dtype: of the copy that samples (none:
    sample from the policy itself). mixed_precision: "no" or "bf16", for the training forward. threads: CPU threads
    (0: torch's choice). lora: none trains all weights. tracker: "tensorboard" draws the logged numbers there as well;
    it needs that package. server: one that samples for the loop, see `helpers.server`.
    """

    model: str
    task: str
    about: str = ""
    balanced: bool = True
    train_size: int = 2000
    seed: int = 0
    dtype: str = "float32"
    sampler_dtype: str | None = None
    mixed_precision: str = "no"
    threads: int = 0
    tracker: str | None = None
    server: ServerConfig | None = None
    lora: LoraConfig | None = field(default_factory=LoraConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        for key, value, allowed in (
            ("model", self.model, MODELS),
            ("task", self.task, TASK_NAMES),
            ("dtype", self.dtype, DTYPES),
            ("sampler_dtype", self.sampler_dtype or DTYPES[0], DTYPES),
            ("mixed_precision", self.mixed_precision, ("no", "bf16")),
            ("tracker", self.tracker or TRACKERS[0], TRACKERS),
        ):
            if value not in allowed:
                raise ValueError(unknown(key, value, allowed))
        if not (self.train_size >= 1 and self.threads >= 0 and 0 <= self.seed < 2**32):
            raise ValueError("A recipe needs a train_size of 1 or more, threads of 0 or more and 0 <= seed < 2**32.")
        if self.grpo.scale == "mean" and self.grpo.credit == "response" and self.reward.length:
            raise ValueError(
                "grpo.scale=mean needs rewards of 0 or more: leave out reward.length, or set another scale."
            )
        if self.server and not (self.lora and self.grpo.loss.correction):
            raise ValueError("A recipe with a server needs lora, which is what it is sent, and a grpo.loss.correction.")
        if self.server and self.grpo.top_p < 1:
            raise ValueError("A recipe with a server needs grpo.top_p=1: a server's log-probs are those after top_p.")


def recipe_names() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(f.name.removesuffix(".yaml") for f in files(__package__).iterdir() if f.name.endswith(".yaml"))


def load_recipe(name: str, settings: Iterable[str] = ()) -> Recipe:
    """A recipe by name, with settings of the form "grpo.steps=50" laid over it.

    Raises ValueError, one sentence with the nearest right name, for a wrong recipe, key or value.
    """
    if name not in recipe_names():
        raise ValueError(unknown("recipe", name, recipe_names()))
    values = yaml.safe_load((files(__package__) / f"{name}.yaml").read_text(encoding="utf-8"))
    for setting in settings:
        key, sign, text = setting.partition("=")
        if not sign:
            raise ValueError(f"A setting has the form key=value, for example grpo.steps=50, not {setting!r}.")
        try:
            value = yaml.safe_load(text)
        except Exception:  # PyYAML has a YAMLError, and many another error for what looks like a date, say, and is none
            raise ValueError(
                f"The value of {key!r} cannot be read: {text!r} is not a number, a word or a list."
            ) from None
        *path, last = key.split(".")
        place = values
        for part in path:
            place[part] = place.get(part) or {}
            if not isinstance(place[part], dict):
                raise ValueError(f"{key!r} does not exist: {part!r} is a single value.")
            place = place[part]
        place[last] = value
    return build(Recipe, values)


def build(kind: type, values: Any, where: str = "") -> Any:
    """A dataclass from plain YAML values, every key and type checked. ValueError names the place and the cure."""
    if not isinstance(values, dict):
        raise ValueError(f"{where or 'A recipe'} must be a list of key: value lines, not {values!r}.")
    hints = typing.get_type_hints(kind)
    made = {}
    for key, value in values.items():
        place = f"{where}.{key}" if where else str(key)
        if key not in hints:
            raise ValueError(unknown("setting", place, [f"{where}.{h}" if where else h for h in hints]))
        made[key] = _convert(hints[key], value, place)
    for f in dataclasses.fields(kind):
        if f.name not in made and f.default is f.default_factory is dataclasses.MISSING:
            raise ValueError(f"A recipe must say its {f.name}.")
    return kind(**made)


def _convert(hint: Any, value: Any, place: str) -> Any:
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if dataclasses.is_dataclass(hint):
        return build(hint, value, place)
    if hint is float and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-6, without a dot, as text
        except (TypeError, ValueError, OverflowError):
            pass
    elif type(value) is hint and (hint is not int or abs(value) < 2**63):  # beyond that, torch has no whole numbers
        return value
    noun = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}[hint]
    raise ValueError(f"{place} must be {noun}, not {value!r}.")
