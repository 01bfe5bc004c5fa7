"""What a request's texts, conversations and masks give its selectors; nothing runs here."""

from __future__ import annotations

import json
from typing import Any

import pytest

from trocar import errors, strict
from trocar.gate.database import Database
from trocar.gate.handles import Handles
from trocar.graph.cost import Prices
from trocar.service.prepare import Prepared, prepare
from trocar.wire.requests import RunRequest

CHAT = {
    "messages": [
        {"role": "system", "content": "be"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo"},
    ]
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Any:
    database = Database(f"sqlite:///{tmp_path_factory.mktemp('handles') / 'ledger.db'}")
    yield Handles(database)
    database.close()


def prepared(tiny: Any, store: Any, at: str, prompts: list[Any], **fields: Any) -> Prepared:
    nodes = [{"op": "logprobs", "id": "out", "at": at, "tokens": [1]}]
    body = {"model": "tiny", "prompts": prompts, "program": {"nodes": nodes}, **fields}
    request = strict.parse(RunRequest, json.dumps(body).encode())
    return prepare(request, {}, tiny, store, "a", Prices(32, 256))


def selected(tiny: Any, store: Any, at: str, prompts: list[Any], **fields: Any) -> list[str]:
    """The text that is selected in each prompt."""
    found = prepared(tiny, store, at, prompts, **fields)
    (selection,) = {id(s): s for s in found.variants[0].checked.selections.values()}.values()
    return [
        tiny.decode([t[i] for i in r.prompt], special=True)
        for t, r in zip(found.tokens, selection.rows, strict=True)
    ]


def test_a_text_in_texts_and_conversations(tiny: Any, store: Any) -> None:
    chat = {"messages": [{"role": "user", "content": "é hi"}]}
    assert selected(tiny, store, 'span("é h")', ["a é h", chat]) == ["é h", "é h"]
    assert selected(tiny, store, 'span("assistant", 1)[-1]', [CHAT]) == ["t"]


def test_a_role(tiny: Any, store: Any) -> None:
    assert selected(tiny, store, 'role("user")', [CHAT]) == ["hi"]
    assert selected(tiny, store, 'role("assistant")[0]', [CHAT, CHAT]) == ["y", "y"]


def test_a_mask(tiny: Any, store: Any) -> None:
    masks = {"m": [[True, False, True], [False, True]], "n": [[False] * 3, [True] * 2]}
    assert selected(tiny, store, 'mask("m")', ["abc", [70, 71]], masks=masks) == ["ac", tiny.decode([71])]


@pytest.mark.parametrize(
    ("at", "prompts", "masks", "code", "path", "names"),
    [
        ('span("x")', [[70, 71]], {}, "bad_position", "program.nodes[0].at", "token ids"),
        ('span("x")', ["abc"], {}, "position_out_of_range", "program.nodes[0].at", "prompt 0"),
        ('role("user")', ["abc"], {}, "bad_position", "program.nodes[0].at", "not a conversation"),
        ('role("tool")', [CHAT], {}, "bad_position", "program.nodes[0].at", "system, user, assistant"),
        ('mask("m")', ["abc"], {}, "bad_position", "program.nodes[0].at", "no mask"),
        ('mask("m")', ["abc"], {"m": [[True]]}, "bad_position", "program.nodes[0].at", "1 entries"),
        ('mask("m")', ["abc"], {"m": [[True]] * 2}, "bad_value", "masks.m", "2 rows for 1 prompts"),
        ("prompt[0]", ["abc"], {"m": []}, "bad_value", "masks.m", "0 rows for 1 prompts"),
        ("prompt[0]", ["abc"], {"m": [[1, 0, 0]]}, "bad_value", "masks.m[0][0]", "boolean"),
        ("prompt[0]", ["abc"], {f"m{i}": [] for i in range(65)}, "too_large", "$", "65 keys"),
    ],
)
def test_refusals(
    tiny: Any, store: Any, at: str, prompts: list[Any], masks: Any, code: str, path: str, names: str
) -> None:
    with pytest.raises(errors.TrocarError) as caught:
        prepared(tiny, store, at, prompts, masks=masks)
    assert (caught.value.code, caught.value.path) == (code, path)
    assert names in caught.value.reason


def test_masks_belong_to_the_request(tiny: Any, store: Any) -> None:
    one, other = (
        prepared(tiny, store, 'mask("m")', ["ab"], masks={"m": [row]})
        for row in ([True, False], [False, True])
    )
    assert one.digest != other.digest
