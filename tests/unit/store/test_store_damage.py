"""Files that are not what was written: refused where that is cheap to see, found by `verify` everywhere."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from trocar import errors
from trocar.store import RowTable, Store

SITES = {"resid_post.0": 8, "mlp_out.1": 8}


@pytest.fixture
def filled(tmp_path: Path) -> tuple[Path, str, str]:
    """A closed store with a handle of two shards and an artifact: root, handle, artifact."""
    table = RowTable.of(
        prompt=[0] * 6, position=range(6), token_id=[1] * 6, token=["t"] * 6, phase=["gen"] * 6
    )
    with Store(tmp_path) as store:
        artifact = store.save_artifact("alice", "ridge", "f1", {"final_norm": {"a": np.arange(4.0)}}, {})
        with store.create("alice", "smol", "f1", SITES, "p1") as writer:
            for _ in range(2):
                writer.append({site: np.ones((6, w), np.float32) for site, w in SITES.items()}, table)
                writer.flush()
            return tmp_path, writer.finish().id, artifact


def one(root: Path, pattern: str) -> Path:
    return sorted((root / "data").rglob(pattern))[0]


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def refused(call: Callable[[], object]) -> None:
    with pytest.raises(errors.ServerFault) as caught:
        call()
    assert caught.value.code == "store_damaged"


@pytest.mark.parametrize("change", [cut, grow, Path.unlink])
@pytest.mark.parametrize("pattern", ["*resid_post.0.safetensors", "*.parquet", "artifact.safetensors"])
def test_another_size_is_refused_and_reported(
    filled: tuple[Path, str, str], change: Callable[[Path], None], pattern: str
) -> None:
    root, handle, artifact = filled
    path = one(root, pattern)
    change(path)
    with Store(root) as store:
        (problem,) = store.check()
        assert problem.startswith(str(path.relative_to(root / "data")))
        assert len(store.verify()) == 1
        if pattern.startswith("artifact"):
            refused(lambda: store.open_artifact("alice", artifact))
        else:
            refused(lambda: store.open("alice", handle).read("resid_post.0"))


@pytest.mark.parametrize("pattern", ["*resid_post.0.safetensors", "*.parquet", "artifact.safetensors"])
def test_one_flipped_bit_is_found(filled: tuple[Path, str, str], pattern: str) -> None:
    root, handle, artifact = filled
    flip(one(root, pattern), -1)
    with Store(root) as store:
        assert store.check() == []  # sizes are right: only hashing sees it
        (problem,) = store.verify()
        assert "SHA-256" in problem
        if pattern == "*.parquet":
            refused(lambda: store.open("alice", handle).rows())
        if pattern.startswith("artifact"):
            refused(lambda: store.open_artifact("alice", artifact))


def test_a_changed_header_is_refused(filled: tuple[Path, str, str]) -> None:
    root, handle, _ = filled
    path = one(root, "*resid_post.0.safetensors")
    path.write_bytes(path.read_bytes().replace(b"[6,8]", b"[8,6]"))
    with Store(root) as store:
        refused(lambda: store.open("alice", handle).read("resid_post.0"))
        assert store.open("alice", handle).read("mlp_out.1").shape == (12, 8)


def test_a_link_in_place_of_a_file_is_not_followed(filled: tuple[Path, str, str], tmp_path: Path) -> None:
    root, handle, _ = filled
    path = one(root, "*resid_post.0.safetensors")
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with Store(root) as store, pytest.raises(OSError, match="symbolic"):
        store.open("alice", handle).read("resid_post.0")


def test_files_that_nobody_listed_are_reported_then_swept(filled: tuple[Path, str, str]) -> None:
    root, handle, _ = filled
    with Store(root) as store:
        for name in (f"{handle}/000002.resid_post.0.safetensors", "act_" + "0" * 32 + "/x", "stray"):
            (root / "data" / name).parent.mkdir(exist_ok=True)
            (root / "data" / name).write_bytes(b"half a shard")
        assert len(store.check()) == 3
    with Store(root) as store:
        assert store.check() == []
        assert store.open("alice", handle).info.n_rows == 12
        assert len(list((root / "data").iterdir())) == 2


def test_a_catalog_with_a_hole_is_reported(filled: tuple[Path, str, str]) -> None:
    root, handle, _ = filled
    path = one(root, "000000.mlp_out.1.safetensors")
    with sqlite3.connect(root / "catalog.sqlite") as c:
        c.execute("DELETE FROM files WHERE path = ?", (f"{handle}/{path.name}",))
    c.close()
    with Store(root) as store:
        assert store.check() == [f"{handle}: the sites of shard 0 do not match"]


def test_a_store_of_the_first_format_is_read_and_written(filled: tuple[Path, str, str]) -> None:
    root, handle, artifact = filled
    with sqlite3.connect(root / "catalog.sqlite") as c:
        for table, columns in {
            "entries": ["dtype", "pinned"],
            "files": ["label", "first_key", "last_key"],
        }.items():
            for column in columns:
                c.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
        c.execute("PRAGMA user_version = 1")
    c.close()
    with Store(root) as store:
        assert store.check() == store.verify() == []
        reader = store.open("alice", handle)
        assert (reader.info.dtype, reader.info.pinned) == ("float32", False)
        expected = sorted([0, 1, 2, 3, 4, 5] * 2)  # both shards hold the same keys, so they are merged
        assert reader.rows().position.tolist() == expected
        assert sum(len(block) for block in reader.site("resid_post.0").blocks(5)) == 12
        assert store.open_artifact("alice", artifact).info.kind == "ridge"
        with store.create("alice", "smol", "f1", SITES, "p1", dtype="bfloat16") as writer:
            new = writer.finish().id
    with Store(root) as store:
        assert {i.id: i.dtype for i in store.list("alice")} == {handle: "float32", new: "bfloat16"}


def test_a_store_of_another_format_is_not_opened(tmp_path: Path) -> None:
    with Store(tmp_path):
        pass
    with sqlite3.connect(tmp_path / "catalog.sqlite") as c:
        c.execute("PRAGMA user_version = 99")
    c.close()
    for _ in range(2):  # a refused opening holds no lock
        refused(lambda: Store(tmp_path))
