"""A released file: readable by the plain library, the same bytes each time, and no byte of it can be changed."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from trocar.errors import TrocarError
from trocar.gate.manifest import KEY_FILE, Manifest, ManifestPart, SigningKey, build, tensor_sha256, verify

KEY = SigningKey(bytes(range(32)))
TENSORS = {
    "rows:codes": np.arange(-6, 6, dtype=np.int8).reshape(3, 4),
    "rows:scales": np.array([1, 2, 3], np.float16),
    "b:codes": np.arange(6, dtype=np.uint8).reshape(3, 2),
}
MANIFEST = Manifest(
    request="0" * 32, kind="rows", lineage="base", fingerprint="sha256:1", author="k1", bits=8,
    parts=(ManifestPart("rows", "resid_post.12", "read", 3, 4, ('=cmd()"\x1b', "日本")),), approvers=("bea", "cid"),
    digest="1" * 64, sha256=tensor_sha256(TENSORS), charged_bits=400, ledger_seq=7, ledger_head="2" * 64,
    submitted_ms=1, released_ms=2, public_key=KEY.public_key,
)  # fmt: skip
FILE = build(TENSORS, MANIFEST, KEY)


def header(raw: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def rebuilt(head: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(head).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_the_plain_library_reads_it() -> None:
    back = load(FILE)
    assert set(back) == set(TENSORS)
    assert all((back[name] == TENSORS[name]).all() for name in TENSORS)


def test_the_manifest_is_signed_canonical_json() -> None:
    """Checked with the library alone, as a stranger would."""
    head, data = header(FILE)
    signed = json.loads(head.pop("__metadata__")["trocar"])
    text = json.dumps(signed["manifest"], sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(KEY.public_key))
    key.verify(bytes.fromhex(signed["signature"]), text.encode())
    entries = json.dumps(head, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    assert hashlib.sha256(entries.encode() + b"\n" + data).hexdigest() == signed["manifest"]["sha256"]
    assert text.isascii()
    assert text.isprintable()
    assert MANIFEST.text == text


def test_a_whole_file_verifies_and_says_what_it_is() -> None:
    opened = verify(FILE, KEY.public_key)
    assert opened.faults == ()
    assert opened.manifest["approvers"] == ["bea", "cid"]
    assert opened.manifest["parts"][0]["texts"] == list(MANIFEST.parts[0].texts)


def test_the_same_tensors_and_manifest_give_the_same_bytes() -> None:
    turned = dict(reversed(TENSORS.items()))
    assert build(turned, MANIFEST, SigningKey(bytes(range(32)))) == FILE


@settings(max_examples=300)
@given(st.integers(0, len(FILE) - 1), st.integers(1, 255))
def test_no_byte_can_be_changed(at: int, change: int) -> None:
    changed = FILE[:at] + bytes([FILE[at] ^ change]) + FILE[at + 1 :]
    if header_or_none(changed) != header(FILE):  # JSON has spaces that say nothing
        assert verify(changed, KEY.public_key).faults


def header_or_none(raw: bytes) -> Any:
    try:
        return header(raw)
    except ValueError:
        return None


@given(st.integers(0, len(FILE) - 1))
def test_a_file_cut_short_is_noticed(length: int) -> None:
    assert verify(FILE[:length], KEY.public_key).faults


def test_tensors_cannot_trade_their_names() -> None:
    head, data = header(FILE)
    head["x:codes"] = head.pop("rows:codes")
    assert verify(rebuilt(head, data), KEY.public_key).faults == (
        "the tensors are not those of the manifest",
    )


def test_another_manifest_or_key_is_noticed() -> None:
    forged = build(TENSORS, replace(MANIFEST, approvers=("mallory",)), SigningKey(bytes(32)))
    said = verify(forged, KEY.public_key)
    assert said.faults == ("the manifest was not signed by this gate, or was changed since",)
    assert verify(forged, SigningKey(bytes(32)).public_key).faults == ()


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xff" * 8,
        b"\xff" * 100,
        save({"a": np.zeros(1, np.float32)}),
        save({"a": np.zeros(1, np.float32)}, metadata={"trocar": "x"}),
        save({"a": np.zeros(1, np.float32)}, metadata={"trocar": "[]"}),
        save({"a": np.zeros(1, np.float32)}, metadata={"trocar": '{"manifest":[],"signature":""}'}),
        save({"a": np.zeros(1, np.float32)}, metadata={"trocar": '{"manifest":{},"signature":3}'}),
        rebuilt({"__metadata__": 3}, b""),
        rebuilt([], b""),  # type: ignore[arg-type]
        b"PK\x03\x04" + bytes(100),
    ],
)
def test_other_files_are_named_as_such(raw: bytes) -> None:
    opened = verify(raw, KEY.public_key)
    assert opened.faults == ("it is not a file of an airlock",)
    assert opened.manifest == {}


def test_words_beside_the_manifest_are_noticed() -> None:
    head, data = header(FILE)
    head["__metadata__"]["note"] = "trust me"
    assert verify(rebuilt(head, data), KEY.public_key).faults == ("it is not a file of an airlock",)


def test_a_signature_that_is_no_hex_is_a_fault() -> None:
    head, data = header(FILE)
    text = head["__metadata__"]["trocar"]
    head["__metadata__"]["trocar"] = text.replace('"signature":"', '"signature":"zz')
    assert len(verify(rebuilt(head, data), KEY.public_key).faults) == 1


@pytest.mark.parametrize(
    "respell", [lambda t: t.replace("{", "{ ", 1), lambda t: t.replace("u65e5", "u65E5")]
)
def test_another_spelling_of_the_same_manifest_is_noticed(respell: Any) -> None:
    head, data = header(FILE)
    text = head["__metadata__"]["trocar"]
    head["__metadata__"]["trocar"] = respell(text)
    assert json.loads(head["__metadata__"]["trocar"]) == json.loads(text)
    assert respell(text) != text
    assert verify(rebuilt(head, data), KEY.public_key).faults == ("it is not a file of an airlock",)


@pytest.mark.parametrize("public_key", ["", "zz", "00", "0" * 63, "0" * 66])
def test_a_public_key_that_is_none_is_refused(public_key: str) -> None:
    with pytest.raises(TrocarError) as e:
        verify(FILE, public_key)
    assert e.value.code == "bad_value"


def test_a_manifest_of_other_tensors_is_never_signed_into_a_file() -> None:
    with pytest.raises(TrocarError) as e:
        build({**TENSORS, "b:codes": TENSORS["b:codes"] + 1}, MANIFEST, KEY)
    assert e.value.code == "internal"


def test_the_key_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    made = SigningKey.in_folder(tmp_path)
    assert SigningKey.in_folder(tmp_path).public_key == made.public_key
    assert [p.name for p in tmp_path.iterdir()] == [KEY_FILE]
    assert (tmp_path / KEY_FILE).stat().st_mode & 0o777 == 0o600
    raw = (tmp_path / KEY_FILE).read_bytes()
    assert raw.hex() not in repr(made)
    assert made.public_key in repr(made)


def test_many_at_once_make_one_key(tmp_path: Path) -> None:
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(SigningKey.in_folder(tmp_path).public_key))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert [p.name for p in tmp_path.iterdir()] == [KEY_FILE]


def test_a_key_made_by_another_process_meanwhile_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = SigningKey.in_folder(tmp_path)
    monkeypatch.setattr(Path, "exists", lambda _: False)
    assert SigningKey.in_folder(tmp_path).public_key == first.public_key


def damaged(path: Path) -> None:
    path.write_bytes(b"short")


def open_to_all(path: Path) -> None:
    path.chmod(0o644)


def a_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("spoil", [damaged, open_to_all, a_link, a_folder])
def test_a_key_that_cannot_be_trusted_is_refused(tmp_path: Path, spoil: Any) -> None:
    SigningKey.in_folder(tmp_path)
    spoil(tmp_path / KEY_FILE)
    with pytest.raises(TrocarError) as e:
        SigningKey.in_folder(tmp_path)
    assert e.value.code == "ledger_unavailable"
    assert str(tmp_path) not in str(e.value)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrocarError) as e:
        SigningKey.in_folder(tmp_path / "none")
    assert e.value.code == "ledger_unavailable"


def test_another_users_key_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SigningKey.in_folder(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    with pytest.raises(TrocarError) as e:
        SigningKey.in_folder(tmp_path)
    assert e.value.code == "ledger_unavailable"
