"""A decoder made for sampling: fused and packed weights, and each prompt's keys and values stored once a group."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.models import bare, merged_weight

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")  # transformers' model types whose forward pass is the one below


def round_up(rows: int) -> int:
    """A number of rows that many share: from 16 on a multiple of 16, from 512 on of 32, from 1024 on of 64, ...

    On a CPU oneDNN makes code for each number of rows that a matrix product meets, half a megabyte each, and keeps it.
    Numbers of tokens are hardly ever the same twice: without this, training takes more and more memory for hundreds
    of steps. From 256 rows on at most a 16th is added.
    """
    unit = max(16, 1 << max(0, rows.bit_length() - 5)) if rows > 16 else 1
    return -(-rows // unit) * unit


def spare_rows(rows: int, device: torch.device) -> int:
    """How many rows `round_up` adds; none where there is no oneDNN. Their results are thrown away."""
    return round_up(rows) - rows if device.type == "cpu" else 0


def packed_product(weight: Tensor, bias: Tensor | None):
    """The function x -> x @ weight.T + bias, with the weight laid out beforehand where that is faster.

    A CPU otherwise rearranges the weight at every call, which for few rows costs as much as the product itself. What
    torch's compiler uses for frozen weights is used here.
    """
    ops = torch.ops.mkldnn
    on_cpu = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()  # not every build of torch has it
    half = weight.dtype == torch.bfloat16 and on_cpu and ops._is_mkldnn_bf16_supported()
    if on_cpu and (half or weight.dtype == torch.float32):
        packed = ops._reorder_linear_weight(weight.contiguous())
        return lambda x: ops._linear_pointwise(x, packed, bias, "none", [], "")
    return lambda x: F.linear(x, weight, bias)


def attend(queries: Tensor, keys: Tensor, values: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention without a causal mask, and the log of each query's sum of exponentials, to join it with another.

    queries: (B, H, Q, D); keys, values: (B, H, K, D); hidden: (B, 1, 1, K), added to the scores. Returns (B, H, Q, D)
    and (B, H, Q). Source: the split softmax of FlashAttention (arXiv 2205.14135).
    """
    if queries.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(queries, keys, values, attn_mask=hidden)
    scores = queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5
    scores = (scores if hidden is None else scores + hidden).float()
    return scores.softmax(dim=-1).to(values.dtype) @ values, scores.logsumexp(dim=-1)


class Decoder:
    """A copy of a policy that only samples. LoRA is merged into its weights from float32; see `refresh`.

    For the model types in `FAMILIES`; `supports` says whether a model's forward pass is the one written here.
    """

    def __init__(self, policy: nn.Module, dtype: torch.dtype | None = None) -> None:
        model = bare(policy)
        self.config, self.generation_config = model.config, model.generation_config
        self.device = next(model.parameters()).device
        self.dtype = dtype or next(model.parameters()).dtype
        self.rotary = model.get_decoder().rotary_emb
        self.heads, self.groups = self.config.num_attention_heads, self.config.num_key_value_heads
        self.width = model.get_decoder().layers[0].self_attn.head_dim
        self.refresh(policy)

    @staticmethod
    def supports(policy: nn.Module) -> bool:
        """Whether the policy's forward pass is this one: its family, activation and full attention in every layer."""
        config = bare(policy).config
        sliding = getattr(config, "layer_types", None) or []
        return (
            config.model_type in FAMILIES
            and config.hidden_act == "silu"
            and all(kind == "full_attention" for kind in sliding)
            and (bool(sliding) or getattr(config, "sliding_window", None) is None)
        )

    @torch.no_grad()
    def refresh(self, policy: nn.Module) -> None:
        """Take over the policy's present weights, each LoRA product added in float32 and rounded once."""
        model = bare(policy)
        decoder, cast = model.get_decoder(), {"dtype": self.dtype, "device": self.device}

        def fuse(*modules: nn.Module):
            weight = torch.cat([merged_weight(module).to(**cast) for module in modules])
            biased = modules[0].bias is not None
            return packed_product(weight, torch.cat([m.bias.to(**cast) for m in modules]) if biased else None)

        def scale(norm: nn.Module | None):
            return None if norm is None else norm.weight.to(**cast, copy=True)

        self.embedding = model.get_input_embeddings().weight.to(**cast, copy=True)  # or it would train with the policy
        self.layers = []
        for layer in decoder.layers:
            attention, mlp = layer.self_attn, layer.mlp
            self.layers.append(
                (
                    scale(layer.input_layernorm),
                    fuse(attention.q_proj, attention.k_proj, attention.v_proj),
                    scale(getattr(attention, "q_norm", None)),
                    scale(getattr(attention, "k_norm", None)),
                    fuse(attention.o_proj),
                    scale(layer.post_attention_layernorm),
                    fuse(mlp.gate_proj, mlp.up_proj),
                    fuse(mlp.down_proj),
                )
            )
        self.norm = scale(decoder.norm)
        self.head = fuse(model.get_output_embeddings())

    def forward(self, ids: Tensor, positions: Tensor, attention, keep: Tensor | None = None) -> Tensor:
        """Logits behind each token, or behind those at `keep` alone. ids, positions: (N,); returns (N, V).

        The tokens may belong to any sequences: what a token looks at is `attention`'s business, a function of layer
        number, queries (N, heads, D), keys and values (N, key-value heads, D) that returns (N, heads, D).
        """
        eps, size = self.config.rms_norm_eps, self.embedding.shape[1:]
        rows = len(ids)
        more = spare_rows(rows, ids.device)
        ids, positions = F.pad(ids, (0, more)), F.pad(positions, (0, more))
        hidden = F.embedding(ids, self.embedding)
        cos, sin = (x[0, :, None] for x in self.rotary(hidden, positions[None]))  # (N, 1, D)
        split = [self.heads, self.groups, self.groups]
        for number, (norm, qkv, q_norm, k_norm, out, mlp_norm, gate_up, down) in enumerate(self.layers):
            mixed = qkv(F.rms_norm(hidden, size, norm, eps)).view(len(ids), -1, self.width)
            queries, keys, values = mixed.split(split, dim=1)
            if q_norm is not None:
                queries, keys = (F.rms_norm(x, (self.width,), w, eps) for x, w in ((queries, q_norm), (keys, k_norm)))
                mixed = torch.cat([queries, keys], dim=1)
            turned = rotate(mixed[:, : self.heads + self.groups], cos, sin)
            looked = attention(number, turned[:rows, : self.heads], turned[:rows, self.heads :], values[:rows])
            hidden = hidden + out(F.pad(looked.reshape(rows, -1), (0, 0, 0, more)))
            gate, up = gate_up(F.rms_norm(hidden, size, mlp_norm, eps)).chunk(2, dim=-1)
            hidden = hidden + down(F.silu(gate) * up)
        logits = self.head(F.rms_norm(hidden if keep is None else hidden[keep], size, self.norm, eps))
        return logits[:rows] if keep is None else logits


def sampling_copy(policy: nn.Module | Decoder, dtype: torch.dtype | None = None) -> nn.Module | Decoder:
    """What to sample from in a policy's place: a `Decoder` in `dtype`, or for another family the policy itself."""
    if isinstance(policy, Decoder):
        return policy
    return Decoder(policy, dtype) if Decoder.supports(policy) else bare(policy)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864). x: (N, heads, D); cos, sin: (N, 1, D)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Rows:
    """The responses being sampled: keys and values of each question's prompt, once, and of each response's tokens.

    prompts: token ids of each question; copies: responses to each; room: the most tokens a response can have.
    """

    def __init__(self, decoder: Decoder, prompts: Sequence[Sequence[int]], copies: int, room: int) -> None:
        self.decoder, device = decoder, decoder.device
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        longest = int(lengths.max())
        self.inside = torch.arange(longest, device=device) < lengths[:, None]  # (Q, P)
        self.prompt_keys: list[Tensor] = []
        self.prompt_values: list[Tensor] = []
        ids = torch.tensor([token for prompt in prompts for token in prompt], device=device)
        _, positions = self.inside.nonzero(as_tuple=True)
        self.logits = decoder.forward(ids, positions, self._read_prompts, keep=lengths.cumsum(0) - 1)
        self.logits = self.logits.repeat_interleave(copies, dim=0)  # (Q * copies, V)
        self.question = torch.arange(len(prompts), device=device).repeat_interleave(copies)
        self.position = lengths.repeat_interleave(copies)
        self.length = 0  # tokens that each response has
        shape = (len(self.question), decoder.groups, room, decoder.width)
        self.keys = [self.prompt_keys[0].new_empty(shape) for _ in decoder.layers]
        self.values = [self.prompt_keys[0].new_empty(shape) for _ in decoder.layers]
        self._arrange()

    def _read_prompts(self, number: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        # Only attention sees padding, behind the shorter prompts, where no token before it looks.
        q, k, v = (self._pad(x).transpose(1, 2) for x in (queries, keys, values))
        self.prompt_keys.append(k.contiguous())
        self.prompt_values.append(v.contiguous())
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)[self.inside]

    def _pad(self, x: Tensor) -> Tensor:
        if bool(self.inside.all()):
            return x.view(*self.inside.shape, *x.shape[1:])
        return x.new_zeros(*self.inside.shape, *x.shape[1:]).index_put((self.inside,), x)

    def _arrange(self) -> None:
        """Note which place of its question's group each row has, and which prompt places are empty."""
        questions, sizes = self.question.unique_consecutive(return_counts=True)
        self.place = torch.cat([torch.arange(n, device=self.question.device) for n in sizes.tolist()])
        self.largest = int(sizes.max())
        self.even = len(self.question) == len(questions) * self.largest
        zero = self.prompt_keys[0].new_zeros(())
        self.hidden = None
        if not bool(self.inside.all()):
            self.hidden = torch.where(self.inside, zero, -torch.inf)[:, None, None]  # (Q, 1, 1, P)

    def step(self, tokens: Tensor) -> Tensor:
        """Write one token to each row. tokens: (B,); returns the logits (B, V) behind it."""
        logits = self.decoder.forward(tokens, self.position, self._read_step)
        self.position = self.position + 1
        self.length += 1
        return logits

    def _read_step(self, number: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        d, stop = self.decoder, self.length + 1
        self.keys[number][:, :, self.length] = keys
        self.values[number][:, :, self.length] = values
        # Query heads that share a key head stand side by side, as if they were several queries of one head.
        rows = queries.view(len(queries), d.groups, -1, d.width)  # (B, kv, heads a kv, D)
        own, own_sum = attend(rows, self.keys[number][:, :, :stop], self.values[number][:, :, :stop])
        grouped = self._group(rows)  # (Q, kv, G * heads a kv, D)
        prompt, prompt_sum = attend(grouped, self.prompt_keys[number], self.prompt_values[number], self.hidden)
        prompt, prompt_sum = self._ungroup(prompt, rows), self._ungroup(prompt_sum[..., None], rows)
        share = torch.sigmoid(prompt_sum - own_sum[..., None]).to(own.dtype)
        return torch.lerp(own, prompt, share).view(len(queries), d.heads, d.width)

    def _group(self, rows: Tensor) -> Tensor:
        """(B, kv, r, D) -> (Q, kv, G * r, D): all queries to one prompt together."""
        shape = (len(self.inside), self.largest, *rows.shape[1:])
        if not self.even:
            rows = rows.new_zeros(shape).index_put((self.question, self.place), rows)
        return rows.view(shape).transpose(1, 2).flatten(2, 3)

    def _ungroup(self, grouped: Tensor, like: Tensor) -> Tensor:
        """The inverse of `_group`."""
        rows = grouped.unflatten(2, (self.largest, like.shape[2])).transpose(1, 2)  # (Q, G, kv, r, D)
        return rows.flatten(0, 1) if self.even else rows[self.question, self.place]

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone: (B',), indices in rising order."""
        self.position = self.position[rows]
        questions, self.question = self.question[rows].unique_consecutive(return_inverse=True)
        for cache in (self.keys, self.values):
            for number, old in enumerate(cache):
                cache[number] = old.new_empty(len(rows), *old.shape[1:])
                cache[number][:, :, : self.length] = old[rows, :, : self.length]
        if len(questions) < len(self.inside):
            self.inside = self.inside[questions]
            self.prompt_keys = [x[questions] for x in self.prompt_keys]
            self.prompt_values = [x[questions] for x in self.prompt_values]
        self._arrange()
