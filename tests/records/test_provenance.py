from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from llm_at_home.records import provenance


def git(folder: Path, *words: str) -> str:
    settings = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *settings, *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "code.py").write_text("x = 1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path


def test_a_clean_checkout(repository: Path) -> None:
    head = git(repository, "rev-parse", "HEAD")
    assert provenance.git_state(repository / "package") == {"commit": head, "dirty": False}


@pytest.mark.parametrize("change", ["edited", "new file", "deleted"])
def test_any_change_makes_it_dirty(repository: Path, change: str) -> None:
    if change == "edited":
        (repository / "package" / "code.py").write_text("x = 2\n")
    elif change == "new file":
        (repository / "other.py").write_text("")
    else:
        (repository / "package" / "code.py").unlink()
    assert provenance.git_state(repository / "package")["dirty"] is True


def test_outside_a_checkout_and_without_a_commit_it_is_unknown(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.git_state(tmp_path) is None
    git(tmp_path, "init", "-q")
    assert provenance.git_state(tmp_path) is None


def test_without_git_it_is_unknown(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert provenance.git_state(repository) is None


def test_what_is_collected_is_plain_json_and_takes_the_callers_part() -> None:
    data = json.loads(json.dumps(provenance.collect({"model": {"sha256": "x"}})))
    assert {"started_at", "git", "packages", "python", "platform", "cpu", "gpu"} < set(data)
    assert data["model"] == {"sha256": "x"}
    assert data["started_at"].endswith("+00:00")
    assert data["packages"]["torch"].startswith("2.")
    assert data["cpu"]["cores"] >= 1
    assert data["cpu"]["model"]
