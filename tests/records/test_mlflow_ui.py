"""A sweep in MLflow's own UI, in a real Chromium: parent and children, the columns to compare, charts, artifacts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llm_at_home.records import mlflow_view, store
from llm_at_home.records.tracking import Tracker

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
SWEEP = ROOT / "results" / "two_core_cpu" / "demo" / "infer"
FIGURES = ("decode_tokens_per_second", "resident_set_peak")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ui")
    uri = f"sqlite:///{folder}/mlflow.db"
    for run in sorted(SWEEP.iterdir()):
        record = store.load(run)
        tags = {"task": record.task, "quant": record.config["quant"]["name"], "gpu": record.config["gpu"]["name"]}
        tracker = Tracker(uri, "llm-at-home", f"infer {tags['quant']}", str(folder / "demo"))
        tracker.open(record.config, tags)
        tracker.close(record, run)
        assert tracker.problem is None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["ui", "--backend-store-uri", uri, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    nowhere = subprocess.DEVNULL
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", *words], stdout=nowhere, stderr=nowhere, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with socket.socket() as trying:
            if trying.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.2)
    yield f"http://127.0.0.1:{port}/#/experiments/1/runs?viewStateShareKey={mlflow_view.KEY}"
    os.killpg(server.pid, 15)
    server.wait(timeout=20)


def test_a_sweep_can_be_compared(address, browser):
    page = browser.new_page(viewport={"width": 1500, "height": 620})
    page.set_default_timeout(90_000)
    page.goto(address)
    page.get_by_text("sweep demo").first.wait_for()
    assert page.get_by_text("infer nf4", exact=True).count() == 0
    page.locator(".ag-row", has_text="sweep demo").first.locator("button").first.click()
    for name in ("none", "nf4", "int8"):
        page.get_by_text(f"infer {name}", exact=True).first.wait_for()
    shown = page.inner_text("body")
    for column in ("quant", "gpu", *FIGURES):
        assert column in shown
    for name in ("none", "nf4", "int8"):
        speed = store.load(SWEEP / name).readings["decode_tokens_per_second"].value
        assert speed is not None
        assert f"{speed:.6f}"[:8] in shown
    # Charts of the same runs, and the files of one.
    page.locator("label:has(input[value=CHART])").first.click(force=True)
    page.get_by_text("Model metrics").wait_for()
    page.get_by_text("bits_per_weight", exact=True).first.wait_for()
    page.locator(".js-plotly-plot svg").first.wait_for()
    page.locator("label:has(input[value=TABLE])").first.click(force=True)
    page.get_by_text("infer nf4", exact=True).first.click()
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_text("record.json").first.wait_for()
