"""The same store on object storage: a real S3 server on this machine, and what goes wrong between the two."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from resumed_writer import SITES, length, prompt_rows, shard_bytes

from trocar import errors
from trocar.store import Objects, Reader, Store, bucket, concat

N_PROMPTS = 150
SCRIPT = Path(__file__).with_name("resumed_writer.py")


@pytest.fixture
def objects(s3: Any) -> Objects:
    return Objects(s3.new_url(), s3.options)


@pytest.fixture
def store(tmp_path: Path, objects: Objects) -> Iterator[Store]:
    with Store(tmp_path, objects=objects, shard_bytes=shard_bytes()) as opened:
        yield opened
        assert opened.check() == opened.verify() == []


def kept(store: Store, prompts: range = range(40), dtype: str = "bfloat16") -> str:
    with store.create("alice", "smol", "f1", SITES, "p1", dtype=dtype) as writer:
        for prompt in prompts:
            writer.append(*prompt_rows(prompt))
        return writer.finish().id


def keys(prompts: Any) -> list[tuple[int, int]]:
    return [(p, q) for p in prompts for q in range(length(p))]


def expected(site: str, prompts: Any) -> np.ndarray:
    found = [[q + p % 100 + j for j in range(SITES[site])] for p, q in keys(prompts)]
    return np.array(found, np.float32)


def assert_prompts(reader: Reader, prompts: Any) -> None:
    table = reader.rows()
    assert list(zip(table.prompt.tolist(), table.position.tolist(), strict=True)) == keys(prompts)
    for site in SITES:
        np.testing.assert_array_equal(reader.site(site).read(), expected(site, prompts))


def remote(objects: Objects) -> tuple[Any, Any]:
    return bucket._connect(objects)


def listed(objects: Objects) -> set[str]:
    place, api = remote(objects)
    return {m["path"] for chunk in api.list(place) for m in chunk} - {"owner"}


def cached(root: Path) -> list[Path]:
    return sorted((root / "cache").iterdir())


def test_rows_come_back(store: Store, objects: Objects, tmp_path: Path) -> None:
    handle = kept(store)
    reader = store.open("alice", handle)
    assert_prompts(reader, range(40))
    site = reader.site("mlp_act.1")
    index = np.random.default_rng(0).integers(0, len(site), 90)
    np.testing.assert_array_equal(site.take(index), expected("mlp_act.1", range(40))[index])
    assert len(listed(objects)) == 3 * reader.index.n_shards > 6
    assert not (tmp_path / "data").exists()
    assert store.usage("alice") == reader.info.size_bytes


def test_artifacts_labels_and_views(store: Store) -> None:
    handle, other = kept(store), kept(store, range(5), "float32")
    artifact = store.save_artifact("alice", "ridge", "f1", {"final_norm": {"a": np.arange(4.0)}}, {"k": 1})
    np.testing.assert_array_equal(
        store.open_artifact("alice", artifact).arrays["final_norm"]["a"], np.arange(4.0)
    )
    store.add_labels("alice", handle, "third", [p % 3 for p, _ in keys(range(40))])
    view = store.open("alice", handle).view().where(third=1, position=0, site="mlp_act.1")
    both = concat([store.open("alice", other).view().where(site="mlp_act.1")])
    np.testing.assert_array_equal(view.site("mlp_act.1").read(), expected("mlp_act.1", range(40))[
        [i for i, (p, q) in enumerate(keys(range(40))) if p % 3 == 1 and q == 0]
    ])  # fmt: skip
    np.testing.assert_array_equal(both.site("mlp_act.1").read(), expected("mlp_act.1", range(5)))
    store.drop_labels("alice", handle, "third")
    assert "third" not in store.open("alice", handle).rows().labels


def test_deleting_removes_objects_and_what_was_cached(store: Store, objects: Objects, tmp_path: Path) -> None:
    handle, other = kept(store), kept(store, range(3))
    reader = store.open("alice", handle)
    reader.site("mlp_act.1").read()
    assert any(handle in path.name for path in cached(tmp_path))
    store.delete("alice", handle)
    assert {place.partition("/")[0] for place in listed(objects)} == {other}
    assert not any(handle in path.name for path in cached(tmp_path))
    with pytest.raises(errors.NotFound):
        reader.site("mlp_act.1").read()
    with pytest.raises(errors.NotFound):
        reader.site("mlp_act.1").take(np.array([0]))
    with store.create("alice", "smol", "f1", SITES, "p1") as writer:
        writer.append(*prompt_rows(7))
        writer.flush()
        writer.abandon()
    assert {place.partition("/")[0] for place in listed(objects)} == {other}


def test_few_rows_are_read_by_ranges_and_many_from_the_cache(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket, "LATENCY_BYTES", 512)
    reader = store.open("alice", kept(store))
    site = reader.site("resid_post.0")
    assert reader.index.tidy
    found = site.take(np.array([3, 160, 4]))
    np.testing.assert_array_equal(found, expected("resid_post.0", range(40))[[3, 160, 4]])
    vectors = [p for p in cached(tmp_path) if p.suffix == ".safetensors"]
    assert vectors == []
    every = np.arange(len(site))[::-1]
    np.testing.assert_array_equal(site.take(every), expected("resid_post.0", range(40))[every])
    assert len([p for p in cached(tmp_path) if p.suffix == ".safetensors"]) == reader.index.n_shards


def test_the_cache_keeps_to_its_room(s3: Any, tmp_path: Path) -> None:
    room = 40_000
    with Store(tmp_path, objects=Objects(s3.new_url(), s3.options, room), shard_bytes=shard_bytes()) as store:
        reader = store.open("alice", kept(store, range(120)))
        assert reader.info.size_bytes > 3 * room
        for _ in range(2):
            assert_prompts(reader, range(120))
            assert 0 < sum(p.stat().st_size for p in cached(tmp_path)) <= room


@pytest.mark.parametrize("change", ["flip", "cut", "lose"])
def test_objects_that_are_not_what_was_written(tmp_path: Path, objects: Objects, change: str) -> None:
    with Store(tmp_path, objects=objects) as store:
        handle = kept(store)
        place, api = remote(objects)
        (key,) = [k for k in listed(objects) if k.endswith("mlp_act.1.safetensors")]
        raw = bytearray(bytes(api.get(place, key).bytes()))
        if change == "lose":
            api.delete(place, [key])
        else:
            raw[-1] ^= 1
            api.put(place, key, bytes(raw[: -1 if change == "cut" else None]))
        assert len(store.verify()) == 1
        assert len(store.check()) == (change != "flip")
        with pytest.raises(errors.ServerFault) as caught:
            store.open("alice", handle).site("mlp_act.1").read()
        assert caught.value.code == "store_damaged"
        assert not any(path.name.endswith("mlp_act.1.safetensors") for path in cached(tmp_path))
        reader = store.open("alice", handle)
        np.testing.assert_array_equal(reader.site("resid_post.0").read(), expected("resid_post.0", range(40)))


def test_a_prefix_belongs_to_one_store(tmp_path: Path, objects: Objects) -> None:
    with Store(tmp_path / "a", objects=objects) as store:
        handle = kept(store)
        for _ in range(2):
            with pytest.raises(errors.ProgramError) as caught:
                Store(tmp_path / "b", objects=objects)
            assert (caught.value.code, caught.value.path) == ("bad_value", "objects")
        with Store(tmp_path / "a", objects=objects) as again:
            assert_prompts(again.open("alice", handle), range(40))
    with Store(tmp_path / "a", objects=objects) as store:
        assert_prompts(store.open("alice", handle), range(40))


@pytest.mark.parametrize(
    ("url", "options", "path"),
    [("https://x/y", {}, "objects"), ("s3://rows/x", {"colour": "red"}, "objects.options")],
)
def test_places_that_make_no_sense(tmp_path: Path, url: str, options: dict[str, str], path: str) -> None:
    with pytest.raises(errors.ProgramError) as caught:
        Store(tmp_path, objects=Objects(url, options))
    assert (caught.value.code, caught.value.path) == ("bad_value", path)


def test_secrets_are_not_shown(s3: Any) -> None:
    assert "secret" not in repr(Objects("s3://rows/x", s3.options))


def test_a_wrong_secret_opens_nothing(s3: Any, tmp_path: Path) -> None:
    wrong = Objects(s3.new_url(), {**s3.options, "secret_access_key": "guessed"})
    with pytest.raises(OSError, match="privileges"):
        Store(tmp_path, objects=wrong)


def test_leftovers_are_swept_when_nobody_can_be_writing(tmp_path: Path, objects: Objects) -> None:
    with Store(tmp_path, objects=objects) as store:
        handle = kept(store)
        place, api = remote(objects)
        api.put(place, f"{handle}/0123-000009.mlp_act.1.safetensors", b"half a shard")
        (tmp_path / "cache" / "0123.part").write_bytes(b"half a file")
        assert [line.endswith("not in the catalog") for line in store.check()] == [True]
        with Store(tmp_path, objects=objects):  # not alone
            assert len(store.check()) == 1
    with Store(tmp_path, objects=objects) as store:
        assert store.check() == []
        assert not (tmp_path / "cache" / "0123.part").exists()
        assert_prompts(store.open("alice", handle), range(40))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "the writer made no progress"


def test_a_writer_killed_on_the_way_to_the_bucket(tmp_path: Path, objects: Objects) -> None:
    rng = random.Random(5)
    with Store(tmp_path, objects=objects, shard_bytes=shard_bytes()) as store:
        handle = store.create("alice", "smol", "f1", SITES, "p1", dtype="bfloat16", resumable=True).id
    options = [f"{name}={value}" for name, value in objects.options.items()]
    command = [sys.executable, str(SCRIPT), str(tmp_path), handle, str(N_PROMPTS), objects.url, *options]
    seen = [0]
    for trial in range(3):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "going\n"
            if trial == 2:
                assert process.stdout.readline() == "finished\n"
                continue
            enough = len(listed(objects)) + rng.randint(3, 7)
            wait_for(lambda enough=enough: len(listed(objects)) >= enough)
            process.kill()
        with Store(tmp_path, objects=objects) as store:
            assert store.check() == []
            reader = store.open("alice", handle, partial=True)
            there = sorted(set(reader.rows().prompt.tolist()))
            assert there == list(range(len(there)))
            assert len(there) >= seen[-1]
            assert_prompts(reader, there)
            seen.append(len(there))
    assert 0 < seen[-1] < N_PROMPTS
    with Store(tmp_path, objects=objects) as store:
        assert store.verify() == []
        assert_prompts(store.open("alice", handle), range(N_PROMPTS))


def test_a_server_that_dies_loses_nothing_that_was_promised(
    tmp_path: Path, s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket, "_RETRY", {"max_retries": 0})
    with Store(tmp_path, objects=Objects(s3.new_url(), s3.options)) as store:
        writer = store.create("alice", "smol", "f1", SITES, "p1", dtype="bfloat16")
        for prompt in range(10):
            writer.append(*prompt_rows(prompt))
        writer.flush()
        writer.append(*prompt_rows(10))
        s3.kill()
        with pytest.raises(OSError, match="error sending request"):
            writer.flush()
        assert writer.committed.tolist() == list(range(10))
        s3.restart()
        assert writer.finish().n_rows == len(keys(range(11)))  # the buffer was kept
        assert_prompts(store.open("alice", writer.id), range(11))
        assert store.check() == store.verify() == []
