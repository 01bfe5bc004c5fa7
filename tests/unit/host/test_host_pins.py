"""Facts of a model: asked once, checked against the manifest, pinned in the log, and never changed by a worker."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trocar.errors import TrocarError
from trocar.gate.chain import Kind
from trocar.gate.gate import Gate
from trocar.host.gate.pins import FOLDER, pinned
from trocar.wire.orders import Pinned


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    made = Gate(f"sqlite:///{tmp_path}/ledger.db")
    yield made
    made.close()


def never(_: str) -> bytes:
    raise AssertionError("a worker was asked twice")


def says(tiny: Any, engine: str = "hf", **changed: Any) -> Callable[[str], bytes]:
    made = Pinned(facts=tiny.facts.model_copy(update=changed), engine=engine)
    return lambda _: made.model_dump_json().encode()


def test_facts_are_asked_once_and_are_an_entry_of_the_log(gate: Gate, tiny: Any, tmp_path: Path) -> None:
    first = pinned(tmp_path, gate.ledger, tiny.manifest, says(tiny))
    assert first == Pinned(facts=tiny.facts, engine="hf")
    assert pinned(tmp_path, gate.ledger, tiny.manifest, never) == first
    (entry,) = gate.ledger.entries(kind=Kind.facts_pinned)
    assert json.loads(entry.detail)["model"] == "tiny"
    (file,) = (tmp_path / FOLDER).iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert gate.ledger.check() == []


def test_a_pin_that_was_changed_is_refused(gate: Gate, tiny: Any, tmp_path: Path) -> None:
    pinned(tmp_path, gate.ledger, tiny.manifest, says(tiny))
    (file,) = (tmp_path / FOLDER).iterdir()
    file.write_text(file.read_text().replace('"hf"', '"xx"'))
    with pytest.raises(TrocarError) as caught:
        pinned(tmp_path, gate.ledger, tiny.manifest, never)
    assert caught.value.code == "checksum_mismatch"
    file.unlink()
    again = pinned(tmp_path, gate.ledger, tiny.manifest, says(tiny, "hf 2"))
    assert again.engine == "hf 2"
    assert pinned(tmp_path, gate.ledger, tiny.manifest, never) == again


def test_other_files_are_another_model(gate: Gate, tiny: Any, tmp_path: Path) -> None:
    pinned(tmp_path, gate.ledger, tiny.manifest, says(tiny))
    other = tiny.manifest.model_copy(update={"fingerprint": "sha256:" + "1" * 64})
    found = pinned(tmp_path, gate.ledger, other, says(tiny, fingerprint=other.fingerprint))
    assert found.facts.fingerprint == other.fingerprint
    assert len(gate.ledger.entries(kind=Kind.facts_pinned)) == 2


@pytest.mark.parametrize(
    "changed",
    [
        {"open_weights": False},
        {"weight_bits": 10**12},
        {"lineage": "another"},
        {"name": "another"},
        {"parameters": 1},
        {"fingerprint": "sha256:0"},
        {"sites": ("secret.weights",)},
        {"unavailable": {"attn_probs": "w" * 401}},
        {"unavailable": {"attn_probs": "line\nbreak"}},
        {"unavailable": {"weights": "x"}},
        {"norms": {"weights": (1.0,)}},
        {"family": "x" * 401},
        {"norms": {"resid_post": (1.5,) * 40_000}},
    ],
)
def test_facts_that_cannot_be_those_of_the_model_are_refused(
    gate: Gate, tiny: Any, tmp_path: Path, changed: dict[str, Any]
) -> None:
    ask = says(tiny, **changed)
    with pytest.raises(TrocarError) as caught:
        pinned(tmp_path, gate.ledger, tiny.manifest, ask)
    assert caught.value.code == "bad_result"
    assert gate.ledger.entries(kind=Kind.facts_pinned) == ()


def test_what_is_no_facts_is_refused(gate: Gate, tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(TrocarError) as caught:
        pinned(tmp_path, gate.ledger, tiny.manifest, lambda _: b"secret weights")
    assert caught.value.code == "bad_result"
    assert "secret" not in str(caught.value)
