"""Recipes: the shipped ones load, settings are read as YAML and checked, what is wrong gets one sentence."""

import dataclasses
from importlib.resources import files

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers.grpo import GRPOConfig
from helpers.losses import LossConfig
from helpers.recipes import LoraConfig, Recipe, build, load_recipe, recipe_names
from helpers.sft import SFTConfig

ARTICLE = ("article-smollm-135m", "article-smollm-360m", "article-qwen3-0.6b")


def test_the_recipes_that_are_shipped():
    names = recipe_names()
    assert {"pocket", "smollm2-135m-cpu", *ARTICLE} <= set(names)
    for name in names:
        recipe = load_recipe(name)
        written = yaml.safe_load((files("helpers.recipes") / f"{name}.yaml").read_text())
        assert recipe.about and recipe == build(Recipe, written)
        kept = yaml.safe_load(yaml.safe_dump(dataclasses.asdict(recipe)))  # as config.yaml keeps it
        assert build(Recipe, kept) == recipe


def test_the_article_s_recipes_have_the_article_s_numbers():
    for name in ARTICLE:
        recipe = load_recipe(name)
        grpo = recipe.grpo
        assert (recipe.sft.traces, recipe.lora) == (200, LoraConfig(32, 64, 0.0))
        assert (grpo.max_new_tokens, grpo.questions_per_rollout, grpo.group_size) == (300, 8, 6)
        assert (grpo.temperature, grpo.top_p, grpo.buffer_size) == (0.7, 0.95, 500)
        assert (grpo.minibatch_size, grpo.gradient_accumulation, grpo.gradient_checkpointing) == (16, 12, True)


def test_what_a_recipe_leaves_out_has_its_default():
    recipe = build(Recipe, {"model": "pocket", "task": "syllogism"})
    assert (recipe.sft, recipe.grpo, recipe.lora, recipe.seed) == (SFTConfig(), GRPOConfig(), LoraConfig(), 0)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("grpo.learning_rate=1e-6", 1e-6),  # YAML reads it as text
        ("grpo.learning_rate=1.5E-5", 1.5e-5),
        ("grpo.temperature=1", 1.0),
        ("grpo.steps=50", 50),
        ("grpo.gradient_checkpointing=true", True),
        ("grpo.gradient_checkpointing=no", False),
        ("grpo.loss.loss_type=dapo", "dapo"),
        ("grpo.loss={loss_type: dr_grpo, beta: 1e-3}", LossConfig("dr_grpo", beta=1e-3)),
        ("reward.correct=1", 1.0),
        ("seed=7", 7),
        ("sampler_dtype=bfloat16", "bfloat16"),
        ("sampler_dtype=null", None),
        ("lora=null", None),
        ("lora.r=8", LoraConfig(8)),  # the pocket recipe has none: this gives it one
        ("about=a = b", "a = b"),
        ("balanced=false", False),
    ],
)
def test_settings_are_laid_over_a_recipe(setting, value):
    recipe = load_recipe("pocket", [setting])
    found = recipe
    for name in setting.partition("=")[0].split("."):
        found = found if isinstance(found, LoraConfig) and name == "r" else getattr(found, name)
    assert found == value and type(found) is type(value)
    standing = load_recipe("pocket")
    others = [f.name for f in dataclasses.fields(Recipe) if not setting.startswith(f.name)]
    assert all(getattr(recipe, name) == getattr(standing, name) for name in others)


def test_settings_count_in_order_and_leave_their_neighbours():
    recipe = load_recipe("pocket", ["grpo.steps=5", "lora.r=8", "grpo.steps=6", "lora.alpha=16"])
    assert recipe.grpo == dataclasses.replace(load_recipe("pocket").grpo, steps=6)
    assert recipe.lora == LoraConfig(8, 16)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["grpo.stepz=5"], "There is no setting 'grpo.stepz'; did you mean 'grpo.steps'?"),
        (["grppo.steps=5"], "There is no setting 'grppo'; did you mean 'grpo'?"),
        (["lr=5"], "There is no setting 'lr'; did you mean 'lora'?"),
        (["grpo.loss.betta=1"], "There is no setting 'grpo.loss.betta'; did you mean 'grpo.loss.beta'?"),
        (["task=sylogism"], "There is no task 'sylogism'; did you mean 'syllogism'?"),
        (["model=smollm2"], "There is no model 'smollm2'; did you mean 'smollm2-135m'?"),
        (["dtype=float"], "There is no dtype 'float'; did you mean 'float32'?"),
        (["sampler_dtype=int8"], "There is no sampler_dtype 'int8'; choose one of: float32, bfloat16, float16."),
        (["mixed_precision=bf"], "There is no mixed_precision 'bf'; did you mean 'bf16'?"),
        (["grpo.steps=many"], "grpo.steps must be a whole number, not 'many'."),
        (["grpo.steps=true"], "grpo.steps must be a whole number, not True."),
        (["grpo.steps=1.5"], "grpo.steps must be a whole number, not 1.5."),
        (["grpo.steps=null"], "grpo.steps must be a whole number, not None."),
        (["grpo.steps=-1"], "grpo.steps must be 0 or more, not -1."),
        (["grpo.temperature=true"], "grpo.temperature must be a number, not True."),
        (["grpo.temperature=hot"], "grpo.temperature must be a number, not 'hot'."),
        (["grpo.temperature=[1]"], "grpo.temperature must be a number, not [1]."),
        (["balanced=1"], "balanced must be true or false, not 1."),
        (["task=1"], "task must be a word, not 1."),
        (["grpo=5"], "grpo must be a list of key: value lines, not 5."),
        (["seed.x=1"], "seed must be a whole number, not {'x': 1}."),
        (["train_size.x=1"], "'train_size.x' does not exist: 'train_size' is a single value."),
        (["grpo.steps"], "A setting has the form key=value, for example grpo.steps=50, not 'grpo.steps'."),
        (["grpo.steps=[1"], "The value of 'grpo.steps' cannot be read: '[1' is not a number, a word or a list."),
        (["seed=-1"], "A recipe needs a train_size of 1 or more, threads of 0 or more and 0 <= seed < 2**32."),
        (["train_size=0"], "A recipe needs a train_size of 1 or more, threads of 0 or more and 0 <= seed < 2**32."),
        (["lora.r=0"], "lora needs r and alpha of 1 or more and a dropout from 0 to below 1."),
        (["lora.dropout=1"], "lora needs r and alpha of 1 or more and a dropout from 0 to below 1."),
        (["evaluation.size=0"],
         "evaluation needs size and max_new_tokens of 1 or more and a temperature of 0 or more."),
        (["sft.warmup=2"],
         "sft.warmup and sft.decay are shares from 0 to 1; learning_rate and max_grad_norm are above 0."),
        (["reward.correct=-1"], "The reward's correct must be a number of 0 or more, not -1.0."),
        (["reward.length=1"], "A reward with a length weight needs a length_target of 1 word or more."),
        (["grpo.scale=mean", "reward.length=0.3", "reward.length_target=2"],
         "grpo.scale=mean needs rewards of 0 or more: leave out reward.length, or set another scale."),
        (["grpo.loss.loss_type=ppo"], "loss_type must be one of grpo, bnpo, dr_grpo, dapo, cispo, not 'ppo'."),
    ],
)  # fmt: skip
def test_a_wrong_key_or_value_is_one_sentence(settings, sentence):
    with pytest.raises(ValueError) as refusal:
        load_recipe("pocket", settings)
    assert str(refusal.value) == sentence


def test_a_wrong_recipe_is_one_sentence():
    with pytest.raises(ValueError, match=r"^There is no recipe 'poket'; did you mean 'pocket'\?$"):
        load_recipe("poket")
    with pytest.raises(ValueError, match=r"^There is no recipe '\.\./pocket'; "):
        load_recipe("../pocket")
    for values, sentence in [({"model": "pocket"}, "A recipe must say its task."),
                             ([], r"A recipe must be a list of key: value lines, not \[\]\.")]:  # fmt: skip
        with pytest.raises(ValueError, match=sentence):
            build(Recipe, values)


def names_of(kind, where=""):
    """Every key that a setting may have."""
    for f in dataclasses.fields(kind):
        yield where + f.name
        inner = f.default_factory() if f.default_factory is not dataclasses.MISSING else None
        if dataclasses.is_dataclass(inner):
            yield from names_of(type(inner), f"{where}{f.name}.")


KEYS = sorted(names_of(Recipe))
joined = st.lists(st.sampled_from(KEYS), max_size=3).map(".".join)
keys = st.one_of(st.sampled_from(KEYS), st.text(max_size=20), joined)
pieces = [*"[]{}:,-.&*!|>'\"#%@0123456789eE_+ \n\t", "!!int ", "!!float ", "!!timestamp ", "!!binary ", "null", "true",
          ".inf", ".nan", "0x", "0b1", "1:30", "2001-02-30", "&a ", "*a", "<<", "? ", "loss_type", "r: "]  # fmt: skip
yaml_soup = st.lists(st.sampled_from(pieces), max_size=12).map("".join)
texts = st.one_of(st.text(max_size=30), yaml_soup, st.integers().map(str), st.floats().map(str), st.sampled_from(
    ["bfloat16", "dapo", "syllogism", "pocket", "bf16", "group", "none", "null", "true", "1e-6", "{}", "{r: 1}"]
))  # fmt: skip


@settings(deadline=None, max_examples=150)
@example(["grpo.steps=" + "[" * 20_000])
@example(["grpo.temperature=1" + "0" * 400])
@example(["reward.length_target=1" + "0" * 400])
@example(["grpo.steps=0x" + "f" * 5_000])
@example(["grpo.steps=" + "9" * 5_000])
@example(["grpo.steps=!!int ''"])
@example(["grpo.steps=!!timestamp x"])
@example(["about=2001-02-30"])
@example(["grpo=&a {loss: *a}"])
@example(["grpo.\nsteps=["])
@example(["seed=\n.x=1"])
@example(["train_size.\n=1"])
@given(st.lists(st.one_of(st.text(max_size=30), st.tuples(keys, texts).map("=".join)), min_size=1, max_size=3))
def test_no_setting_raises_anything_but_one_line(settings):
    try:
        recipe = load_recipe("pocket", settings)
    except ValueError as refusal:
        assert str(refusal) and "\n" not in str(refusal)
    else:
        assert isinstance(recipe, Recipe)
