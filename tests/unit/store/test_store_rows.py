"""What goes in comes out: canonical order, shards, zero copies, refusals of rows that do not fit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file

from trocar import errors
from trocar.store import RowTable, Store, Writer

SITES = {"resid_post.3": 5, "mlp_act.0": 3}
PROMPTS = [2, 0, 1, 0, 2, 1, 0, 2]
POSITIONS = [1, 2, 0, 0, 0, 1, 1, 4]
CANONICAL = sorted(zip(PROMPTS, POSITIONS, strict=True))


def table(keys: list[tuple[int, int]], label: Any = None) -> RowTable:
    return RowTable.of(
        prompt=[p for p, _ in keys],
        position=[q for _, q in keys],
        token_id=[1000 * p + q for p, q in keys],
        token=[f"é{p}/{q}" for p, q in keys],
        phase=["gen" if q > 1 else "prompt" for _, q in keys],
        label=label,
    )


def vectors(keys: list[tuple[int, int]]) -> dict[str, npt.NDArray[np.float32]]:
    """The vector of a row names its key and its feature."""
    return {
        site: np.array([[p * 100 + q + j / 8 for j in range(w)] for p, q in keys], np.float32).reshape(-1, w)
        for site, w in SITES.items()
    }


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path) as opened:
        yield opened
        assert opened.check() == []
        assert list((tmp_path / "tmp").iterdir()) == []


def new(store: Store, **options: Any) -> Writer:
    return store.create("alice", "smol", "f1", SITES, "p1", **options)


def code(caught: pytest.ExceptionInfo[errors.TrocarError]) -> tuple[str, str]:
    return caught.value.code, caught.value.path


@pytest.mark.parametrize("flush_every", [1, 3, 8])
def test_rows_come_back_in_canonical_order(store: Store, flush_every: int) -> None:
    keys = list(zip(PROMPTS, POSITIONS, strict=True))
    with new(store) as writer:
        for start in range(0, len(keys), flush_every):
            part = keys[start : start + flush_every]
            writer.append(vectors(part), table(part))
            writer.flush()
        info = writer.finish()
    reader = store.open("alice", info.id)
    rows = reader.rows()
    assert list(zip(rows.prompt.tolist(), rows.position.tolist(), strict=True)) == CANONICAL
    assert rows.token_id.tolist() == [1000 * p + q for p, q in CANONICAL]
    assert rows.token.tolist() == [f"é{p}/{q}" for p, q in CANONICAL]
    assert rows.phase.tolist() == ["gen" if q > 1 else "prompt" for _, q in CANONICAL]
    assert rows.label is None
    for site, expected in vectors(CANONICAL).items():
        np.testing.assert_array_equal(reader.read(site), expected)
    assert reader.rows_per_prompt() == (3, 2, 3)
    assert (info.n_rows, info.state, dict(info.widths)) == (8, "complete", SITES)


@pytest.mark.parametrize("chosen", [[0], [2, 1], [0, 2], [1, 1, 0, 2], []])
@pytest.mark.parametrize("flush_every", [3, 8])
def test_some_prompts_only(store: Store, chosen: list[int], flush_every: int) -> None:
    keys = list(zip(PROMPTS, POSITIONS, strict=True))
    with new(store) as writer:
        for start in range(0, len(keys), flush_every):
            writer.append(
                vectors(keys[start : start + flush_every]), table(keys[start : start + flush_every])
            )
            writer.flush()
        info = writer.finish()
    reader = store.open("alice", info.id)
    kept = [key for key in CANONICAL if key[0] in chosen]
    np.testing.assert_array_equal(reader.read("resid_post.3", chosen), vectors(kept)["resid_post.3"])
    assert reader.rows(chosen).token_id.tolist() == [1000 * p + q for p, q in kept]


def test_random_arrival_over_many_bounded_shards(store: Store, tmp_path: Path) -> None:
    keys = [(p, q) for p in range(40) for q in range(1 + p % 9)]
    shuffled = [keys[i] for i in np.random.default_rng(3).permutation(len(keys))]
    with Store(tmp_path, shard_bytes=4 * 8 * 16) as small, new(small) as writer:  # 16 rows of width 8
        for start in range(0, len(keys), 50):
            writer.append(vectors(shuffled[start : start + 50]), table(shuffled[start : start + 50]))
            partial = small.open("alice", writer.id, partial=True).info.n_rows
            assert partial == min(start + 50, len(keys)) // 16 * 16  # never more than a shard in memory
        info = writer.finish()
    reader = store.open("alice", info.id)
    for site, expected in vectors(keys).items():
        np.testing.assert_array_equal(reader.read(site), expected)
    assert reader.rows_per_prompt() == tuple(1 + p % 9 for p in range(40))


def test_rows_with_equal_keys_keep_their_order(store: Store) -> None:
    keys = [(0, 1)] * 3 + [(0, 0)]
    numbered = {site: np.arange(4 * w, dtype=np.float32).reshape(4, w) for site, w in SITES.items()}
    with new(store) as writer:
        writer.append(numbered, table(keys))
        info = writer.finish()
    assert store.open("alice", info.id).read("mlp_act.0")[:, 0].tolist() == [9, 0, 3, 6]


def test_one_shard_is_read_without_copying_and_cannot_be_written(store: Store) -> None:
    with new(store) as writer:
        writer.append(vectors(CANONICAL[::-1]), table(CANONICAL[::-1]))
        info = writer.finish()
    reader = store.open("alice", info.id)
    for prompts in (None, [0, 1]):
        rows = reader.read("resid_post.3", prompts)
        assert not rows.flags.owndata
        with pytest.raises(ValueError, match="read-only"):
            rows[0, 0] = 1.0
    gathered = reader.read("resid_post.3", [0, 2])
    assert not gathered.flags.writeable


def test_the_writer_copies_what_it_is_given(store: Store) -> None:
    given = vectors(CANONICAL)
    with new(store) as writer:
        writer.append(given, table(CANONICAL))
        for array in given.values():
            array[:] = -1
        info = writer.finish()
    np.testing.assert_array_equal(
        store.open("alice", info.id).read("mlp_act.0"), vectors(CANONICAL)["mlp_act.0"]
    )


def test_any_safetensors_reader_opens_a_shard(store: Store, tmp_path: Path) -> None:
    with new(store) as writer:
        writer.append(vectors(CANONICAL), table(CANONICAL))
        info = writer.finish()
    (path,) = (tmp_path / "data" / info.id).glob("*.mlp_act.0.safetensors")
    np.testing.assert_array_equal(load_file(path)["rows"], vectors(CANONICAL)["mlp_act.0"])
    assert int.from_bytes(path.read_bytes()[:8], "little") + 8 == 4096


@pytest.mark.parametrize(("label", "dtype"), [(list(range(8)), np.int64), ([0.5] * 8, np.float64)])
def test_labels_stay_with_their_rows(store: Store, label: list[float], dtype: type) -> None:
    keys = list(zip(PROMPTS, POSITIONS, strict=True))
    with new(store) as writer:
        for start in (0, 4):
            part = slice(start, start + 4)
            writer.append(vectors(keys[part]), table(keys[part], label[part]))
            writer.flush()
        info = writer.finish()
    found = store.open("alice", info.id).rows().label
    assert found is not None
    assert found.dtype == dtype
    assert found.tolist() == [label[keys.index(key)] for key in CANONICAL]


def test_a_handle_without_rows(store: Store) -> None:
    info = new(store).finish()
    reader = store.open("alice", info.id)
    assert reader.read("mlp_act.0").shape == (0, 3)
    assert (len(reader.rows()), reader.rows_per_prompt(), info.size_bytes) == (0, (), 0)


def test_an_exception_abandons_the_handle(store: Store, tmp_path: Path) -> None:
    writer = new(store)

    def run() -> None:
        with writer:
            writer.append(vectors(CANONICAL), table(CANONICAL))
            writer.flush()
            raise KeyError("the engine fell over")

    with pytest.raises(KeyError):
        run()
    (info,) = store.list("alice")
    assert (info.state, info.n_rows) == ("failed", 0)
    assert list((tmp_path / "data").iterdir()) == []
    with pytest.raises(RuntimeError, match="finished"):
        writer.flush()
    with pytest.raises(errors.ProgramError) as caught:
        store.open("alice", info.id)
    assert code(caught) == ("handle_incomplete", "handle")


def test_an_open_handle_opens_on_request_only(store: Store) -> None:
    writer = new(store)
    writer.append(vectors(CANONICAL), table(CANONICAL))
    with pytest.raises(errors.ProgramError) as caught:
        store.open("alice", writer.id)
    assert code(caught) == ("handle_incomplete", "handle")
    early = store.open("alice", writer.id, partial=True)
    writer.finish()
    assert early.read("mlp_act.0").shape == (0, 3)  # a reader is a snapshot
    assert store.open("alice", writer.id).read("mlp_act.0").shape == (8, 3)


BAD_VECTORS = [
    ("rows_mismatch", "vectors", lambda v: {"mlp_act.0": v["mlp_act.0"]}),
    ("rows_mismatch", "vectors", lambda v: {**v, "final_norm": v["mlp_act.0"]}),
    ("rows_mismatch", "vectors.mlp_act.0", lambda v: {**v, "mlp_act.0": v["mlp_act.0"][:-1]}),
    ("width_mismatch", "vectors.mlp_act.0", lambda v: {**v, "mlp_act.0": v["mlp_act.0"][:, :2]}),
    ("bad_value", "vectors.mlp_act.0", lambda v: {**v, "mlp_act.0": v["mlp_act.0"].astype(np.float64)}),
    ("bad_value", "vectors.mlp_act.0", lambda v: {**v, "mlp_act.0": v["mlp_act.0"].ravel()}),
]


@pytest.mark.parametrize(("name", "path", "change"), BAD_VECTORS)
def test_vectors_that_do_not_fit_are_refused_whole(store: Store, name: str, path: str, change: Any) -> None:
    with new(store) as writer:
        with pytest.raises(errors.ProgramError) as caught:
            writer.append(change(vectors(CANONICAL)), table(CANONICAL))
        assert code(caught) == (name, path)
        assert writer.finish().n_rows == 0


@pytest.mark.parametrize(
    ("name", "column", "values"),
    [
        ("rows_mismatch", "position", [0]),
        ("rows_mismatch", "label", [1, 2, 3]),
        ("bad_value", "prompt", [-1, 0]),
        ("bad_value", "prompt", [0.5, 1.0]),
        ("bad_value", "phase", ["prompt", "sample"]),
        ("bad_value", "token", ["a", 5]),
        ("bad_value", "label", [1, "b"]),
        ("bad_value", "label", [0.5, float("nan")]),
        ("bad_value", "labels", {"token": [1, 2]}),
        ("bad_value", "labels", {"Not a name": [1, 2]}),
        ("rows_mismatch", "role", ["user"]),
        ("bad_value", "role", ["user", 3]),
        ("bad_value", "prompt", [0, 1 << 40]),
        ("bad_value", "position", [0, 1 << 24]),
    ],
)
def test_row_tables_are_checked(name: str, column: str, values: Any) -> None:
    good: dict[str, Any] = {
        "prompt": [0, 0],
        "position": [0, 1],
        "token_id": [5, 6],
        "token": ["a", "b"],
        "phase": ["prompt", "gen"],
    }
    assert len(RowTable.of(**good)) == 2
    with pytest.raises(errors.ProgramError) as caught:
        RowTable.of(**{**good, column: values})
    assert caught.value.code == name


def test_labels_for_all_rows_or_for_none(store: Store) -> None:
    with new(store) as writer:
        writer.append(vectors(CANONICAL), table(CANONICAL))
        with pytest.raises(errors.ProgramError) as caught:
            writer.append(vectors(CANONICAL), table(CANONICAL, [1] * 8))
        assert code(caught) == ("rows_mismatch", "rows.label")


def test_what_was_not_stored_is_refused_by_name(store: Store) -> None:
    with new(store) as writer:
        writer.append(vectors(CANONICAL), table(CANONICAL))
        info = writer.finish()
    reader = store.open("alice", info.id)
    with pytest.raises(errors.ProgramError) as caught:
        reader.read("resid_post.4")
    assert (caught.value.code, caught.value.closest) == ("site_unavailable", "resid_post.3")
    with pytest.raises(errors.ProgramError) as caught:
        reader.rows([0, 3])
    assert code(caught) == ("bad_value", "prompts")


@pytest.mark.parametrize(
    ("widths", "name"),
    [
        ({}, "nothing_returned"),
        ({"resid_post.3": 0}, "bad_value"),
        ({"resid_pots.3": 4}, "unknown_site"),
        ({"../resid_post.3": 4}, "unknown_site"),
        ({"resid_post.3\n": 4}, "unknown_site"),
    ],
)
def test_sites_and_widths_are_checked(store: Store, widths: dict[str, int], name: str) -> None:
    with pytest.raises(errors.ProgramError) as caught:
        store.create("alice", "smol", "f1", widths, "p1")
    assert caught.value.code == name
    assert store.list("alice") == []
