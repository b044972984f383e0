"""The peak memory of answering with transformers' ``generate``, by parts, from a configuration alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_at_home.planning.allocator import Gaps, context_bytes, cublas_workspace
from llm_at_home.planning.prediction import Moment, Prediction
from llm_at_home.planning.shape import Shape
from llm_at_home.planning.weights import BYTES, linear_bytes, model_bytes

# At once, of the feed-forward block's inner width: the activated gate, what it multiplies, their product; and of the
# stream's: the embedded tokens, which the model's forward pass holds to its end, the stream, its norm, a block's sum.
PREFILL_WIDTHS = (3, 4)


def predict_inference(
    config: Mapping[str, Any], prompt_tokens: int, capability: tuple[int, int] = (9, 0)
) -> Prediction:
    """Predict the peaks of ``infer.py engine=eager`` on a GPU.

    Args:
        config: a resolved configuration of ``conf/infer.yaml``.
        prompt_tokens: of the longest prompt of a batch.
        capability: the card's compute capability.

    Raises:
        Refusal: for a model or quantization that the planner does not know.
    """
    shape = Shape.of(config["model"])
    rows = config["engine"].get("batch_size", 1)
    return predict_answers(shape, config, rows, prompt_tokens, config["engine"]["max_new_tokens"], capability)


def predict_answers(
    shape: Shape,
    config: Mapping[str, Any],
    rows: int,
    prompt_tokens: int,
    new_tokens: int,
    capability: tuple[int, int] = (9, 0),
) -> Prediction:
    """The same for so many answers at once, each of so many new tokens."""
    each = BYTES[config["dtype"]]
    weights = model_bytes(shape, config["quant"], config["dtype"])
    token = cache_bytes(shape, config["dtype"])
    widest = max(shape.linears(), key=lambda linear: linear.weights)
    read_back = 0.0 if config["quant"]["method"] == "dense" else float(each * widest.weights)
    inner, stream = PREFILL_WIDTHS
    block = shape.experts_per_token * inner * shape.inner
    widest_part = max(block, 2 * shape.queries + 2 * shape.values)
    hidden = rows * prompt_tokens * each * (widest_part + stream * shape.hidden)
    prefilled, answered = rows * prompt_tokens * token, rows * (prompt_tokens + new_tokens) * token
    # The keys of a layer, and then its values, are copied to grow by a token.
    growing = answered / shape.layers / 2
    logits = float(rows * shape.vocabulary * (each + 4 + 4))
    moments = [
        _moment("the prompt", weights, prefilled, hidden + read_back, 0.0),
        _moment("the last token", weights, answered, growing, logits),
    ]
    workspace = cublas_workspace(capability, threads=1)
    peak = max(moments, key=lambda moment: moment.allocated)
    moving = max(moment.moving for moment in moments)
    gaps = Gaps.of("infer").bytes(moving)
    parts = {**peak.parts, "workspace": peak.parts["workspace"] + workspace, "fragmentation": gaps}
    reserved = peak.allocated + workspace + gaps
    return Prediction(
        parts=parts,
        allocated=peak.allocated + workspace,
        reserved=reserved,
        process=reserved + context_bytes("infer"),
        moment=peak.name,
        moving=moving,
    )


def cache_bytes(shape: Shape, dtype: str) -> float:
    """Bytes of the keys and values of one token."""
    return 2.0 * shape.layers * shape.values * BYTES[dtype]


def read_bytes(shape: Shape, config: Mapping[str, Any], tokens: int) -> float:
    """Bytes that one decoding step reads: the weights that a token uses, and the keys and values of all before it."""
    quant, dtype = config["quant"], config["dtype"]
    linears = shape.layers * sum(linear_bytes(linear, quant, dtype) for linear in shape.linears())
    used = shape.expert_weights * shape.experts_per_token / max(1, shape.experts)
    head = shape.vocabulary * shape.hidden
    return linears + (used + head) * BYTES[dtype] + tokens * cache_bytes(shape, dtype)


def _moment(name: str, weights: float, cache: float, workspace: float, logits: float) -> Moment:
    parts = {"weights": weights, "keys and values": cache, "workspace": workspace, "logits": logits}
    return Moment(name, parts, cache + workspace + logits)
