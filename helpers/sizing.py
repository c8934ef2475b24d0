"""What a recipe needs before it runs: memory part by part, and the operations and seconds of a step."""

import math
from dataclasses import dataclass, replace

import torch

from helpers.limits import Shape, Work, operations
from helpers.logprobs import CHUNK
from helpers.recipes import Recipe
from helpers.rollout import MAX_ROWS

GIB = 2**30
CARDS = (8, 16, 24, 80)  # GiB of common GPUs


@dataclass(frozen=True)
class ModelShape(Shape):
    """A model as sizes. tied: the vocabulary projection is the embedding; head_norms: queries and keys are normed."""

    tied: bool = True
    head_norms: bool = False

    @classmethod
    def of(cls, config, lora_r: int = 0) -> "ModelShape":
        """From a transformers config."""
        more = {"tied": config.tie_word_embeddings, "head_norms": config.model_type == "qwen3"}
        return replace(super().of(config, lora_r), **more)

    @property
    def linear(self) -> int:
        """Weights of all layers' matrices."""
        return self.layers * sum(a * b for a, b in self.products)

    @property
    def embedding(self) -> int:
        """Weights of the embedding; the vocabulary projection has as many, or is the same."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All weights, a tied one once."""
        norms = (2 * self.layers + 1) * self.hidden + 2 * self.layers * self.width * self.head_norms
        return self.linear + self.embedding * (1 if self.tied else 2) + norms


_SMALL = ModelShape(layers=30, hidden=576, heads=9, groups=3, width=64, mlp=1536, vocabulary=49152, lora_r=0)
SHAPES = {
    "pocket": ModelShape(layers=3, hidden=128, heads=4, groups=2, width=32, mlp=352, vocabulary=178, lora_r=0),
    "smollm-135m": _SMALL,
    "smollm2-135m": _SMALL,
    "smollm-360m": ModelShape(32, 960, 15, 5, 64, 2560, 49152, lora_r=0),
    "qwen3-0.6b": ModelShape(28, 1024, 16, 8, 128, 3072, 151936, lora_r=0, head_norms=True),
}


@dataclass(frozen=True)
class Estimate:
    """Bytes by part, and the work of a step. What is in `rollout` and what is in `update` is never held together.

    loading: bytes that a CPU holds while the model is loaded, its file among them. flops: of "prefill", "decode" and
    "update"; reads: bytes that decoding takes from memory; passes: of one layer, one after the other, by phase.
    """

    loading: int
    always: dict[str, int]
    rollout: dict[str, int]
    update: dict[str, int]
    flops: dict[str, float]
    reads: float
    passes: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes at the peak of a step."""
        return sum(self.always.values()) + max(sum(self.rollout.values()), sum(self.update.values()))

    def fits(self, gib: float) -> bool:
        """Whether a GPU of so many GiB has room: 1 GiB is left to CUDA, a tenth to gaps between the pieces."""
        return 1.1 * self.total + GIB <= gib * GIB

    def seconds(self, flops_per_second: float, bytes_per_second: float, layer_seconds: float = 0.0) -> dict[str, float]:
        """The seconds that a step's "sampling" and "learning" cannot go below at this throughput.

        Training waits for arithmetic, decoding for memory as well, and both for `layer_seconds`: what a layer takes at
        the least, however little it computes, to launch its kernels.
        """
        arithmetic = {phase: flops / flops_per_second for phase, flops in self.flops.items()}
        launch = {phase: passes * layer_seconds for phase, passes in self.passes.items()}
        decode = max(arithmetic["decode"], self.reads / bytes_per_second, launch["decode"])
        return {"sampling": arithmetic["prefill"] + decode, "learning": max(arithmetic["update"], launch["update"])}


def estimate(
    recipe: Recipe, shape: ModelShape | None = None, prompt_length: int = 120, length: int | None = None
) -> Estimate:
    """Memory and work of one step of a recipe, from its settings and its model's sizes alone.

    shape: the model's sizes, if they are not in `SHAPES`. prompt_length: tokens of a prompt. length: tokens of each
    response, for the work (None: max_new_tokens); memory must be there for max_new_tokens in any case.
    What Python and its libraries take is not counted.
    """
    g, lora, half = recipe.grpo, recipe.lora, recipe.mixed_precision == "bf16"
    m = replace(shape or SHAPES[recipe.model], lora_r=lora.r if lora else 0)
    own, size = (torch.finfo(getattr(torch, d)).bits // 8 for d in (recipe.dtype, recipe.sampler_dtype or recipe.dtype))
    trained = m.layers * m.lora_products if lora else m.parameters
    frozen = own * m.parameters if lora else 0
    if lora and half:  # the linear weights are halved; the projection with them, which parts from the embedding
        frozen = 2 * (m.linear + m.embedding) + own * m.embedding
    always = {
        "frozen weights": frozen,
        "trained weights": 4 * trained,
        "their gradients": 4 * trained,
        "Adam's two moments": 8 * trained,
        "the policy at the start": 4 * trained,
        "the sampler's copy": size * (m.linear + 2 * m.embedding),
    }
    questions = min(g.questions_per_rollout, max(1, MAX_ROWS // g.group_size))  # at a time
    rows, p, room = questions * g.group_size, prompt_length, g.max_new_tokens
    token = 2 * m.layers * m.groups * m.width * size  # its keys and values
    scaled = any(g.at(step).temperature != 1 for step in (0, g.steps - 1))  # a run has two temperatures at most
    scores = 2 * size + 4 + 4 * scaled + 8 * (g.top_p < 1)  # for one entry of the vocabulary
    rollout = {"key/value cache": token * (questions * p + rows * room), "scores": scores * rows * m.vocabulary}

    rollouts = math.ceil(g.buffer_size / (g.questions_per_rollout * g.group_size))
    held = rollouts * g.questions_per_rollout * g.group_size  # responses: rollouts are kept whole
    part = min(1.0, g.minibatch_size * g.gradient_accumulation / held)  # of them, in an update
    mates = g.group_size * part / (1 - (1 - part) ** g.group_size)  # of a group, where an update has any of it
    mini = min(g.minibatch_size, held)
    prompts = math.ceil(mini / mates)
    layer, entering = activations(m, half, bool(lora), prompts, mini, p, room)
    update = {
        "activations": m.layers * (entering if g.gradient_checkpointing else layer),
        # Gradients take the place of what they free; under checkpointing, of what is computed once more for them.
        "the layer at work": entering + layer * g.gradient_checkpointing,
        "vocabulary projection": 8 * min(CHUNK, mini * room) * m.vocabulary + 8 * mini * room * m.hidden,
    }

    t = length or room
    turns = rollouts * math.ceil(g.questions_per_rollout / questions)
    all_rows = Work((p,) * g.questions_per_rollout, g.group_size, t)
    prefill = operations(replace(all_rows, length=1), m)["rollouts"]
    cached = sum(questions * p + rows * at for at in range(1, t))
    reads = turns * ((t - 1) * size * (m.linear + m.embedding) + token * cached)
    share = Work((p,) * prompts, max(1, round(mates)), t)  # of one minibatch
    forward, once = operations(share, m).values()
    if not lora:  # the gradient of each weight, which `operations` leaves out
        once += 2 * (m.linear * (share.prompt_tokens + share.response_tokens) + m.embedding * share.response_tokens)
    scored = g.updates_per_buffer > 1 or part < 1  # the old log-probs take a forward pass of their own
    work = g.updates_per_buffer * (once + forward * g.gradient_checkpointing) + forward * scored
    layers = m.layers * math.ceil(held / mini)  # a backward pass counts as two
    return Estimate(
        (own + 2) * m.parameters, always, rollout, update,
        flops={"prefill": rollouts * prefill, "decode": rollouts * (operations(all_rows, m)["rollouts"] - prefill),
               "update": work * held / share.rows},
        reads=reads,
        passes={"prefill": turns * m.layers, "decode": turns * (t - 1) * m.layers,
                "update": layers * (g.updates_per_buffer * (3 + g.gradient_checkpointing) + scored)},
    )  # fmt: skip


def activations(m: ModelShape, half: bool, lora: bool, prompts: int, rows: int, p: int, t: int) -> tuple[int, int]:
    """Bytes that one layer keeps for the backward pass of a minibatch, and bytes of what goes into it.

    half: under bfloat16 autocast. prompts: different ones, p tokens each, computed once; rows: responses of t tokens.
    """
    tokens, size = prompts * p + rows * t, 2 if half else 4
    attention, keys = m.heads * m.width, m.groups * m.width
    state = 4 * m.hidden  # the residual stream stays in float32
    a_token = 2 * state  # before either norm
    # What enters q, k, v, gate and up: autocast rounds it for each LoRA matrix anew; float32 needs one a norm.
    a_token += 5 * 2 * m.hidden if half and lora else 2 * size * m.hidden
    a_token += (0 if lora else 2 * state) + 7 * m.lora_r * size  # a norm that trains; between the LoRA matrices
    a_token += 4 * m.mlp * size  # gate, its silu, up, their product
    a_token += 3 * attention * size  # queries, what they found, and that again before the output projection
    a_token += 4 * (attention + keys) * m.head_norms
    looked_at = 2 * keys * size * (prompts * p + rows * (p + t))  # a prompt's keys and values, once a response
    mask = rows * (m.heads // m.groups) * t * (p + t) * size
    return tokens * a_token + looked_at + mask, tokens * state


if __name__ == "__main__":  # python -m helpers.sizing check --json FILE
    from helpers.memory import main

    main()
