"""The estimate's arithmetic on real configs and the pocket model, and against the memory that was measured."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from helpers.benchmark import peak
from helpers.memory import CASES, PHASES, case, check, expected, forget_peak, main, measure
from helpers.models import add_lora, halve_frozen
from helpers.recipes import load_recipe
from helpers.sizing import CARDS, SHAPES, ModelShape, activations, estimate
from helpers.tests.conftest import small_model

RECORD = Path(__file__).parents[1] / "recorded/sizing.json"


@pytest.fixture(autouse=True)
def one_accelerator_a_test():
    """accelerate keeps the first accelerator's settings for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)


TOLERANCE = 0.15  # as the notebook states it
ARTICLE = ("article-smollm-135m", "article-smollm-360m", "article-qwen3-0.6b")
# From the models' own config.json files.
CONFIGS = {
    "smollm-135m": (LlamaConfig, LlamaForCausalLM, 134_515_008, dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152)),
    "smollm-360m": (LlamaConfig, LlamaForCausalLM, 361_821_120, dict(
        hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15, num_key_value_heads=5,
        vocab_size=49152)),
    "qwen3-0.6b": (Qwen3Config, Qwen3ForCausalLM, 596_049_920, dict(
        hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, vocab_size=151936)),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_have_the_parameters_of_the_real_models(name):
    config_class, model_class, known, sizes = CONFIGS[name]
    config = config_class(**sizes, tie_word_embeddings=True)
    with torch.device("meta"):
        model = model_class(config)
    assert sum(p.numel() for p in model.parameters()) == SHAPES[name].parameters == known  # a tied weight once
    assert ModelShape.of(config) == SHAPES[name]


def test_shapes_of_the_models_that_are_here(pocket):
    model, _ = pocket
    assert ModelShape.of(model.config) == SHAPES["pocket"]
    assert SHAPES["smollm2-135m"] == SHAPES["smollm-135m"]


def held(model) -> int:
    return sum(p.nbytes for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("mixed", ["no", "bf16"])
@pytest.mark.parametrize("build", ["llama_gqa_tied", "qwen3_gqa_untied"])
def test_weights_are_counted_to_the_byte(build, mixed):
    model = small_model(build)
    recipe = replace(load_recipe("pocket"), lora=load_recipe("smollm2-135m-cpu").lora, mixed_precision=mixed)
    policy, m = add_lora(model), ModelShape.of(model.config, lora_r=32)
    if mixed == "bf16":
        halve_frozen(policy, torch.bfloat16)
    found = estimate(recipe, m)
    trained = sum(p.nbytes for p in policy.parameters() if p.requires_grad)
    assert found.always["trained weights"] == found.always["their gradients"] == trained
    assert found.always["Adam's two moments"] == 2 * trained
    norms = 4 * sum(p.numel() for name, p in policy.named_parameters() if "norm" in name)
    counted = found.always["frozen weights"]
    assert counted == held(policy) - (norms if mixed == "bf16" else 0)  # a norm is left out where it is not halved


def test_without_lora_all_weights_train():
    found = estimate(load_recipe("pocket"))
    assert found.always["frozen weights"] == 0
    assert found.always["trained weights"] == 4 * SHAPES["pocket"].parameters


def saved_bytes(model, run) -> int:
    """Bytes that autograd keeps, each tensor once, weights left out."""
    seen: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x):
        if x.untyped_storage().data_ptr() not in weights:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        kept = run()
    del kept
    return sum(seen.values())


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("build", ["llama_gqa_tied", "qwen3_gqa_untied"])
def test_activations_are_what_autograd_keeps(build, half):
    from helpers.packing import lay_out, packed_states

    prompts, rows, p, t = 2, 6, 20, 40
    model = small_model(build, num_hidden_layers=4)
    policy = add_lora(model, r=4, alpha=8)
    if half:
        halve_frozen(policy, torch.bfloat16)
    ids = torch.randint(2, 24, (prompts, p)).repeat_interleave(rows // prompts, 0)
    ids = torch.cat([ids, torch.randint(2, 24, (rows, t))], dim=1)
    layout = lay_out(ids, torch.full((rows,), p), torch.full((rows,), t))

    def run(layers):
        model.model.layers, whole = model.model.layers[:layers], model.model.layers
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            found = saved_bytes(policy, lambda: packed_states(policy, layout))
        model.model.layers = whole
        return found

    one_layer = (run(4) - run(2)) / 2
    said, _ = activations(ModelShape.of(model.config, lora_r=4), half, True, prompts, rows, p, t)
    assert said == pytest.approx(one_layer, rel=0.1)


def test_parts_grow_with_their_setting_and_with_no_other():
    recipe = load_recipe("article-smollm-135m")

    def settings(**changes):
        return estimate(replace(recipe, grpo=replace(recipe.grpo, **changes)))

    now = settings()
    assert now.total == sum(now.always.values()) + max(sum(now.rollout.values()), sum(now.update.values()))
    longer = settings(max_new_tokens=600)
    assert longer.always == now.always
    assert longer.rollout["scores"] == now.rollout["scores"]
    assert longer.rollout["key/value cache"] > 1.5 * now.rollout["key/value cache"]
    assert settings(minibatch_size=32).rollout == now.rollout
    plain = settings(gradient_checkpointing=False)
    assert plain.update["activations"] > 5 * now.update["activations"]
    assert plain.flops["update"] < now.flops["update"] < 1.5 * plain.flops["update"]
    many = settings(questions_per_rollout=1000)  # more rows than are sampled at once
    assert many.rollout == settings(questions_per_rollout=64).rollout


def test_scores_are_those_of_whichever_temperature_takes_more():
    """Another temperature than 1 takes one more number for each entry of the vocabulary, in whichever steps it has."""
    recipe = load_recipe("smollm2-135m-cpu")

    def scores(**changes):
        return estimate(replace(recipe, grpo=replace(recipe.grpo, steps=10, top_p=1.0, **changes))).rollout["scores"]

    plain, scaled = scores(temperature=1.0), scores(temperature=1.3)
    assert scaled > plain
    assert scores(temperature=1.0, later_temperature=1.3, later_after=9) == scaled
    assert scores(temperature=1.3, later_temperature=1.0, later_after=5) == scaled
    # A temperature that no step has takes nothing.
    assert scores(temperature=1.0, later_temperature=1.3, later_after=10) == plain
    assert scores(temperature=1.3, later_temperature=1.0, later_after=0) == plain


def test_seconds_are_bound_by_memory_arithmetic_or_layers():
    found = estimate(load_recipe("article-smollm-135m"))
    seconds = found.seconds(1e15, 1e12)
    assert seconds["sampling"] == pytest.approx(found.flops["prefill"] / 1e15 + found.reads / 1e12)
    assert seconds["learning"] == pytest.approx(found.flops["update"] / 1e15)
    assert found.seconds(1e15, 1e18)["sampling"] == pytest.approx(
        (found.flops["prefill"] + found.flops["decode"]) / 1e15
    )
    assert found.seconds(1e15, 1e12, 1.0)["learning"] == found.passes["update"]


@pytest.mark.parametrize(("checkpointing", "smallest"), [("true", (8, 8, 8)), ("false", (8, 16, 24))])
def test_the_article_s_recipes_and_the_cards_they_fit(checkpointing, smallest):
    for name, card in zip(ARTICLE, smallest, strict=True):
        found = estimate(load_recipe(name, [f"grpo.gradient_checkpointing={checkpointing}"]))
        assert min(gib for gib in CARDS if found.fits(gib)) == card


def test_whole_rollouts_are_learned_from():
    """A buffer of 500 takes eleven rollouts of 48, which are 528 responses: as many as one of eleven times the size."""
    recipe = load_recipe("article-smollm-135m")
    one = estimate(replace(recipe, grpo=replace(recipe.grpo, questions_per_rollout=88)))
    eleven = estimate(recipe)
    assert one.flops["update"] == eleven.flops["update"] and one.passes["update"] == eleven.passes["update"]
    assert eleven.passes["decode"] == 5.5 * one.passes["decode"]  # 384 rows at a time


def test_peak_of_this_process_sees_a_new_tensor():
    before = forget_peak()
    torch.ones(64 * 2**20)
    assert 0.9 * 2**28 < peak() - before < 1.5 * 2**28


@pytest.mark.parametrize("phase", PHASES)
def test_measuring_a_phase_here(phase):
    """Not the numbers, for this process has a history: that each phase runs, with and without autocast."""
    mixed = replace(case("8 x 32 tokens"), model="pocket", task="letter_counting")
    answer = measure(mixed, phase, keep=True)
    assert answer["bytes"] >= 0 and 20 < answer["prompt_length"] < 120


def test_the_command_keeps_its_result_where_it_is_told(monkeypatch, tmp_path):
    told = []
    monkeypatch.setattr("helpers.memory.check", told.append)
    main(["check", "--json", str(tmp_path / "x.json")])
    assert told == [tmp_path / "x.json"]


def test_check_compares_every_case(monkeypatch, tmp_path):
    class Done:
        stdout = json.dumps({"bytes": 2**30, "prompt_length": 100})

    monkeypatch.setattr("helpers.memory.subprocess.run", lambda *args, **kwargs: Done)
    monkeypatch.setattr("helpers.memory.environment", lambda device: {})
    lines: list[str] = []
    rows = check(tmp_path / "x.json", lines.append)["rows"]
    assert len(rows) == len(lines) == 2 * len(CASES) + 1
    assert json.loads((tmp_path / "x.json").read_text())["rows"] == rows
    assert rows[0]["estimate"] == expected(case(rows[0]["case"]), "load", 100) == 6 * SHAPES["smollm2-135m"].parameters


def test_the_recorded_measurement_is_within_the_tolerance():
    record = json.loads(RECORD.read_text())
    assert record["machine"]["git_commit"]
    assert {(r["case"], r["phase"]) for r in record["rows"] if r["phase"] != "load"} == {
        (name, phase) for name in CASES for phase in PHASES[1:]
    }
    for r in record["rows"]:
        assert r["estimate"] == expected(case(r["case"]), r["phase"], r["prompt_length"]), "run the check again"
        assert r["estimate"] / r["measured"] == pytest.approx(1, abs=TOLERANCE), r
        assert (r["kept"] or r["measured"]) >= r["measured"]
