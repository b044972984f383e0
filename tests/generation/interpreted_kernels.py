"""The Triton kernels against float64; ``test_kernels`` runs this with Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from llm_at_home.generation.static import kernels, reference


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("has_delta", [True, False])
def test_add_rms_norm(has_delta: bool) -> None:
    x, delta, weight = drawn(3, 1, 72), drawn(3, 1, 72) * 2 if has_delta else None, drawn(72)
    hidden, normed = kernels.add_rms_norm(x, delta, weight, 1e-5)
    total = x.double() + (0 if delta is None else delta.double())
    torch.testing.assert_close(hidden.double(), total, atol=1e-6, rtol=0)
    expected = total / (total.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    torch.testing.assert_close(normed.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("query_heads", "key_heads", "size", "page"), [(4, 4, 16, 64), (6, 2, 24, 128)])
def test_rotate_and_store_and_attend(query_heads: int, key_heads: int, size: int, page: int) -> None:
    capacity, sequences = 256, 4
    positions, places = torch.tensor([0, 63, 199, 255]), torch.arange(4)
    # Of pages of 64 and 128 tokens, out of order, with scrap where a sequence does not reach.
    rows = [[5, 0, 0, 0], [9, 0, 0, 0], [3, 1, 8, 2], [7, 4, 6, 10]] if page == 64 else [[5, 0], [1, 0], [4, 2], [3, 6]]
    pages = torch.tensor(rows)
    projected = drawn(sequences, (query_heads + 2 * key_heads) * size)
    heads = projected.view(sequences, -1, size)  # parts of longer rows, as a joined projection gives them
    q, k, v = heads.split([query_heads, key_heads, key_heads], dim=1)
    angles = torch.arange(capacity)[:, None] * 0.1 ** torch.linspace(0, 1, size // 2)
    tables = tuple(f(torch.cat([angles, angles], -1)) for f in (torch.cos, torch.sin))
    keys, values = drawn(11, key_heads, page, size), drawn(11, key_heads, page, size) + 1
    wide = [t.double() for t in (keys, values)]
    found = kernels.rotate_and_store(q, k, v, tables, positions, places, pages, keys, values)
    expected = reference.rotate_and_store(
        q.double(), k.double(), v.double(), tuple(t.double() for t in tables), positions, places, pages, *wide
    )
    for ours, theirs in ((found, expected), (keys, wide[0]), (values, wide[1])):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=0)
    attended = kernels.attend(found, keys, values, pages, positions, size**-0.5)
    twin = reference.attend(expected, *wide, pages, positions, size**-0.5)
    torch.testing.assert_close(attended.double(), twin, atol=1e-5, rtol=0)
    wide = [cache[pages].transpose(1, 2).flatten(2, 3) for cache in wide]
    for i, at in enumerate(positions.tolist()):
        for head in range(query_heads):
            source = head // (query_heads // key_heads)
            scores = wide[0][i, source, : at + 1] @ expected[i, head] * size**-0.5
            value = scores.softmax(0) @ wide[1][i, source, : at + 1]
            torch.testing.assert_close(attended[i, head].double(), value, atol=1e-5, rtol=0)


def test_tokens_of_one_sequence_go_to_its_place() -> None:
    keys, values = torch.zeros(4, 1, 8, 4), torch.zeros(4, 1, 8, 4)
    tables = (torch.ones(16, 4), torch.zeros(16, 4))
    pages = torch.tensor([[0, 0], [3, 1]])
    k, v = drawn(3, 1, 4), drawn(3, 1, 4)
    kernels.rotate_and_store(k, k, v, tables, torch.tensor([6, 7, 8]), torch.tensor([1, 1, 1]), pages, keys, values)
    for cache, stored in ((keys, k), (values, v)):
        assert torch.equal(cache[3, 0, 6:], stored[:2, 0])
        assert torch.equal(cache[1, 0, :1], stored[2:, 0])
        assert not cache[[0, 2]].any()


def test_attention_is_the_same_in_parts_and_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    q, keys, values = drawn(1, 2, 16), drawn(4, 2, 128, 16), drawn(4, 2, 128, 16) + 1
    positions, pages = torch.tensor([330]), torch.tensor([[2, 0, 3, 1]])
    parts = kernels.attend(q, keys, values, pages, positions, 0.25)
    monkeypatch.setattr(kernels, "PARTS_IN_FLIGHT", 1)
    torch.testing.assert_close(parts, kernels.attend(q, keys, values, pages, positions, 0.25), atol=1e-6, rtol=0)


def test_silu_multiply() -> None:
    both = drawn(2, 1, 2 * 1100)
    gate, up = both.split(1100, dim=-1)
    expected = torch.nn.functional.silu(gate.double()) * up.double()
    torch.testing.assert_close(kernels.silu_multiply(gate, up).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("has_bias", [True, False])
def test_matvec(has_bias: bool) -> None:
    x, weight, bias = drawn(1, 1, 2100), drawn(13, 2100), drawn(13) if has_bias else None
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    torch.testing.assert_close(kernels.matvec(x, weight, bias).double(), expected, atol=1e-3, rtol=0)
