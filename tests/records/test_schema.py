import json

import pytest

from llm_at_home.records.schema import SCHEMA_VERSION, STATUSES, Reading, Record

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize("reason", [None, ""])
def test_an_unknown_reading_must_say_why(reason: str | None) -> None:
    with pytest.raises(ValueError, match="must say why"):
        Reading(None, "Wh", "rapl", reason=reason)
    assert Reading.unknown("Wh", "no counter").value is None


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
def test_what_is_not_finite_is_no_reading(value: float) -> None:
    with pytest.raises(ValueError, match="is no reading"):
        Reading(value, "s", "clock")
    with pytest.raises(ValueError, match="is no interval"):
        Reading(1.0, "s", "clock", interval95=(0.0, value))


def test_zero_is_a_value() -> None:
    assert Reading(0.0, "1", "squad").value == 0.0


def full_record() -> Record:
    return Record(
        task="infer",
        status="out_of_memory",
        config={"model": {"name": "tiny"}, "limit": None},
        config_hash="0123456789abcdef",
        provenance={"git": {"commit": "abc", "dirty": True}},
        kernel={"Linear": 3},
        readings={"decode_tokens_per_second": Reading(12.5, "tokens/s", "clock", interval95=(12.0, 13.0), n=5)},
        quality={"exact_match": Reading.unknown("1", "no question")},
        counts={"truncated": 2},
        subject={"folder": "x"},
        error={"type": "OutOfMemoryError", "message": "m"},
        notes=["größe"],
    )


def test_a_record_comes_back_through_json_as_it_was() -> None:
    record = full_record()
    assert Record.from_dict(json.loads(json.dumps(record.to_dict()))) == record


def test_every_key_of_the_contract_is_always_there() -> None:
    contract = {"schema_version", "status", "task", "config", "config_hash", "provenance", "kernel"}
    contract |= {"readings", "quality", "error"}
    assert contract <= set(Record(task="train").to_dict())
    assert Record(task="train").to_dict()["schema_version"] == SCHEMA_VERSION


def test_a_newer_schema_and_unknown_keys_are_refused() -> None:
    data = full_record().to_dict()
    with pytest.raises(ValueError, match="newer than this package"):
        Record.from_dict(data | {"schema_version": SCHEMA_VERSION + 1})
    with pytest.raises(ValueError, match="unknown keys in the record: colour"):
        Record.from_dict(data | {"colour": 1})


def test_rebuilding_a_record_leaves_its_data_alone() -> None:
    data = full_record().to_dict()
    before = json.dumps(data)
    Record.from_dict(data)
    assert json.dumps(data) == before


def test_the_status_is_one_of_five() -> None:
    for status in STATUSES:
        Record(task="infer", status=status)
    with pytest.raises(ValueError, match="'done' is none of ok, out_of_memory"):
        Record(task="infer", status="done")
