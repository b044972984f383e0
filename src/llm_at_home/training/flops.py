"""Model FLOPs of training: what a step's matrix products and attention need, whatever the run recomputes or pads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llm_at_home.quantization.layers import linear_layers
from llm_at_home.records.schema import Reading

# FLOPs of a weight and token: forth, to its input's gradient, to its own.
FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = 2, 2, 2
# FLOPs of a pair of tokens and a query's value, forth: the score and the sum.
ATTENTION = 4
METHOD = "flops_of_matrix_products_and_causal_attention_over_measured_matmul"


@dataclass(frozen=True)
class ModelFlops:
    """What of a model is multiplied.

    A frozen weight takes 4 FLOPs a token (forth, and to its input's gradient), a trained one 6 (Chowdhery et al. 2022,
    appendix B, for weights that all train), attention 12 a pair of tokens that see each other and value of a query.

    Attributes:
        frozen: weights of matrix products, the output layer's among them.
        trained: those that train, an adapter's among them.
        queries: values of a token's queries, of all layers.
    """

    frozen: int
    trained: int
    queries: int

    @classmethod
    def of(cls, model: Any) -> ModelFlops:
        """Count a causal language model of transformers, with or without a PEFT adapter, on any base."""
        head = model.get_output_embeddings()
        of_head = {id(module) for module in head.modules()}  # more than one where PEFT has wrapped it to train it
        linears = {id(layer): layer for _, layer in linear_layers(model) if id(layer) not in of_head}
        linears[id(head)] = head
        frozen = trained = 0
        for layer in linears.values():
            weight = getattr(layer, "weight", None)
            # PEFT's wrapper around an output layer with trained tokens has a weight and no widths.
            size = layer.in_features * layer.out_features if hasattr(layer, "in_features") else layer.weight.numel()
            if weight is not None and weight.requires_grad:
                trained += size
            else:
                frozen += size
        for name, module in model.named_modules():
            if (
                id(module) in linears
                or id(module) in of_head
                or isinstance(module, torch.nn.Embedding)
                or "prompt_encoder" in name
            ):
                continue
            # Vectors scale and shift; they multiply nothing.
            own = (p for p in module.parameters(recurse=False) if p.requires_grad and p.dim() > 1 and min(p.shape) > 1)
            trained += sum(parameter.numel() for parameter in own)
        config = model.config.get_text_config()
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(frozen, trained, config.num_hidden_layers * config.num_attention_heads * size)

    def of_tokens(self, tokens: float, pairs: float, backward: bool = True) -> float:
        """FLOPs of so many tokens, and pairs of a token and one that it attends to; without a backward pass a third."""
        if not backward:
            return FORWARD * tokens * (self.frozen + self.trained) + ATTENTION * pairs * self.queries
        frozen = (FORWARD + INPUT_GRADIENT) * self.frozen
        trained = (FORWARD + INPUT_GRADIENT + WEIGHT_GRADIENT) * self.trained
        return tokens * (frozen + trained) + 3 * ATTENTION * pairs * self.queries


def utilisation(flops: Sequence[float], seconds: Sequence[float], peak: Reading | None) -> Reading:
    """``model_flop_utilisation``: the share of the dense peak that the model's own FLOPs take, between 0 and 1.

    Args:
        flops: of each measured optimizer step.
        seconds: of each.
        peak: in TFLOP/s, as :func:`llm_at_home.metering.matmul.dense_peak` measured it.
    """
    why = None
    if not flops:
        why = "the run made no measured step"
    elif peak is None or peak.value is None:
        why = f"the dense peak is unknown: {peak.reason if peak else 'it was not measured'}"
    if why or peak is None or peak.value is None:
        return Reading.unknown("1", why or "the dense peak is unknown")
    return Reading(sum(flops) / sum(seconds) / (peak.value * 1e12), "1", METHOD, n=len(flops))
