"""A study on disk: what is graded, in which order each rater sees it, and every grade, in one sqlite file."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llm_at_home.data.questions import Question
from llm_at_home.errors import Refusal
from llm_at_home.human import links
from llm_at_home.human.runs import Material, Model

DATABASE = "study.sqlite"
SCHEMA = Path(__file__).with_name("schema.sql")
SCHEMA_VERSION = 1
GRADES = range(1, 6)
#: How long a grade waits for another process that writes into the same file.
BUSY_TIMEOUT_S = 2.0


@dataclass(frozen=True)
class Item:
    """One answer in a rater's own order; numbers count from 1. ``grade`` is None until there is one."""

    position: int
    question_number: int
    answer_number: int
    grade: int | None
    comment: str


@dataclass(frozen=True)
class Page:
    """An item with what there is to read: ``turns`` holds a question and the answer to it, turn by turn."""

    item: Item
    turns: list[tuple[str, str]]
    questions: int
    answers: int
    items: int
    graded: int


@dataclass(frozen=True)
class GradeRow:
    """A rater's last word on one answer; ``grade`` is None and ``graded_at`` "" where there is none."""

    rater: int
    position: int
    question_id: int
    model: str
    grade: int | None
    comment: str
    graded_at: str


class Study:
    """An open study. Its methods may be called from several threads.

    Args:
        folder: which holds ``study.sqlite``.

    Raises:
        Refusal: when there is no study there, or it cannot be read.
    """

    def __init__(self, folder: Path | str) -> None:
        self.path = Path(folder) / DATABASE
        if not self.path.is_file():
            raise Refusal(f"{folder} holds no study: `make rate RUNS=...` begins one")
        self._guard = threading.Lock()
        self._connection = _connect(self.path)
        try:
            facts = dict(self._connection.execute("SELECT key, value FROM study"))
            if int(facts["schema_version"]) > SCHEMA_VERSION:
                raise Refusal(f"{self.path} was made by a newer version of this package")
        except (sqlite3.Error, KeyError, ValueError) as error:
            self._connection.close()
            raise Refusal(f"{self.path} cannot be read as a study: {error}") from None
        self.secret = facts["secret"]
        self.fingerprint = facts["fingerprint"]
        self.seed = int(facts["seed"])
        self.left_out = int(facts["left_out"])

    @classmethod
    def begin(cls, folder: Path | str, material: Material, raters: int, seed: int = 0) -> Study:
        """Make a study in ``folder``, with an order of its own for each rater.

        Raises:
            Refusal: when there is one already, or no rater.
        """
        if raters < 1:
            raise Refusal(f"--raters {raters}: a study has at least one")
        path = Path(folder) / DATABASE
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{DATABASE}.{os.getpid()}")
        # The file holds the secret of every link.
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        try:
            _write_study(part, material, raters, seed)
            os.link(part, path)  # a rename would replace a study that was begun meanwhile
        except FileExistsError:
            raise Refusal(f"{folder} holds a study already") from None
        finally:
            part.unlink()
        return cls(folder)

    def close(self) -> None:
        """Let go of the file."""
        with self._guard:
            self._connection.close()

    @property
    def raters(self) -> int:
        """How many raters have a link."""
        return int(self._one("SELECT max(rater) FROM item")[0])

    def add_raters(self, raters: int) -> None:
        """Give further raters an order, until there are so many."""
        with self._guard, _transaction(self._connection):
            (present,) = self._connection.execute("SELECT max(rater) FROM item").fetchone()
            for rater in range(present + 1, raters + 1):
                _write_order(self._connection, self.seed, rater)

    def items(self, rater: int) -> list[Item]:
        """All of a rater's items in the order in which they are seen."""
        return [Item(*row) for row in self._all(_ITEMS + "WHERE i.rater = ? ORDER BY i.position", rater)]

    def page(self, rater: int, position: int) -> Page | None:
        """What a rater reads at a position, or None where there is no such position."""
        items = self.items(rater)
        if not 1 <= position <= len(items):
            return None
        item = items[position - 1]
        asked, given = self._one(
            "SELECT q.turns, a.turns FROM item JOIN answer AS a USING (answer) JOIN question AS q USING (question_id) "
            "WHERE rater = ? AND position = ?",
            rater,
            position,
        )
        alike = [one for one in items if one.question_number == item.question_number]
        # An answer may have more turns than its question, never fewer.
        turns = list(zip(json.loads(asked), json.loads(given), strict=False))
        graded = sum(one.grade is not None for one in items)
        return Page(item, turns, items[-1].question_number, len(alike), len(items), graded)

    def save(self, rater: int, position: int, grade: int | None, comment: str) -> int:
        """Keep a grade and a comment; when this returns, they are on disk. Returns how many the rater has graded.

        What is there already is not written again, so a grade may be sent twice. Without a grade, an earlier one stays.

        Raises:
            sqlite3.Error: when it could not be kept; then nothing has changed.
        """
        with self._guard, _transaction(self._connection):
            last = self._connection.execute(
                "SELECT grade, comment FROM last_grade WHERE rater = ? AND position = ?", (rater, position)
            ).fetchone()
            if grade is None and last:
                grade = last[0]
            if (grade, comment) != (last or (None, "")):
                self._connection.execute(
                    "INSERT INTO grade (rater, position, grade, comment, graded_at) VALUES (?, ?, ?, ?, ?)",
                    (rater, position, grade, comment, _now()),
                )
            row = self._connection.execute("SELECT count(grade) FROM last_grade WHERE rater = ?", (rater,)).fetchone()
        return int(row[0])

    def models(self) -> list[Model]:
        """The models in the order in which their runs were named."""
        return [Model(**json.loads(row[0])) for row in self._all("SELECT described FROM model ORDER BY model")]

    def questions(self) -> list[Question]:
        """The questions in their own order, without references."""
        rows = self._all("SELECT question_id, category, turns FROM question ORDER BY place")
        return [Question(number, category, json.loads(turns)) for number, category, turns in rows]

    def answers(self) -> dict[tuple[str, int], list[str]]:
        """The turns of each answer, by model and question."""
        rows = self._all("SELECT label, question_id, turns FROM answer JOIN model USING (model)")
        return {(label, question_id): json.loads(turns) for label, question_id, turns in rows}

    def grades(self) -> list[GradeRow]:
        """Every rater's last word on every answer, by rater and position, also where there is none."""
        rows = self._all(
            "SELECT i.rater, i.position, a.question_id, m.label, g.grade, coalesce(g.comment, ''), "
            "coalesce(g.graded_at, '') FROM item AS i JOIN answer AS a USING (answer) JOIN model AS m USING (model) "
            "LEFT JOIN last_grade AS g ON g.rater = i.rater AND g.position = i.position ORDER BY i.rater, i.position"
        )
        return [GradeRow(*row) for row in rows]

    def _all(self, sql: str, *values: Any) -> list[Any]:
        with self._guard:
            return self._connection.execute(sql, values).fetchall()

    def _one(self, sql: str, *values: Any) -> Any:
        return self._all(sql, *values)[0]


_ITEMS = (
    "SELECT i.position, i.question_number, i.answer_number, g.grade, coalesce(g.comment, '') "
    "FROM item AS i LEFT JOIN last_grade AS g ON g.rater = i.rater AND g.position = i.position "
)


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        # In WAL mode NORMAL would keep the file whole and lose the last grades with the power.
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
    except sqlite3.Error as error:
        connection.close()
        raise Refusal(f"{path} cannot be opened as a study: {error}") from None
    return connection


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _write_study(path: Path, material: Material, raters: int, seed: int) -> None:
    connection = _connect(path)
    try:
        with _transaction(connection):
            for statement in SCHEMA.read_text(encoding="utf-8").split(";\n"):
                connection.execute(statement)
            _write_material(connection, material)
            facts = {
                "schema_version": SCHEMA_VERSION,
                "secret": links.new_secret(),
                "fingerprint": material.fingerprint(),
                "seed": seed,
                "left_out": material.left_out,
                "begun_at": _now(),
            }
            connection.executemany("INSERT INTO study VALUES (?, ?)", [(k, str(v)) for k, v in facts.items()])
            for rater in range(1, raters + 1):
                _write_order(connection, seed, rater)
    finally:
        connection.close()


def _write_material(connection: sqlite3.Connection, material: Material) -> None:
    for place, question in enumerate(material.questions):
        row = (question.question_id, place, question.category, json.dumps(question.turns))
        connection.execute("INSERT INTO question VALUES (?, ?, ?, ?)", row)
    for number, model in enumerate(material.models):
        described = json.dumps(dataclasses.asdict(model), default=str)
        connection.execute("INSERT INTO model VALUES (?, ?, ?)", (number, model.label, described))
        for question_id, turns in material.answers[model.label].items():
            connection.execute(
                "INSERT INTO answer (question_id, model, turns) VALUES (?, ?, ?)",
                (question_id, number, json.dumps(turns)),
            )


def _write_order(connection: sqlite3.Connection, seed: int, rater: int) -> None:
    """Questions in an order of the rater's own, and under each its answers in another."""
    shuffle = random.Random(f"{seed}/{rater}").shuffle
    questions = [row[0] for row in connection.execute("SELECT question_id FROM question ORDER BY place")]
    shuffle(questions)
    position = 0
    for question_number, question_id in enumerate(questions, 1):
        found = connection.execute("SELECT answer FROM answer WHERE question_id = ? ORDER BY model", (question_id,))
        answers = [row[0] for row in found]
        shuffle(answers)
        for answer_number, answer in enumerate(answers, 1):
            position += 1
            row = (rater, position, answer, question_number, answer_number)
            connection.execute("INSERT INTO item VALUES (?, ?, ?, ?, ?)", row)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
