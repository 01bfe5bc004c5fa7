"""The error tree: the table is whole, refusals survive the network, texts say what to do."""

from __future__ import annotations

import json
import time

import pytest

from trocar import errors
from trocar.codes import CODES, TABLE

LEAVES = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, errors.TrocarError)]


@pytest.mark.parametrize("code", CODES.values(), ids=lambda c: c.name)
def test_a_code_is_complete(code: errors.Code) -> None:
    assert issubclass(errors.kind_of(code.name), errors.TrocarError)
    assert errors.kind_of(code.name) is not errors.TrocarError
    assert code.summary.endswith(".")
    assert code.next_step.endswith((".", "`"))


def test_names_are_used_once() -> None:
    assert len(CODES) == len(TABLE)


@pytest.mark.parametrize("code", CODES)
def test_a_refusal_survives_the_network(code: str) -> None:
    sent = errors.refuse(code, "nodes[3].site", "it is 'x'", closest="y")
    sent = type(sent)([*sent.refusals, errors.refusal("unknown_site", "b", "two")], "req_1")
    got = errors.from_json(json.loads(json.dumps(sent.as_json())))
    assert type(got) is type(sent) is errors.kind_of(code)
    assert got.refusals == sent.refusals
    assert got.request_id == "req_1"
    assert (got.code, got.path, got.reason, got.closest) == (code, "nodes[3].site", "it is 'x'", "y")
    assert got.next_step == CODES[code].next_step
    assert got.retryable == CODES[code].retryable
    assert got.as_json()["error"]["refusals"][0]["docs"] == f"docs/errors/{code}.md"


def test_answers_of_a_newer_server_are_read() -> None:
    body = errors.refuse("internal", "p", "r").as_json()
    body["error"]["kind"] = "NewKind"
    body["error"]["refusals"][0]["code"] = "new_code"
    got = errors.from_json(body, "req_2")
    assert type(got) is errors.ServerFault
    assert (got.code, got.reason, got.request_id) == ("internal", "r", "req_2")


def test_the_text_says_what_where_nearest_and_next() -> None:
    text = str(
        errors.refuse(
            "unknown_site", "program.nodes[0].site", "'resid' is not a site", closest="resid_post.0"
        )
    )
    for part in (
        "ProgramError",
        "[unknown_site]",
        "program.nodes[0].site",
        "'resid'",
        "'resid_post.0'",
        "model.sites",
        "docs/errors/unknown_site.md",
    ):
        assert part in text
    both = errors.ProgramError(
        [errors.refusal("unknown_site", "", "one"), errors.refusal("unknown_op", "b", "two")], "req_3"
    )
    assert "one" in str(both)
    assert "two" in str(both)
    assert "request req_3" in str(both)
    assert " at " not in str(both).splitlines()[0]


def test_an_error_without_a_refusal_is_a_fault() -> None:
    with pytest.raises(ValueError, match="at least one"):
        errors.BadRequest([])


def test_classes_have_a_status_and_a_category() -> None:
    table = {k.__name__: (k.status, k.category) for k in LEAVES}
    assert table == {
        "TrocarError": (500, "server"), "BadRequest": (400, "user"), "AuthError": (401, "user"),
        "PolicyRefusal": (403, "policy"), "NotFound": (404, "user"), "Conflict": (409, "user"),
        "ProgramError": (422, "user"), "RunFailed": (422, "user"), "Overloaded": (503, "capacity"),
        "ServerFault": (500, "server"), "ClientError": (0, "user"),
    }  # fmt: skip


def test_the_nearest_word() -> None:
    assert errors.closest("resid_pots", ("resid_pre", "resid_post")) == "resid_post"
    assert errors.closest("xyz", ("resid_pre",)) is None
    assert errors.closest("x", ()) is None


def test_looking_for_the_nearest_word_is_bounded() -> None:
    started = time.thread_time()
    errors.closest("ab" * 1_000_000, (f"{'ab' * 30}{i}" for i in range(1_000_000)))
    assert time.thread_time() - started < 0.5
