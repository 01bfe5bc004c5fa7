"""`trocar serve` as a user runs it: over real HTTP, stopped politely, stopped in the middle, and killed."""

from __future__ import annotations

import json
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import cli_server
import httpx
import pytest
from cli_server import MODEL, Serving

import trocar
from trocar.models.pull import pull
from trocar.store import Store

pytestmark = [pytest.mark.e2e, pytest.mark.model]
PROMPT = "The capital of France is"
LONG = " the cat sat on the mat and looked at the moon" * 20


@pytest.fixture
def home(tmp_path: Path) -> Path:
    pull(MODEL)
    return tmp_path


@pytest.fixture
def serving(home: Path) -> Iterator[Serving]:
    started = cli_server.start(home, "--threads", "1", "--log-level", "info")
    yield started
    started.process.kill()
    started.process.wait(30)


def ledger_rows(home: Path, query: str) -> list[sqlite3.Row]:
    connection = sqlite3.connect(home / "data" / "ledger.db")
    connection.row_factory = sqlite3.Row
    rows = connection.execute(query).fetchall()
    connection.close()
    return rows


def wait_for_rows(home: Path) -> str:
    """The id of the handle that the server is writing, once it has committed a shard of it."""
    query = "select e.id from entries e join files f on f.entry = e.id where e.state = 'open'"
    deadline_s = time.monotonic() + 90
    while time.monotonic() < deadline_s:
        connection = sqlite3.connect(home / "data" / "store" / "catalog.sqlite")
        found = connection.execute(query).fetchone()
        connection.close()
        if found:
            return str(found[0])
        time.sleep(0.05)
    raise AssertionError("no shard was committed")


def capture_in_the_background(serving: Serving) -> threading.Thread:
    """Starts a capture of about 14,000 rows at all layers, which takes a minute; its failure is expected."""

    def work() -> None:
        client = trocar.Client(serving.url, serving.secret, quiet=True)
        with pytest.raises(trocar.TrocarError):
            client.model(MODEL).capture([f"{i}{LONG}" for i in range(64)], "resid_post.*", at="prompt[*]")

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_a_program_over_http_then_a_polite_stop(home: Path, serving: Serving) -> None:
    said = serving.said()
    assert f"trocar ready {serving.url}\n" in said
    assert said.count(serving.secret) == 1
    assert "14 sites validated in" in said
    assert "isolation: process" in said
    with trocar.Client(serving.url, serving.secret, quiet=True) as client:
        text = client.model(MODEL).generate(PROMPT, max_new_tokens=2)
        assert text == " Paris." or "Paris" in str(text)
    health = httpx.get(f"{serving.url}/healthz")
    assert (health.status_code, "server" in health.headers) == (200, False)
    assert httpx.get(f"{serving.url}/docs").status_code == 200

    beside = cli_server.command(
        home, "key", "create", "--tenant", "bob", "--data", str(serving.data), "--json"
    )
    with trocar.Client(serving.url, json.loads(beside.stdout)["secret"], quiet=True) as bob:
        assert bob.handles() == ()
    doctor = cli_server.command(home, "doctor", "--data", str(serving.data), "--json")
    failed = [f for f in json.loads(doctor.stdout) if f["level"] == "fail"]
    assert (doctor.returncode, failed) == (0, [])

    code, took_s = serving.stop()
    assert (code, took_s < 5.0) == (0, True), serving.said()
    assert not (home / "ready.json").exists()
    assert PROMPT not in serving.said().replace("print(model.generate(", "").replace(f'"{PROMPT}"', "")
    verified = cli_server.command(home, "ledger", "verify", "--data", str(serving.data))
    assert (verified.returncode, verified.stdout[:3]) == (0, "ok:")
    # closed, not abandoned: the server's presence file is gone
    assert list((serving.data / "ledger.db.locks").glob("*.live")) == []


def test_a_stop_in_the_middle_of_a_long_job_takes_less_than_five_seconds(
    home: Path, serving: Serving
) -> None:
    thread = capture_in_the_background(serving)
    wait_for_rows(home)
    _, took_s = serving.stop()
    thread.join(30)
    assert not thread.is_alive()
    assert took_s < 5.0
    again = cli_server.start(home, "--threads", "1")
    again.stop()
    assert ledger_rows(home, "select * from reservations where state = 'open'") == []
    assert cli_server.command(home, "ledger", "verify", "--data", str(serving.data)).returncode == 0


def test_killed_in_the_middle_of_a_capture(home: Path, serving: Serving) -> None:
    thread = capture_in_the_background(serving)
    handle = wait_for_rows(home)
    serving.stop(signal.SIGKILL)
    thread.join(30)
    [held] = ledger_rows(home, "select * from reservations where state = 'open'")

    again = cli_server.start(home, "--threads", "1")
    try:
        [row] = ledger_rows(home, f"select * from reservations where id = '{held['id']}'")
        assert (row["state"], row["spent_bits"]) == ("recovered", held["reserved_bits"])
        assert cli_server.command(home, "ledger", "verify", "--data", str(again.data)).returncode == 0
        doctor = cli_server.command(home, "doctor", "--data", str(again.data), "--json")
        assert [f for f in json.loads(doctor.stdout) if f["level"] == "fail"] == []
        with trocar.Client(again.url, serving.secret, quiet=True) as client:
            with pytest.raises(trocar.ProgramError) as caught:
                client.activations(handle)
            assert caught.value.code == "handle_incomplete"
            model = client.model(MODEL)
            assert "Paris" in str(model.generate(PROMPT, max_new_tokens=2))
            assert model.capture(["a b", "c d"], "resid_post.3").rows == 2
            [budget] = client.ledger().budgets.values()
            assert budget.spent_bits >= held["reserved_bits"]
        assert again.secret == ""  # there is a key: none is made, none is printed
    finally:
        code, _ = again.stop()
    assert code == 0
    with Store(home / "data" / "store") as store:
        assert (store.check(), store.verify()) == ([], [])
