"""Views: the rows that conditions mean, against a list of dictionaries that is filtered by hand."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from trocar import errors
from trocar.store import RowTable, Store, View, concat

SITES = {"resid_post.3": 4, "resid_post.7": 4, "mlp_out.7": 2, "final_norm": 3}
ROLES, SPLITS = ["user", None, "assistant"], ["train", "test", None]
Row = dict[str, Any]


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is about surviving."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def made(n_prompts: int = 30) -> list[Row]:
    """Rows in canonical order."""
    return [
        {
            "prompt": p, "position": q, "token_id": (p * 5 + q) % 17, "token": f"w{q % 3}",
            "phase": "gen" if q > 3 else "prompt", "role": ROLES[(p + q) % 3], "split": SPLITS[p % 3],
            "label": p % 2, "score": p / 8 - 1, "city": ["Rome", "Oslo", "Bonn"][p % 3],
        }
        for p in range(n_prompts)
        for q in range(1, 2 + p % 6)
    ]  # fmt: skip


ROWS = made()


def columns(rows: list[Row]) -> dict[str, list[Any]]:
    return {name: [r[name] for r in rows] for name in ROWS[0]}


def vectors(rows: list[Row], shift: int = 0) -> dict[str, npt.NDArray[np.float32]]:
    """A row's vector names its prompt and position."""
    return {
        site: np.array([[r["prompt"], r["position"], shift, -1][:width] for r in rows], np.float32).reshape(-1, width)
        for site, width in SITES.items()
    }  # fmt: skip


def kept(store: Store, rows: list[Row], *, shift: int = 0, names: tuple[str, ...] = ("label", "score", "city"),
         per_shard: int = 25, seed: int = 1, fingerprint: str = "f1") -> str:  # fmt: skip
    """A handle of these rows, which arrive in any order."""
    shuffled = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]
    with store.create("alice", "smol", fingerprint, SITES, "p1", dtype="bfloat16") as writer:
        for start in range(0, len(rows), per_shard):
            part = shuffled[start : start + per_shard]
            given = columns(part)
            labels = {name: given.pop(name) for name in ("label", "score", "city")}
            table = RowTable.of(**given, labels={k: v for k, v in labels.items() if k in names})
            writer.append(vectors(part, shift), table)
            writer.flush()
        return writer.finish().id


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path) as opened:
        yield opened
        assert opened.check() == opened.verify() == []


@pytest.fixture(scope="module")
def acts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[View]:
    with Store(tmp_path_factory.mktemp("acts")) as store:
        yield store.open("alice", kept(store, ROWS)).view()


def shown(view: View) -> list[Row]:
    table = view.rows()
    fixed = ["prompt", "position", "token_id", "token", "phase", "role", "split"]
    found: dict[str, Any] = {name: getattr(table, name) for name in fixed} | dict(table.labels)
    return [{name: column[i] for name, column in found.items()} for i in range(len(table))]


def last(rows: list[Row], row: Row, back: int = 1) -> bool:
    return row["position"] == sorted(r["position"] for r in rows if r["prompt"] == row["prompt"])[-back:][0]


CONDITIONS: list[tuple[dict[str, Any], Callable[[Row], bool]]] = [
    ({}, lambda r: True),
    ({"label": 1}, lambda r: r["label"] == 1),
    ({"label": True}, lambda r: r["label"] == 1),
    ({"prompt": [3, 5, 29]}, lambda r: r["prompt"] in (3, 5, 29)),
    ({"prompt": []}, lambda r: False),
    ({"prompt": np.array([4])}, lambda r: r["prompt"] == 4),
    ({"prompt": range(2, 20, 5)}, lambda r: r["prompt"] in (2, 7, 12, 17)),
    ({"prompt": slice(25, None)}, lambda r: r["prompt"] >= 25),
    ({"position": slice(2, 4)}, lambda r: 2 <= r["position"] < 4),
    ({"position": 2}, lambda r: r["position"] == 2),
    ({"position": -1}, lambda r: last(ROWS, r)),
    ({"position": [-1, 1]}, lambda r: last(ROWS, r) or r["position"] == 1),
    ({"position": -2}, lambda r: r["prompt"] % 6 > 0 and last(ROWS, r, 2)),
    ({"position": slice(-2, None)}, lambda r: last(ROWS, r) or last(ROWS, r, 2)),
    ({"position": range(-2, 0)}, lambda r: last(ROWS, r) or last(ROWS, r, 2)),
    ({"position": -1, "phase": "gen"}, lambda r: last(ROWS, r) and r["phase"] == "gen"),
    ({"token": "w2"}, lambda r: r["token"] == "w2"),
    ({"token_id": {1, 4}}, lambda r: r["token_id"] in (1, 4)),
    ({"role": "user"}, lambda r: r["role"] == "user"),
    ({"role": None}, lambda r: r["role"] is None),
    ({"role": ["user", None]}, lambda r: r["role"] in ("user", None)),
    ({"split": "train", "phase": "gen"}, lambda r: r["split"] == "train" and r["phase"] == "gen"),
    ({"score": slice(None, 0.25)}, lambda r: r["score"] < 0.25),
    ({"score": slice(0, 1)}, lambda r: 0 <= r["score"] < 1),
    ({"city": ("Oslo", "Bonn")}, lambda r: r["city"] in ("Oslo", "Bonn")),
    ({"city": "'; DROP TABLE rows; --"}, lambda r: False),
]


def assert_is(view: View, rows: list[Row], shift: int = 0) -> None:
    assert shown(view) == rows
    assert len(view) == len(rows)
    for site in view.sites:
        found = view.site(site)
        assert len(found) == len(rows)
        expected = vectors(rows, shift)[site]
        np.testing.assert_array_equal(found.read(), expected)
        np.testing.assert_array_equal(
            np.concatenate([expected[:0], *(b.copy() for b in found.blocks(3))]), expected
        )
        if rows:
            np.testing.assert_array_equal(found.take(np.array([len(rows) - 1, 0])), expected[[-1, 0]])


@pytest.mark.parametrize(("conditions", "means"), CONDITIONS, ids=[str(c) for c, _ in CONDITIONS])
def test_where(acts: View, conditions: dict[str, Any], means: Callable[[Row], bool]) -> None:
    rows = [r for r in ROWS if means(r)]
    assert 0 < len(rows) < len(ROWS) or conditions in ({}, {"prompt": []}) or "DROP" in str(conditions)
    assert_is(acts.where(**conditions), rows)


def test_conditions_narrow_what_is_left(acts: View) -> None:
    """The last stored token stays the last stored one, also where it was filtered out before."""
    both = acts.where(phase="prompt").where(position=-1)
    assert_is(both, [r for r in ROWS if r["phase"] == "prompt" and last(ROWS, r)])
    assert 0 < len(both) < len(acts.where(position=-1))


def test_sites_and_layers(acts: View) -> None:
    assert acts.sites == tuple(SITES)
    assert acts.where(layer=7).sites == ("resid_post.7", "mlp_out.7")
    assert acts.where(layer=[3, 7], site=["mlp_out.7", "final_norm"]).sites == ("mlp_out.7",)
    narrow = acts.where(label=1, position=-1, layer=range(7))
    assert (narrow.sites, narrow.widths) == (("resid_post.3",), {"resid_post.3": 4})
    assert_is(narrow, [r for r in ROWS if r["label"] == 1 and last(ROWS, r)])
    for refused in (
        lambda: narrow.site("final_norm"),
        lambda: acts.where(layer=5),
        lambda: narrow.where(site="mlp_out.7"),
    ):
        with pytest.raises(errors.ProgramError) as caught:
            refused()
        assert caught.value.code == "site_unavailable"


BAD = [
    ({"colour": 1}, "unknown_field", None), ({"tokens": "a"}, "unknown_field", "token"),
    ({"prompt": 1.5}, "bad_value", None), ({"prompt": True}, "bad_value", None), ({"prompt": "1"}, "bad_value", None),
    ({"prompt": None}, "bad_value", None), ({"token": 3}, "bad_value", None), ({"city": 3}, "bad_value", None),
    ({"score": float("nan")}, "bad_value", None), ({"phase": "gne"}, "bad_value", "gen"),
    ({"prompt": slice(1, 5, 2)}, "bad_value", None), ({"prompt": slice(None)}, "bad_value", None),
    ({"token": slice("a", "b")}, "bad_value", None), ({"position": slice(-3, 2)}, "bad_value", None),
    ({"position": slice(0, -1)}, "bad_value", None), ({"label": "1 OR 1=1"}, "bad_value", None),
    ({"label": 1 << 70}, "bad_value", None),
]  # fmt: skip


@pytest.mark.parametrize(("conditions", "name", "near"), BAD)
def test_bad_conditions_are_refused_at_once(
    acts: View, conditions: dict[str, Any], name: str, near: str | None
) -> None:
    with pytest.raises(errors.ProgramError) as caught:
        acts.where(**conditions)
    assert (caught.value.code, caught.value.path) == (name, f"where.{next(iter(conditions))}")
    if near:
        assert caught.value.closest == near


def test_rows_without_a_column_cannot_be_asked_for_it(store: Store) -> None:
    table = RowTable.of(prompt=[0], position=[0], token_id=[1], token=["t"], phase=["gen"])
    with store.create("alice", "smol", "f1", {"final_norm": 3}, "p1") as writer:
        writer.append({"final_norm": np.ones((1, 3), np.float32)}, table)
        bare = store.open("alice", writer.finish().id).view()
    for name in ("role", "split", "label"):
        with pytest.raises(errors.ProgramError) as caught:
            bare.where(**{name: "user"})
        assert caught.value.code == "unknown_field"
    nothing = store.open("alice", store.create("alice", "s", "f1", {"final_norm": 3}, "p").finish().id).view()
    assert len(nothing.where(prompt=1, position=-1).rows()) == 0


def test_samples_are_drawn_without_putting_back(acts: View) -> None:
    source = acts.where(label=1)
    drawn = source.sample(20, seed=3)
    assert_is(drawn, [r for r in ROWS if r in shown(drawn)])
    assert len(drawn) == 20
    assert all(r["label"] == 1 for r in shown(drawn))
    assert shown(source.sample(20, seed=3)) == shown(drawn) != shown(source.sample(20, seed=4))
    assert shown(source.sample(len(source), seed=0)) == shown(source)
    assert_is(drawn.where(phase="gen"), [r for r in shown(drawn) if r["phase"] == "gen"])
    often = np.zeros(len(ROWS))
    for seed in range(60):
        often[[ROWS.index(r) for r in shown(acts.sample(30, seed))]] += 1
    assert (often.min(), often.max()) > (0, 0)
    assert abs(often[: len(ROWS) // 2].sum() / often.sum() - 0.5) < 0.1
    with pytest.raises(errors.ProgramError) as caught:
        len(source.sample(len(source) + 1, seed=0))
    assert caught.value.code == "too_few_rows"


@pytest.mark.parametrize("by", ["prompt", "row", "city", "role", "score"])
def test_splits_keep_what_belongs_together(acts: View, by: str) -> None:
    first, second = acts.where(phase="prompt").split(0.7, seed=5, by=by)
    rows = [r for r in ROWS if r["phase"] == "prompt"]
    one, two = shown(first), shown(second)
    assert_is(first, one)
    assert_is(second, two)
    assert [r for r in rows if r in one or r in two] == rows
    assert len(one) + len(two) == len(rows)
    groups = [range(len(rows))] if by == "row" else [{r[by] for r in side} for side in (one, two)]
    if by == "row":
        assert len(one) == round(0.7 * len(rows))
    else:
        assert groups[0] & groups[1] == set()
        assert len(groups[0]) == round(0.7 * len(groups[0] | groups[1]))
    again, _ = acts.where(phase="prompt").split(0.7, seed=5, by=by)
    assert shown(again) == one


@pytest.mark.parametrize(("fraction", "seed", "by", "name"), [
    (0, 0, "prompt", "bad_value"), (1.0, 0, "prompt", "bad_value"), (0.5, -1, "prompt", "bad_value"),
    (0.5, 0, "colour", "unknown_field"), (0.01, 0, "prompt", "too_few_rows"), (0.99, 0, "city", "too_few_rows"),
])  # fmt: skip
def test_splits_with_an_empty_side_are_refused(
    acts: View, fraction: float, seed: int, by: str, name: str
) -> None:
    with pytest.raises(errors.ProgramError) as caught:
        len(acts.split(fraction, seed, by)[0])
    assert caught.value.code == name


def test_views_are_joined(store: Store, acts: View) -> None:
    more = made(9)
    other = store.open("alice", kept(store, more, shift=5)).view()
    both = concat([acts.where(label=1), other])
    odd = [r for r in ROWS if r["label"] == 1]
    assert shown(both) == odd + more
    assert both.rows().part is not None
    assert both.rows().part.tolist() == [0] * len(odd) + [1] * len(more)
    for site in SITES:
        expected = np.concatenate([vectors(odd)[site], vectors(more, 5)[site]])
        np.testing.assert_array_equal(both.site(site).read(), expected)
        at = np.array([len(odd), 0, len(odd) - 1])
        np.testing.assert_array_equal(both.site(site).take(at), expected[at])
    assert shown(both.where(prompt=3)) == [r for r in odd if r["prompt"] == 3] + [
        r for r in more if r["prompt"] == 3
    ]
    assert shown(both.where(part=1, phase="gen")) == [r for r in more if r["phase"] == "gen"]
    assert shown(both.where(part=range(1))) == odd
    first, second = both.split(0.5, seed=0)
    sides = [
        {(int(p), int(q)) for p, q in zip(s.rows().part, s.rows().prompt, strict=True)}
        for s in (first, second)
    ]
    assert sides[0] & sides[1] == set()
    assert len(sides[0]) + len(sides[1]) == 15 + 9
    assert {q for _, q in sides[0]} & {q for _, q in sides[1]}, (
        "equal numbers of other handles are other prompts"
    )
    three = concat([both, acts])
    assert (len(three), len(three.sample(10, 0))) == (len(odd) + len(more) + len(ROWS), 10)
    assert set(three.rows().part.tolist()) == {0, 1, 2}


def test_what_does_not_fit_is_not_joined(store: Store, acts: View) -> None:
    foreign = store.open("alice", kept(store, made(3), fingerprint="f2")).view()
    unlabelled = store.open("alice", kept(store, made(3), names=("label",))).view()
    cases: list[tuple[list[View], str]] = [
        ([], "nothing_returned"), ([acts, foreign], "wrong_handle"), ([acts, unlabelled], "rows_mismatch"),
        ([acts, acts.where(layer=7)], "width_mismatch"),
    ]  # fmt: skip
    for views, name in cases:
        with pytest.raises(errors.ProgramError) as caught:
            concat(views)
        assert caught.value.code == name
    assert len(concat([acts])) == len(ROWS)


def test_views_read_nothing_before_they_are_asked(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from trocar.store import filters

    asked: list[int] = []
    real = filters.matching
    monkeypatch.setattr(filters, "matching", lambda *a: (asked.append(1), real(*a))[1])
    acts = store.open("alice", kept(store, ROWS)).view()
    train, test = acts.where(position=-1).where(label=1).split(0.5, seed=0)
    joined = concat([train.sample(3, seed=1), test])
    assert asked == []
    assert len(joined) == 3 + len(test)
    assert len(asked) == 2  # once per where, and not again
    joined.rows()
    assert len(asked) == 2
