"""What a caller is told when a worker fails on a secret: one list of codes, in one process and in three."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from trocar.codes import CODES
from trocar.errors import Overloaded, TrocarError, refuse
from trocar.service import faults
from trocar.wire.orders import FAULTS

SECRET = "secret-weights-0.125"
NAMES = frozenset({"a", "b"})


@pytest.fixture(scope="module")
def shut(tiny_of: Any) -> Any:
    return tiny_of("shut", open_weights=False, weight_bits=20_000_000_000)


def told(facts: Any, code: str, path: str = SECRET) -> TrocarError:
    """What is made of a fault."""
    with pytest.raises(TrocarError) as caught, faults.reworded(facts, NAMES):
        raise refuse(code, path, SECRET, closest=SECRET, next_step=SECRET)
    return caught.value


def test_there_is_one_list() -> None:
    assert {*FAULTS, *faults.OF_A_WORKER} == faults.KNOWN
    assert not set(FAULTS) & set(faults.OF_A_WORKER)
    assert len(faults.KNOWN) == 20


@pytest.mark.parametrize("code", sorted(CODES))
def test_a_code_of_the_list_is_told_and_any_other_is_not(shut: Any, code: str) -> None:
    error = told(shut.facts, code)
    assert error.code == (code if code in faults.KNOWN else "internal")
    assert (error.path, error.reason) == ("", CODES[error.code].summary)
    assert SECRET not in json.dumps(error.as_json())
    assert not isinstance(error, Overloaded) or error.retry_after_s == faults.RETRY_S


@pytest.mark.parametrize(
    ("path", "seen"),
    [
        ("a", "a"),
        ("c", ""),
        ("program.nodes[0]", "program.nodes[0]"),
        ("program.nodes[1]", "program.nodes[1]"),
        ("program.nodes[2]", ""),
        ("program.nodes[00001]", "program.nodes[00001]"),
        ("program.nodes[0].site", ""),
        ("program.nodes[\u0660]", ""),
    ],
)
def test_a_place_is_one_of_the_program(shut: Any, path: str, seen: str) -> None:
    assert told(shut.facts, "edit_not_finite", path).path == seen


def test_open_weights_have_nothing_to_hide(tiny: Any) -> None:
    assert told(tiny.facts, "bad_value").reason == SECRET


@pytest.fixture(scope="module")
def server(serve: Any, shut: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from trocar.gate.policy import Role, Tier

    made = serve(tmp_path_factory.mktemp("shut"), [shut])
    made.keys["ada"] = made.service.gate.keys.create("lab", Tier.trusted, Role.researcher).secret
    yield made
    made.service.close()


def test_a_query_without_keys_is_no_fault_of_ours(server: Any) -> None:
    """Each cut leaves the token something to attend to, both together nothing; that is found when they run."""
    cut = {"op": "edit.knockout", "site": "attn_probs.1", "at": "prompt[1]"}
    nodes = [
        {**cut, "id": "k", "keys": "prompt[0]"},
        {**cut, "id": "l", "keys": "prompt[1]"},
        {"op": "logprobs", "id": "p", "at": "prompt[-1]", "tokens": [1]},
    ]
    body = {"model": "shut", "prompts": [[21, 22]], "program": {"nodes": nodes}}

    async def ask() -> httpx.Response:
        headers = {"authorization": f"Bearer {server.keys['ada']}"}
        async with httpx.AsyncClient(
            transport=server.transport(), base_url="http://s", headers=headers, timeout=60
        ) as http:
            begun = await http.post("/v1/runs", json=body)
            assert begun.status_code == 202, begun.text
            job = begun.json()["job"]
            return await http.get(f"/v1/jobs/{job}/result", params={"wait_s": "30"})

    heard = asyncio.run(ask())
    assert heard.status_code == 422, heard.text
    [refusal] = heard.json()["error"]["refusals"]
    assert (refusal["code"], refusal["path"]) == ("no_keys_left", "l")
    assert refusal["reason"] == CODES["no_keys_left"].summary
