"""The SDK against a whole server in this process: what a researcher types, and what comes back."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import trocar

SECRET = "trk_0123456789abcdef_" + "S" * 43


@pytest.fixture(scope="module")
def client(server: Any) -> Iterator[trocar.Client]:
    with trocar.Client("http://server", server.keys["alice"], transport=server.transport()) as c:
        yield c


@pytest.fixture(scope="module")
def model(client: trocar.Client) -> trocar.Model:
    return client.model("tiny")


def test_a_lens_over_all_layers(model: trocar.Model) -> None:
    with model.trace(["abc", "hello"]) as t:
        t.save("top", t.lens(t.resid_post[:][-1], top_k=3))
        t.save("lp", t.logprobs(["a", "b"]))
    plan = t.plan()
    result = t.run().result()
    top, lp = result["top"], result["lp"]
    assert top.ids.shape == top.logprobs.shape == (model.n_layers, 2, 3)
    assert top.prompts.tolist() == [0, 1]
    assert top.positions.tolist() == [2, 4]
    assert lp.values.shape == (2, 2)
    assert lp.diff() == pytest.approx(lp.values[:, 0] - lp.values[:, 1])
    assert result.charge.bits <= plan.bits
    assert result.charge.bits == sum(result.receipt.released_bits.values())
    with pytest.raises(KeyError, match="closest 'top'"):
        result["tap"]


def test_a_trace_edits_and_steers(model: trocar.Model) -> None:
    vector = np.full(model.d_model, 2.0, dtype=np.float32)
    with model.trace("hello") as t:
        t.resid_post[1] += 3.0 * t.vector(vector)
        t.resid_post[2][-1] = t.resid_post[1][-1]
        t.mlp_out[3] *= 0.5
        t.save("lp", t.logprobs([1, 2, 3]))
    result = t.run().result()
    assert [(e.op, e.site, e.rows) for e in result.receipt.edits] == [
        ("edit.add", "resid_post.1", 5),
        ("edit.set", "resid_post.2", 1),
        ("edit.scale", "mlp_out.3", 5),
    ]
    plain = model.generate("hello", max_new_tokens=4)
    steered = model.generate(
        "hello", edits=[trocar.edit.add("resid_post.*", vector, coef=4.0)], max_new_tokens=4
    )
    assert isinstance(plain, trocar.Text)
    assert len(plain.ids) <= 4
    assert plain.ids != steered.ids
    assert len(steered.receipt.edits) == model.n_layers


def test_capture_fit_and_reuse(client: trocar.Client, model: trocar.Model) -> None:
    words = [f"{'yes' if i % 2 else 'no'} {i}" for i in range(24)]
    acts = model.capture(words, sites="resid_post.*")
    assert (acts.rows, len(acts.sites)) == (24, model.n_layers)
    probe = acts.fit("logistic", [i % 2 for i in range(24)])
    assert probe.sites == acts.sites
    assert probe.metric("auroc")["resid_post.1"] > 0.5
    text = model.generate(
        "maybe", edits=[trocar.edit.add("resid_post.2", -2.0 * probe.direction)], max_new_tokens=3
    )
    assert text.receipt.edits[0].rows > 0
    with model.trace("abc") as t:
        t.save("s", t.score(t.resid_post[1][:], probe))
    assert t.run().result()["s"].values.shape == (3,)
    crossed = acts.fit("lda", [i % 2 for i in range(24)], folds=3)
    assert set(crossed.metric("auroc_folds")) == set(acts.sites)
    many = acts.fit("multinomial", [i % 3 for i in range(24)], class_weight="balanced")
    with pytest.raises(trocar.ClientError) as caught:
        _ = many.direction
    assert caught.value.code == "bad_argument"
    again = client.activations(acts.handle)
    assert again.stored == acts.stored
    assert acts.handle in {h.handle for h in client.handles()}
    acts.delete()
    with pytest.raises(trocar.NotFound):
        client.activations(acts.handle)


def test_refusals_arrive_as_the_classes_that_the_server_raised(
    client: trocar.Client, model: trocar.Model
) -> None:
    with pytest.raises(trocar.ProgramError) as caught:
        model.generate("a", edits=[trocar.edit.add("resid_post.1", [1.0] * 31)])
    assert (caught.value.code, caught.value.path) == ("width_mismatch", "program.nodes[1].value")
    assert caught.value.request_id is not None
    assert caught.value.request_id in str(caught.value)
    with pytest.raises(trocar.BadRequest) as nan:
        model.generate("a", edits=[trocar.edit.add("resid_post.1", [float("nan")] * 32)])
    assert nan.value.code == "not_finite"
    with pytest.raises(trocar.NotFound) as missing:
        client.model("tinny")
    assert missing.value.closest == "tiny"
    with pytest.raises(AttributeError), model.trace("a") as t:
        _ = t.resid_pots
    with pytest.raises(trocar.RunFailed) as failed:
        model.generate("a", edits=[trocar.edit.scale(f"resid_post.{i}", 1e6) for i in range(3)])
    assert failed.value.code == "edit_not_finite"


def test_a_job_by_its_id(client: trocar.Client, model: trocar.Model) -> None:
    with model.trace("abc") as t:
        t.save("lp", t.logprobs([1]))
    job = t.run()
    found = client.job(job.id)
    assert found.result()["lp"].values.tolist() == job.result()["lp"].values.tolist()
    assert found.refresh() == "COMPLETED"
    assert client.engine().forwards > 0
    assert client.ledger().entries[-1].kind == "settled"


def test_two_clients_in_two_threads_share_a_batch(server: Any) -> None:
    """Both hand in a run while the engine is held; it takes them in one forward pass, each with its own answer."""
    engine = server.engines["tiny"]
    answers: dict[str, Any] = {}

    def go(who: str, prompt: str) -> None:
        c = trocar.Client("http://server", server.keys[who], transport=server.transport())
        with c.model("tiny").trace(prompt) as t:
            t.save("lp", t.logprobs([1, 2], at="prompt[*]"))
        answers[who] = t.run().result()["lp"].values
        c.close()

    before = engine.stats()
    threads = [threading.Thread(target=go, args=x) for x in (("alice", "abc"), ("bob", "hello"))]
    with engine._wake:
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 10
        while server.service._jobs.check() == [] and time.monotonic() < deadline:
            running = [j for j in server.service._jobs._jobs.values() if j.state == "RUNNING"]
            if len(running) >= 2:
                break
            time.sleep(0.01)
        time.sleep(0.2)
    for thread in threads:
        thread.join(20)
    after = engine.stats()
    assert after.forwards == before.forwards + 1
    assert after.most_requests >= 2
    assert {k: v.shape for k, v in answers.items()} == {"alice": (3, 2), "bob": (5, 2)}


def test_one_client_may_be_shared_by_threads(server: Any) -> None:
    c = trocar.Client("http://server", server.keys["alice"], transport=server.transport())
    barrier, texts = threading.Barrier(6), []

    def go(number: int) -> None:
        barrier.wait()
        texts.append(c.model("tiny").generate(f"say {number}", max_new_tokens=3).ids)

    threads = [threading.Thread(target=go, args=(i,)) for i in range(6)]
    loops = [t for t in threading.enumerate() if t.name == "trocar-client"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(texts) == 6
    now = [t for t in threading.enumerate() if t.name == "trocar-client" and t not in loops]
    assert len(now) == 1
    c.close()


def test_a_client_works_inside_a_running_loop(client: trocar.Client) -> None:
    async def notebook() -> int:
        return len(client.model("tiny").generate("abc", max_new_tokens=2, stop_at_eos=False).ids)

    assert asyncio.run(notebook()) == 2


def test_the_async_client(server: Any) -> None:
    async def go() -> None:
        async with trocar.AsyncClient(
            "http://server", server.keys["alice"], transport=server.transport()
        ) as c:
            model = await c.model("tiny")
            with model.trace("abc") as t:
                t.save("lp", t.logprobs([1]))
            job = await t.run()
            assert (await job)["lp"].values.shape == (1, 1)
            assert job.state == "COMPLETED"
            both = await asyncio.gather(*[model.generate(p, max_new_tokens=2) for p in ("a", "b")])
            assert len(both) == 2
            acts = await model.capture(["a", "b"], "resid_post.1")
            await acts.delete()

    asyncio.run(go())


def test_closing_leaves_no_thread_and_no_loop(server: Any) -> None:
    c = trocar.Client("http://server", server.keys["alice"], transport=server.transport())
    c.models()
    loop = c._portal._loop
    c.close()
    deadline = time.monotonic() + 5
    while not loop.is_closed() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert loop.is_closed()
    c.close()


# ---- what is shown ----


def test_no_repr_tells_the_key(server: Any) -> None:
    c = trocar.Client("http://server", SECRET, transport=server.transport())
    a = trocar.AsyncClient("http://server", SECRET, transport=server.transport())
    shown = [repr(x) for x in (c, a, a.settings, a.transport, c._core, c._portal)]
    assert not [s for s in shown if "SSSS" in s]
    with pytest.raises(trocar.AuthError) as caught:
        c.ledger()
    assert "SSSS" not in str(caught.value)
    assert caught.value.code == "bad_key"
    c.close()


def test_html_is_escaped(model: trocar.Model) -> None:
    """Prompts and token texts are written by users; a notebook runs what is not escaped."""
    nasty = "<script>x</script>&"
    with model.trace([nasty]) as t:
        t.save("top", t.lens(t.resid_post[:][:], top_k=1))
        t.save("lp", t.logprobs(["<", ">"]))
        t.save("s", t.score(t.resid_post[1][:].dot(np.ones(32, dtype=np.float32))))
    result = t.run().result()
    pages = [x._repr_html_() for x in (result, result["top"], t.plan(), result["s"].strip())]
    for page in pages:
        assert "<script" not in page.lower()
    assert "&lt;" in pages[1]
    for text in (
        repr(result),
        repr(result["top"]),
        repr(result["lp"]),
        repr(result["s"]),
        repr(t),
        repr(t.plan()),
    ):
        assert text


def test_everything_has_a_repr(client: trocar.Client, model: trocar.Model) -> None:
    acts = model.capture(["<b>", "b"], "resid_post.1")
    assert "<b>" not in acts._repr_html_()
    assert acts.handle in repr(acts)
    assert "tiny" in repr(model)
    assert "http://server" in repr(client)
    with model.trace("a") as t:
        _ = t.resid_post[1]
    assert "resid_post.1" in repr(t)  # recorded, though nothing is returned yet
    acts.delete()


def test_a_wait_that_is_interrupted_returns_at_once(server: Any) -> None:
    """Ctrl-C while a result is awaited: KeyboardInterrupt in the caller, the client still works."""
    c = trocar.Client("http://server", server.keys["alice"], transport=server.transport())
    with c.model("tiny").trace("abc") as t:
        t.save("lp", t.logprobs([1]))
    job = t.run()

    class Interrupted:
        def result(self) -> None:
            raise KeyboardInterrupt

        def cancel(self) -> bool:
            return True

    plain = asyncio.run_coroutine_threadsafe
    with pytest.MonkeyPatch.context() as patch:

        def interrupted(coroutine: Any, loop: Any) -> Any:
            coroutine.close()
            return Interrupted()

        patch.setattr(asyncio, "run_coroutine_threadsafe", interrupted)
        with pytest.raises(KeyboardInterrupt):
            job.result()
    assert asyncio.run_coroutine_threadsafe is plain
    assert job.result()["lp"].values.shape == (1, 1)
    c.close()


def test_means_of_prompts_are_stored_as_one_row_each(model: trocar.Model) -> None:
    """A mean has no token of its own; it can be a source for other prompts, one row per prompt."""
    prompts = ["abc", "hello"]
    with model.trace(prompts) as t:
        t.save("mean", t.capture(t.resid_post[1]["prompt[*]"], reduce="mean"))
        t.save("rows", t.capture(t.resid_post[1]["prompt[*]"]))
    kept = t.run().result()
    assert (kept["mean"].rows, kept["rows"].rows) == (2, 8)
    with model.trace(prompts) as t:
        t.resid_post[1][-1] = t.vector(kept["mean"]["resid_post.1"])
        t.save("stored", t.logprobs([1, 2, 3]))
    with model.trace(prompts) as u:
        u.resid_post[1][-1] = u.resid_post[1]["prompt[*]"].mean()
        u.save("made", u.logprobs([1, 2, 3]))
    stored, made = t.run().result()["stored"].values, u.run().result()["made"].values
    assert stored == pytest.approx(made, abs=1e-5)
    with model.trace(prompts) as p:
        p.save("plain", p.logprobs([1, 2, 3]))
    assert np.abs(p.run().result()["plain"].values - made).max() > 1e-3
