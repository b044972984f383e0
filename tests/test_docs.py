"""What the documentation says is there: links and anchors resolve, commands compose, make targets and modules exist."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SCRIPTS = ("train", "infer", "evaluate")
# Which configuration a make target's ARGS override.
COMPOSED_BY = {"plan": "plan", "quantize": "quantize", "prune": "prune", "merge": "merge"}
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code_lines(text: str) -> list[str]:
    """The lines of indented and fenced blocks and the inline code of a page; a trailing backslash joins lines."""
    joined = re.sub(r"\s*\\\n\s*", " ", text)
    fenced = [line for block in FENCE.findall(joined) for line in block.splitlines()[1:-1]]
    rest = FENCE.sub("", joined)
    indented = [line for line in rest.splitlines() if line.startswith("    ")]
    prose = "\n".join(line for line in rest.splitlines() if not line.startswith("    "))
    return [line.strip() for line in [*fenced, *indented, *re.findall(r"`([^`]+)`", prose)]]


def notebook_lines(path: Path) -> list[str]:
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    return [line.strip() for cell in cells for line in re.sub(r"\s*\\\n\s*", " ", "".join(cell["source"])).splitlines()]


@cache
def commands(path: Path) -> list[str]:
    """The commands of a page or notebook, without prompt, comment and what they are piped into."""
    lines = notebook_lines(path) if path.suffix == ".ipynb" else code_lines(path.read_text())
    found = []
    for line in lines:
        begun = re.search(r"(?:^|\s|/|!)(?:(?:python3?|\{sys\.executable\}) (?=\S+\.py|-m )|make(?= [a-z]|$)).*", line)
        if begun and "[group=choice]" not in line and not re.match(r"(refused|setup):", line):
            command = re.sub(r"\s+#\s.*|\s[|&<>].*", "", begun[0].strip(" /!"))
            # What a notebook's variables fill in is known when it runs: tests/test_notebooks.py.
            found.append(re.sub(r"\s\S*\{[^}]*\}\S*", "", command) if path.suffix == ".ipynb" else command)
    return found


def all_commands() -> list[tuple[Path, str]]:
    found = [(path, command) for path in [*PAGES, *NOTEBOOKS] for command in dict.fromkeys(commands(path))]
    # The methods that docs/add_a_method.md adds are tested in tests/tasks/test_add_a_method.py.
    return [(path, command) for path, command in found if not re.search(r"=(nadam|halved)\b", command)]


def composes(config: str, words: list[str]) -> None:
    """Compose as Hydra would, with the first value of each that is swept over."""
    words = [word for word in words if not word.startswith("-") and word not in ("job", "...")]
    singles = []
    for word, override in zip(words, OverridesParser.create().parse_overrides(words), strict=True):
        if override.is_sweep_override():
            swept = override.value()
            first = next(override.sweep_string_iterator()) if override.is_choice_sweep() else swept.start
            word = f"{override.get_key_element()}={first}"
        singles.append(word)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        compose(config, singles)


def fault(command: str) -> str | None:
    """Why a command of the documentation cannot be given, or None."""
    words = shlex.split(command)
    program, words = words[0], words[1:]
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        targets = [word for word in words if "=" not in word and not word.startswith("-")]
        missing = [target for target in targets if not re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE)]
        if missing:
            return f"no target {', '.join(missing)}"
        arguments = next((word.removeprefix("ARGS=") for word in words if word.startswith("ARGS=")), None)
        if arguments and targets[0] in COMPOSED_BY:
            composes(COMPOSED_BY[targets[0]], shlex.split(arguments))
        return None
    if words[0] == "-m":
        module = words[1]
        if module.startswith("llm_at_home") and importlib.util.find_spec(module) is None:
            return f"no module {module}"
        return None
    script = Path(words[0])
    if script.stem in SCRIPTS and str(script) == script.name:
        composes(script.stem, words[1:])
        return None
    return None if (ROOT / script).is_file() else f"no file {script}"


@pytest.mark.parametrize(("path", "command"), all_commands(), ids=lambda value: str(value)[-60:])
def test_a_command_can_be_given(path, command):
    try:
        why = fault(command)
    except HydraException as error:
        why = str(error)
    assert why is None, f"{name_of(path)}: {command}: {why}"


def test_faults_are_found():
    assert fault("make nothing-such") == "no target nothing-such"
    assert fault("python -m llm_at_home.nothing") == "no module llm_at_home.nothing"
    assert fault("python benchmarks/nothing.py --out X") == "no file benchmarks/nothing.py"
    for command in ("python train.py adapter=nothing", "python infer.py engine.nothing=1", 'make plan ARGS="gpu=none"'):
        with pytest.raises(HydraException):
            fault(command)


def test_commands_are_found():
    text = "    python train.py -m \\\n      seed=1,2  # two\n\n`make plan`, and\n\n"
    text += "```sh\n!python infer.py x=1 | head\n```\n"
    assert code_lines(text) == ["!python infer.py x=1 | head", "python train.py -m seed=1,2  # two", "make plan"]
    assert len(commands(ROOT / "README.md")) > 20


def anchors(path: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6} (.+)$", FENCE.sub("", path.read_text()), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)|`", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
        if found[slug]:
            found[f"{slug}-{found[slug]}"] = 0
    return set(found)


def broken_links(path: Path) -> list[str]:
    """The relative links of a page that lead nowhere."""
    broken = []
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", path.read_text()))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_relative_link_leads_somewhere(path):
    assert broken_links(path) == []


def test_broken_links_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `b`, c\n\n[x](page.md#a-b-c) [y](other.md) [z](#nothing) ![w](https://example.org)\n")
    assert broken_links(page) == ["other.md", "#nothing"]
