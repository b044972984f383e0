"""A disk that fills up while a checkpoint is written leaves the one before, from which the run goes on."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
import torch
from safetensors import SafetensorError

from llm_at_home.training.callbacks.checkpoints import Checkpoints, last_checkpoint


@pytest.fixture
def small_disk(tmp_path):
    """``small_disk(kilobytes)`` mounts a file system of that size and gives its folder."""
    mounted = []

    def mount(kilobytes):
        folder = tmp_path / "small_disk"
        folder.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a small file system can only be had where one may be mounted ({done.stderr.strip()})")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def size_of_a_checkpoint(folder):
    checkpoint = next((folder / "checkpoints").glob("step_*"))
    return sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())


@pytest.mark.parametrize("quarters", [5, 7])  # the second checkpoint's weights do not fit, or its trainer's state
def test_a_full_disk_leaves_the_checkpoint_before(fit, small_disk, tmp_path, quarters):
    straight = fit(4, 1, steps=3, callbacks=[Checkpoints(every_n_steps=2)], folder=tmp_path / "straight")
    disk = small_disk(size_of_a_checkpoint(tmp_path / "straight") * quarters // 4 // 2**10)
    with pytest.raises((OSError, SafetensorError), match="No space left on device"):
        fit(4, 1, steps=3, callbacks=[Checkpoints(every_n_steps=1)], folder=disk)
    assert [path.name for path in (disk / "checkpoints").iterdir()] == ["step_000001"]
    resumed = fit(4, 1, steps=3, resume=last_checkpoint(disk), folder=tmp_path / "resumed")
    assert resumed.history == straight.history
    assert all(torch.equal(a, b) for a, b in zip(resumed.model.parameters(), straight.model.parameters(), strict=True))


@pytest.mark.slow
def test_the_record_of_such_a_run_says_so_and_it_can_be_resumed(command, small_disk, tmp_path):
    words = ("adapter=full", "limit=8", "trainer.max_steps=3", "callbacks.accumulation.steps=1", "rerun=true")
    words += ("callbacks.checkpoints.every_n_steps=1",)
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert command("train.py", *words, f"hydra.run.dir={straight}").returncode == 0
    disk = small_disk(size_of_a_checkpoint(straight) * 3 // 2 // 2**10)
    done = command("train.py", *words, f"hydra.run.dir={disk}/run")
    assert done.returncode == 1
    record = json.loads((disk / "run" / "record.json").read_text())
    assert record["status"] == "failed"
    assert "No space left on device" in record["error"]["message"]
    assert record["counts"]["optimizer_steps"] == 2
    done = command("train.py", *words, f"resume={disk}/run", f"hydra.run.dir={resumed}")
    assert done.returncode == 0, done.stderr
    assert (resumed / "metrics.csv").read_text() == (straight / "metrics.csv").read_text()
    assert (resumed / "model" / "model.safetensors").read_bytes() == (
        straight / "model" / "model.safetensors"
    ).read_bytes()
    assert shutil.disk_usage(disk).free < size_of_a_checkpoint(disk / "run")
