"""Fidelity is zero against itself, right against arithmetic done by hand, and orders bits on real models."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llm_at_home.errors import Refusal
from llm_at_home.evaluation import fidelity
from llm_at_home.evaluation.fidelity.figures import FIGURES, METHOD, Sums, fidelity_readings, rows
from llm_at_home.evaluation.fidelity.passages import Passage, passages_hash
from llm_at_home.evaluation.fidelity.predictions import Scores, load, predict, save, score
from llm_at_home.records import store

PASSAGES = [Passage(list(range(100 + 50 * i, 130 + 50 * i))) for i in range(4)]
EVERYTHING = 10**6


def sharpened(folder):
    """The tiny model with logits that spread as a trained one's: its own are nearly all alike."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.model.norm.weight.data *= 10
    return model


@pytest.fixture(scope="module")
def baseline(tiny_model):
    return sharpened(tiny_model)


@pytest.fixture(scope="module")
def other(tiny_model):
    model = sharpened(tiny_model)
    generator = torch.Generator().manual_seed(1)
    for layer in model.model.layers:
        for parameter in layer.parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def by_hand(baseline, other, passage):
    """Both distributions at the counted tokens, in double precision."""
    ids = torch.tensor([passage.ids])
    with torch.no_grad():
        logits = (model(ids).logits[0, passage.first - 1 : -1].double() for model in (baseline, other))
        return [torch.softmax(one, -1) for one in logits]


@pytest.mark.parametrize("k", [1, 64, EVERYTHING])
def test_a_model_against_itself_loses_nothing(baseline, k):
    scores = [score(baseline, passage, predict(baseline, passage, k)) for passage in PASSAGES]
    readings = fidelity_readings(Sums.of(rows("held_out", scores), "held_out"), "", k)
    assert readings["kl_divergence_mean"].value == 0
    assert readings["kl_divergence_p99"].value == 0
    assert readings["top1_agreement"].value == 1
    assert readings["perplexity_ratio"].value == pytest.approx(1, rel=1e-6)
    assert readings["kl_divergence_mean_detectable"].value == 0


@pytest.mark.parametrize("first", [1, 12])
def test_perplexity_and_divergence_are_those_of_their_definitions(baseline, other, first):
    passage = Passage(PASSAGES[0].ids, first)
    scores = score(other, passage, predict(baseline, passage, EVERYTHING))
    p, q = by_hand(baseline, other, passage)
    targets = torch.tensor(passage.ids[first:]).unsqueeze(1)
    assert passage.tokens == len(scores.kl) == 30 - first
    assert scores.nll == pytest.approx(-float(q.gather(1, targets).log().sum()), rel=1e-5)
    assert scores.baseline_nll == pytest.approx(-float(p.gather(1, targets).log().sum()), rel=1e-5)
    torch.testing.assert_close(torch.tensor(scores.kl), (p * (p / q).log()).sum(-1), rtol=1e-3, atol=2e-6)
    assert scores.agrees.tolist() == (p.argmax(-1) == q.argmax(-1)).tolist()
    assert 0 < scores.agrees.sum() < len(scores.agrees)


def test_the_divergence_of_few_kept_tokens_is_that_with_the_others_lumped_and_never_more(baseline, other):
    p, q = by_hand(baseline, other, PASSAGES[0])
    found = []
    for k in (1, 8, 512, EVERYTHING):
        kl = score(other, PASSAGES[0], predict(baseline, PASSAGES[0], k)).kl
        top = p.topk(min(k, p.shape[1])).indices
        parts = [torch.cat([one.gather(1, top), one.scatter(1, top, 0.0).sum(-1, keepdim=True)], 1) for one in (p, q)]
        if k == EVERYTHING:
            parts = [part[:, :-1] for part in parts]
        expected = (parts[0] * (parts[0] / parts[1]).log()).sum(-1)
        torch.testing.assert_close(torch.tensor(kl), expected, rtol=1e-3, atol=2e-6)
        found.append(kl.mean())
    assert found == sorted(found)
    assert found[0] < 0.9 * found[-1]


def test_predictions_come_back_from_their_file_as_they_were(tmp_path, baseline):
    made = [predict(baseline, passage, 8) for passage in (PASSAGES[0], Passage(PASSAGES[1].ids, 20))]
    save(made, tmp_path / "predictions.npz")
    for before, after in zip(made, load(tmp_path / "predictions.npz"), strict=True):
        for name in ("target", "best", "ids", "logp", "rest"):
            np.testing.assert_array_equal(getattr(before, name), getattr(after, name))
            assert getattr(before, name).dtype == getattr(after, name).dtype


def test_what_counts_is_part_of_the_hash():
    assert passages_hash(PASSAGES) == passages_hash([Passage(list(p.ids)) for p in PASSAGES])
    assert passages_hash(PASSAGES) != passages_hash(PASSAGES[:3])
    assert passages_hash(PASSAGES) != passages_hash([Passage(p.ids, 2) for p in PASSAGES])


def drawn(n=6, seed=0):
    generator = np.random.default_rng(seed)
    sizes = generator.integers(20, 60, n)
    return [
        Scores(40.0 + i, 40.0, generator.exponential(0.1, size), generator.random(size) < 0.8)
        for i, size in enumerate(sizes)
    ]


def test_intervals_resample_texts():
    texts = [Scores(10.0 + i, 10.0, np.full(10, 0.1 * i), np.arange(10) < 9 - i) for i in range(5)]
    readings = fidelity_readings(Sums.of(rows("held_out", texts), "held_out"), "", 64)
    assert readings["kl_divergence_mean"].value == pytest.approx(0.2)
    assert readings["top1_agreement"].value == pytest.approx(0.7)
    assert readings["perplexity_ratio"].value == pytest.approx(math.exp(0.2))
    for name in FIGURES:
        low, high = readings[name].interval95
        assert low <= readings[name].value <= high
        assert readings[name].n == 5


def test_the_99th_percentile_needs_only_the_tokens_that_are_kept():
    scores = drawn()
    kept = rows("held_out", scores)
    every = np.concatenate([one.kl for one in scores])
    assert sum(len(row["kl_above_cut"]) for row in kept) <= 0.1 * len(every) + 1
    sums, p99 = Sums.of(kept, "held_out"), FIGURES["kl_divergence_p99"][1]
    for chosen in ([0, 1, 2, 3, 4, 5], [0, 0, 1, 2, 5, 5], [3, 3, 3, 1, 4, 2]):
        expected = np.percentile(np.concatenate([scores[i].kl for i in chosen]), 99)
        assert p99(sums, np.array(chosen)) == pytest.approx(expected, rel=1e-3)
    rare = [Scores(1.0, 1.0, np.where(np.arange(1000) < count, 1.0, 0.0), np.ones(1000, bool)) for count in (5, 3)]
    assert p99(Sums.of(rows("held_out", rare), "held_out"), np.arange(2)) == 0


def test_the_smallest_detectable_difference_is_2_8_standard_errors_of_the_difference_from_the_baseline():
    # With texts of one length the mean divergence is a plain mean, whose standard error is known.
    values = np.random.default_rng(2).exponential(1.0, 60)
    texts = [
        Scores(20.0 + 3 * i, 19.0 + 3 * i, np.full(10, value), np.ones(10, bool)) for i, value in enumerate(values)
    ]
    readings = fidelity_readings(Sums.of(rows("held_out", texts), "held_out"), "_own_answers", 64)
    expected = 2.8 * values.std() / math.sqrt(60)
    assert readings["kl_divergence_mean_own_answers_detectable"].value == pytest.approx(expected, rel=0.05)
    # Every text is a tenth of a nat a token worse: the ratio does not scatter however much the perplexities do.
    assert readings["perplexity_ratio_own_answers_detectable"].value == pytest.approx(0, abs=1e-9)
    assert readings["perplexity_own_answers_detectable"].value > 0.01
    low, high = readings["perplexity_own_answers"].interval95
    assert high - low > readings["perplexity_own_answers_detectable"].value


def test_a_broken_model_is_unknown_with_the_reason(tiny_model, baseline):
    broken = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    with torch.no_grad():
        broken.model.norm.weight.fill_(math.inf)
    kept = rows("held_out", [score(broken, passage, predict(baseline, passage, 8)) for passage in PASSAGES])
    readings = fidelity_readings(Sums.of(json.loads(json.dumps(kept, allow_nan=False)), "held_out"), "", 8)
    for name in ("perplexity", "perplexity_ratio", "kl_divergence_mean", "kl_divergence_p99"):
        assert readings[name].value is None
        assert "not finite" in readings[name].reason
        assert readings[f"{name}_detectable"].value is None


def test_one_text_has_figures_and_no_spread():
    readings = fidelity_readings(Sums.of(rows("held_out", drawn(1)), "held_out"), "", 64)
    assert readings["kl_divergence_mean"].value > 0
    assert readings["kl_divergence_mean"].interval95 is None
    assert readings["kl_divergence_mean_detectable"].value is None


@pytest.mark.parametrize("key", ["max_length=1", "answer_tokens=-1", "baseline_top_k=0"])
def test_settings_under_which_nothing_is_measured_are_refused(fidelity_config, key):
    with pytest.raises(Refusal, match=f"fidelity.{key} is too small"):
        fidelity.check(fidelity_config(f"fidelity.{key}"))


def test_a_checkpoint_without_its_unquantized_model_is_refused(fidelity_config, tiny_model, tmp_path):
    quantized = json.loads((tiny_model / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (tmp_path / "config.json").write_text(json.dumps(quantized))
    with pytest.raises(Refusal, match=r"fidelity\.baseline_source="):
        fidelity.check(fidelity_config(f"model.source={tmp_path}"))
    fidelity.check(fidelity_config(f"model.source={tmp_path}", f"fidelity.baseline_source={tiny_model}"))


def test_bits_are_ordered_on_both_sets_and_the_record_follows_from_its_rows(fidelity_run):
    values = {}
    for bits in (8, 4, 2):
        folder = fidelity_run("quant=rtn", "quant.group_size=32", f"quant.bits={bits}")
        record = store.load(folder)
        kept = [json.loads(line) for line in (folder / fidelity.ROWS).read_text().splitlines()]
        for name, suffix in fidelity.SUFFIXES.items():
            sums = Sums.of(kept, name)
            assert len(sums) == record.counts[f"texts{suffix}"] == 4
            assert sums.tokens.sum() == record.counts[f"tokens{suffix}"]
            recomputed = fidelity_readings(sums, suffix, 64)
            assert recomputed == {key: record.quality[key] for key in recomputed}
            assert record.provenance["fidelity"][name].keys() == {"texts", "baseline"}
            values.setdefault(name, []).append(record.quality[f"kl_divergence_mean{suffix}"].value)
        assert record.readings["bits_per_weight"].value == pytest.approx(bits + 40 / 32)
        assert record.quality["kl_divergence_p99"].method == f"{METHOD}/top_64_and_rest"
        assert record.kernel["linear"] == "RTNLinear"
    for name in fidelity.SUFFIXES:
        assert 0 < values[name][0] < values[name][1] < values[name][2]


def test_the_embedded_model_loses_more_with_each_bit_less(fidelity_config):
    from llm_at_home.evaluation.fidelity.passages import held_out
    from llm_at_home.models.loading import load_tokenizer
    from llm_at_home.quantization.base import load_base

    words = ("model=smollm2_135m", "model.source=embedded", "model.name=smollm2_135m", "quant.group_size=32")
    config = fidelity_config(*words[:-1])
    passages = held_out(load_tokenizer(config["model"]), 2, 48)
    dense = load_base(config)
    predictions = [predict(dense, passage, 256) for passage in passages]
    del dense
    found = []
    for bits in (8, 4, 3, 2):
        model = load_base(fidelity_config(*words, "quant=rtn", f"quant.bits={bits}"))
        found.append([score(model, *pair).kl.mean() for pair in zip(passages, predictions, strict=True)])
        del model
    assert (np.diff(found, axis=0) > 0).all(), "on each text"
    assert (np.array(found[0]) > 0).all()


def test_own_answers_can_be_left_out(fidelity_run):
    record = store.load(fidelity_run("fidelity.answer_tokens=0"))
    assert "kl_divergence_mean" in record.quality
    assert not any("own_answers" in name for name in record.quality)


def test_the_command_leaves_a_record_with_both_sets(tmp_path, command):
    folder = tmp_path / "run"
    words = ("task=fidelity", "quant=nf4", "limit=3", "fidelity.answer_tokens=4", f"hydra.run.dir={folder}")
    done = command("evaluate.py", *words, LLM_AT_HOME_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    record = store.load(folder)
    assert record.status == "ok"
    assert record.quality["top1_agreement_own_answers"].n == 3
    assert record.provenance["fidelity"]["own_answers"]["baseline"]
    assert len(list((tmp_path / "cache" / "baselines").glob("*/made_from.json"))) == 3
