"""The airlock from the SDK: what a researcher and a reviewer type, and the numbers that come back."""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load

import trocar
from trocar.client.airlock import Export

WORDS = [x + y for x in "abcd" for y in "klmn"]
LABELS = [i % 2 for i in range(len(WORDS))]
WHY = {"reason": "Figure 3 of the paper.", "controls": "One laptop, deleted after."}


@pytest.fixture(scope="module")
def who(house: Any) -> Iterator[Callable[[str], trocar.Client]]:
    opened: dict[str, trocar.Client] = {}

    def client(name: str) -> trocar.Client:
        if name not in opened:
            opened[name] = trocar.Client(
                "http://server", house.keys[name], transport=house.transport(), quiet=True
            )
        return opened[name]

    yield client
    for one in opened.values():
        one.close()


@pytest.fixture(scope="module")
def acts(who: Callable[[str], trocar.Client]) -> trocar.Activations:
    return who("ada").model("shut").capture(WORDS, "resid_post.2", at=-1)


@pytest.fixture(scope="module")
def probe(acts: trocar.Activations) -> trocar.Probe:
    return acts.fit("mean_diff", LABELS)


@pytest.fixture(scope="module")
def export(who: Callable[[str], trocar.Client], probe: trocar.Probe) -> Export:
    ticket = who("ada").request_release(probe, **WHY)
    for name in ("bea", "cid"):
        who(name).ticket(ticket.id).approve()
    return ticket.file()


def test_a_probe_comes_back_within_half_a_step(house: Any, probe: trocar.Probe, export: Export) -> None:
    held = house.store.open_artifact("lab", probe.handle).arrays["resid_post.2"]
    assert set(export.arrays) == {f"resid_post.2/{name}" for name in held}
    steps = load(export.payload)
    for name, array in held.items():
        back = export.arrays[f"resid_post.2/{name}"]
        assert (back.dtype, back.shape) == (np.float32, (1, len(array)))
        assert (np.abs(back[0] - array) <= steps[f"resid_post.2/{name}:scales"] * (0.5 + 1e-6)).all()
    assert np.abs(export.arrays["resid_post.2/direction"]).max() > 0
    assert export.charge is not None
    assert export.charge.bits == export.manifest["charged_bits"] == 256 + 8 * (2 * 34 + 3)


def test_a_ticket_tells_where_it_stands(who: Any, tmp_path: Path) -> None:
    acts = who("ada").model("shut").capture(WORDS[:8], "resid_post.2", at=-1)
    ticket = acts.request_release(**WHY)
    assert (ticket.state, ticket.price_bits) == ("submitted", 256 + 8 * 8 * 34)
    assert ticket.percent == pytest.approx(100 * ticket.price_bits / 20_000_000)
    assert [reason.code for reason in ticket.reasons] == ["rows"]
    assert ticket.id in repr(ticket)
    assert "parts: rows are looked at by people" in repr(ticket)
    assert "<table" in ticket._repr_html_()
    with pytest.raises(trocar.Conflict) as caught:
        ticket.file()
    assert caught.value.code == "airlock_state"
    assert who("bea").ticket(ticket.id).view.review is not None
    seen = next(t for t in who("bea").airlock("submitted") if t.id == ticket.id)
    seen.approve("enough for figure 3")
    assert seen.state == "seconded"
    assert ticket.refresh() == "seconded"
    who("boss").ticket(ticket.id).approve()
    path = tmp_path / "rows.safetensors"
    export = ticket.file(path)
    assert ticket.state == "released"
    assert path.read_bytes() == export.payload
    assert export.arrays["resid_post.2/rows"].shape == (8, 32)
    again = who("ada").ticket(ticket.id).file()
    assert again.payload == export.payload
    assert again.charge is not None
    assert (again.charge.bits, again.charge.replayed) == (0, True)
    assert Export.of(path.read_bytes()).charge is None


def test_a_reviewer_rejects_and_an_author_withdraws(who: Any, probe: trocar.Probe) -> None:
    one, two = (who("ada").request_release(probe.handle, **WHY) for _ in range(2))
    with pytest.raises(trocar.PolicyRefusal):
        one.approve()
    who("bea").ticket(one.id).reject("more than figure 3 needs")
    one.refresh()
    assert (one.state, one.view.steps[-1].words) == ("rejected", "more than figure 3 needs")
    two.withdraw()
    assert two.state == "withdrawn"
    assert {one.id, two.id} <= {t.id for t in who("ann").airlock()}
    assert who("mal").airlock() == ()
    with pytest.raises(trocar.NotFound):
        who("mal").ticket(two.id)


def test_an_agent_is_signed_for(who: Any, probe: trocar.Probe) -> None:
    ticket = who("bot").request_release(probe, **WHY)
    assert ticket.state == "unsigned"
    who("ann").ticket(ticket.id).sign()
    assert ticket.refresh() == "submitted"


def test_rows_of_open_weights_leave_at_once(who: Any) -> None:
    acts = who("free").model("tiny").capture(["abc", "hello"], "resid_post.0", at="prompt[*]")
    ticket = acts.request_release(**WHY)
    assert (ticket.state, ticket.percent, ticket.reasons) == ("approved", None, ())
    assert ticket.file().arrays["resid_post.0/rows"].shape == (8, 32)


def test_rows_that_may_not_leave_are_refused_with_reasons(who: Any) -> None:
    acts = who("ada").model("shut").capture(WORDS, ["embeddings", "resid_post.1"], at=-1)
    with pytest.raises(trocar.PolicyRefusal) as caught:
        acts.request_release(**WHY)
    assert {r.code for r in caught.value.refusals} == {"export_refused"}
    assert [r.reason.partition(":")[0] for r in caught.value.refusals] == ["early_layer"] * 2


def test_larger_limits_are_asked_for(who: Any, probe: trocar.Probe) -> None:
    ticket = who("ada").request_raise("shut", life_bits=220_000_000, **WHY)
    assert (ticket.view.kind, ticket.price_bits) == ("raise", 0)
    assert "price" not in repr(ticket)
    for name in ("bea", "boss"):
        who(name).ticket(ticket.id).approve()
    ticket.refresh()
    ticket.apply()
    assert ticket.state == "released"
    assert who("ada").ledger().budgets["shut"].limit_bits == 220_000_000


def test_a_file_is_verified_with_the_public_key(who: Any, export: Export) -> None:
    key = who("ada").capabilities().airlock.public_key
    assert export.verify(key) == ()
    changed = bytearray(export.payload)
    changed[-1] ^= 1
    assert Export.of(bytes(changed)).verify(key) == ("the tensors are not those of the manifest",)
    assert export.verify("00" * 31 + "01") != ()
    with pytest.raises(trocar.ProgramError):
        export.verify("short")
    assert export.manifest["request"][:12] in repr(export)
    assert "resid_post.2/direction" in export._repr_html_()


def test_verifying_needs_one_more_package(export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("cryptography"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(trocar.ClientError) as caught:
        export.verify("00" * 32)
    assert caught.value.code == "missing_extra"
    assert "cryptography" in str(caught.value)


@pytest.mark.parametrize("raw", [b"", b"\x00" * 8, b"hello", b"\x02" + b"\x00" * 7 + b"{}"])
def test_what_is_no_file_of_an_airlock_is_refused(raw: bytes) -> None:
    with pytest.raises(trocar.ClientError) as caught:
        Export.of(raw)
    assert caught.value.code == "bad_argument"


def test_a_file_that_was_cut_is_refused(export: Export) -> None:
    with pytest.raises(trocar.ClientError, match="cannot be read"):
        Export.of(export.payload[:-1])


def test_four_bits_are_read_like_eight(who: Any, probe: trocar.Probe, house: Any) -> None:
    """An agent's numbers leave in 4 bits."""
    ticket = who("bot").request_release(probe, **WHY)
    who("ann").ticket(ticket.id).sign()
    for name in ("bea", "cid"):
        who(name).ticket(ticket.id).approve()
    export = ticket.file()
    held = house.store.open_artifact("lab", probe.handle).arrays["resid_post.2"]["direction"]
    back = export.arrays["resid_post.2/direction"]
    step = load(export.payload)["resid_post.2/direction:scales"]
    assert export.manifest["bits"] == 4
    assert (np.abs(back[0] - held) <= step * (0.5 + 1e-6)).all()
    assert step * 7 >= np.abs(held).max()


def test_the_async_client_does_the_same(house: Any, probe: trocar.Probe) -> None:
    async def go() -> None:
        opened = {
            n: trocar.AsyncClient("http://server", house.keys[n], transport=house.transport())
            for n in ("ada", "bea", "cid")
        }
        ticket = await opened["ada"].request_release(probe, **WHY)
        for name in ("bea", "cid"):
            await (await opened[name].ticket(ticket.id)).approve()
        export = await ticket.file()
        assert set(export.arrays) == {f"resid_post.2/{n}" for n in ("direction", "weights", "bias")}
        assert "AsyncTicket" not in repr(ticket)
        for client in opened.values():
            await client.close()

    asyncio.run(go())
