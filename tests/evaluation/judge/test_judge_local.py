"""llama.cpp's real server with the embedded model: slow by design, so few and short calls."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from llm_at_home.errors import Refusal
from llm_at_home.evaluation.judge import judge_run
from llm_at_home.evaluation.judge.client import JudgeClient, JudgeDenied, JudgeError
from llm_at_home.evaluation.judge.local import LocalServer, find_gguf
from llm_at_home.records.jsonl import read_jsonl

LOCAL = Path(__file__).resolve().parents[3] / "conf" / "judge" / "local.yaml"


def listens(base_url: str) -> bool:
    address = urlsplit(base_url)
    with socket.socket() as probe:
        return probe.connect_ex((address.hostname, address.port)) == 0


def gone(pid: int) -> bool:
    for _ in range(100):
        try:
            os.kill(pid, 0)
            # A zombie whose parent was killed may wait for its new one.
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


def test_the_local_judge_grades_both_ways_and_a_prompt_too_long_is_missing(
    questions, answers, baseline, templates_file, tmp_path
) -> None:
    config = yaml.safe_load(LOCAL.read_text())
    config |= {"templates": str(templates_file), "mode": "both", "context": 512, "threads": 1}
    answers[1]["choices"][0]["turns"] = ["4", "much " * 2000]
    readings, counts, _ = judge_run(config, questions[1:2], answers, baseline, tmp_path)
    rows = list(read_jsonl(tmp_path / "judgments.jsonl"))
    assert len(rows) == 4
    for row in rows:
        if row["turn"] == 2:
            assert "exceed" in row["missing"]
        elif "model" in row:
            assert 1 <= row["score"] <= 10
            assert row["judgment"] == f"Rating: [[{row['score']:.4f}]]"
            assert sum(row["probabilities"]) == pytest.approx(1)
            mean = sum(rating * share for rating, share in enumerate(row["probabilities"], 1))
            assert row["score"] == pytest.approx(mean, abs=1e-4)
            assert row["served_model"] == row["judge"][0] == "SmolLM2-135M-Instruct.Q4_1"
        else:
            assert {row["g1_judgment"], row["g2_judgment"]} <= {"[[A]]", "[[B]]", "[[C]]"}
    assert (counts["judgments"], counts["judgments_missing"], counts["judge_retries"]) == (2, 2, 0)
    assert 1 <= readings["judge_score_mean"].value <= 10
    assert readings["judge_score_mean"].method == "local[SmolLM2-135M-Instruct.Q4_1, expected rating]/single"
    assert readings["win_rate"].value in (0, 0.5, 1)


def test_the_server_wants_its_key_and_stops_even_while_it_answers() -> None:
    ended: list[BaseException] = []
    with LocalServer(find_gguf(), context=512, threads=1) as server:
        pid, address = server.pid, server.base_url
        assert urlsplit(address).hostname == "127.0.0.1"
        assert server.api_key not in repr(server)
        assert server.api_key.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
        with pytest.raises(JudgeDenied, match="401"):
            JudgeClient("m", address, api_key="not-the-key").ask([{"role": "user", "content": "hi"}])

        def long_answer() -> None:
            client = JudgeClient("m", address, api_key=server.api_key, max_tokens=400, max_retries=0)
            try:
                # A grammar without an end, so that the answer is surely under way when the server stops.
                client.ask([{"role": "user", "content": "hi"}], {"grammar": 'root ::= "a " root'})
            except JudgeError as error:
                ended.append(error)

        asking = threading.Thread(target=long_answer)
        asking.start()
        time.sleep(0.5)
        start = time.monotonic()
    assert time.monotonic() - start < 5
    asking.join(20)
    assert len(ended) == 1
    assert gone(pid)
    assert not listens(address)


def test_the_server_ends_with_a_parent_that_is_killed() -> None:
    code = (
        "import time\n"
        "from llm_at_home.evaluation.judge.local import LocalServer, find_gguf\n"
        "with LocalServer(find_gguf(), context=256, threads=1) as server:\n"
        "    print(server.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    with parent:
        pid = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
    assert gone(pid)


def test_a_file_that_is_no_model_is_refused(tmp_path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF but not really")
    with pytest.raises(Refusal, match=r"cannot serve .*broken\.gguf"):
        LocalServer(broken).__enter__()
    with pytest.raises(Refusal, match="no model file"):
        LocalServer(tmp_path / "none.gguf").__enter__()
