"""Sessions in the SDK: what is recorded, and what comes back; sync and async alike."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import trocar
from trocar import errors


@pytest.fixture(scope="module")
def client(server: Any) -> Iterator[trocar.Client]:
    with trocar.Client("http://server", server.keys["alice"], transport=server.transport()) as c:
        yield c


@pytest.fixture(scope="module")
def model(client: trocar.Client) -> trocar.Model:
    return client.model("tiny")


def patch(session: Any, clean: Any, other: Any) -> None:
    with session.trace(clean) as first:
        first.save("kept", first.capture(first.resid_post[1][-1]))
        first.save("lp", first.logprobs([1, 2]))
    with session.trace(other) as second:
        second.resid_post[1][-1] = first["kept"]
        second.save("lp", second.logprobs([1, 2]))


def test_a_value_of_one_step_is_used_in_the_next(model: trocar.Model, client: trocar.Client) -> None:
    before = len(client.handles())
    with model.session() as s:
        patch(s, ["abc", "hello"], ["abc", "hello"])
    results = s.run().result()
    assert len(results) == 2
    assert np.allclose(results[0]["lp"].values, results[1]["lp"].values, atol=1e-4)
    assert "kept" not in results[0]
    assert len(client.handles()) == before
    assert results.charge.bits == sum(sum(x.receipt.released_bits.values()) for x in results)
    assert [x.receipt.edits != () for x in results[0:2]] == [False, True]


def test_captures_may_be_kept(model: trocar.Model, client: trocar.Client) -> None:
    with model.session(keep=True) as s:
        patch(s, "abc", "xyz")
    first, second = s.run().result()
    assert isinstance(first["kept"], trocar.Activations)
    assert first["kept"].handle in {h.handle for h in client.handles()}
    with model.trace("xyz") as t:
        t.resid_post[1][-1] = first["kept"]["resid_post.1"]
        t.save("lp", t.logprobs([1, 2]))
    assert np.allclose(t.run().result()["lp"].values, second["lp"].values, atol=1e-4)
    first["kept"].delete()


def test_several_sites_and_some_rows(model: trocar.Model) -> None:
    with model.session() as s:
        with s.trace(["abc", "hello"]) as first:
            first.save(
                "both", first.capture([first.resid_post[0]["prompt[*]"], first.resid_post[2]["prompt[*]"]])
            )
            first.save("one", first.capture(first.mlp_out[1]["prompt[*]"]))
        with s.trace(["xyz"]) as second:
            second.resid_post[2][-1] = first["both"]["resid_post.2"].rows(prompts=[1], at=-1)
            second.apply(trocar.edit.set("mlp_out.1", first["one"].rows(prompts=[0], at="prompt[0]"), at=0))
            second.save("lp", second.logprobs([1]))
        with s.trace(["abc", "hello"]) as third:
            third.resid_post[0]["prompt[*]"] = first["both"]
    nodes = [n for n in second.recorded.request.program.nodes if n.op == "stored"]
    assert [(n.handle, n.site, n.prompts, n.at) for n in nodes] == [
        ("step0.both", "resid_post.2", (1,), "prompt[-1]"),
        ("step0.one", "mlp_out.1", (0,), "prompt[0]"),
    ]
    (node,) = (n for n in third.recorded.request.program.nodes if n.op == "stored")
    assert (node.handle, node.site) == ("step0.both", "resid_post.0")
    with pytest.raises(errors.ClientError, match="holds 2 sites"):
        first["both"].rows(at=-1)
    with pytest.raises(errors.TrocarError, match=r"captures no 'resid_post\.1'"):
        first["both"]["resid_post.1"]
    with pytest.raises(errors.ClientError, match="captures nothing under 'bth'") as caught:
        first["bth"]
    assert caught.value.refusals[0].closest == "both"


def test_arrays_of_steps_do_not_meet(model: trocar.Model) -> None:
    """Both steps call theirs v0."""
    with model.session() as s:
        for size in (0.0, 2.0):
            with s.trace("abc") as t:
                t.resid_post[1] += np.full(32, size, np.float32)
                t.save("lp", t.logprobs([1]))
    assert set(s.recorded.vectors) == {"step0.v0", "step1.v0"}
    still, moved = s.run().result()
    edits = [x.receipt.edits[0] for x in (still, moved)]
    assert edits[0].norm_before == edits[0].norm_after != edits[1].norm_after


def test_a_step_may_sweep(model: trocar.Model) -> None:
    with model.session() as s, s.trace("abc") as t:
        t.sweep(trocar.edit.scale("resid_post.1", 1.0), by=[1, 0])
        t.save("lp", t.logprobs([1]))
    (found,) = s.run().result()
    assert found.sweep.grid("lp").shape == (2, 1, 1)


def test_how_a_session_looks(model: trocar.Model) -> None:
    with model.session() as s:
        patch(s, "abc", "abc")
    assert repr(s).startswith("Session on tiny, 2 steps\nTrace on tiny")
    results = s.run().result()
    assert repr(results).startswith("Results of a session")
    assert "lp" in repr(results)
    assert "<td" in results._repr_html_()


def test_what_is_no_session(model: trocar.Model) -> None:
    with pytest.raises(errors.ClientError, match="no step"):
        model.session().run()
    s = model.session()
    with s.trace("abc") as t:
        t.save("lp", t.logprobs([1]))
    for verb in (t.run, t.plan):
        with pytest.raises(errors.ClientError, match="step of a session"):
            verb()
    with pytest.raises(ZeroDivisionError), model.session() as broken, broken.trace("abc"):
        raise ZeroDivisionError
    with pytest.raises(errors.ClientError, match="block raised"):
        broken.run()
    with pytest.raises(errors.ClientError, match="not an option of a generation"):
        s.trace("abc", max_tokens=3)


def test_a_refused_session_names_the_step(model: trocar.Model) -> None:
    with model.session() as s:
        patch(s, ["abc", "hello"], ["abc"])
    with pytest.raises(errors.ProgramError) as caught:
        s.run()
    assert caught.value.path.startswith("steps[1].program.nodes[0]")


def test_a_session_is_found_again_by_its_job(model: trocar.Model, client: trocar.Client) -> None:
    with model.session() as s:
        patch(s, "abc", "abc")
    job = s.run()
    first = job.result()
    again = client.job(job.id).result()
    assert again[1]["lp"].values.tolist() == first[1]["lp"].values.tolist()


def test_the_async_session(server: Any) -> None:
    async def main() -> Any:
        async with trocar.AsyncClient(
            "http://server", server.keys["alice"], transport=server.transport()
        ) as client:
            model = await client.model("tiny")
            with model.session() as s:
                patch(s, "abc", "abc")
            return await (await s.run())

    first, second = asyncio.run(main())
    assert np.allclose(first["lp"].values, second["lp"].values, atol=1e-4)
