"""A run that a signal stopped leaves a record, and resuming it gives the losses of the run that was not stopped."""

from __future__ import annotations

import csv
import json
import signal
import time

import pytest

from llm_at_home.errors import Refusal
from llm_at_home.records import store
from llm_at_home.records.schema import Record
from llm_at_home.tasks import resolve

STEPS = 40
PROTOCOL = (
    "adapter=lora",
    "adapter.r=4",
    "adapter.lora_dropout=0.1",  # draws random numbers, so that their state matters too
    "data.batch_size=2",
    "callbacks.accumulation.steps={0: 3, 20: 2}",
    "optimizer.lr=1e-2",
    "scheduler=linear",
    "limit=30",
    f"trainer.max_steps={STEPS}",
    "rerun=true",
)


def losses(folder):
    with (folder / "metrics.csv").open() as file:
        return [(row["step"], row["loss"], row["lr"]) for row in csv.DictReader(file)]


def wait_for_steps(folder, steps, process):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "metrics.csv").is_file() and len((folder / "metrics.csv").read_text().splitlines()) > steps:
            return
        time.sleep(0.02)
    pytest.fail(f"{steps} steps were not reached: {process.communicate()[1]}")


def test_a_run_that_was_stopped_twice_ends_as_one_that_was_not(tmp_path, command, start):
    straight = tmp_path / "straight"
    done = command("train.py", *PROTOCOL, f"hydra.run.dir={straight}")
    assert done.returncode == 0, done.stderr

    resume, steps = [], 0
    for number in (signal.SIGTERM, signal.SIGINT):
        stopped = tmp_path / signal.Signals(number).name
        process = start("train.py", *PROTOCOL, *resume, f"hydra.run.dir={stopped}")
        wait_for_steps(stopped, steps + 5, process)
        process.send_signal(number)
        _, err = process.communicate(timeout=100)
        assert process.returncode == 1, err
        record = json.loads((stopped / "record.json").read_text())
        assert record["status"] == "interrupted"
        assert signal.Signals(number).name in record["error"]["message"]
        assert steps + 5 <= len(losses(stopped)) < STEPS, "it was to be stopped in the middle"
        resume, steps = [f"resume={stopped}"], len(losses(stopped))

    resumed = tmp_path / "resumed"
    done = command("train.py", *PROTOCOL, *resume, f"hydra.run.dir={resumed}")
    assert done.returncode == 0, done.stderr
    assert losses(resumed) == losses(straight)
    assert (resumed / "adapter" / "adapter_model.safetensors").read_bytes() == (
        straight / "adapter" / "adapter_model.safetensors"
    ).read_bytes()


def test_resume_with_other_settings_is_refused(tmp_path, command):
    folder = tmp_path / "run"
    few = ("limit=8", "adapter.r=4", "trainer.max_steps=2", "callbacks.checkpoints.every_n_steps=1")
    assert command("train.py", *few, f"hydra.run.dir={folder}").returncode == 0
    other = command("train.py", *few, "adapter.r=8", f"resume={folder}")
    assert other.returncode == 2
    assert "another adapter" in other.stderr
    nothing = command("train.py", *few, f"resume={tmp_path}/none")
    assert nothing.returncode == 2
    assert "holds no checkpoint" in nothing.stderr


@pytest.fixture
def interrupted(tmp_path, resolved):
    """``interrupted(words, **record)``: the folder of a run of these words that was stopped at its step 10."""

    def make(words, record=True, **provenance):
        folder = tmp_path / "interrupted"
        (folder / "checkpoints" / "step_000010").mkdir(parents=True)
        (folder / "checkpoints" / "step_000010" / "trainer.ckpt").touch()
        config = resolved(words)
        store.write_json(folder / store.JOB, {"task": "train", "config": config})
        if record:
            store.save(Record("train", "interrupted", config, provenance=provenance), folder)
        return folder

    return make


@pytest.mark.parametrize("record", [True, False], ids=["record", "no record"])
def test_a_run_that_left_no_record_is_resumed_as_well(interrupted, resolved, record):
    """As after a power cut, when neither the job nor its command could write one."""
    folder = interrupted(["callbacks.accumulation.steps={0: 8, 5: 4}"], record=record)
    again = ["callbacks.accumulation.steps={0: 8, 5: 4}", f"resume={folder}"]
    resolve.check("train", resolved(again))
    with pytest.raises(Refusal, match="another optimizer"):
        resolve.check("train", resolved([*again, "optimizer.lr=1"]))


@pytest.mark.parametrize(
    ("words", "further", "why"),
    [
        ([], ["trainer.max_steps=9"], "has made 10 steps"),
        (["adapter=adalora"], ["trainer.max_steps=200"], "trainer.max_steps=100, and adapter=adalora hands out"),
        ([], ["callbacks.clipping.max_norm=1"], "callbacks.clipping.max_norm=0.3: give the same"),
        ([], ["~callbacks.clipping"], "callbacks.clipping.max_norm=0.3: give the same"),
        ([], ["trainer.precision=bf16-mixed"], "trainer.precision=32-true: give the same"),
        ([], ["data.path=CHANGED"], "other conversations"),
    ],
)
def test_what_would_be_another_run_is_not_resumed(interrupted, resolved, tmp_path, words, further, why):
    file = tmp_path / "own.jsonl"
    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": "b"}] for text in "acd"]
    lines = [json.dumps({"messages": messages}) + "\n" for messages in turns]
    file.write_text("".join(lines[:2]))
    words = [*words, "data=jsonl", f"data.path={file}"]
    folder = interrupted(words, data=resolve.ingredients("train", resolved(words))["data"])
    resolve.check("train", resolved([*words, f"resume={folder}"]))
    if further == ["data.path=CHANGED"]:
        further = []
        file.write_text("".join(lines))
    with pytest.raises(Refusal, match=why):
        resolve.check("train", resolved([*words, *further, f"resume={folder}"]))


def test_a_checkpoint_without_its_trainer_s_state_is_none(interrupted, resolved):
    folder = interrupted([])
    (folder / "checkpoints" / "step_000010" / "trainer.ckpt").unlink()
    with pytest.raises(Refusal, match="holds no checkpoint"):
        resolve.check("train", resolved([f"resume={folder}"]))


def test_a_fully_trained_model_is_read_as_it_is(tmp_path, command):
    folder = tmp_path / "run"
    words = ("adapter=full", "limit=8", "trainer.max_steps=1", f"hydra.run.dir={folder}")
    assert command("train.py", *words).returncode == 0
    source = (f"model.source={folder}/model", "limit=2", "engine.max_new_tokens=4", f"hydra.run.dir={tmp_path}/infer")
    done = command("infer.py", "model=custom", *source, model=False)
    assert done.returncode == 0, done.stderr
