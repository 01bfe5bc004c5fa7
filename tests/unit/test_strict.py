"""The strict reader: what is refused, with which code and where, and that it takes time linear in the bytes."""

# ruff: noqa: E501 - tables of cases, one a line
from __future__ import annotations

import json
import time
from typing import Annotated, Any

import pytest
from pydantic import Field

from trocar import errors, strict
from trocar.graph.program import Generation, Program
from trocar.wire.requests import Chat, FitRequest, RunRequest, TokenizeRequest

OPTIONS = {"op": ("read", "lens", "text"), "*": ("site", "top_k", "prompts", "model")}
ACTS = f"act_{'a' * 32}"


class Inner(strict.Strict):
    n: Annotated[int, Field(ge=0)] = 0
    x: float = 0.0


class Outer(strict.Strict):
    inner: Inner
    many: Annotated[tuple[Inner, ...], Field(max_length=3)] = ()


def refused(model: type[Any], raw: str | bytes) -> tuple[errors.Refusal, ...]:
    with pytest.raises(errors.TrocarError) as caught:
        strict.parse(model, raw.encode() if isinstance(raw, str) else raw, options=OPTIONS)
    return caught.value.refusals


@pytest.mark.parametrize(
    ("raw", "code", "path", "names"),
    [
        ('{"inner":{"x":NaN}}', "not_finite", "$", "NaN"),
        ('{"inner":{"x":-Infinity}}', "not_finite", "$", "-Infinity"),
        ('{"inner":{"x":1e999}}', "not_finite", "$", "1e999"),
        ('{"inner":{"n":1,"n":2}}', "duplicate_key", "n", "'n' appears twice"),
        ('{"inner":{"n":1,"\\u006e":2}}', "duplicate_key", "n", "'n'"),
        ('{"inner":{}', "bad_json", "$", "JSON"),
        ('{"inner":{}} x', "bad_json", "$", "JSON"),
        ("", "bad_json", "$", "JSON"),
        (b'{"inner":{"x":"\xff"}}', "bad_json", "$", "UTF-8"),
        ('{"inner":"\\ud800"}', "bad_json", "$", "UTF-8"),
        ('{"inner":{"n":true}}', "bad_value", "inner.n", "True"),
        ('{"inner":{"n":"2"}}', "bad_value", "inner.n", "'2'"),
        ('{"inner":{"n":1.5}}', "bad_value", "inner.n", "1.5"),
        ('{"inner":{"n":-1}}', "bad_value", "inner.n", "-1"),
        ('{"inner":{"x":"1"}}', "bad_value", "inner.x", "'1'"),
        ('{"inner":{"n":' + "9" * 1_000_000 + "}}", "bad_value", "$", "1000000 digits"),
        ('{"inner":{"y":1}}', "unknown_field", "inner.y", "'y'"),
        ("{}", "missing_field", "inner", "'inner'"),
        ("[]", "bad_value", "$", "[]"),
        ('{"inner":{},"many":[{},{"n":"x"}]}', "bad_value", "many[1].n", "'x'"),
        ('{"inner":{},"many":[{},{},{},{}]}', "too_large", "many", "4 many; one request takes at most 3"),
        ("[" * 100_000 + "]" * 100_000, "too_large", "$", "deeper than 32"),
        ('{"a":' * 33 + "1" + "}" * 33, "too_large", "$", "deeper than 32"),
        ("{" + ",".join(f'"k{i}":0' for i in range(65)) + "}", "too_large", "$", "65 keys"),
    ],
)
def test_one_fault_is_one_refusal(raw: str | bytes, code: str, path: str, names: str) -> None:
    found = refused(Outer, raw)
    assert [(f.code, f.path) for f in found] == [(code, path)]
    assert names in found[0].reason
    assert found[0].next_step
    assert len(found[0].reason) < 300


@pytest.mark.parametrize(
    ("body", "code", "path", "names", "closest"),
    [
        ({"op": "reed", "id": "r"}, "unknown_op", "nodes[0].op", "'reed'", "read"),
        ({"op": "__class__", "id": "r"}, "unknown_op", "nodes[0].op", "__class__", None),
        ({"op": "rеad", "id": "r"}, "unknown_op", "nodes[0].op", "rеad", "read"),
        ({"op": 1, "id": "r"}, "unknown_op", "nodes[0].op", "'1'", None),
        ({"op": "x" * 10_000, "id": "r"}, "unknown_op", "nodes[0].op", "xxx", None),
        ({"id": "r"}, "missing_field", "nodes[0].op", "'op'", None),
        ({"op": "text"}, "missing_field", "nodes[0].id", "'id'", None),
        ({"op": "text", "id": "t", "sight": 1}, "unknown_field", "nodes[0].sight", "'sight'", "site"),
        ({"op": "text", "id": "a b"}, "bad_value", "nodes[0].id", "'a b'", None),
        ({"op": "text", "id": "t\n"}, "bad_value", "nodes[0].id", "t", None),
        ({"op": "text", "id": "\u202et"}, "bad_value", "nodes[0].id", "pattern", None),
        ({"op": "text", "id": "t" * 65}, "bad_value", "nodes[0].id", "ttt", None),
        ({"op": "lens", "id": "t", "of": ["r"], "top_k": 21}, "bad_value", "nodes[0].top_k", "21", None),
        ({"op": "lens", "id": "t", "of": ["r"], "top_k": True}, "bad_value", "nodes[0].top_k", "True", None),
        ({"op": "lens", "id": "t", "of": ["r"], "top_k": 2**63 + 1}, "bad_value", "nodes[0].top_k", "9223372036854775809", None),
        ({"op": "lens", "id": "t", "of": ["r"], "top_k": 0}, "bad_value", "nodes[0].top_k", "0", None),
        ({"op": "lens", "id": "t", "of": []}, "bad_value", "nodes[0].of", "[]", None),
        ({"op": "logprobs", "id": "t", "tokens": []}, "bad_value", "nodes[0].tokens", "[]", None),
        ({"op": "logprobs", "id": "t", "tokens": [[True]]}, "bad_value", "nodes[0].tokens[0][0]", "True", None),
        ({"op": "logprobs", "id": "t", "tokens": list(range(21))}, "bad_value", "nodes[0].tokens[0]", "", None),
        ({"op": "stored", "id": "t", "site": "z.1", "handle": "../etc"}, "bad_value", "nodes[0].handle", "../etc", None),
        (7, "bad_value", "nodes[0]", "7", None),
    ],
)  # fmt: skip
def test_nodes(body: Any, code: str, path: str, names: str, closest: str | None) -> None:
    found = refused(Program, json.dumps({"nodes": [body]}))
    assert [(f.code, f.path, f.closest) for f in found] == [(code, path, closest)]
    assert names in found[0].reason


def test_no_node_and_no_prompt() -> None:
    assert [(f.code, f.path) for f in refused(Program, '{"nodes":[]}')] == [("nothing_returned", "nodes")]
    body = {"model": "m", "prompts": [], "program": {"nodes": [{"op": "text", "id": "t"}]}}
    assert [(f.code, f.path) for f in refused(RunRequest, json.dumps(body))] == [("empty_prompt", "prompts")]


@pytest.mark.parametrize(
    ("prompt", "path"),
    [
        (42, "prompts[0]"),
        ([1, "a"], "prompts[0][1]"),
        ([-1], "prompts[0][0]"),
        ([2**63], "prompts[0][0]"),
        ({"messages": []}, "prompts[0].messages"),
        ({"messages": [{"role": "user"}]}, "prompts[0].messages[0].content"),
        ({"messages": [{"role": "user", "content": 1}]}, "prompts[0].messages[0].content"),
        (None, "prompts[0]"),
    ],
)
def test_one_bad_prompt_is_one_refusal_however_many_kinds_there_are(prompt: Any, path: str) -> None:
    body = {"model": "m", "prompts": [prompt], "program": {"nodes": [{"op": "text", "id": "t"}]}}
    assert [f.path for f in refused(RunRequest, json.dumps(body))] == [path]


def test_several_mistakes_are_several_refusals() -> None:
    nodes = [
        {"op": "text", "id": "t", "x": 1},
        {"op": "nope", "id": "u"},
        {"op": "lens", "id": "v", "of": ["t"], "top_k": 0},
    ]
    found = refused(RunRequest, json.dumps({"prompts": ["a"], "program": {"nodes": nodes}}))
    assert [(f.code, f.path) for f in found] == [
        ("missing_field", "model"),
        ("unknown_field", "program.nodes[0].x"),
        ("unknown_op", "program.nodes[1].op"),
        ("bad_value", "program.nodes[2].top_k"),
    ]
    many = [{"op": "nope", "id": "u"}] * 100
    assert len(refused(Program, json.dumps({"nodes": many}))) == strict.MAX_FINDINGS


def test_values_built_in_python() -> None:
    with pytest.raises(errors.ProgramError) as caught:
        strict.make(Inner, n=-1, x=float("nan"))
    assert [(f.code, f.path) for f in caught.value.refusals] == [("bad_value", "n"), ("not_finite", "x")]
    assert strict.make(Inner, n=1) == Inner(n=1)
    with pytest.raises(errors.ProgramError):
        strict.make(Generation, seed=2**53 + 1)


def test_models_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Inner().n = 2  # type: ignore[misc]


def test_legal_json_passes_unchanged() -> None:
    raw = b'{"inner":{"n":3,"x":-0.5},"many":[{"x":2}]}'
    assert strict.parse(Outer, raw) == Outer(inner=Inner(n=3, x=-0.5), many=(Inner(x=2.0),))
    assert strict.read_json(b'"[[[{{{ \\" \\\\"') == '[[[{{{ " \\'
    deep = "[" * 32 + "]" * 32
    assert strict.read_json(deep.encode()) == json.loads(deep)


# ---- time and memory ------------------------------------------------------------------------------


def seconds(raw: bytes, model: type[Any]) -> float:
    started = time.thread_time()  # of this thread: a busy machine makes it no longer
    with pytest.raises(errors.TrocarError):
        strict.parse(model, raw)
    return time.thread_time() - started


RUN = b'{"model":"m","program":{"nodes":[{"op":"text","id":"t"}]},"prompts":['


@pytest.mark.parametrize(
    ("name", "raw", "model"),
    [
        ("a string that never ends", b'"' + b'\\"' * 1_000_000, Outer),
        ("many quotes", b'"' * 1_000_000, Outer),
        ("a backslash at the end", b'"' + b"\\" * 999_999, Outer),
        ("deep", b"[" * 1_000_000, Outer),
        ("a million digits", b'{"inner":{"n":' + b"1" * 1_000_000 + b"}}", Outer),
        ("a million digits of a fraction", b'{"inner":{"n":0.' + b"1" * 1_000_000 + b"}}", Outer),
        ("many keys", b"{" + b",".join(b'"k%d":0' % i for i in range(100_000)) + b',"k99999":1}', Outer),
        ("a long key", b'{"' + b"k" * 1_000_000 + b'":0}', Outer),
        ("many labels", b'{"handle":"%s","kind":"ridge","labels":[' % ACTS.encode() + b",".join([b'"x"'] * 250_000) + b"]}", FitRequest),
        ("many token ids", RUN + b"[" + b",".join([b'"x"'] * 250_000) + b"]]}", RunRequest),
        ("many prompts", RUN + b",".join([b"1"] * 250_000) + b"]}", RunRequest),
        ("many messages", RUN + b'{"messages":[' + b",".join([b"{}"] * 250_000) + b"]}]}", RunRequest),
        ("many nodes", b'{"nodes":[' + b",".join([b"1"] * 250_000) + b"]}", Program),
        ("many references", b'{"nodes":[{"op":"lens","id":"x","of":[' + b",".join([b"1"] * 250_000) + b"]}]}", Program),
        ("many tokens", b'{"nodes":[{"op":"logprobs","id":"x","tokens":[' + b",".join([b"[true]"] * 150_000) + b"]}]}", Program),
        ("a large value in the wrong place", b'{"inner":[' + b",".join([b'"x"'] * 250_000) + b"]}", Outer),
        ("many texts", b'{"model":"m","texts":[' + b",".join([b"1"] * 250_000) + b"]}", TokenizeRequest),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_a_megabyte_of_anything_is_refused_in_seconds(name: str, raw: bytes, model: type[Any]) -> None:
    assert seconds(raw, model) < 6, name  # quadratic work here took minutes; the margin is for a busy machine


def test_a_nesting_bomb_is_refused_in_milliseconds() -> None:
    assert seconds(b"[" * 100_000, Outer) < 0.5
    assert seconds(b'{"a":' * 100_000, Outer) < 0.5


def test_a_large_legal_request_is_read() -> None:
    chats = [{"messages": [{"role": "user", "content": "x"}]}] * 4096
    body = {
        "model": "m",
        "prompts": chats,
        "program": {"nodes": [{"op": "text", "id": f"t{i}"} for i in range(2000)]},
    }
    read = strict.parse(RunRequest, json.dumps(body).encode())
    assert len(read.prompts) == 4096
    assert isinstance(read.prompts[0], Chat)
