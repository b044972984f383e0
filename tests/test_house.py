"""The house keeps its plan: floors, no circles, and a README whose commands and tables are true."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from llm_at_home.reporting import readme

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "llm_at_home"
# A room imports from rooms of a lower number, or from itself; records describe the hardware that they were made on.
FLOORS = {
    "errors": 0,
    "paths": 0,
    "hardware": 1,
    "records": 2,
    "metering": 3,
    "data": 3,
    "models": 4,
    "quantization": 5,
    "pruning": 6,
    "adapters": 7,
    "training": 8,
    "generation": 8,
    "planning": 8,
    "evaluation": 9,
    "human": 9,
    "reporting": 10,
    "tasks": 11,
}


def imports(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("llm_at_home.") and name.count(".") >= 1}
    return rooms & set(FLOORS)


@pytest.mark.parametrize("room", sorted(p.name for p in PACKAGE.iterdir() if (p / "__init__.py").is_file()))
def test_a_room_imports_from_lower_floors_only(room):
    for path in (PACKAGE / room).rglob("*.py"):
        upward = {other for other in imports(path) - {room} if FLOORS[other] >= FLOORS[room]}
        assert not upward, f"{path.relative_to(PACKAGE)} imports {', '.join(sorted(upward))}"


def test_entry_points_are_thin():
    for name in ("train.py", "infer.py", "evaluate.py"):
        assert len((ROOT / name).read_text().splitlines()) < 40


@pytest.mark.parametrize("page", ["README.md", "docs/quantization.md", "docs/claims.md"])
def test_a_page_s_tables_are_those_of_the_committed_records(page):
    text = (ROOT / page).read_text()
    assert "<!-- table:" in text or "<!-- claims:" in text
    assert readme.render(text, ROOT, page) == text, "run `make readme`"


def test_make_alone_lists_every_target():
    text = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"\.PHONY: (.*)", text)[1].split())
    described = set(re.findall(r"^([a-z-]+):.*## ", text, re.MULTILINE))
    assert targets == described
