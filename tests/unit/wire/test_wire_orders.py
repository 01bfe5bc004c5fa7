"""Bodies of frames between gate and worker: sheets, faults, counters and arrays, exactly as they were meant."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trocar.codes import CODES
from trocar.errors import TrocarError
from trocar.graph import ops
from trocar.graph.cost import Prices
from trocar.graph.facts import HandleFacts
from trocar.graph.labels import STRICT
from trocar.graph.program import Generation, Program
from trocar.wire import calls, orders
from trocar.wire.calls import Ending, Words
from trocar.wire.orders import FAULTS, EraseSheet, FitSheet, RunSheet
from trocar.wire.requests import FitRequest, RunRequest
from trocar.wire.results import Charge

NODES = ("a", "b", "c")
KNOWN = HandleFacts(
    handle="act_1", kind="activations", fingerprint="f", widths={"resid_post.1": 8}, rows_per_prompt=(1, 2)
)


def code(attempt: Any) -> str:
    with pytest.raises(TrocarError) as caught:
        attempt()
    return caught.value.code


def sheet(**changed: Any) -> RunSheet:
    program = Program(nodes=(ops.Text(id="t"),))
    request = RunRequest(
        model="m", prompts=("caf\u00e9 \U0001f600", (1, 2)), program=program, generation=Generation()
    )
    fields: dict[str, Any] = {
        "model": "m", "order": "o.1", "tenant": "alice", "request": request, "handles": ({"kept": "act_1"},),
        "made": {"step0.kept": "act_2"}, "begun": True, "known": {"act_1": KNOWN},
        "prices": Prices(8, 256, 4, STRICT), "digest": "0" * 64,
    }  # fmt: skip
    return RunSheet(**{**fields, **changed})


def test_a_run_comes_out_as_it_went_in() -> None:
    vectors = {"v": np.arange(4, dtype=np.float32), "w": np.ones((2, 3), dtype=np.float32)}
    found, arrays = orders.run_sheet(orders.with_arrays(sheet(), vectors))
    assert found == sheet()
    assert found.prices == Prices(8, 256, 4, STRICT)
    assert {k: v.tolist() for k, v in arrays.items()} == {k: v.tolist() for k, v in vectors.items()}


def test_a_run_without_arrays_has_none() -> None:
    assert orders.run_sheet(orders.with_arrays(sheet(), {})) == (sheet(), {})


@pytest.mark.parametrize("labels", [(True, False), (1, 2), (0.5, 2.0), None])
def test_labels_keep_their_types(labels: Any) -> None:
    request = FitRequest(handle="act_" + "0" * 32, kind="ridge", labels=(1, 2))
    made = FitSheet(
        model="m", order="o", tenant="a", request=request, sites=("resid_post.1",), labels=labels,
        groups=("x", 1), artifact="art_1",
    )  # fmt: skip
    found = orders.read(FitSheet, made.model_dump_json().encode())
    assert found == made
    assert [type(x) for x in found.labels or ()] == [type(x) for x in labels or ()]


def test_what_is_no_sheet_is_refused() -> None:
    assert code(lambda: orders.read(EraseSheet, b"{}")) == "bad_frame"
    assert code(lambda: orders.run_sheet(b"nothing")) == "bad_frame"


def test_a_worker_can_name_sixteen_codes_and_no_more() -> None:
    assert len(set(FAULTS)) == len(FAULTS) == 16
    assert set(FAULTS) <= set(CODES)
    assert FAULTS[0] == "internal"


@given(st.sampled_from(FAULTS), st.one_of(st.none(), st.integers(0, 2)))
def test_faults_come_out_as_they_went_in(name: str, node: int | None) -> None:
    body = orders.pack_fault(name, node)
    assert len(body) == orders.FAULT_BYTES
    assert orders.unpack_fault(body, NODES) == (name, "" if node is None else NODES[node])


def test_a_code_without_a_number_is_internal() -> None:
    assert orders.unpack_fault(orders.pack_fault("budget_exhausted", None), NODES) == ("internal", "")


@pytest.mark.parametrize(("number", "node"), [(16, 0), (2**32 - 1, 0), (0, 4), (3, 2**32 - 1)])
def test_numbers_outside_the_tables_are_refused(number: int, node: int) -> None:
    assert code(lambda: orders.unpack_fault(struct.pack(">II", number, node), NODES)) == "bad_frame"


def test_a_fault_of_another_length_is_refused() -> None:
    assert code(lambda: orders.unpack_fault(b"1234567", NODES)) == "bad_frame"


def test_counters_and_counts() -> None:
    told = {name: i for i, name in enumerate(orders.STATS)}
    assert orders.unpack_stats(orders.pack_stats(told)) == told
    assert orders.unpack_count(orders.pack_count(7)) == 7


def test_arrays_stand_in_the_order_they_were_declared_in() -> None:
    made = {"b": np.array([[1.5, 2.5]], dtype="<f4"), "a": np.array([7], dtype="<i4")}
    body = orders.pack_arrays(made, ["a", "b"])
    assert body == struct.pack("<iff", 7, 1.5, 2.5)
    view = memoryview(body)
    assert orders.unpack_array(view, 0, "<i4", (1,)).tolist() == [7]
    second = orders.unpack_array(view, 4, "<f4", (1, 2))
    assert second.tolist() == [[1.5, 2.5]]
    assert not second.flags.writeable
    assert orders.unpack_array(view, 12, "<f4", (0, 3)).shape == (0, 3)


# ---- fronts ---------------------------------------------------------------------------------------


def test_a_call_comes_out_as_it_went_in() -> None:
    words = Words(verb="run", secret="trk_x", idempotency_key="once")
    vectors = {"v": np.arange(3, dtype=np.float32)}
    call = calls.unpack_call(calls.pack_call(words, sheet().request, vectors))
    assert call.words == words
    assert RunRequest.model_validate_json(call.request) == sheet().request
    assert call.arrays.startswith(b"TRCR")
    bare = calls.unpack_call(calls.pack_call(Words(verb="health")))
    assert (bare.request, bare.arrays) == (b"", b"")


def test_an_answer_comes_out_as_it_went_in() -> None:
    ending = Ending(status=200, charge=Charge(bits=7, seq=3, head="a" * 64, left_bits=None), retry_after_s=2)
    assert calls.unpack_answer(calls.pack_answer(ending, b"\x00payload")) == (ending, b"\x00payload")


@given(st.binary(max_size=60))
def test_other_bytes_are_no_call(raw: bytes) -> None:
    with pytest.raises(TrocarError):
        calls.unpack_call(raw)


def test_a_verb_that_there_is_not_is_refused() -> None:
    body = calls.pack_call(Words(verb="health")).replace(b"health", b"wealth")
    assert code(lambda: calls.unpack_call(body)) == "bad_value"
