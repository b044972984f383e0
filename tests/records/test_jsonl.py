import json
import multiprocessing
import os
import threading
from pathlib import Path

import pytest

from llm_at_home.errors import Refusal
from llm_at_home.records.jsonl import JsonlLog, read_jsonl

ROWS = [{"id": number, "text": f"größe {number}\u2028\nnext \ud800"} for number in range(4)]


def by_id(row):
    return row["id"]


def write(path: Path, rows=ROWS) -> None:
    with JsonlLog(path, by_id) as log:
        for row in rows:
            log.append(row)


def test_rows_come_back_in_order_and_one_a_line(tmp_path: Path) -> None:
    path = tmp_path / "new" / "log.jsonl"
    write(path)
    with JsonlLog(path, by_id) as log:
        assert log.rows() == ROWS
        assert log.keys() == {0, 1, 2, 3}
    assert [json.loads(line) for line in path.read_text().splitlines()] == ROWS
    assert list(read_jsonl(path)) == ROWS


def test_a_cut_at_any_byte_costs_one_row_at_most(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write(path)
    whole = path.read_bytes()
    ends = [0, *(i + 1 for i, byte in enumerate(whole) if byte == 10)]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        # A row whose line end alone is lost is whole.
        kept = sum(end - 1 <= cut for end in ends[1:])
        assert list(read_jsonl(path)) == ROWS[:kept]
        with JsonlLog(path, by_id) as log:
            assert log.keys() == set(range(kept))
            log.append({"id": "after"})
            assert log.rows() == [*ROWS[:kept], {"id": "after"}]
        assert path.read_bytes().startswith(whole[: ends[kept]])


def test_rows_that_are_not_wanted_are_set_aside_and_lose_nothing(tmp_path: Path) -> None:
    path, aside = tmp_path / "log.jsonl", tmp_path / "aside.jsonl"
    write(path)
    with JsonlLog(path, by_id) as log:
        log.keep({0, 1, 2, 3, 4}, aside)
        assert not aside.exists()
        log.keep({1, 3}, aside)
        assert [row["id"] for row in log.rows()] == [1, 3]
        assert [row["id"] for row in read_jsonl(aside)] == [0, 2]
        with pytest.raises(Refusal, match="another run"):
            JsonlLog(path, by_id)
        log.append({"id": "after"})
    with JsonlLog(path, by_id) as log:
        log.keep({0, 1}, aside)
        assert log.rows() == [ROWS[1], ROWS[0]]
        assert log.keys() == {0, 1}
    assert {row["id"] for row in read_jsonl(aside)} == {0, 2, 3, "after"}


def test_a_last_line_that_never_reached_the_disk_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write(path)
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0" * 30 + b"\n")
    with JsonlLog(path, by_id) as log:
        assert log.rows() == ROWS
    assert path.read_bytes() == whole


def test_a_broken_line_in_the_middle_is_named_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"id": 1}\n{"id": \n{"id": 3}\n')
    before = path.read_bytes()
    with pytest.raises(Refusal, match="line 2"):
        JsonlLog(path, by_id)
    with pytest.raises(Refusal, match="line 2"):
        list(read_jsonl(path))
    assert path.read_bytes() == before
    path.write_text('{"id": 1}\n{"other": 2}\n')
    with pytest.raises(Refusal, match="line 2"):
        JsonlLog(path, by_id)


def test_a_key_is_written_once(tmp_path: Path) -> None:
    with JsonlLog(tmp_path / "log.jsonl", by_id) as log:
        log.append({"id": 1})
        with pytest.raises(ValueError, match="already"):
            log.append({"id": 1, "text": "again"})
        with pytest.raises(ValueError, match="JSON"):
            log.append({"id": 2, "x": float("nan")})
        assert log.rows() == [{"id": 1}]


def _try_to_open(path: Path, answer) -> None:
    try:
        JsonlLog(path, by_id)
        answer.put("opened")
    except Refusal as error:
        answer.put(str(error))


def test_a_second_writer_is_refused_until_the_first_is_done(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    context = multiprocessing.get_context("fork")
    answer = context.SimpleQueue()
    with JsonlLog(path, by_id):
        with pytest.raises(Refusal, match="another run"):
            JsonlLog(path, by_id)
        # Spawned afresh, as another run would be: a fork would inherit the lock.
        pid = os.posix_spawn(
            os.sys.executable,
            [
                os.sys.executable,
                "-c",
                "import sys\nfrom llm_at_home.records.jsonl import JsonlLog\nJsonlLog(sys.argv[1], id)",
                str(path),
            ],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_OPEN, 2, str(tmp_path / "err"), os.O_WRONLY | os.O_CREAT, 0o600)],
        )
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
        assert "another run" in (tmp_path / "err").read_text()
    child = context.Process(target=_try_to_open, args=(path, answer))
    child.start()
    assert answer.get() == "opened"
    child.join()


def test_threads_may_append_together(tmp_path: Path) -> None:
    with JsonlLog(tmp_path / "log.jsonl", by_id) as log:
        threads = [
            threading.Thread(target=lambda start=start: [log.append({"id": start + i}) for i in range(20)])
            for start in (0, 100, 200)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {row["id"] for row in log.rows()} == {s + i for s in (0, 100, 200) for i in range(20)}


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "log.jsonl"
    real = os.write

    def half_then_full(fd, data):
        if len(data) < 20:
            raise OSError(28, "No space left on device")
        return real(fd, data[:20])

    with JsonlLog(path, by_id) as log:
        log.append({"id": 1})
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", half_then_full)
            with pytest.raises(OSError, match="No space"):
                log.append({"id": 2, "text": "x" * 10})
        log.append({"id": 2})
        assert log.rows() == [{"id": 1}, {"id": 2}]
