"""A policy file and anchors around a real server: tightened while it runs, never loosened, never turned back."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cli_server
import httpx
import pytest
from cli_server import MODEL, Serving

from trocar.models.pull import pull

pytestmark = [pytest.mark.e2e, pytest.mark.model]
FIRST = "[people.tiers.external]\nscalar_bits = 10\n"
TIGHTER = "[people.tiers.external]\nscalar_bits = 6\n"
WAIT_S = 30.0


@pytest.fixture
def home(tmp_path: Path) -> Path:
    pull(MODEL)
    return tmp_path


def start(home: Path) -> Serving:
    return cli_server.start(home, "--threads", "1", "--policy", str(home / "rules.toml"))


@pytest.fixture
def serving(home: Path) -> Iterator[Serving]:
    (home / "rules.toml").write_text(FIRST)
    started = start(home)
    yield started
    started.process.kill()
    started.process.wait(30)


def refused_start(home: Path, *words: str) -> str:
    """What a server says that does not start."""
    data = str(home / "data")
    ran = cli_server.command(home, "serve", "--port", "0", "--data", data, *words)
    assert ran.returncode in (1, 2, 3), ran.stdout
    assert "trocar ready" not in ran.stdout
    return ran.stderr


def read_again(serving: Serving, text: str) -> str:
    """Changes the file and says so; what the server says to that."""
    (serving.home / "rules.toml").write_text(text)
    before = serving.said()
    serving.process.send_signal(signal.SIGHUP)
    deadline_s = time.monotonic() + WAIT_S
    while not (said := serving.said().removeprefix(before)).endswith("\n"):
        assert time.monotonic() < deadline_s
        assert serving.process.poll() is None
        time.sleep(0.05)
    return said


def scalar_bits(serving: Serving) -> int:
    tiers = httpx.get(f"{serving.url}/v1/capabilities").json()["tiers"]
    return int(tiers["external"]["scalar_bits"])


def explain(serving: Serving, request_id: str) -> list[dict[str, Any]]:
    """What an operator is told beside the running server."""
    words = ("policy", "explain", request_id, "--data", str(serving.data), "--json")
    ran: subprocess.CompletedProcess[str] = cli_server.command(serving.home, *words)
    assert ran.returncode == 0, ran.stderr
    found: list[dict[str, Any]] = json.loads(ran.stdout)
    return found


def test_a_policy_is_tightened_while_the_server_runs_and_never_loosened(home: Path, serving: Serving) -> None:
    assert scalar_bits(serving) == 10
    assert "policy read again" in read_again(serving, TIGHTER)
    assert scalar_bits(serving) == 6

    said = read_again(serving, FIRST)
    assert "the policy stays as it was" in said
    assert "[policy_loosened] at people.tiers.external.scalar_bits" in said
    said = read_again(serving, "[people\n")
    assert ("the policy stays as it was" in said, "[bad_policy]" in said) == (True, True)
    (home / "rules.toml").unlink()
    serving.process.send_signal(signal.SIGHUP)
    assert scalar_bits(serving) == 6

    code, _ = serving.stop()
    assert code == 0, serving.said()
    for text in (FIRST, ""):  # the default is looser too
        (home / "rules.toml").write_text(text)
        assert "[policy_loosened]" in refused_start(home, "--policy", str(home / "rules.toml"))
    assert "[policy_loosened]" in refused_start(home)  # nor without naming it
    (home / "rules.toml").write_text(TIGHTER)
    again = start(home)
    try:
        assert scalar_bits(again) == 6
    finally:
        again.stop()


def test_a_request_is_explained_by_the_id_of_its_answer(serving: Serving) -> None:
    http = httpx.Client(
        base_url=serving.url, headers={"authorization": f"Bearer {serving.secret}"}, timeout=WAIT_S
    )
    with http:
        read = {"op": "read", "id": "r", "site": "resid_pots.1", "at": "prompt[-1]"}
        nodes = [read, {"op": "capture", "id": "c", "of": ["r"]}]
        bad = http.post("/v1/runs", json={"model": MODEL, "prompts": ["a"], "program": {"nodes": nodes}})
        assert bad.status_code == 422
        [refused] = explain(serving, bad.headers["x-request-id"])
        assert (refused["kind"], refused["path"]) == ("refused", "program.nodes[0].site")
        assert [code["code"] for code in refused["codes"]] == ["unknown_site"]

        logprobs = {"op": "logprobs", "id": "lp", "at": "prompt[-1]", "tokens": [1]}
        body = {"model": MODEL, "prompts": ["a"], "program": {"nodes": [logprobs]}}
        good = http.post("/v1/runs", json=body)
        answer = http.get(f"/v1/jobs/{good.json()['job']}/result", params={"wait_s": 20})
        assert answer.status_code == 200
    admitted, settled = explain(serving, good.headers["x-request-id"])
    assert (admitted["kind"], settled["kind"]) == ("admitted", "settled")
    assert settled["charged_bits"] == int(answer.headers["x-trocar-bits"]) > 0
    assert str(settled["seq"]) == answer.headers["x-trocar-ledger-seq"]


def test_a_ledger_from_yesterday_does_not_start(home: Path, serving: Serving) -> None:
    serving.stop()
    rules = ("--policy", str(home / "rules.toml"))
    yesterday = home / "yesterday"
    shutil.copytree(serving.data, yesterday)
    again = start(home)
    again.run(
        f"import trocar; trocar.Client().model({MODEL!r}).generate('a', max_new_tokens=1)", serving.secret
    )
    assert again.stop()[0] == 0
    shutil.move(serving.data, home / "today")
    shutil.copytree(yesterday, serving.data)
    assert "[ledger_rolled_back]" in refused_start(home, *rules)
    assert "[ledger_rolled_back]" in refused_start(home, *rules, "--anchors", str(home / "none"))
    shutil.rmtree(serving.data)
    shutil.move(home / "today", serving.data)
    last = start(home)
    last.stop()
