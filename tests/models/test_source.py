from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llm_at_home.errors import Refusal
from llm_at_home.models import source
from llm_at_home.models.source import check, hub_commit, identity

ARCHITECTURE = {"model_type": "llama", "hidden_size": 64}


def group(where: Path | str, **changes: Any) -> dict[str, Any]:
    return {
        "name": "x",
        "source": str(where),
        "revision": None,
        "weights": "pretrained",
        "trust_remote_code": False,
        "use_safetensors": True,
        "chat_template": None,
        "architecture": None,
        **changes,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text('{"model_type": "llama"}')
    (made / "model.safetensors").write_bytes(b"\0" * 100)
    return made


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, offline."""
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf" / "hub"


def refusal(model: dict[str, Any]) -> str:
    with pytest.raises(Refusal) as caught:
        check(model)
    text = str(caught.value)
    assert "\n" not in text
    return text


def in_hub_cache(hub: Path, name: str, commit: str, branch: str = "main") -> None:
    cache = hub / f"models--{name.replace('/', '--')}"
    (cache / "refs").mkdir(parents=True, exist_ok=True)
    (cache / "refs" / branch).write_text(commit)
    (cache / "snapshots" / commit).mkdir(parents=True, exist_ok=True)


# -- check


def test_a_good_folder_passes(folder: Path) -> None:
    check(group(folder))
    check(group(folder, weights="random"))


def test_the_embedded_model_passes() -> None:
    check(group("embedded"))
    check(group("embedded", weights="random"))


@pytest.mark.parametrize("where", ["{}/missing", "./no/such/folder", "../no/such/folder", "~/no/such/folder"])
def test_a_missing_folder_is_refused(tmp_path: Path, where: str) -> None:
    assert "is not a folder: give one in transformers' format" in refusal(group(where.format(tmp_path)))


def test_a_folder_without_a_configuration_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "holds no config.json" in refusal(group(folder))
    assert "holds no config.json" in refusal(group(folder, weights="random"))


def test_pickled_weights_are_refused_unless_they_are_trusted(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "holds no weights" in refusal(group(folder))
    check(group(folder, weights="random"))
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert "pickled weights only" in refusal(group(folder))
    assert "model.use_safetensors=false" in refusal(group(folder))
    check(group(folder, use_safetensors=False))


def test_unknown_weights_are_refused_with_the_choices(folder: Path) -> None:
    assert "choose pretrained or random" in refusal(group(folder, weights="none"))


def test_a_hub_model_that_is_not_here_is_refused_offline(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = refusal(group("someone/thing"))
    assert "someone/thing is not in the local hub cache and HF_HUB_OFFLINE is set" in text
    assert "model.source=FOLDER" in text
    check(group("someone/thing", weights="random", architecture=ARCHITECTURE))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    check(group("someone/thing"))


def test_a_hub_model_in_the_cache_passes_offline(hub: Path) -> None:
    in_hub_cache(hub, "someone/thing", "c0ffee")
    check(group("someone/thing"))
    check(group("someone/thing", revision="c0ffee"))
    assert "local hub cache" in refusal(group("someone/thing", revision="other"))


def test_the_hub_cache_is_found_where_the_hubs_own_client_keeps_it(tmp_path: Path, monkeypatch) -> None:
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for variables in (
        {"HF_HUB_CACHE": str(tmp_path / "a")},
        {"HF_HOME": str(tmp_path / "b")},
        {"XDG_CACHE_HOME": str(tmp_path / "c")},
        {"HOME": str(tmp_path / "d")},
    ):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            script = "from huggingface_hub.constants import HF_HUB_CACHE\nprint(HF_HUB_CACHE)"
            theirs = subprocess.run(
                [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=dict(os.environ)
            ).stdout.strip()
            in_hub_cache(Path(theirs), "someone/thing", "c0ffee")
            assert hub_commit("someone/thing", None) == "c0ffee", variables


# -- identity


def test_a_folders_identity_follows_its_weights_and_configuration(folder: Path) -> None:
    first = identity(group(folder))
    assert identity(group(folder)) == first
    seen = {json.dumps(first)}

    def change(action) -> None:
        action()
        now = json.dumps(identity(group(folder)))
        assert now not in seen
        seen.add(now)

    weights = folder / "model.safetensors"
    change(lambda: weights.write_bytes(b"\0" * 101))
    # The same size, as a second fine-tuning of the same model would have it.
    stat = weights.stat()
    change(lambda: (weights.write_bytes(b"\1" * 101), os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))))
    change(lambda: (folder / "config.json").write_text('{"model_type": "llamb"}'))
    change(lambda: (folder / "model-2.safetensors").write_bytes(b"\0"))
    change(lambda: (folder / "chat_template.jinja").write_text("{{ messages }}"))


def test_a_folders_identity_ignores_what_is_not_the_model(folder: Path) -> None:
    first = identity(group(folder))
    (folder / "README.md").write_text("changed")
    (folder / "sub").mkdir()
    os.utime(folder / "config.json", (0, 0))
    assert identity(group(folder)) == first
    assert "folder" in first


def test_the_embedded_models_identity_is_its_files_hash_and_is_remembered(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("LLM_AT_HOME_CACHE", str(tmp_path / "cache"))
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"one")
    monkeypatch.setattr(source, "gguf_path", lambda: gguf)
    reads = []
    from llm_at_home.records import hashing

    real = hashing.file_hash
    monkeypatch.setattr(hashing, "file_hash", lambda path: (reads.append(path), real(path))[1])
    first = identity(group("embedded"))
    assert first["sha256"] == "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"
    assert first["weights"] == "dequantised from Q4_1, permuted"
    assert identity(group("embedded")) == first
    assert len(reads) == 1, "a large file is read once"
    gguf.write_bytes(b"other")
    assert identity(group("embedded"))["sha256"] != first["sha256"]
    monkeypatch.setattr(source, "CONVERSION", source.CONVERSION + 1)
    assert identity(group("embedded"))["conversion"] != first["conversion"]


def test_random_weights_are_named_as_such_and_by_their_architecture(folder: Path) -> None:
    given = identity(group("someone/thing", weights="random", architecture=ARCHITECTURE))
    assert given == {"weights": "random", "architecture": ARCHITECTURE}
    other = identity(group("someone/thing", weights="random", architecture=ARCHITECTURE | {"hidden_size": 65}))
    assert other != given
    first = identity(group(folder, weights="random"))
    (folder / "config.json").write_text('{"model_type": "llamb"}')
    assert identity(group(folder, weights="random")) != first
    assert identity(group(folder)) != identity(group(folder, weights="random"))


def test_a_hub_models_identity_is_its_commit(hub: Path) -> None:
    in_hub_cache(hub, "someone/thing", "c0ffee")
    in_hub_cache(hub, "someone/thing", "decaf", branch="other")
    assert identity(group("someone/thing")) == {"hub": "someone/thing", "commit": "c0ffee"}
    assert identity(group("someone/thing", revision="other"))["commit"] == "decaf"
    assert identity(group("someone/thing", revision="c0ffee"))["commit"] == "c0ffee"
    shutil.rmtree(hub)
    assert identity(group("someone/thing"))["commit"] == "not downloaded yet"


def test_nothing_heavy_is_imported() -> None:
    script = (
        "import sys\nfrom llm_at_home.models import source\n"
        f"source.check({group('embedded')!r}); source.identity({group('embedded')!r})\n"
        "assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
