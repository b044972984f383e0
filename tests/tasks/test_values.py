"""Values that would end in a traceback after everything was loaded, or change a run without a word, are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from llm_at_home.errors import Refusal
from llm_at_home.planning import composing
from llm_at_home.tasks import resolve

CONF = Path(__file__).resolve().parents[2] / "conf"
T4 = {"device": "cuda", "card": "Tesla T4", "emulated": False, "compute_capability": "7.5"}


def checked(task, words, **gpu):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = resolve.resolve(task, compose(task, ["gpu=cpu", *words]), words)
    config["gpu"] |= gpu
    resolve.check(task, config)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["data.batch_size=0"], "data.batch_size=0"),
        (["data.batch_size=1.5"], "data.batch_size=1.5"),
        (["data.max_length=-5"], "data.max_length=-5"),  # which would cut the last five tokens off
        (["trainer.max_steps=1.5"], "trainer.max_steps=1.5"),
        (["trainer.max_steps=null"], "trainer.max_steps=None"),
        (["trainer.max_epochs=0"], "leaves nothing to train"),
        (["limit=1.5"], "limit=1.5"),
        (["limit=some"], "limit=some"),
        (["seed=-1"], "seed=-1"),
        (["timeout_s=-1"], "null for none"),
        (["grace_s=null"], "0 for none"),
        (["seed=null"], "seed=None"),
        (["callbacks.checkpoints.every_n_steps=0"], "every_n_steps=0"),
        (["callbacks.checkpoints.keep=-1"], "keep=-1"),  # which would keep none
        (["callbacks.divergence.window=0"], "window=0"),
        (["callbacks.clipping.max_norm=-1"], "max_norm=-1"),  # which would turn the gradient round
        (["data.packing=off"], "data.packing=off is text"),
        (["data.packing=maybe"], "give true or false"),
        (["trainer.fused=off"], "trainer.fused=off"),
        (["model.trust_remote_code=no"], "trust_remote_code=no is text"),
        (["+trainer.gradient_clip_val=1"], "use callbacks.clipping.max_norm"),
        (["+trainer.accumulate_grad_batches=2"], "use callbacks.accumulation.steps"),
        (["scheduler=wsd", "trainer.max_steps=10"], "num_decay_steps=20 do not fit trainer.max_steps=10"),
        (["~optimizer"], "choose one of conf/optimizer"),
        (["~adapter"], "choose one of conf/adapter"),
        (["adapter.trains=both"], "choose one of adapter, all, nothing"),
        (["+adapter.init_lora_weights=eva"], "starts from data"),
        (["adapter=adalora", "~callbacks.rank_allocation"], "leave it in"),
        (["adapter=adalora", "adapter.target_r=96"], "leaves no rank to lower"),
        (["adapter=adalora", "adapter.deltaT=0"], "deltaT=0"),
        (["adapter.r=0"], "adapter.r=0 is no rank"),
        (["adapter=dora", "adapter.r=2.5"], "adapter.r=2.5 is no rank"),
        (["adapter=prompt", "adapter.num_virtual_tokens=0"], "num_virtual_tokens=0"),
        (["adapter=bottleneck", "adapter.bottleneck_size=1.5"], "bottleneck_size=1.5"),
        (["adapter.lora_alpha=0"], "with which nothing is learned"),
        (["adapter.lora_dropout=1"], "give 0 or more, and less than 1"),
        (["optimizer.lr=-1"], "optimizer.lr=-1 is no number above 0"),
        (["optimizer.lr=1e-4x"], "optimizer.lr=1e-4x"),
        (["optimizer.weight_decay=-1"], "give 0 or more"),
        (["scheduler=cosine_restarts", "scheduler.T_0=0"], "T_0=0"),
        (["data.path=mine.jsonl"], "is not read with data=handbook: add data=jsonl"),
        (["data=guanaco", "data.test_path=mine.jsonl"], "is not read with data=guanaco: add data=jsonl"),
        (["model=custom"], "model.source has no value: give model.source="),
        (["adapter=oft", "adapter.oft_block_size=30"], "does not divide layers of 576 inputs: give a divisor of 192"),
    ],
    ids=str,
)
def test_what_training_would_stumble_over_is_refused(words, why):
    with pytest.raises(Refusal, match=why) as refused:
        checked("train", words)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "words",
    [
        ["scheduler=wsd"],
        ["~scheduler", "~callbacks"],
        ["trainer.max_epochs=2"],
        ["adapter.r=1", "adapter.lora_alpha=0.5", "adapter.lora_dropout=0", "optimizer.lr=1"],
        ["~callbacks.clipping", "~callbacks.checkpoints", "~callbacks.divergence"],
        ["adapter=oft", "adapter.target_modules=[q_proj]", "adapter.oft_block_size=36"],
    ],
    ids=str,
)
def test_what_can_be_is_not(words):
    checked("train", words)


def test_weights_that_no_scaler_takes_are_not_trained_in_float16():
    words = ["+adapter.modules_to_save=[lm_head]"]
    with pytest.raises(Refusal, match=r"dtype=float32 trainer\.precision=16-mixed"):
        checked("train", [*words, "dtype=float16"], **T4)
    checked("train", [*words, "dtype=float32", "trainer.precision=16-mixed"], **T4)


@pytest.mark.parametrize(("task", "words"), [("infer", []), ("quantize", ["quant=gptq"]), ("evaluate", ["task=text"])])
def test_a_word_is_no_switch_for_any_command(task, words):
    with pytest.raises(Refusal, match="give true or false"):
        checked(task, [*words, "model.trust_remote_code=off"])


@pytest.mark.parametrize(
    ("task", "words", "why"),
    [
        ("infer", ["repeats=x"], "repeats=x"),
        ("infer", ["samples=1.5"], "samples=1.5"),
        ("infer", ["engine.batch_size=2.5"], "engine.batch_size=2.5"),
        ("evaluate", ["task=text", "text.batch_size=0"], "text.batch_size=0"),
        ("evaluate", ["task=text", "text.max_new_tokens=few"], "text.max_new_tokens=few"),
        ("evaluate", ["task=text", "engine.temperature=-1"], "engine.temperature=-1"),
        ("evaluate", ["task=fidelity", "fidelity.max_length=2.5"], "fidelity.max_length=2.5"),
    ],
    ids=str,
)
def test_what_answering_would_stumble_over_is_refused(task, words, why):
    with pytest.raises(Refusal, match=f"{why} .*give"):
        checked(task, words)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["quant.bits=3"], "changes nothing of quant=none"),
        (["quant=nf4", "quant.bits=8"], "changes nothing of quant=nf4, which has 4"),
        (["quant=int8", "quant.bits=4"], "changes nothing of quant=int8, which has 8"),
        (["quant=gguf", "quant.bits=4"], "choose with quant.type="),
        (["quant=int8_torchao", "quant.bits=4"], "not to be had with quant=int8_torchao: use"),
        (["quant=int4_torchao", "quant.bits=8"], "not to be had with quant=int4_torchao: use"),
        (["quant=nf4", "quant.config.bnb_4bit_quant_type=nf5"], "choose one of nf4, fp4"),
        (["quant=int8", "quant.config.llm_int8_threshold=-1"], "is no threshold"),
        (["questions.ids=81"], r"give questions\.ids=\[81\]"),
        (["questions.path=no_such_file.jsonl"], "does not exist"),
    ],
    ids=str,
)
def test_what_would_change_nothing_of_an_inference_or_end_it_late_is_refused(words, why):
    with pytest.raises(Refusal, match=why):
        checked("infer", words)
    checked("infer", ["quant=int8", "quant.config.llm_int8_threshold=5"])


def test_a_file_of_questions_is_read_before_anything_loads(tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text("")
    with pytest.raises(Refusal, match="holds no question"):
        checked("infer", [f"questions.path={file}"])
    file.write_bytes(b'{"question_id": 1, "category": "stem", "turns": ["One?", "Two?"]}\r\n{"question_id": 2}\r\n')
    with pytest.raises(Refusal, match="line 2: category is no string"):
        checked("infer", [f"questions.path={file}"])
    checked("infer", [f"questions.path={file}", "mode=chat"])


def test_a_file_of_conversations_is_read_before_anything_loads(tmp_path):
    turns = [{"role": "user", "content": "Where is the key?"}, {"role": "assistant", "content": "Under the mat."}]
    for text, why in (
        ("", "it is empty"),
        ("nothing\n", "no usable conversation"),
        (json.dumps({"messages": turns}) + "\n", "holds one conversation"),
    ):
        file = tmp_path / "mine.jsonl"
        file.write_text(text)
        words = ["data=jsonl", f"data.path={file}"]
        with pytest.raises(Refusal, match=why):
            checked("train", words)
        with pytest.raises(Refusal, match=why):
            checked("evaluate", ["task=text", *words])
    tested = tmp_path / "tested.jsonl"
    tested.write_text("")
    words += [f"data.test_path={tested}"]
    checked("train", words)  # which reads no test split
    for task, more in (("train", "held_out=2"), ("evaluate", "task=text")):
        with pytest.raises(Refusal, match=r"tested\.jsonl holds no usable conversation: it is empty"):
            checked(task, [*words, more])


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("questions.path=/tmp/übung.jsonl", """'questions.path="/tmp/übung.jsonl"'"""),
        ("+questions.path=/tmp/a(1).jsonl", "quote the value"),
        ("quant==nf4", "give one ="),
        ("adapters={cook: /tmp/ü}", "quote each text in it"),
        ("questions=null", "choose one of conf/questions"),
        ("hydra/launcher=null", "choose one of conf/hydra/launcher"),
    ],
)
def test_words_that_hydra_cannot_read_are_refused_with_what_to_write(word, why):
    with pytest.raises(Refusal) as refused:
        composing.check_words([word])
    assert why in str(refused.value)


def test_the_quotes_that_are_named_can_be_read():
    composing.check_words(["-m", "--cfg", "job", 'questions.path="/tmp/übung.jsonl"', "quant=none,nf4", "seed=null"])


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for key in composing.PLACES:
        with pytest.raises(Refusal, match="is a file: name another"):
            composing.check_words([f"{key}={file}/run"])
        composing.check_words([f"{key}={tmp_path}/new/run"])
