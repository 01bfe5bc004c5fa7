"""Handles: what is kept of them, whose they are, and one answer for all that are not there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from gate_places import Place
from hypothesis import given
from hypothesis import strategies as st

from trocar.errors import NotFound
from trocar.gate.database import Database
from trocar.gate.handles import ACTIVATIONS, Handle, Handles, Origin, new_activations, new_artifact
from trocar.graph.facts import HandleFacts

MAKER = ("key", "token")
ROWS = Handle(
    id="act_" + "1" * 32,
    tenant="lab",
    kind=ACTIVATIONS,
    model="m",
    fingerprint="f",
    shapes={"resid_post.1": {"rows": (8,)}, "z.2": {"rows": (16,)}},
    counts=(2, 0, 3),
    origins={"resid_post.1": Origin(3, first=True), "z.2": Origin(None, first=False)},
    created_ms=5,
    maker=MAKER,
)
PROBE = Handle(
    id="art_" + "2" * 32,
    tenant="lab",
    kind="mean_diff",
    model="m",
    fingerprint="f",
    shapes={"resid_post.1": {"direction": (8,), "weights": (8,), "bias": (1,)}},
    source=ROWS.id,
    created_ms=6,
    maker=MAKER,
)
MAP = replace(
    PROBE,
    id="art_" + "3" * 32,
    kind="linear_map",
    shapes={"z.2": {"map": (16, 8), "bias": (8,)}},
    own_targets=True,
)


@pytest.fixture
def handles(somewhere: Place) -> Iterator[Handles]:
    database = Database(somewhere.url)
    yield Handles(database)
    database.close()


def add(handles: Handles, made: Sequence[Handle]) -> None:
    """What the ledger does when a request that made them is charged."""
    with handles._database.write() as connection:
        handles.enter(connection, made, MAKER)


def absent(handles: Handles, tenant: str, name: str) -> str:
    with pytest.raises(NotFound) as caught:
        handles.find(tenant, name)
    assert (caught.value.code, caught.value.path) == ("handle_not_found", "handle")
    return caught.value.reason.replace(name[:40], "X")


def test_what_is_added_is_found_as_it_was(handles: Handles) -> None:
    add(handles, (PROBE, ROWS))
    add(handles, (MAP,))
    for handle in (ROWS, PROBE, MAP):
        assert handles.find("lab", handle.id) == handle
    assert handles.list("lab") == (ROWS, PROBE, MAP)  # oldest first
    assert handles.list("other") == ()


def test_nothing_to_add_is_nothing(handles: Handles) -> None:
    add(handles, ())
    assert handles.list("lab") == ()


def test_a_time_is_added(handles: Handles) -> None:
    add(handles, (replace(ROWS, created_ms=0),))
    assert handles.find("lab", ROWS.id).created_ms > 1_600_000_000_000


def test_absent_foreign_deleted_and_malformed_are_one_answer(handles: Handles) -> None:
    add(handles, (ROWS, PROBE))
    handles.delete("lab", PROBE.id)
    names = [("other", ROWS.id), ("lab", PROBE.id), ("lab", new_activations()), ("lab", "x"), ("lab", ROWS.id + "0"),
             ("lab", ROWS.id.upper()), ("lab", "../" * 20), ("lab", "act_" + "é" * 32), ("lab", "")]  # fmt: skip
    assert len({absent(handles, *name) for name in names if name[1]}) == 1
    absent(handles, "lab", "")


def test_only_its_tenant_deletes(handles: Handles) -> None:
    add(handles, (ROWS,))
    for tenant, name in (("other", ROWS.id), ("lab", "x")):
        with pytest.raises(NotFound):
            handles.delete(tenant, name)
    assert handles.find("lab", ROWS.id) == ROWS
    handles.delete("lab", ROWS.id)
    with pytest.raises(NotFound):
        handles.delete("lab", ROWS.id)


def test_of_several_handles_all_or_none(handles: Handles) -> None:
    from sqlalchemy.exc import IntegrityError

    from trocar.errors import ServerFault

    add(handles, (ROWS,))
    with pytest.raises((ServerFault, IntegrityError)):
        add(handles, (PROBE, ROWS))
    assert handles.list("lab") == (ROWS,)


def test_rows_and_widths() -> None:
    assert (ROWS.rows, PROBE.rows) == (5, 0)
    assert ROWS.widths == {"resid_post.1": 8, "z.2": 16}
    assert PROBE.widths == {"resid_post.1": 8}


def test_what_the_checker_may_know() -> None:
    assert ROWS.facts() == HandleFacts(
        handle=ROWS.id, kind="activations", fingerprint="f", widths=ROWS.widths, rows_per_prompt=(2, 0, 3)
    )
    assert (PROBE.facts().kind, PROBE.facts().has_probe, PROBE.facts().widths) == (
        "artifact", True, {"resid_post.1": 8},
    )  # fmt: skip
    assert (MAP.facts().has_probe, MAP.facts().widths) == (False, {})  # a map is no direction


def test_new_ids_are_told_apart_and_guessed_by_nobody() -> None:
    made = [new_activations() for _ in range(100)] + [new_artifact() for _ in range(100)]
    assert len(set(made)) == 200
    assert {(name[:4], len(name)) for name in made} == {("act_", 36), ("art_", 36)}


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=20),
        st.builds(Origin, st.none() | st.integers(0, 99), st.booleans()),
        max_size=4,
    ),
    st.lists(st.integers(0, 10**6), max_size=5).map(tuple),
    st.text(max_size=20),
)
def test_a_row_gives_back_its_handle(origins: Any, counts: tuple[int, ...], source: str) -> None:
    from trocar.gate import handles as room

    handle = replace(ROWS, origins=origins, counts=counts, source=source)
    row: Any = room._row(handle)
    assert room._handle(row) == handle
