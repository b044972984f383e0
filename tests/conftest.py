"""What many tests share: a tiny real model, and commands run as a user runs them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Log lines of libraries are no test's business, and no test reaches for the hub.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MLFLOW_DISABLE_TELEMETRY="true")


def pytest_configure(config: pytest.Config) -> None:
    """Two tests run at once: a second thread of each would only wait, and tiny models are faster without it anyway."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # A shell starts what it runs in the background with Ctrl-C ignored, which commands under test would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def save_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Save a random two-layer Llama with SmolLM2's tokenizer, ``save_llama(name, **shape)``, and give its folder."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from llm_at_home.models.embedded import ensure_converted

    def save(name: str, **shape: int) -> Path:
        tokenizer = AutoTokenizer.from_pretrained(ensure_converted())
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=True,
            **shape,
        )
        folder = tmp_path_factory.mktemp("models") / name
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def tiny_model(save_llama: Callable[..., Path]) -> Path:
    """Real code paths in milliseconds."""
    return save_llama("tiny", hidden_size=64, intermediate_size=128)


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of Debian's Chromium; without one a test is skipped, and where CI runs fails."""
    found = shutil.which("chromium")
    if not found:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no chromium: apt-get install chromium")
    return found


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Any]:
    """A real Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def start(tmp_path: Path, tiny_model: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start one of the entry points on the tiny model, offline, with all outputs below ``tmp_path``.

    ``start("train.py", "adapter=lora", model=False)`` leaves the model to the configuration.
    """

    def popen(script: str, *overrides: str, model: bool = True, **environment: str) -> subprocess.Popen[str]:
        # argparse takes flags before the overrides or after them, not in between.
        flags = [word for word in overrides if word.startswith("-")]
        overrides = tuple(word for word in overrides if not word.startswith("-"))
        words = [sys.executable, script, *flags, f"paths.output={tmp_path}/multirun", "logger=none", "gpu=cpu"]
        if model:
            words += ["model=custom", f"model.source={tiny_model}", "model.name=tiny"]
        inherited = {key: value for key, value in os.environ.items() if key != "LLM_AT_HOME_STAMP"}
        return subprocess.Popen(
            [*words, *overrides],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**inherited, **environment},
        )

    return popen


@pytest.fixture
def command(start: Callable[..., subprocess.Popen[str]]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run such a command to its end: ``command(script, *overrides, model=True, stdin="")``."""

    def run(script: str, *overrides: str, stdin: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
        process = start(script, *overrides, **options)
        out, err = process.communicate(stdin, timeout=250)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return run


TRITON = "3.9.0"


@pytest.fixture(scope="session")
def interpreted() -> Callable[..., None]:
    """Run a file of tests of Triton kernels with its interpreter: ``interpreted(__file__, beside, passing)``.

    In a process of its own, since Triton decides when it is imported whether it interprets; and from a folder of its
    own, kept from one run to the next, since with Triton in the environment every start would take seconds longer.
    """
    from filelock import FileLock

    from llm_at_home.paths import cache_dir

    folder = cache_dir() / "test_packages" / f"triton-{TRITON}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(folder) + ".lock"):
        if not (folder / "triton").is_dir():
            pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
            subprocess.run([*pip, f"triton=={TRITON}"], check=True, capture_output=True)

    def run(test: str, beside: str, passing: int) -> None:
        file = Path(test).with_name(beside)
        options = ["-q", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"]
        path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
        done = subprocess.run(
            [sys.executable, "-m", "pytest", str(file), *options],
            env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout
        assert f"{passing} passed" in done.stdout

    return run
