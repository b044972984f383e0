from __future__ import annotations

import copy
import datetime
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from llm_at_home.errors import Refusal
from llm_at_home.hardware import __main__ as command
from llm_at_home.hardware import catalogue
from llm_at_home.hardware.catalogue import BFLOAT16, CATALOGUE, DTYPES, Card, Price, load_catalogue
from llm_at_home.hardware.table import markdown

ROOT = Path(__file__).resolve().parents[2]
CARDS = load_catalogue()
# What is soldered on, in GiB: CUDA offers a little less.
SIZES = {
    **{"rtx4060": 8, "rtx3060": 12, "t4": 16, "v100": 16, "l4": 24, "a10g": 24, "rtx3090": 24, "rtx4090": 24},
    **{"rtx5090": 32, "a100_40gb": 40, "l40s": 48, "a6000": 48, "a100_80gb": 80, "h100": 80, "h200": 141},
}
NAMES = list(SIZES)


def entry(name: str = "t4") -> dict:
    return yaml.safe_load((CATALOGUE / f"{name}.yaml").read_text())


def test_the_catalogue_is_complete_and_the_smallest_card_first():
    assert set(CARDS) == set(NAMES)
    assert [card.memory for card in CARDS.values()] == sorted(card.memory for card in CARDS.values())
    assert {path.stem for path in CATALOGUE.glob("*.yaml")} == {*NAMES, "auto", "cpu", "cuda"}
    assert len({card.title for card in CARDS.values()}) == len(CARDS)


@pytest.mark.parametrize("name", NAMES)
def test_a_card_agrees_with_itself(name):
    card, text = CARDS[name], (CATALOGUE / f"{name}.yaml").read_text()
    assert card.name == name
    assert entry(name)["device"] == "cuda"
    assert 0.9 * SIZES[name] < card.memory / 1.073741824 < SIZES[name]
    assert f"gpu={name}" in text.split("name:")[0], "no command"
    flops = card.tflops
    assert (flops["bfloat16"] is None) is (card.compute_capability < BFLOAT16)
    assert (flops["tf32"] is None) is (card.compute_capability < BFLOAT16)
    assert (flops["fp8"] is None) is (card.compute_capability < (8, 9))
    assert (flops["int8"] is None) is (card.compute_capability < (7, 5))
    given = [flops[dtype] for dtype in ("float32", "tf32", "float16", "int8") if flops[dtype] is not None]
    assert given == sorted(given), "a narrower dtype is never slower"
    assert flops["float16"] >= 2 * flops["float32"] * 0.99
    assert flops["bfloat16"] in (None, flops["float16"])
    if flops["int8"]:
        assert flops["int8"] / flops["float16"] == pytest.approx(2, rel=0.02) or card.title.startswith("NVIDIA GeForce")
    for words in (card.source, card.memory_source, card.title):
        assert len(words) > 5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", ["price_buy", "price_hour"])
def test_a_price_says_where_and_when_or_why_not(name, key):
    price = getattr(CARDS[name], key)
    if price.value is None:
        assert price.reason
        assert price.source is price.date is price.currency is None
    else:
        year = int(re.search(r"\b20\d\d\b", price.date)[0])
        assert 2018 <= year <= datetime.date.today().year
        assert price.currency in ("USD", "CHF")
        assert 0.1 < price.value < 20 if key == "price_hour" else 100 < price.value < 50_000


def test_the_paper_s_prices_are_the_paper_s():
    assert [CARDS[name].price_buy.value for name in ("rtx4090", "a6000", "h100")] == [1800, 4300, 30000]
    assert [CARDS[name].price_hour.value for name in ("t4", "a100_40gb", "a100_80gb")] == [0.35, 2.87, 3.85]
    assert CARDS["v100"].price_hour.value == pytest.approx(3069.65 / 730, abs=0.005)


def test_a_card_is_read_into_types():
    card = Card.from_config(entry())
    assert card.compute_capability == (7, 5)
    assert card.capability_text == "7.5"
    assert card.price_hour == Price(0.35, "USD", card.price_hour.source, "2024-02")
    assert card.price_buy.value is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory": 0}, "memory is 0: give a positive number"),
        ({"memory": None}, "memory is None"),
        ({"bandwidth": "fast"}, "bandwidth is fast"),
        ({"power_limit": True}, "power_limit is True"),
        ({"tflops": {"float32": 1}}, "tflops has other dtypes than"),
        ({"tflops": dict.fromkeys(DTYPES, -1)}, r"tflops.float32 is -1"),
        ({"compute_capability": "75"}, "compute capability 75 is not of the form 8.6"),
        ({"price_buy": {"value": None}}, "price_buy is unknown without a reason"),
        ({"price_buy": {"value": 0, "currency": "USD", "source": "s", "date": "2024"}}, "price_buy.value is 0"),
        ({"price_hour": {"value": 1, "currency": "USD", "source": "s"}}, "needs a currency, a source and a date"),
        ({"price_hour": {"value": 1, "per": "hour"}}, "price_hour has unknown keys: per"),
        ({"vram": 16}, "gpu=t4 has unknown keys: vram"),
        ({"source": ...}, "gpu=t4 lacks source"),
    ],
)
def test_an_entry_that_makes_no_sense_is_refused_by_its_key(change, message):
    broken = {**entry(), **change}
    broken = {key: value for key, value in broken.items() if value is not ...}
    before = copy.deepcopy(broken)
    with pytest.raises(Refusal, match=message):
        Card.from_config(broken)
    assert broken == before


def test_without_a_checkout_there_is_no_catalogue(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(catalogue, "CATALOGUE", tmp_path / "conf")
    assert command.main() == 2
    assert "run this from a checkout" in capsys.readouterr().err


def test_the_page_holds_the_catalogue(capsys):
    assert command.main() == 0
    printed = capsys.readouterr().out.strip()
    assert printed == markdown(CARDS.values())
    page = (ROOT / "docs" / "gpus.md").read_text()
    assert printed in page, "put the output of `python -m llm_at_home.hardware` into docs/gpus.md"
    assert page.count("\n| `") == 1 + len(CARDS), "another table beside it"


def test_a_row_shows_what_is_lacking_as_a_dash():
    row = markdown([CARDS["v100"]]).splitlines()[-1]
    assert row.startswith("| `v100` | Tesla V100-PCIE-16GB | 16.93 | 900 | 14 | - | 112 | - | - | - | 7.0 | 250 | - |")


def test_reading_the_catalogue_loads_nothing_heavy():
    code = (
        "import sys; from llm_at_home.hardware import condition, device, emulation; "
        "from llm_at_home.hardware.catalogue import load_catalogue; load_catalogue(); "
        "print([name for name in ('torch', 'numpy', 'hydra', 'psutil') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
