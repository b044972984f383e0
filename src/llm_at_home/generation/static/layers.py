"""A Llama-family decoder over a static cache, whatever its linear layers are: dense, quantized, with adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from llm_at_home.generation.static.joined import is_plain, join
from llm_at_home.generation.static.reference import spots

# Decoder layers that compute as Llama's does: RMS norms before two blocks, rotary attention, SwiGLU.
KNOWN_LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
# Rotary embeddings whose angles depend on the length so far.
MOVING_ROTARY = ("dynamic", "longrope")
# Their forward pass waits for the device, which a graph cannot.
UNCAPTURABLE = {"Linear8bitLt": "LLM.int8() looks for outliers on the host at every layer"}


# Not cuDNN's, which plans anew for each length that it has not seen: some 60 ms on an H100.
ANY_LENGTH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Segment(NamedTuple):
    """Tokens of one sequence that are read at once.

    Args:
        place: of the sequence in the cache.
        start: how many of its tokens the cache holds already.
        unread: how many are read.
    """

    place: int
    start: int
    unread: int


class Unsupported(Exception):
    """This model cannot be decoded in fixed steps; the message says why."""


def decoder_of(model: Any) -> tuple[Any, Any]:
    """The decoder and the output layer of a causal language model, with or without a PEFT adapter.

    Raises:
        Unsupported: for another architecture, a sliding window, or an adapter that adds tokens.
    """
    peft = getattr(model, "peft_config", None)
    if peft and any(config.is_prompt_learning for config in peft.values()):
        raise Unsupported("the adapter is a prompt, which transformers puts before the tokens")
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = getattr(causal, "model", None)
    layers = getattr(decoder, "layers", None)
    if not layers or not hasattr(decoder, "rotary_emb") or not hasattr(causal, "lm_head"):
        raise Unsupported(f"{type(causal).__name__} is not built as Llama is")
    for layer in layers:
        if type(layer).__name__ not in KNOWN_LAYERS:
            raise Unsupported(f"its layers are {type(layer).__name__}, not one of {', '.join(KNOWN_LAYERS)}")
        if not isinstance(layer.mlp.act_fn, nn.SiLU) and type(layer.mlp.act_fn).__name__ != "SiLUActivation":
            raise Unsupported(f"its activation is {type(layer.mlp.act_fn).__name__}, not SiLU")
        if getattr(layer.self_attn, "sliding_window", getattr(causal.config, "sliding_window", None)):
            raise Unsupported("its attention has a sliding window")
    kind = (getattr(causal.config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind in MOVING_ROTARY:
        raise Unsupported(f"its rotary embedding is {kind}: the angles change with the length")
    return decoder, causal.lm_head


def uncapturable(model: Any) -> str | None:
    """Why no CUDA graph can be captured of this model's layers, or None."""
    names = {type(module).__name__ for module in model.modules()}
    return next((why for name, why in UNCAPTURABLE.items() if name in names), None)


class Decoder:
    """What a decoder computes: a prompt, and then one token of each sequence at a time.

    Args:
        model: a causal language model that :func:`decoder_of` knows.
        operations: the module ``kernels`` or ``reference``.
        capacity: tokens of the longest sequence.

    Raises:
        Unsupported: when the model is another.
    """

    def __init__(self, model: Any, operations: Any, capacity: int) -> None:
        self.decoder, self.head = decoder_of(model)
        self.operations = operations
        self.product = _product(self.head, operations)
        self.norm = _active_norm(self.decoder.norm)
        first = self.decoder.layers[0].self_attn
        self.head_dim, self.scale = first.head_dim, first.scaling
        embedded = self.decoder.embed_tokens.weight
        places = torch.arange(capacity, device=embedded.device)[None]
        probe = torch.empty((1, 1, 1), dtype=embedded.dtype, device=embedded.device)
        cos, sin = self.decoder.rotary_emb(probe, places)
        self.tables = (cos[0].contiguous(), sin[0].contiguous())
        self.blocks = [_Block(layer, operations) for layer in self.decoder.layers]

    def next_token(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        last: torch.Tensor,
        places: torch.Tensor,
        pages: torch.Tensor,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """Logits of shape (sequences, vocabulary) after one more token of each, in the model's dtype.

        Args:
            tokens: the last token of each sequence, int64 of shape (sequences,).
            positions: where they stand, the same.
            last: up to where each looks, the same; its position, or less where nobody wants its token.
            places: 0, 1, 2, ..., the same.
            pages: in the cache, of each sequence's positions, int64 of shape (sequences, pages of the longest).
            keys: the cache of each layer, of shape (pages, key heads, tokens of a page, size); written at
                ``positions``.
            values: the same.
        """

        def attend(q: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor) -> torch.Tensor:
            return self.operations.attend(q, key_cache, value_cache, pages, last, self.scale)

        return self.product(self._run(tokens, positions, places, pages, keys, values, attend))[:, 0]

    def prompts(
        self,
        tokens: Sequence[int],
        segments: Sequence[Segment],
        pages: torch.Tensor,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """Logits of shape (segments, vocabulary) after prompts, each whole or the rest of one that the cache begins.

        All are read in one pass: only attention looks at one segment at a time.

        Args:
            tokens: of all segments, one after the other.
            segments: whose tokens they are.
            pages: as above.
            keys: as above; written at the segments' positions.
            values: the same.
        """
        unread = [one.unread for one in segments]
        whole = [one.start + one.unread for one in segments]
        own_places = torch.tensor([one.place for one in segments])
        device = keys[0].device
        ids, positions, places = to_device(
            torch.stack(
                [
                    torch.tensor(tokens),
                    torch.cat([torch.arange(one.start, one.start + one.unread) for one in segments]),
                    own_places.repeat_interleave(torch.tensor(unread)),
                ]
            ),
            device,
        )
        last = to_device(torch.tensor(unread).cumsum(0) - 1, device)
        # Each segment attends to all of its sequence, which is gathered from its pages.
        in_order = torch.cat([torch.arange(length) for length in whole])
        owners = own_places.repeat_interleave(torch.tensor(whole))
        owners, in_order = to_device(torch.stack([owners, in_order]), device)
        page, spot = spots(pages, owners, in_order, keys[0].shape[2])
        masks = [
            torch.arange(length, device=device) <= own[:, None] if one.start else None
            for one, length, own in zip(segments, whole, positions.split(unread), strict=True)
        ]

        def attend(q: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor) -> torch.Tensor:
            keys, values = (cache[page, :, spot].split(whole) for cache in (key_cache, value_cache))
            parts = zip(q.split(unread), keys, values, masks, strict=True)
            return torch.cat([self._attend_whole(*part) for part in parts])

        with sdpa_kernel(ANY_LENGTH):
            hidden = self._run(ids, positions, places, pages, keys, values, attend)
        return self.product(hidden[last])[:, 0]

    def _attend_whole(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor | None
    ) -> torch.Tensor:
        """Attention of several tokens of one sequence; all of shape (tokens, heads, size), ``seen`` None for causal."""
        return functional.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            attn_mask=seen,
            is_causal=seen is None,
            scale=self.scale,
            enable_gqa=q.shape[1] != keys.shape[1],
        )[0].transpose(0, 1)

    def _run(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        places: torch.Tensor,
        pages: torch.Tensor,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """The last hidden states, of shape (tokens, 1, width)."""
        ops = self.operations
        hidden = self.decoder.embed_tokens(tokens[:, None])
        delta = None
        count = tokens.shape[0]
        for block, key_cache, value_cache in zip(self.blocks, keys, values, strict=True):
            hidden, normed = ops.add_rms_norm(hidden, delta, block.input_norm.weight, block.input_norm.variance_epsilon)
            q, k, v = (part.view(count, -1, self.head_dim) for part in block.project(normed))
            if block.q_norm is not None and block.k_norm is not None:
                q, k = block.q_norm(q), block.k_norm(k)
            q = ops.rotate_and_store(q, k, v, self.tables, positions, places, pages, key_cache, value_cache)
            delta = block.out(attend(q, key_cache, value_cache).reshape(count, 1, -1))
            hidden, normed = ops.add_rms_norm(hidden, delta, block.post_norm.weight, block.post_norm.variance_epsilon)
            delta = block.down(ops.silu_multiply(*block.gate_and_up(normed)))
        return ops.add_rms_norm(hidden, delta, self.norm.weight, self.norm.variance_epsilon)[1]


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on the device, without waiting for what the device does."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class _Block:
    """One decoder layer's parts; plain linear layers that read the same input become one product."""

    def __init__(self, layer: Any, operations: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.input_norm = _active_norm(layer.input_layernorm)
        self.post_norm = _active_norm(layer.post_attention_layernorm)
        self.q_norm, self.k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.project = _together([attention.q_proj, attention.k_proj, attention.v_proj], operations)
        self.out = _product(attention.o_proj, operations)
        self.gate_and_up = _together([mlp.gate_proj, mlp.up_proj], operations)
        self.down = _product(mlp.down_proj, operations)


def _active_norm(layer: Any) -> Any:
    """The normalisation that a layer computes with now: PEFT's LN tuning keeps tuned copies beside the base's."""
    copies = getattr(layer, "ln_tuning_layers", None)
    if copies is None:
        return layer
    unused = layer.disable_adapters or layer.merged or not layer.active_adapters
    return layer.base_layer if unused else copies[layer.active_adapters[0]]


def _product(layer: Any, operations: Any) -> Any:
    """The layer itself, or for a plain linear one the product that suits a step."""
    return (lambda x: _plain(x, layer, operations)) if is_plain(layer) else layer


def _plain(x: torch.Tensor, layer: nn.Linear, operations: Any) -> torch.Tensor:
    return operations.matvec(x, layer.weight, layer.bias) if x.shape[0] == 1 else layer(x)


def _together(layers: Sequence[Any], operations: Any) -> Any:
    """A function from the shared input to the layers' outputs, by one product where the layers can be joined."""
    whole = join(layers)
    if whole is None:
        return lambda x: [layer(x) for layer in layers]
    product = _product(whole, operations)
    sizes = [layer.out_features for layer in layers]
    return lambda x: product(x).split(sizes, dim=-1)
