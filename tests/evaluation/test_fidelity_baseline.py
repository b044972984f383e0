"""The baseline's answers and predictions are made once, kept whole, and made again where they are damaged."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from llm_at_home.evaluation.fidelity import baseline as room
from llm_at_home.evaluation.fidelity.baseline import Baseline
from llm_at_home.evaluation.fidelity.passages import Passage, first_turns, held_out


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def loads(monkeypatch, tmp_path):
    """A cache of its own, and a list that grows with each loaded model."""
    monkeypatch.setenv("LLM_AT_HOME_CACHE", str(tmp_path / "cache"))
    loaded = []
    real = room.load_base

    def counted(config):
        loaded.append((config["quant"]["name"], config["dtype"]))
        return real(config)

    monkeypatch.setattr(room, "load_base", counted)
    return loaded


PASSAGES = [Passage(list(range(100, 120))), Passage(list(range(300, 330)), first=10)]


def test_a_second_run_loads_no_baseline(loads, fidelity_config, tokenizer):
    prompts = first_turns(tokenizer, 3)
    one, two = (Baseline(fidelity_config(f"quant={quant}"), tokenizer) for quant in ("nf4", "rtn"))
    answers = one.answers(prompts, 6, seed=0)
    made, made_hash = one.predictions(answers, 16)
    assert loads == [("none", "float32")]
    assert two.answers(prompts, 6, seed=0) == answers
    kept, kept_hash = two.predictions(answers, 16)
    assert len(loads) == 1
    assert kept_hash == made_hash
    assert [one.logp.tolist() for one in kept] == [one.logp.tolist() for one in made]


def test_answers_follow_their_prompts_and_their_seed(loads, fidelity_config, tokenizer):
    prompts = first_turns(tokenizer, 3)
    baseline = Baseline(fidelity_config(), tokenizer)
    answers = baseline.answers(prompts, 6, seed=0)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.ids[: answer.first] == prompt
        assert 1 <= answer.tokens <= 6
    others = baseline.answers(prompts, 6, seed=1)
    assert [answer.ids for answer in others] != [answer.ids for answer in answers]
    assert len(loads) == 1, "the model is loaded once for all that is missing"


def test_other_settings_are_other_predictions(loads, fidelity_config, tokenizer):
    configs = (fidelity_config(), fidelity_config("fidelity.baseline_dtype=bfloat16"))
    hashes = {
        Baseline(config, tokenizer).predictions(passages, k)[1]
        for config in configs
        for passages in (PASSAGES, PASSAGES[:1])
        for k in (8, 16)
    }
    assert len(hashes) == 8
    assert ("none", "bfloat16") in loads


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 torn", None])
def test_what_was_damaged_is_made_again(loads, fidelity_config, tokenizer, damage, caplog):
    baseline = Baseline(fidelity_config(), tokenizer)
    made, _ = baseline.predictions(PASSAGES, 16)
    (file,) = room.cached("baselines", baseline._key(passages=room.passages_hash(PASSAGES), top_k=16), None).glob(
        "*.npz"
    )
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF  # one byte somewhere in the middle, which only a checksum tells
    file.write_bytes(bytes(content) if damage is None else damage)
    again, _ = Baseline(fidelity_config(), tokenizer).predictions(PASSAGES, 16)
    assert [one.logp.tolist() for one in again] == [one.logp.tolist() for one in made]
    assert "damaged" in caplog.text
    assert len(loads) == 2


def test_what_cannot_be_made_leaves_nothing_behind(loads, fidelity_config, tokenizer, monkeypatch, tmp_path):
    def broken(*args):
        raise ValueError("no such thing")

    monkeypatch.setattr(room, "predict", broken)
    with pytest.raises(ValueError, match="no such thing"):
        Baseline(fidelity_config(), tokenizer).predictions(PASSAGES, 16)
    assert len(loads) == 1
    assert not [path for path in (tmp_path / "cache" / "baselines").iterdir() if path.is_dir()]


def test_a_checkpoint_is_held_against_the_model_that_it_was_made_from(loads, fidelity_config, tokenizer, tiny_model):
    config = fidelity_config("model.source=/some/checkpoint", f"fidelity.baseline_source={tiny_model}")
    predictions, _ = Baseline(config, tokenizer).predictions(PASSAGES, 16)
    own, _ = Baseline(fidelity_config(), tokenizer).predictions(PASSAGES, 16)
    assert predictions[1].target.tolist() == own[1].target.tolist()


def test_held_out_texts_are_cut(tokenizer):
    passages = held_out(tokenizer, 3, 20)
    assert [(len(passage.ids), passage.first) for passage in passages] == [(20, 1)] * 3
