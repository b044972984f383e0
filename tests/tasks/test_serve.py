"""The endpoint as a user starts it, on a tiny real model."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import openai
import pytest

from llm_at_home.errors import Refusal

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("words", [("engine=graph",), ("quant=gguf", "quant.type=Q8_0", "engine.threads=1")])
def test_it_answers_and_ctrl_c_ends_it(start: Any, words: tuple[str, ...]) -> None:
    port = free_port()
    shared = ("mode=serve", f"serve.port={port}", "engine.batch_size=2", "engine.max_new_tokens=8", "serve.api_key=abc")
    process: subprocess.Popen[str] = start("infer.py", *shared, *words)
    try:
        said = process.stdout.readline()  # type: ignore[union-attr]
        assert f"http://127.0.0.1:{port}/v1" in said
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="abc", max_retries=0)
        for _ in range(100):
            try:
                (model,) = client.models.list()
                break
            except openai.APIConnectionError:
                time.sleep(0.1)
        assert model.id == "tiny"
        asked: Any = [{"role": "user", "content": "Who are you?"}]
        answer = client.chat.completions.create(model=model.id, messages=asked, temperature=0)
        assert answer.usage is not None
        assert 1 <= answer.usage.completion_tokens <= 8
        stranger = openai.OpenAI(base_url=client.base_url, api_key="-", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            stranger.chat.completions.create(model=model.id, messages=asked)
    finally:
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode in (0, 1), err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["serve.host=0.0.0.0"], "give serve.api_key as well"),
        (["serve.context=0"], "serve.context=0 is no whole number from 1 on"),
        (["serve.queue=null"], "serve.queue=None is no whole number from 1 on"),
        (["serve.port=0"], "serve.port=0 is no port: give one from 1 to 65535"),
        (["serve.port=70000"], "serve.port=70000 is no port"),
        (["serve.api_key=12345"], "serve.api_key is empty or a number"),
        (["serve.api_key=''"], "serve.api_key is empty or a number"),
        (["engine.max_new_tokens=0"], "engine.max_new_tokens=0 is no whole number from 1 on"),
        (["engine.batch_size=2.5"], "engine.batch_size=2.5 is no whole number from 1 on"),
        (["engine.temperature=-1"], "engine.temperature=-1 is no temperature: give 0"),
        (["engine.temperature=hot"], "engine.temperature=hot is no temperature"),
        (["quant=gguf", "engine.threads=0"], "engine.threads=0 is no whole number from 1 on"),
        (["serve.context=9000"], "serve.context=9000 is longer than smollm2_135m knows: give 8192"),
        (["engine=graph", "engine.kernels=fast"], "choose auto, triton or torch"),
        (["engine=graph", "engine.kernels=triton"], "needs a GPU"),
        (["engine=graph", "engine.pages=0"], "engine.pages=0 is no number of pages"),
        (["serve.host=home"], "serve.host=home is no address"),
        (["model=llama2_7b", "model.weights=random"], "has no tokenizer to be served with: give model.source=FOLDER"),
        (["adapters={a: nowhere}"], "name the first one with adapter_path="),
    ],
)
def test_what_cannot_be_served_is_refused(words: list[str], said: str) -> None:
    from hydra import compose, initialize_config_dir

    from llm_at_home.tasks import resolve

    words = ["mode=serve", "logger=none", "gpu=cpu", *words]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = resolve.resolve("infer", compose("infer", words), words)
    with pytest.raises(Refusal, match=said):
        resolve.check("infer", config)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["adapters={default: poet}"], "adapters: default is taken"),  # PEFT would load it into the first one
        (["adapters={poet: poet}"], "adapters: poet is taken"),
        (["adapters={smollm2_135m: poet}"], "adapters: smollm2_135m is taken"),
        (["adapters={v1.5: poet}"], "adapters: v1.5 cannot be an adapter's name"),
        (["adapters={1: poet}"], "adapters: 1 cannot be an adapter's name"),
        (["adapter_path=smollm2_135m"], "adapter_path=smollm2_135m has the name of no adapter"),
        (["adapter_path=."], r"adapter_path=\. has the name of no adapter"),
    ],
)
def test_adapters_that_could_not_be_told_apart_are_refused(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hydra import compose, initialize_config_dir

    from llm_at_home.tasks import resolve

    monkeypatch.chdir(tmp_path)
    for name in ("poet", "smollm2_135m", "."):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    words = ["mode=serve", "logger=none", "gpu=cpu", "adapter_path=poet", *words]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = resolve.resolve("infer", compose("infer", words), words)
    with pytest.raises(Refusal, match=said):
        resolve.check("infer", config)


def test_a_file_of_one_s_own_is_not_held_to_the_context_of_another_model(tmp_path: Path) -> None:
    from hydra import compose, initialize_config_dir

    from llm_at_home.evaluation.judge.local import find_gguf
    from llm_at_home.tasks import resolve

    words = ["mode=serve", "logger=none", "gpu=cpu", "quant=gguf", f"quant.path={find_gguf()}", "serve.context=20000"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        words.append(f"serve.port={free.getsockname()[1]}")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        resolve.check("infer", resolve.resolve("infer", compose("infer", words), words))


def test_a_port_that_is_taken_is_refused_before_anything_loads(command: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = command("infer.py", "mode=serve", f"serve.port={port}")
    assert done.returncode == 2
    assert done.stderr.startswith(f"refused: serve.port={port} cannot be had")


def test_a_record_holds_no_key() -> None:
    from hydra import compose, initialize_config_dir

    from llm_at_home.tasks import resolve

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = resolve.resolve("infer", compose("infer", ["serve.api_key=secret"]), ["serve.api_key=secret"])
    assert "secret" not in str(config)
