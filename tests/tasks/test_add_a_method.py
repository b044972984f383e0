"""docs/add_a_method.md does what it says: its files, put where it says, are a method that runs and is recorded."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "add_a_method.md"
BLOCK = re.compile(r"`((?:conf|src)/[\w/]+\.(?:yaml|py))`:\n\n```(?:yaml|python)\n(.*?)```", re.DOTALL)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with what the page adds."""
    folder = tmp_path_factory.mktemp("tree")
    for name in ("conf", "src"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "infer.py"):
        shutil.copy(ROOT / name, folder)
    files = dict(BLOCK.findall(PAGE.read_text()))
    assert sorted(files) == [
        "conf/optimizer/nadam.yaml",
        "conf/quant/halved.yaml",
        "src/llm_at_home/quantization/halved.py",
    ]
    for name, content in files.items():
        (folder / name).write_text(content)
    base = folder / "src" / "llm_at_home" / "quantization" / "base.py"
    source = base.read_text()
    base.write_text(source.replace('METHODS = ("dense", ', 'METHODS = ("halved", "dense", '))
    assert base.read_text() != source
    return folder


@pytest.fixture
def run(tree: Path, tiny_model: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def command(script: str, *words: str) -> subprocess.CompletedProcess[str]:
        model = ("model=custom", f"model.source={tiny_model}", "model.name=tiny", "gpu=cpu", "logger=none")
        environment = {key: value for key, value in os.environ.items() if key != "LLM_AT_HOME_STAMP"}
        return subprocess.run(
            [sys.executable, script, *model, *words, f"hydra.run.dir={tmp_path}/run", f"paths.output={tmp_path}"],
            cwd=tree,
            env={**environment, "PYTHONPATH": str(tree / "src")},
            capture_output=True,
            text=True,
        )

    return command


def test_its_refusal_comes_before_anything_loads(run, tmp_path):
    done = run("infer.py", "quant=halved", "quant.step=0")
    assert done.returncode == 2
    assert "refused: quant.step=0 is no step: give more than 0" in done.stderr
    assert not (tmp_path / "run" / "record.json").exists()


@pytest.mark.slow
def test_its_quantization_answers_and_is_recorded(run, tmp_path):
    done = run("infer.py", "quant=halved", "quant.step=0.5", "limit=1", "engine.max_new_tokens=3")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["status"] == "ok"
    assert record["config"]["quant"] == {"name": "halved", "method": "halved", "bits": None, "step": 0.5}
    assert record["kernel"]["linear"] == "Linear"


@pytest.mark.slow
def test_its_optimizer_trains(run, tmp_path):
    words = ("limit=8", "trainer.max_steps=2", "callbacks.accumulation.steps=1", "callbacks.power.idle_seconds=0")
    done = run("train.py", "optimizer=nadam", "optimizer.lr=1e-2", *words)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["config"]["optimizer"]["_target_"] == "torch.optim.NAdam"
    assert record["counts"]["optimizer_steps"] == 2
