import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from llm_at_home.errors import Refusal
from llm_at_home.evaluation.judge import check

CONF = Path(__file__).resolve().parents[3] / "conf" / "judge"
SHIPPED = sorted(path.stem for path in CONF.glob("*.yaml"))


def shipped(name: str, templates: Path) -> dict:
    return yaml.safe_load((CONF / f"{name}.yaml").read_text()) | {"templates": str(templates)}


def test_the_shipped_judges_are_these_and_have_the_same_keys() -> None:
    assert SHIPPED == ["gpt4", "local", "server"]
    keys = [set(yaml.safe_load((CONF / f"{name}.yaml").read_text())) for name in SHIPPED]
    assert keys[0] == keys[2] == keys[1] - {"gguf", "context", "threads"}


def test_gpt4_needs_a_key_and_names_a_snapshot(templates_file, monkeypatch) -> None:
    config = shipped("gpt4", templates_file)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(Refusal, match="OPENAI_API_KEY"):
        check(config)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-1234567")
    check(config)
    assert config["model"] == "gpt-4-0613"
    monkeypatch.setenv("OPENAI_API_KEY", "sk-with\u2019quote")
    with pytest.raises(Refusal, match="OPENAI_API_KEY") as caught:
        check(config)
    assert "sk-with" not in str(caught.value)


def test_local_needs_nothing_but_its_file(templates_file, tmp_path) -> None:
    config = shipped("local", templates_file)
    check(config)
    with pytest.raises(Refusal, match=r"judge\.gguf"):
        check(config | {"gguf": str(tmp_path / "none.gguf")})


def test_server_needs_an_address_and_a_model(templates_file) -> None:
    config = shipped("server", templates_file)
    with pytest.raises(Refusal, match=r"judge\.model"):
        check(config)
    with pytest.raises(Refusal, match=r"judge\.base_url"):
        check(config | {"model": "m"})
    check(config | {"model": "m", "base_url": "http://127.0.0.1:1/v1"})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mode": "triple"}, "single, pairwise, both"),
        ({"mode": "pairwise"}, "baseline=RUN_FOLDER"),
        ({"mode": "both"}, "baseline=RUN_FOLDER"),
        ({"concurrency": 0}, "concurrency"),
        ({"max_retries": -1}, "max_retries"),
        ({"templates": "/nowhere.jsonl"}, "make setup"),
        ({"base_url": "ftp://x"}, "base_url"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(config, change, says) -> None:
    with pytest.raises(Refusal, match=says) as caught:
        check(config | change)
    assert "\n" not in str(caught.value)


def test_a_baseline_allows_pairs(config) -> None:
    check(config | {"mode": "both"}, has_baseline=True)


@pytest.mark.parametrize(
    "change",
    [
        {"api_key_env": "sk-proj-abcdef"},
        {"base_url": "https://me:sk-proj-abcdef@host/v1"},
        {"base_url": "https://host/v1?key=sk-proj-abcdef"},
    ],
)
def test_a_key_in_the_config_is_refused_and_not_repeated(config, change) -> None:
    with pytest.raises(Refusal, match="key") as caught:
        check(config | change)
    assert "sk-proj" not in str(caught.value)


def test_checking_a_judge_loads_nothing_heavy(templates_file) -> None:
    code = (
        "import sys, yaml\n"
        "from llm_at_home.evaluation.judge import check\n"
        "check(yaml.safe_load(open(sys.argv[1])) | {'templates': sys.argv[2]})\n"
        "print([name for name in ('openai', 'numpy', 'xllamacpp', 'torch', 'rich') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(CONF / "local.yaml"), str(templates_file)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
