"""What `serve` refuses before it loads anything, the SDK's config file, the address, and the doctor."""

from __future__ import annotations

import json
import os
import socket
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trocar.cli import access, address, saved
from trocar.client.settings import Settings, config_path, saved_entries
from trocar.errors import TrocarError
from trocar.gate.gate import Gate
from trocar.gate.policy import Role, Tier

URL, OTHER = "http://127.0.0.1:8765", "http://127.0.0.1:1234"


def test_a_model_that_is_not_pulled_is_refused_before_anything_is_made(trocar: Any, home: Path) -> None:
    ran = trocar("serve")
    assert (ran.code, ran.out) == (2, "")
    assert "[model_not_pulled]" in ran.err
    assert "next: Run `trocar model pull smollm2-135m-instruct`." in ran.err
    assert not (home / "data").exists()


def test_a_model_named_twice_is_refused(trocar: Any) -> None:
    ran = trocar("serve", "--model", "a", "--model", "a")
    assert ran.code == 2
    assert "'a' is named twice" in ran.err


def test_a_data_folder_that_cannot_be_written_is_refused(
    trocar: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root, who may run this, can write everywhere
    assert "[data_unwritable]" in trocar("key", "create", "--tenant", "a").err


def test_a_data_folder_under_a_file_is_refused(trocar: Any, home: Path) -> None:
    (home / "file").write_text("")
    ran = trocar("key", "create", "--tenant", "a", "--data", str(home / "file" / "data"))
    assert ran.code == 2
    assert "[data_unwritable]" in ran.err


def test_a_taken_port_is_refused() -> None:
    first = address.bind("127.0.0.1", 0)
    with pytest.raises(TrocarError) as caught:
        address.bind("127.0.0.1", first.socket.getsockname()[1])
    assert caught.value.code == "cannot_listen"
    first.socket.close()


@pytest.mark.parametrize(
    ("host", "start"), [("127.0.0.1", "http://127.0.0.1:"), ("0.0.0.0", "http://127.0.0.1:")]
)
def test_the_url_reaches_the_socket(host: str, start: str) -> None:
    bound = address.bind(host, 0)
    assert bound.url == f"{start}{bound.socket.getsockname()[1]}"
    socket.create_connection(("127.0.0.1", bound.socket.getsockname()[1]), timeout=5).close()
    bound.socket.close()


def test_loopback() -> None:
    assert all(address.is_loopback(h) for h in ("127.0.0.1", "127.1.2.3", "::1", "localhost"))
    assert not any(address.is_loopback(h) for h in ("0.0.0.0", "::", "10.0.0.1", "example"))


def test_the_ready_file_is_whole_json(tmp_path: Path) -> None:
    address.write_ready(tmp_path / "ready", URL)
    assert json.loads((tmp_path / "ready").read_text()) == {"url": URL, "pid": os.getpid()}
    assert [p.name for p in tmp_path.iterdir()] == ["ready"]


@pytest.mark.usefixtures("home")
def test_the_sdk_reads_what_was_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TROCAR_URL")
    outcome = saved.save(URL, "trk_a", replace=False)
    assert (outcome.written, str(config_path()) in outcome.said) == (True, True)
    assert config_path().stat().st_mode & 0o777 == 0o600
    found = Settings.find()
    assert (found.url, found.api_key) == (URL, "trk_a")


@pytest.mark.usefixtures("home")
def test_a_config_folder_of_somebody_else_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After `runuser` HOME is still another user's."""
    monkeypatch.delenv("TROCAR_URL")
    denied = PermissionError(13, "Permission denied", str(config_path()))

    def refuse(*_: Any, **__: Any) -> None:
        raise denied

    monkeypatch.setattr(Path, "read_text", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert saved_entries() == {}
    assert Settings.find().api_key is None
    outcome = saved.save(URL, "trk_a", replace=True)
    assert (outcome.written, "cannot be written: Permission denied" in outcome.said) == (False, True)


@pytest.mark.usefixtures("home")
def test_an_entry_that_cannot_be_read_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    saved.save(OTHER, "trk_other", replace=False)
    with monkeypatch.context() as patch:
        patch.setattr(saved, "saved_entries", dict)
        assert saved.save(URL, "trk_a", replace=True).written
    assert tomllib.loads(config_path().with_name("config.toml.old").read_text())["url"] == OTHER


@pytest.mark.usefixtures("home")
def test_another_servers_entry_stays_unless_replacing_was_asked_and_then_it_is_kept() -> None:
    saved.save(OTHER, "trk_other", replace=False)
    kept = saved.save(URL, "trk_a", replace=False)
    assert (kept.written, OTHER in kept.said) == (False, True)
    assert saved_entries() == {"url": OTHER, "api_key": "trk_other"}
    replaced = saved.save(URL, "trk_a", replace=True)
    assert (replaced.written, OTHER in replaced.said) == (True, True)
    assert saved_entries() == {"url": URL, "api_key": "trk_a"}
    old = config_path().with_name("config.toml.old")
    assert tomllib.loads(old.read_text()) == {"url": OTHER, "api_key": "trk_other"}
    assert old.stat().st_mode & 0o777 == 0o600


@pytest.mark.usefixtures("home")
def test_a_config_file_with_other_settings_is_not_touched() -> None:
    config_path().parent.mkdir(parents=True)
    config_path().write_text('theme = "dark"\n')
    assert saved.save(URL, "trk_a", replace=True).written is False
    assert config_path().read_text() == 'theme = "dark"\n'


def test_doctor_on_an_empty_home_warns_and_passes(trocar: Any) -> None:
    ran = trocar("doctor", "--json")
    levels = {f["check"]: f["level"] for f in ran.json}
    assert (ran.code, levels["data"], levels["server"], levels["cache"]) == (0, "warn", "warn", "warn")
    assert f"{sys.version_info.major}.{sys.version_info.minor}." in ran.json[0]["said"]
    assert all(f["next_step"] for f in ran.json if f["level"] != "ok")
    assert "next: Run `trocar model pull smollm2-135m-instruct`" in trocar("doctor").out


def test_doctor_finds_a_lost_file_of_the_store(trocar: Any, home: Path) -> None:
    import numpy as np

    from trocar.store import Store

    site = "resid_post.3"
    with Store(home / "data" / "store") as store:
        arrays = {site: {"direction": np.ones(4, dtype=np.float32)}}
        name = store.save_artifact("alice", "mean_diff", "sha256:x", arrays, {"model": "m"})
    assert trocar("doctor").code == 0
    next((home / "data" / "store" / "data" / name).iterdir()).unlink()
    ran = trocar("doctor", "--json")
    assert ran.code == 1
    [bad] = [f for f in ran.json if f["level"] == "fail"]
    assert (bad["check"], "missing" in bad["said"]) == ("store", True)


@pytest.fixture
def gate(home: Path) -> Iterator[Gate]:
    opened = Gate(f"sqlite:///{home / 'ledger.db'}")
    yield opened
    opened.close()


def test_the_first_start_makes_one_operator_key_and_the_second_none(gate: Gate) -> None:
    first = access.access(gate, URL, None, save_key=False)
    [record] = gate.keys.list()
    assert (record.principal.tenant, record.principal.role, record.principal.tier) == (
        "local",
        Role.operator,
        Tier.open,
    )
    secret = first.lines[0].partition("TROCAR_API_KEY=")[2]
    assert gate.keys.authenticate(secret) == record.principal
    assert (first.sdk_knows, config_path().exists()) == (False, False)  # a pipe: nothing is written
    second = access.access(gate, URL, None, save_key=False)
    assert len(gate.keys.list()) == 1
    assert "trk_" not in "".join(second.lines)


def test_save_key_saves_and_a_restart_on_another_port_finds_its_own_key(gate: Gate) -> None:
    assert access.saved_secret(gate) is None
    assert access.access(gate, OTHER, None, save_key=True).sdk_knows
    again = access.saved_secret(gate)
    assert again is not None
    assert access.access(gate, URL, again, save_key=True).sdk_knows
    assert saved_entries() == {"url": URL, "api_key": again}
    assert len(gate.keys.list()) == 1


def test_save_key_without_a_key_to_save_is_refused(gate: Gate) -> None:
    gate.keys.create("alice", Tier.external, Role.researcher)
    saved.save(URL, "trk_of_another_ledger", replace=False)
    with pytest.raises(TrocarError) as caught:
        access.saved_secret(gate)
    assert caught.value.path == "save-key"
