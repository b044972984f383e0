"""Which weights go and what becomes of the others: magnitude, Wanda and SparseGPT on matrices small enough to check."""

from __future__ import annotations

import itertools

import pytest
import torch

from llm_at_home.pruning import magnitude, sparsegpt, wanda
from llm_at_home.pruning.pattern import Pattern

HALF, TWO_OF_FOUR = Pattern(0.5), Pattern(0.5, 2, 4)
EXACT = {"damping": 0.0, "block_size": 128}


def problem(rows=24, columns=32, tokens=400, seed=0, dtype=torch.float64):
    """A weight, and inputs that have much in common and are of different size."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(tokens, 4, generator=generator, dtype=dtype) @ torch.randn(
        4, columns, generator=generator, dtype=dtype
    )
    scale = torch.logspace(-0.5, 0.5, columns, dtype=dtype)[torch.randperm(columns, generator=generator)]
    inputs = (common + torch.randn(tokens, columns, generator=generator, dtype=dtype)) * scale
    return torch.randn(rows, columns, generator=generator, dtype=dtype), inputs


def pruned(method, weight, inputs, pattern, options=EXACT):
    statistics = method.Statistics(weight.shape[1], "cpu", weight.dtype) if method.Statistics else None
    for part in inputs.split(97) if statistics is not None else ():
        statistics.add(part)
    return method.prune(weight, statistics, pattern, options)


def error(weight, other, inputs):
    return float(((weight - other) @ inputs.T).square().sum())


@pytest.mark.parametrize("method", [magnitude, wanda, sparsegpt])
@pytest.mark.parametrize(
    ("pattern", "zeros"),
    [(Pattern(0.25), 8), (HALF, 16), (TWO_OF_FOUR, 16), (Pattern(0.75, 1, 4), 24), (Pattern(0.5, 4, 8), 16)],
)
def test_as_many_weights_go_as_were_asked_for_and_not_one_more(method, pattern, zeros):
    weight, inputs = problem()
    before = weight.clone()
    result = pruned(method, weight, inputs, pattern)
    assert torch.equal(weight, before), "what it was given is not changed"
    assert int((result == 0).sum()) == 24 * zeros
    if pattern.group:
        counts = (result.reshape(24, -1, pattern.group) == 0).sum(-1)
        assert set(counts.flatten().tolist()) == {pattern.group - pattern.kept}


def test_equal_scores_do_not_prune_more_than_asked():
    weight = torch.ones(6, 8)
    for pattern in (Pattern(0.25), HALF, TWO_OF_FOUR):
        for by_row in (True, False):
            assert int(pattern.lowest(weight, by_row).sum()) == 6 * 8 * pattern.sparsity
    assert int(Pattern(0.01).lowest(weight, by_row=True).sum()) == 0


def test_magnitude_and_wanda_leave_the_other_weights_as_they_were():
    weight, inputs = problem()
    for method in (magnitude, wanda):
        result = pruned(method, weight, inputs, HALF)
        kept = result != 0
        assert torch.equal(result[kept], weight[kept])


def test_wanda_is_magnitude_where_all_inputs_have_one_norm():
    weight, inputs = problem()
    inputs = inputs / inputs.norm(dim=0)
    assert torch.equal(pruned(wanda, weight, inputs, TWO_OF_FOUR), pruned(magnitude, weight, inputs, TWO_OF_FOUR))
    by_row = weight.masked_fill(HALF.lowest(weight.abs(), by_row=True), 0)
    assert torch.equal(pruned(wanda, weight, inputs, HALF), by_row)
    scaled = inputs * torch.logspace(-2, 2, 32, dtype=weight.dtype)
    assert not torch.equal(pruned(wanda, weight, scaled, HALF), by_row)


@pytest.mark.parametrize("pattern", [Pattern(0.25), HALF, TWO_OF_FOUR])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_on_correlated_inputs_sparsegpt_loses_least_and_magnitude_most(pattern, seed):
    weight, inputs = problem(seed=seed)
    lost = [error(weight, pruned(method, weight, inputs, pattern), inputs) for method in (sparsegpt, wanda, magnitude)]
    assert lost[0] < lost[1] < lost[2]


def brain_surgeon(weight, hessian, pattern, block_size):
    """SparseGPT by its definition: the inverse of what is left of the Hessian, made anew for every column."""
    result = weight.clone()
    rows, columns = result.shape
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(columns)]
    cost = torch.stack([inverse[0, 0] for inverse in inverses])
    gone = torch.zeros_like(result, dtype=torch.bool)
    for j in range(columns):
        step = pattern.group or block_size
        if j % step == 0:
            group = slice(j, j + step)
            scores = result[:, group] ** 2 / cost[group]
            for among in scores if pattern.group else [scores]:
                count = pattern.group - pattern.kept if pattern.group else round(pattern.sparsity * among.numel())
                lowest = among.flatten().topk(count, largest=False).indices
                row = next((i for i in range(rows) if among is not scores and torch.equal(among, scores[i])), 0)
                width = scores.shape[1]
                for index in lowest.tolist():
                    gone[row + index // width, j + index % width] = True
        for i in range(rows):
            if gone[i, j]:
                result[i, j:] -= result[i, j] / inverses[j][0, 0] * inverses[j][0]
                result[i, j] = 0
    return result


@pytest.mark.parametrize("pattern", [Pattern(0.3), HALF, TWO_OF_FOUR, Pattern(0.25, 3, 4)])
@pytest.mark.parametrize("block_size", [4, 8, 12])
def test_sparsegpt_is_the_optimal_brain_surgeon_column_by_column(pattern, block_size):
    weight, inputs = problem(rows=5, columns=12)
    hessian = inputs.T @ inputs
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    expected = brain_surgeon(weight, hessian, pattern, block_size)
    found = pruned(sparsegpt, weight, inputs, pattern, {"damping": 0.01, "block_size": block_size})
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_sparsegpt_finds_the_least_squares_solution_where_all_that_goes_lies_left():
    weight, inputs = problem(rows=3, columns=8)
    weight[:, :4] *= 1e-6  # so that of the first eight, these four go
    found = pruned(sparsegpt, weight, inputs, Pattern(0.5, 4, 8))
    assert torch.equal(found == 0, torch.arange(8).expand(3, 8) < 4)
    best = torch.linalg.lstsq(inputs[:, 4:], inputs @ weight.T).solution.T
    torch.testing.assert_close(found[:, 4:], best, rtol=1e-8, atol=1e-10)


def test_lazy_blocks_change_nothing_where_groups_decide():
    weight, inputs = problem()
    results = [pruned(sparsegpt, weight, inputs, TWO_OF_FOUR, {"damping": 0.01, "block_size": n}) for n in (4, 16, 128)]
    for one, other in itertools.pairwise(results):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_single_precision_is_near_double():
    weight, inputs = problem()
    options = {"damping": 0.01, "block_size": 16}
    exact = pruned(sparsegpt, weight, inputs, TWO_OF_FOUR, options)
    found = pruned(sparsegpt, weight.float(), inputs.float(), TWO_OF_FOUR, options)
    assert error(weight, found.double(), inputs) == pytest.approx(error(weight, exact, inputs), rel=0.02)


@pytest.mark.parametrize("method", [wanda, sparsegpt])
@pytest.mark.parametrize("pattern", [HALF, TWO_OF_FOUR])
def test_inputs_that_are_always_zero_lose_their_weights_first(method, pattern):
    weight, inputs = problem()
    inputs[:, [0, 5, 6, 31]] = 0
    result = pruned(method, weight, inputs, pattern, {"damping": 0.01, "block_size": 8})
    assert result.isfinite().all()
    assert (result[:, [0, 5, 6, 31]] == 0).all()
    assert int((result == 0).sum()) == 24 * 16


def test_a_hessian_without_an_inverse_says_what_to_change():
    weight, inputs = problem(tokens=7)
    with pytest.raises(RuntimeError, match=r"larger prune\.damping"):
        pruned(sparsegpt, weight.float(), torch.ones(7, 32), HALF)
    assert pruned(sparsegpt, weight, inputs, HALF, {"damping": 0.01, "block_size": 8}).isfinite().all()
