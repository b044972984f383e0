"""A quantizer never looks at what is measured afterwards."""

from __future__ import annotations

import json

import pytest

from llm_at_home.data.texts import load_texts
from llm_at_home.errors import Refusal
from llm_at_home.quantization.calibration import calibration_texts, evaluated_texts, shared_words

from .conftest import resolved


def jsonl(path, answers):
    turns = [
        [{"role": "user", "content": f"Question number {i}?"}, {"role": "assistant", "content": answer}]
        for i, answer in enumerate(answers)
    ]
    path.write_text("".join(json.dumps({"messages": one}) + "\n" for one in turns))
    return path


def calibrated_on(path):
    return ["quant=gptq", "quant.calibration.source=jsonl", f"quant.calibration.path={path}"]


def test_thirteen_words_in_a_row_are_shared_whatever_case_and_punctuation():
    words = "one two three four five six seven eight nine ten eleven twelve thirteen"
    assert shared_words([f"before {words} after"], [f"quite different. {words.upper().replace(' ', ', ')}!"]) == words
    assert shared_words([f"before {words[:-9]} after"], [f"different {words[:-9]} ending"]) is None


def test_the_shipped_texts_share_nothing_with_anything_shipped(wide_model):
    for words in (("task=fidelity",), ("task=text", "data=handbook")):
        config = resolved("evaluate", wide_model, "quant=gptq", *words)
        assert shared_words(calibration_texts(config["quant"]["calibration"]), evaluated_texts(config)) is None
        assert len(evaluated_texts(config)) > 40
    assert evaluated_texts(resolved("infer", wide_model, "quant=gptq", "questions=mt_bench"))


@pytest.mark.parametrize("hidden_in", [0, 7])
def test_calibrating_on_held_out_text_is_refused_wherever_it_hides(wide_model, tmp_path, hidden_in):
    answers = [f"Something harmless, the {i}th." for i in range(20)]
    passage = load_texts("held_out")[hidden_in]
    answers[11:14] = [f"Well then. {passage[len(passage) // 3 :]}"] * 3
    path = jsonl(tmp_path / "own.jsonl", answers)
    with pytest.raises(Refusal, match="also evaluated"):
        resolved("evaluate", wide_model, "task=fidelity", *calibrated_on(path))
    assert resolved("infer", wide_model, *calibrated_on(path)), "inference measures no such text"


def test_the_train_split_of_the_evaluated_data_is_no_overlap(wide_model):
    words = ["quant=gptq", "quant.calibration.source=handbook", "task=text", "data=handbook"]
    assert resolved("evaluate", wide_model, *words)["quant"]["calibration"]["source"] == "handbook"
