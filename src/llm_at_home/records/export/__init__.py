"""Records in other projects' formats; what was not measured is null there, and named."""

from __future__ import annotations

from typing import Any

from llm_at_home.errors import Refusal
from llm_at_home.records.schema import Record

FORMATS = ("optimum-benchmark", "peft")


def export(record: Record, kind: str, evaluation: Record | None = None) -> tuple[dict[str, Any], list[str]]:
    """A record as another project's JSON, and a line for each thing that it has no figure for.

    Args:
        record: of a finished run.
        kind: one of :data:`FORMATS`.
        evaluation: for ``peft``, the record of ``task=text`` on what the run trained: its exact match is the accuracy.

    Raises:
        Refusal: for a run that the format has no place for.
    """
    if record.status != "ok":
        raise Refusal(f"the run ended with {record.status}, and other formats hold finished runs: give another")
    if kind == "optimum-benchmark":
        from llm_at_home.records.export import optimum_benchmark

        if evaluation is not None:
            raise Refusal("optimum-benchmark's report has no place for an evaluation: leave out --evaluation")
        return optimum_benchmark.report(record)
    from llm_at_home.records.export import peft_comparison

    return peft_comparison.result(record, evaluation)
