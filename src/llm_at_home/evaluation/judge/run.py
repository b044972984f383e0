"""Gets a list of judgments, several at a time, each on disk as soon as it is there."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from llm_at_home.evaluation.judge.asking import Judge
from llm_at_home.evaluation.judge.client import JudgeUnreachable
from llm_at_home.evaluation.judge.items import Item, Row
from llm_at_home.records.jsonl import JsonlLog

#: A server that fails this many judgments in a row, each after all its retries, is taken to be down.
FAILURES_IN_A_ROW = 3


def run_items(items: Sequence[Item], log: JsonlLog, judge: Judge, concurrency: int) -> list[Row]:
    """Judge all items; a judgment that could not be had for want of a server is returned and not written.

    An unwritten one is asked for again when the run is repeated; a written one, missing or not, is final.
    On any error, and on Ctrl-C, requests under way are still answered and kept: they may have been paid for.

    Raises:
        JudgeDenied: when the server serves nobody.
        JudgeUnreachable: when it seems to be down.
        JudgeOverBudget: when the next request could cost too much.
    """
    lost: list[Row] = []
    failed_in_a_row = 0
    with (
        ThreadPoolExecutor(max_workers=concurrency, thread_name_prefix="judge") as pool,
        _ProgressBar(items) as advance,
    ):
        futures = {pool.submit(_get, item, log, judge): item for item in items}
        try:
            for future in as_completed(futures):
                try:
                    future.result()
                    failed_in_a_row = 0
                except JudgeUnreachable as error:
                    failed_in_a_row += 1
                    if failed_in_a_row == FAILURES_IN_A_ROW:
                        raise JudgeUnreachable(
                            f"{error}; what was judged is in {log.path}, and the same command goes on"
                        ) from None
                    lost.append(futures[future].lost(str(error)))
                advance()
        except BaseException:
            judge.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return lost


def _get(item: Item, log: JsonlLog, judge: Judge) -> None:
    log.append(item.judge(judge))


class _ProgressBar:
    """A progress bar on a terminal, nothing elsewhere; entering gives the function that moves it on."""

    def __init__(self, items: Sequence[Any]) -> None:
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

        console = Console(stderr=True)
        self._progress = Progress(
            *Progress.get_default_columns()[:2],
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._total = len(items)

    def __enter__(self) -> Any:
        self._progress.start()
        task = self._progress.add_task("judging", total=self._total)
        return lambda: self._progress.advance(task)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
