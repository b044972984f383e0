"""A decoder's shape, from its configuration alone: its linear layers, what else has weights, and how many there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llm_at_home.errors import Refusal
from llm_at_home.models import source

# Architectures whose decoder layers are a Llama's: RMSNorm, rotary attention, a gated feed-forward block.
KNOWN = ("llama", "mistral", "mixtral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Linear:
    """A linear layer of the decoder: y = W x, with W of shape (outputs, inputs)."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def weights(self) -> int:
        """Entries of its matrix."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Shape:
    """What of a model's configuration decides its memory; the names are those of transformers' ``config.json``.

    Attributes:
        queries, values: widths of what q_proj and k_proj (v_proj) give.
        experts: feed-forward blocks of a layer, 0 where there is one and no router.
        experts_per_token: how many of them a token goes through.
    """

    name: str
    kind: str
    vocabulary: int
    hidden: int
    inner: int
    layers: int
    heads: int
    queries: int
    values: int
    tied: bool
    longest: int | None
    attention_bias: bool = False
    experts: int = 0
    experts_per_token: int = 1
    head_norms: int = 0

    @classmethod
    def of(cls, model: Mapping[str, Any]) -> Shape:
        """The shape of a ``model`` group: its own ``architecture``, or the ``config.json`` of its folder or hub id.

        Raises:
            Refusal: when neither is there, or the architecture is none that the planner knows.
        """
        found = source.shape(model)
        if not found:
            raise Refusal(
                f"the configuration of {model['source']} is not on this machine: give model.architecture=, or a folder "
                "with its config.json as model.source="
            )
        return cls.from_architecture(str(model["name"]), found)

    @classmethod
    def from_architecture(cls, name: str, config: Mapping[str, Any]) -> Shape:
        """The shape that a ``config.json`` describes.

        Raises:
            Refusal: for an architecture that the planner does not know, or one that lacks a size.
        """
        kind = config.get("model_type")
        if kind not in KNOWN:
            raise Refusal(f"{name} is a {kind}: the planner knows {', '.join(KNOWN)}")
        needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        missing = [key for key in needed if not config.get(key)]
        if missing:
            raise Refusal(f"the architecture of {name} lacks {', '.join(missing)}")
        for key in (*needed, "num_key_value_heads", "head_dim"):
            if config.get(key) is not None and (type(config[key]) is not int or config[key] < 1):
                raise Refusal(f"the architecture of {name} has {key}={config[key]}: give a whole number of at least 1")
        heads = config["num_attention_heads"]
        head = config.get("head_dim") or config["hidden_size"] // heads
        return cls(
            name=name,
            kind=kind,
            vocabulary=config["vocab_size"],
            hidden=config["hidden_size"],
            inner=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            queries=heads * head,
            values=(config.get("num_key_value_heads") or heads) * head,
            tied=bool(config.get("tie_word_embeddings", False)),
            longest=config.get("max_position_embeddings"),
            attention_bias=bool(config.get("attention_bias", kind == "qwen2")),
            experts=config.get("num_local_experts", 8) if kind == "mixtral" else 0,
            experts_per_token=config.get("num_experts_per_tok", 2) if kind == "mixtral" else 1,
            head_norms=2 * head if kind == "qwen3" else 0,
        )

    def linears(self) -> Iterator[Linear]:
        """The linear layers of one decoder layer.

        Experts are none: transformers keeps those of a layer in two stacked parameters, which neither bitsandbytes nor
        PEFT's ``all-linear`` touches.
        """
        bias = self.attention_bias
        yield Linear("q_proj", self.hidden, self.queries, bias)
        yield Linear("k_proj", self.hidden, self.values, bias)
        yield Linear("v_proj", self.hidden, self.values, bias)
        yield Linear("o_proj", self.queries, self.hidden, bias and self.kind != "qwen2")
        if not self.experts:
            yield Linear("gate_proj", self.hidden, self.inner)
            yield Linear("up_proj", self.hidden, self.inner)
            yield Linear("down_proj", self.inner, self.hidden)

    @property
    def linear_weights(self) -> int:
        """Of all layers' linear layers, which quantization makes smaller."""
        return self.layers * sum(linear.weights for linear in self.linears())

    @property
    def expert_weights(self) -> int:
        """Of all experts, all of which are held whatever a token uses."""
        return self.layers * self.experts * 3 * self.hidden * self.inner

    @property
    def other_weights(self) -> int:
        """Embeddings, output head (once with the embeddings where tied), norms, biases and routers."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        biases = sum(linear.outputs for linear in self.linears() if linear.bias)
        layer = 2 * self.hidden + self.head_norms + biases + self.experts * self.hidden
        return embeddings + self.layers * layer + self.hidden

    @property
    def parameters(self) -> int:
        """All weights, tied ones once."""
        return self.linear_weights + self.expert_weights + self.other_weights
