"""Append-only JSON lines: answers and judgments that survive an interruption at any byte."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Callable, Hashable, Iterator, Set
from pathlib import Path
from types import TracebackType
from typing import Any

from llm_at_home.errors import Refusal

Row = dict[str, Any]


class JsonlLog:
    """One JSON object a line, each with a key of its own, written once and never changed.

    Opening mends what an interrupted writer left: an unfinished last line is cut off, so a crash costs the
    item that was being written and no other. The file is locked while it is open. Rows are written in ASCII
    (escapes for the rest), because readers that split at Unicode line ends, FastChat's among them, would
    otherwise break a row that holds U+2028.

    Args:
        path: the file; it and its folder are made when missing.
        key: what makes a row unique, such as ``lambda row: (row["question_id"], row["turn"])``.

    Raises:
        Refusal: when another writer holds the file, or a line before the last is no JSON object with a key.
    """

    def __init__(self, path: Path | str, key: Callable[[Row], Hashable]) -> None:
        self.path = Path(path)
        self._key = key
        self._guard = threading.Lock()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            self._lock()
            self._mend()
            self._keys = {self._key_of(row, number) for number, row in _numbered(self.path)}
        except BaseException:
            os.close(self._fd)
            raise

    def keys(self) -> frozenset[Hashable]:
        """The keys of all rows that are safely on disk."""
        with self._guard:
            return frozenset(self._keys)

    def append(self, row: Row) -> None:
        """Write one row and wait until the disk has it; safe to call from several threads.

        Raises:
            ValueError: for a key that is already there, or a row that JSON cannot hold (NaN among them).
            OSError: when the disk refuses; the file is then as it was before.
        """
        line = json.dumps(row, allow_nan=False).encode("ascii") + b"\n"
        with self._guard:
            key = self._key(row)
            if key in self._keys:
                raise ValueError(f"{self.path} already holds a row for {key}")
            before = os.fstat(self._fd).st_size
            try:
                _write_all(self._fd, line)
                os.fsync(self._fd)
            except BaseException:
                # A half-written row must not be glued to the next one.
                os.ftruncate(self._fd, before)
                raise
            self._keys.add(key)

    def rows(self) -> list[Row]:
        """All rows in the order in which they were written."""
        with self._guard:
            return list(read_jsonl(self.path))

    def keep(self, wanted: Set[Hashable], aside: Path) -> None:
        """Leave only the rows with the wanted keys; the others go to the file ``aside``, and back when wanted again.

        Raises:
            OSError: when the disk refuses; no row is lost then.
        """
        rows = {self._key(row): row for row in self.rows()}
        others = [row for key, row in rows.items() if key not in wanted]
        if not others and not aside.is_file():
            return
        with JsonlLog(aside, self._key) as kept:
            there = kept.keys()
            for row in others:
                if self._key(row) not in there:
                    kept.append(row)
            back = [row for row in kept.rows() if self._key(row) in wanted and self._key(row) not in rows]
        if others:
            self._rewrite([row for key, row in rows.items() if key in wanted])
        for row in back:
            self.append(row)

    def close(self) -> None:
        """Let go of the file and its lock; closing twice is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> JsonlLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _rewrite(self, rows: list[Row]) -> None:
        part = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            # Locked before it has the name, so that no other writer gets between.
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _write_all(fd, b"".join(json.dumps(row).encode("ascii") + b"\n" for row in rows))
            os.fsync(fd)
            with self._guard:
                os.replace(part, self.path)
                os.close(self._fd)
                self._fd = fd
                self._keys = {self._key(row) for row in rows}
        except BaseException:
            if fd != self._fd:
                os.close(fd)
                part.unlink(missing_ok=True)
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refusal(f"{self.path} is being written by another run: wait for it, or stop it") from None

    def _mend(self) -> None:
        data = self.path.read_bytes()
        end = data.rfind(b"\n") + 1
        tail = data[end:]
        if tail and _parse(tail) is not None:
            # The row is whole and only its line end is missing: no prefix of an object is an object.
            _write_all(self._fd, b"\n")
        elif tail:
            os.ftruncate(self._fd, end)
        else:
            # A power cut can leave a last line of the right length whose bytes never reached the disk.
            start = data.rfind(b"\n", 0, end - 1) + 1 if end else 0
            if data[start:end].strip() and _parse(data[start:end]) is None:
                os.ftruncate(self._fd, start)

    def _key_of(self, row: Row, number: int) -> Hashable:
        try:
            return self._key(row)
        except (KeyError, TypeError, IndexError) as error:
            raise Refusal(f"line {number} of {self.path} is not a row of this kind: {error!r}") from None


def read_jsonl(path: Path | str) -> Iterator[Row]:
    """Read rows without a lock, also while another process appends; an unfinished last line is left out.

    Raises:
        Refusal: when a line other than the last is no JSON object; the message names it.
    """
    for _, row in _numbered(Path(path)):
        yield row


def _numbered(path: Path) -> Iterator[tuple[int, Row]]:
    lines = path.read_bytes().split(b"\n")
    last = max((number for number, line in enumerate(lines, 1) if line.strip()), default=0)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = _parse(line)
        if row is not None:
            yield number, row
        elif number != last:
            raise Refusal(f"line {number} of {path} is no JSON object: mend it or delete the line")


def _parse(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
