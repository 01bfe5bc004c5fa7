"""The fingerprint changes when, and only when, something that decides the model's outputs changes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from trocar import errors
from trocar.models.fingerprint import fingerprint, stamp


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "model.safetensors").write_bytes(b"w" * 3_000_000)
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_it_is_the_hash_of_names_lengths_and_bytes(home: Path) -> None:
    expected = hashlib.sha256()
    for name, body in ((b"config.json", b"{}"), (b"model.safetensors", b"w" * 3_000_000)):
        expected.update(len(name).to_bytes(8, "big") + name + len(body).to_bytes(8, "big") + body)
    assert fingerprint(home) == f"sha256:{expected.hexdigest()}"


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "generation_config.json", "chat_template.jinja", "b.safetensors"]
)
def test_a_new_covered_file_changes_it(home: Path, name: str) -> None:
    before = fingerprint(home)
    (home / name).write_text("x")
    assert fingerprint(home) != before


def test_one_byte_of_weights_changes_it(home: Path) -> None:
    before = fingerprint(home)
    (home / "model.safetensors").write_bytes(b"w" * 2_999_999 + b"v")
    assert fingerprint(home) != before


def test_other_files_do_not_count(home: Path) -> None:
    before = fingerprint(home), stamp(home)
    (home / "README.md").write_text("x")
    (home / "pytorch_model.bin").write_text("x")
    assert (fingerprint(home), stamp(home)) == before


def test_the_stamp_sees_a_touched_file(home: Path) -> None:
    before = stamp(home)
    os.utime(home / "config.json", ns=(1, 1))
    assert stamp(home) != before


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json"])
def test_a_directory_without_weights_or_config_is_refused(home: Path, missing: str) -> None:
    (home / missing).unlink()
    with pytest.raises(errors.RunFailed, match="model_unsupported"):
        fingerprint(home)
