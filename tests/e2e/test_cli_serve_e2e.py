"""`trocar serve` as a user runs it: over real HTTP, stopped politely, stopped in the middle, and killed."""

from __future__ import annotations

import json
import signal
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cli_server
import httpx
import pytest
from cli_server import MODEL, Serving

from trocar.cli.serving import GRACE_S, LATE
from trocar.gate.database import Database
from trocar.gate.ledger import Ledger
from trocar.gate.policy import Policy
from trocar.models.pull import pull
from trocar.store import Store

pytestmark = [pytest.mark.e2e, pytest.mark.model]
SECRET_PROMPT = "zanzibar-wombat-quixotic"
CAPTURE = f"""
import trocar
long = " the cat sat on the mat and looked at the moon" * 20
model = trocar.Client(quiet=True).model({MODEL!r})
try:
    with model.trace([f"{{i}}{{long}}" for i in range(64)]) as t:
        t.save("rows", t.capture(t.resid_post[:]["prompt[*]"]))
        t.save("top", t.lens(t.resid_post[29][-1], top_k=5))
    t.run().result()
    print("it finished")
except trocar.TrocarError as e:
    print("refused", e.code)
"""
AFTER = f"""
import json, trocar
client = trocar.Client(quiet=True)
model = client.model({MODEL!r})
try:
    client.activations("{{handle}}")
    torn = "readable"
except trocar.NotFound as e:
    torn = e.code
text = str(model.generate("The capital of France is", max_new_tokens=2))
rows = model.capture(["a b", "c d"], "resid_post.3").rows
[budget] = client.ledger().budgets.values()
print(json.dumps(dict(torn=torn, text=text, rows=rows, spent=budget.spent_bits)))
"""


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


def doctor_fails(serving: Serving) -> list[dict[str, str]]:
    """What `trocar doctor` finds wrong beside the running server."""
    ran = cli_server.command(serving.home, "doctor", "--data", str(serving.data), "--json")
    failed = [f for f in json.loads(ran.stdout) if f["level"] == "fail"]
    assert ran.returncode == bool(failed)
    return failed


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


@contextmanager
def capturing(serving: Serving) -> Iterator[str]:
    """A user's script in the middle of a capture of 14,000 rows at all layers; yields the handle's id.

    The script must end by itself, with a refusal of ours, once the server has gone.
    """
    with cli_server.script(serving.home, CAPTURE, serving.url, serving.secret) as user:
        try:
            yield wait_for_rows(serving.home)
            out, err = user.communicate(timeout=60)
        finally:
            user.kill()
    assert out.startswith("refused "), err


def test_a_program_over_http_then_a_polite_stop(home: Path, serving: Serving) -> None:
    said = serving.said()
    assert f"trocar ready {serving.url}\n" in said
    assert said.count(serving.secret) == 1
    assert "15 sites validated in" in said
    assert "isolation: process" in said
    snippet = "\n".join(said[said.index("import trocar") :].splitlines()[:3])
    assert "Paris" in serving.run(snippet)
    health = httpx.get(f"{serving.url}/healthz")
    assert (health.status_code, "server" in health.headers) == (200, False)
    assert httpx.get(f"{serving.url}/docs").status_code == 200

    data = str(serving.data)
    beside = cli_server.command(home, "key", "create", "--tenant", "bob", "--data", data, "--json")
    bob = json.loads(beside.stdout)["secret"]
    assert serving.run("import trocar; print(trocar.Client().handles())", bob) == "()\n"
    assert doctor_fails(serving) == []

    code, took_s = serving.stop()
    assert (code, took_s < 5.0) == (0, True), serving.said()
    assert not (home / "ready.json").exists()
    assert SECRET_PROMPT not in serving.said()
    verified = cli_server.command(home, "ledger", "verify", "--data", data)
    assert (verified.returncode, verified.stdout[:3]) == (0, "ok:")
    # closed, not abandoned: the server's presence file is gone
    assert list((serving.data / "ledger.db.locks").glob("*.live")) == []


def test_no_prompt_reaches_the_log_even_when_requests_fail(serving: Serving) -> None:
    said_before = serving.said()
    serving.run(
        f"import trocar; trocar.Client().model({MODEL!r}).generate({SECRET_PROMPT!r}, max_new_tokens=2)"
    )
    key = {"authorization": f"Bearer {serving.secret}"}
    for body in (f'{{"model": "{SECRET_PROMPT}"}}', f'{{"{SECRET_PROMPT}', "[]"):
        answer = httpx.post(f"{serving.url}/v1/runs", content=body, headers=key)
        assert 400 <= answer.status_code < 500
    serving.stop()
    added = serving.said().removeprefix(said_before)
    assert SECRET_PROMPT not in added
    assert serving.secret not in added


def test_a_stop_in_the_middle_of_a_long_job_ends_in_time(home: Path, serving: Serving) -> None:
    with capturing(serving):
        _, took_s = serving.stop()
    assert took_s < GRACE_S + 1.5  # a busy machine takes a second to end a process
    again = cli_server.start(home, "--threads", "1")
    again.stop()
    assert ledger_rows(home, "select * from reservations where state = 'open'") == []
    assert cli_server.command(home, "ledger", "verify", "--data", str(serving.data)).returncode == 0


STUCK = """
import signal, time
from trocar.cli import address, serving
signal.signal(signal.SIGTERM, signal.default_int_handler)
stuck = lambda: time.sleep(60)
async def app(scope, receive, send): ...
server = serving.HttpServer(serving.Served(app, stuck, stuck, stuck), "warning", lambda: print("ready", flush=True))
server.serve_until_stopped(address.bind("127.0.0.1", 0))
"""


def test_a_stop_that_nothing_can_hurry_ends_the_process_in_time_and_says_so(tmp_path: Path) -> None:
    with cli_server.script(tmp_path, STUCK, "", "") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        started_s = time.monotonic()
        process.terminate()
        _, err = process.communicate(timeout=30)
        took_s = time.monotonic() - started_s
    assert (process.returncode, LATE in err) == (1, True), err
    assert GRACE_S - 0.5 < took_s < 5.5


def test_killed_in_the_middle_of_a_capture(home: Path, serving: Serving) -> None:
    with capturing(serving) as handle:
        code, _ = serving.stop(signal.SIGKILL)
    assert code == -signal.SIGKILL
    [held] = ledger_rows(home, "select * from reservations where state = 'open'")
    assert held["reserved_bits"] > 10 * Policy().overhead_bits  # so that "in full" is not "the overhead"

    again = cli_server.start(home, "--threads", "1")
    try:
        assert again.secret == ""  # there is a key: none is made, none is printed
        [row] = ledger_rows(home, f"select * from reservations where id = '{held['id']}'")
        assert (row["state"], row["spent_bits"]) == ("recovered", held["reserved_bits"])
        assert cli_server.command(home, "ledger", "verify", "--data", str(again.data)).returncode == 0
        assert doctor_fails(again) == []
        told = json.loads(again.run(AFTER.format(handle=handle), serving.secret))
        assert told["torn"] == "handle_not_found"  # it was never told: nothing of it left
        assert "Paris" in told["text"]
        assert told["rows"] == 2
        assert told["spent"] >= held["reserved_bits"] > 0
    finally:
        code, _ = again.stop()
    assert code == 0
    database = Database(f"sqlite:///{again.data / 'ledger.db'}")
    ledger = Ledger(database, anchors=home / "data.anchors")
    assert (ledger.check(), ledger.verify()) == ([], [])
    ledger.close()
    database.close()
    with Store(again.data / "store") as store:
        assert (store.check(), store.verify()) == ([], [])
