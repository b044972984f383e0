"""Triton kernels of a decode step: what stands between the matrix products, and the products themselves at batch 1.

Each function has its plain torch twin in ``reference``, of the same name and arguments. Sums run in float32, whatever
the tensors' dtype. Lengths are read from the device, so one captured graph serves every position.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

KEYS_AT_ONCE = 64
LEAST_ROWS = 16  # of tl.dot
PARTS_IN_FLIGHT = 264  # two for each multiprocessor of an H100: enough to draw its bandwidth on short contexts as well


@triton.jit
def _add_rms_norm(x, delta, weight, hidden, normed, eps, width, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(x + row * width + columns, mask=inside, other=0.0)
    if ADD:
        value = value + tl.load(delta + row * width + columns, mask=inside, other=0.0)
        tl.store(hidden + row * width + columns, value, mask=inside)
    wide = value.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / width + eps)
    small = (wide * scale).to(value.dtype)
    tl.store(normed + row * width + columns, small * tl.load(weight + columns, mask=inside), mask=inside)


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual stream plus what a block adds to it, and its RMS norm (Zhang and Sennrich 2019).

    Args:
        x: the stream, of shape (sequences, 1, width).
        delta: the same, or None.
        weight: of shape (width,).
        eps: added to the mean square.

    Returns:
        The sum and its norm, both of x's shape.
    """
    x = x.contiguous()
    normed = torch.empty_like(x)
    hidden = x if delta is None else torch.empty_like(x)
    width = x.shape[-1]
    _add_rms_norm[(x.numel() // width,)](
        x,
        x if delta is None else delta.contiguous(),
        weight,
        hidden,
        normed,
        eps,
        width,
        ADD=delta is not None,
        BLOCK=triton.next_power_of_2(width),
        num_warps=8,
    )
    return hidden, normed


@triton.jit
def _rotate_and_store(
    q,
    k,
    v,
    rotated,
    keys,
    values,
    cos,
    sin,
    positions,
    places,
    pages,
    q_row,
    k_row,
    v_row,
    width,
    QUERY_HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    size = 2 * HALF
    at = tl.load(positions + token)
    page = tl.load(pages + tl.load(places + token) * width + at // PAGE)
    lanes = tl.arange(0, BLOCK)
    inside = lanes < HALF
    # Both halves of a table row are the same angles.
    c = tl.load(cos + at * size + lanes, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + at * size + lanes, mask=inside, other=0.0).to(tl.float32)
    if head < QUERY_HEADS:
        source = q + token * q_row + head * size
        target = rotated + (token * QUERY_HEADS + head) * size
    else:
        source = k + token * k_row + (head - QUERY_HEADS) * size
        target = keys + ((page * KEY_HEADS + head - QUERY_HEADS) * PAGE + at % PAGE) * size
    low = tl.load(source + lanes, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(source + HALF + lanes, mask=inside, other=0.0).to(tl.float32)
    tl.store(target + lanes, low * c - high * s, mask=inside)
    tl.store(target + HALF + lanes, high * c + low * s, mask=inside)
    if head >= QUERY_HEADS:
        source = v + token * v_row + (head - QUERY_HEADS) * size
        target = values + ((page * KEY_HEADS + head - QUERY_HEADS) * PAGE + at % PAGE) * size
        tl.store(target + lanes, tl.load(source + lanes, mask=inside), mask=inside)
        tl.store(target + HALF + lanes, tl.load(source + HALF + lanes, mask=inside), mask=inside)


def rotate_and_store(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    positions: torch.Tensor,
    places: torch.Tensor,
    pages: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    """Rotary embedding (Su et al. 2021) of tokens, whose keys and values go into the cache.

    Args:
        q: of shape (tokens, query heads, size); a row may be part of a longer one.
        k: of shape (tokens, key heads, size).
        v: the same.
        tables: cosine and sine of shape (capacity, size).
        positions: of the tokens in their sequences, int64 of shape (tokens,).
        places: of their sequences, the same.
        pages: in the cache, of each sequence's positions, int64 of shape (sequences, pages of the longest).
        keys: the cache, of shape (pages, key heads, tokens of a page, size); written at ``places`` and ``positions``.
        values: the same.

    Returns:
        The rotated queries, of q's shape.
    """
    tokens, query_heads, size = q.shape
    key_heads = keys.shape[1]
    rotated = torch.empty((tokens, query_heads, size), dtype=q.dtype, device=q.device)
    half = size // 2
    _rotate_and_store[(tokens, query_heads + key_heads)](
        q,
        k,
        v,
        rotated,
        keys,
        values,
        *tables,
        positions,
        places,
        pages,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        pages.shape[1],
        QUERY_HEADS=query_heads,
        KEY_HEADS=key_heads,
        PAGE=keys.shape[2],
        HALF=half,
        BLOCK=triton.next_power_of_2(half),
        num_warps=1,
    )
    return rotated


@triton.jit
def _attend(
    q,
    keys,
    values,
    pages,
    positions,
    partial,
    maxima,
    sums,
    scale,
    width,
    KEY_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    LANES: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)  # sequence and key head
    part = tl.program_id(1)
    sequence, head = place // KEY_HEADS, place % KEY_HEADS
    length = tl.load(positions + sequence) + 1
    share = tl.cdiv(tl.cdiv(length, PARTS), BLOCK) * BLOCK
    start = part * share
    end = tl.minimum(start + share, length)
    rows, lanes, block = tl.arange(0, ROWS), tl.arange(0, LANES), tl.arange(0, BLOCK)
    first = (sequence * KEY_HEADS + head) * GROUP
    own = (rows[:, None] < GROUP) & (lanes[None, :] < SIZE)
    query = tl.load(q + (first + rows[:, None]) * SIZE + lanes[None, :], mask=own, other=0.0)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    found = tl.zeros((ROWS, LANES), tl.float32)
    for at in range(start, end, BLOCK):
        spots = at + block
        page = tl.load(pages + sequence * width + at // PAGE)  # all of a block lie in one
        base = (page * KEY_HEADS + head) * PAGE + at % PAGE
        there = (spots[:, None] < end) & (lanes[None, :] < SIZE)
        offsets = (base + block[:, None]) * SIZE + lanes[None, :]
        key = tl.load(keys + offsets, mask=there, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
        scores = tl.where(spots[None, :] < end, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        shrink = tl.exp(top - higher)
        weights = tl.exp(scores - higher[:, None])
        value = tl.load(values + offsets, mask=there, other=0.0)
        found = found * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
        total = total * shrink + tl.sum(weights, axis=1)
        top = higher
    place_of = (first + rows) * PARTS + part
    tl.store(maxima + place_of, top, mask=rows < GROUP)
    tl.store(sums + place_of, total, mask=rows < GROUP)
    tl.store(partial + place_of[:, None] * SIZE + lanes[None, :], found, mask=own)


@triton.jit
def _combine(
    partial, maxima, sums, out, PARTS: tl.constexpr, PADDED: tl.constexpr, SIZE: tl.constexpr, LANES: tl.constexpr
):
    head = tl.program_id(0).to(tl.int64)
    parts, lanes = tl.arange(0, PADDED), tl.arange(0, LANES)
    there = parts < PARTS
    top = tl.load(maxima + head * PARTS + parts, mask=there, other=float("-inf"))
    weight = tl.exp(top - tl.max(top, axis=0))  # a part without keys has -inf, and weighs nothing
    total = tl.sum(weight * tl.load(sums + head * PARTS + parts, mask=there, other=0.0), axis=0)
    inside = there[:, None] & (lanes[None, :] < SIZE)
    found = tl.load(partial + (head * PARTS + parts[:, None]) * SIZE + lanes[None, :], mask=inside, other=0.0)
    value = tl.sum(found * weight[:, None], axis=0) / total
    tl.store(out + head * SIZE + lanes, value, mask=lanes < SIZE)


def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    pages: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attention of one token of each sequence to all up to itself, in parts that are computed at once.

    The keys of a sequence are split as in flash decoding (Dao et al. 2023), since one token has too few heads to occupy
    a card. Only the keys up to the token's own position are read, whatever the cache's capacity.

    Args:
        q: rotated queries of shape (sequences, query heads, size).
        keys: of shape (pages, key heads, tokens of a page, size); a page has a multiple of KEYS_AT_ONCE tokens.
        values: the same.
        pages: in the cache, of each sequence's positions, int64 of shape (sequences, pages of the longest).
        positions: of the tokens, int64 of shape (sequences,).
        scale: of the scores.

    Returns:
        Of q's shape.
    """
    sequences, query_heads, size = q.shape
    key_heads, page, width = keys.shape[1], keys.shape[2], pages.shape[1]
    group = query_heads // key_heads
    parts = max(1, min(PARTS_IN_FLIGHT // (sequences * key_heads), width * page // KEYS_AT_ONCE, 32))
    partial = torch.empty((sequences * query_heads, parts, size), dtype=torch.float32, device=q.device)
    maxima = torch.empty((sequences * query_heads, parts), dtype=torch.float32, device=q.device)
    sums = torch.empty_like(maxima)
    out = torch.empty_like(q)
    lanes = triton.next_power_of_2(size)
    _attend[(sequences * key_heads, parts)](
        q,
        keys,
        values,
        pages,
        positions,
        partial,
        maxima,
        sums,
        scale,
        width,
        KEY_HEADS=key_heads,
        PAGE=page,
        GROUP=group,
        ROWS=max(LEAST_ROWS, triton.next_power_of_2(group)),
        SIZE=size,
        LANES=lanes,
        PARTS=parts,
        BLOCK=KEYS_AT_ONCE,
        PRECISION="ieee",
        num_warps=4,
    )
    _combine[(sequences * query_heads,)](
        partial,
        maxima,
        sums,
        out,
        PARTS=parts,
        PADDED=triton.next_power_of_2(parts),
        SIZE=size,
        LANES=lanes,
        num_warps=1,
    )
    return out


@triton.jit
def _silu_multiply(gate, up, out, gate_row, up_row, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    g = tl.load(gate + row * gate_row + columns, mask=inside, other=0.0)
    wide = g.to(tl.float32)
    activated = (wide / (1.0 + tl.exp(-wide))).to(g.dtype)
    value = activated * tl.load(up + row * up_row + columns, mask=inside, other=0.0)
    tl.store(out + row * width + columns, value, mask=inside)


def silu_multiply(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """SwiGLU's product (Shazeer 2020), silu(gate) * up; a row, of shape (1, width), may be part of a longer one.

    Args:
        gate: of shape (sequences, 1, width).
        up: the same.
    """
    rows, _, width = gate.shape
    out = torch.empty((rows, 1, width), dtype=gate.dtype, device=gate.device)
    block = 1024
    _silu_multiply[(rows, triton.cdiv(width, block))](
        gate, up, out, gate.stride(0), up.stride(0), width, BLOCK=block, num_warps=4
    )
    return out


@triton.jit
def _matvec(x, weight, bias, out, columns, rows, BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lanes = tl.arange(0, BLOCK)
    found = tl.zeros((ROWS, BLOCK), tl.float32)
    start = row[:, None].to(tl.int64) * columns
    for at in range(0, columns, BLOCK):
        inside = at + lanes < columns
        value = tl.load(x + at + lanes, mask=inside, other=0.0).to(tl.float32)
        mask = (row[:, None] < rows) & inside[None, :]
        part = tl.load(weight + start + at + lanes[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
        found += part.to(tl.float32) * value[None, :]
    total = tl.sum(found, axis=1)
    if BIAS:
        total += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)
    tl.store(out + row, total, mask=row < rows)


MATVEC = {"ROWS": 2, "BLOCK": 2048, "num_warps": 2}  # within 3 % of the best of 40 on an H100, for each shape of a 7B


def matvec(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A linear layer of one token: each weight is read once, at the memory's speed.

    Args:
        x: of shape (1, 1, inputs).
        weight: of shape (outputs, inputs), contiguous.
        bias: of shape (outputs,), or None.

    Returns:
        Of shape (1, 1, outputs).
    """
    rows, columns = weight.shape
    out = torch.empty((1, 1, rows), dtype=x.dtype, device=x.device)
    _matvec[(triton.cdiv(rows, MATVEC["ROWS"]),)](
        x.contiguous(),
        weight,
        x if bias is None else bias,
        out,
        columns,
        rows,
        BIAS=bias is not None,
        **MATVEC,
    )
    return out
