"""Cases 28 to 38: two tenants on one server, and everything by which one could find, hurt or impersonate the other."""

from __future__ import annotations

import contextlib
import json
import random
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
from case_room import LOGPROBS, World, clean, codes, mint, numbers
from case_wire import Wire
from http_room import TEXT, Caller, Heard, capture, edit, read, request
from scipy.stats import ks_2samp

from trocar import strict
from trocar.errors import NotFound
from trocar.gate.policy import Tier
from trocar.gate.scopes import Scope
from trocar.grants import tokens
from trocar.sites import SITES
from trocar.wire.requests import RunRequest

WORDS = [f"word {i}" for i in range(12)]


def kept(caller: Caller, site: str = "resid_post.1", model: str = "tiny", prompts: Any = WORDS) -> str:
    """A handle of one row per prompt."""
    heard = caller.run(request(read(site), capture("r"), prompts=prompts, model=model))
    return str(numbers_of(heard)["kept"]["handle"])


def numbers_of(heard: Heard) -> Any:
    assert heard.status == 200, heard.body[:300]
    return heard.json["outputs"]


def asked(caller: Caller, handle: str) -> list[tuple[int, str]]:
    """Every door that takes a handle, and what each answers, with the handle and the request's id taken out."""
    stored = {"op": "stored", "id": "s", "handle": handle, "site": "resid_post.1"}
    patch = request(stored, edit("set", "resid_post.1", at="prompt[-1]", value="s"), LOGPROBS, prompts=WORDS)
    heard = [
        caller.get(f"/v1/handles/{handle}"),
        caller.delete(f"/v1/handles/{handle}"),
        caller.post("/v1/plan", patch),
        caller.post("/v1/runs", patch),
        caller.post("/v1/sessions", {"steps": [patch]}),
        caller.post("/v1/fits", {"handle": handle, "kind": "ridge", "labels": [1.0] * 12}),
    ]
    bare = []
    for h in heard:
        clean(h)
        said = h.body.decode().replace(h.headers["x-request-id"], "ID").replace(handle, "HANDLE")
        bare.append((h.status, said))
    return bare


def test_case_28_foreign_deleted_and_random_handles(world: World) -> None:
    """Five ways of not having a handle, six doors: the same bytes from each door, whatever the way."""
    mine = world.attacker
    foreign, gone, before = kept(world.neighbour), kept(mine), kept(world.neighbour)
    eve = Caller(world.server.app, world.server.keys["eve"])
    elsewhere = kept(eve, model="shut", prompts=["x"])
    assert mine.delete(f"/v1/handles/{gone}").status == 200
    assert world.neighbour.delete(f"/v1/handles/{before}").status == 200
    ways = {"foreign": foreign, "random": f"act_{secrets.token_hex(16)}", "deleted": gone,
            "deleted by its owner": before, "of another model": elsewhere}  # fmt: skip
    answers = {name: asked(mine, handle) for name, handle in ways.items()}
    assert {json.dumps(a) for a in answers.values()} == {json.dumps(answers["random"])}
    assert all("handle_not_found" in said for _, said in answers["random"])
    assert world.neighbour.get(f"/v1/handles/{foreign}").status == 200


def test_case_28_one_bucket_of_time(world: World) -> None:
    """How long the answer takes does not tell a foreign handle from none: one distribution, in turns."""
    foreign = kept(world.neighbour)

    def took(handle: str) -> float:
        world.rest()
        started = time.perf_counter()
        assert world.attacker.get(f"/v1/handles/{handle}").status == 404
        return time.perf_counter() - started

    assert alike(lambda: took(foreign), lambda: took(f"act_{secrets.token_hex(16)}"), 60)


def alike(one: Callable[[], float], other: Callable[[], float], pairs: int) -> bool:
    """Whether two durations come from one distribution: measured in random turns, by Kolmogorov and Smirnov.

    A true difference shows every time; a busy machine does not, so two of three looks must be calm.
    """
    calm = 0
    for _ in range(3):
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(pairs):
            for which in random.sample((0, 1), 2):
                times[which].append((one, other)[which]())
        calm += ks_2samp(*times).pvalue > 0.01
    return calm >= 2


def test_alike_tells_a_twentieth_apart() -> None:
    """The comparison can fail: a duration that is 5 % longer, and scatters by 5 %, is another one."""
    draw = random.Random(1)
    assert alike(lambda: draw.gauss(1.0, 0.05), lambda: draw.gauss(1.0, 0.05), 60)
    assert not alike(lambda: draw.gauss(1.0, 0.05), lambda: draw.gauss(1.05, 0.05), 60)


def test_case_29_ten_thousand_guesses(world: World) -> None:
    """Ten thousand ids, near a real one and far: none opens, and none costs more than another."""
    foreign = kept(world.neighbour)
    near = [foreign[:-1] + digit for digit in "0123456789abcdef" if digit != foreign[-1]]
    guesses = [
        *near,
        *(f"act_{i:032x}" for i in range(5000)),
        *(f"act_{secrets.token_hex(16)}" for _ in range(5000)),
    ]
    handle = world.server.service.handle
    principal = world.server.service.gate.keys.authenticate(_secret(world.attacker))
    for guess in guesses:
        with pytest.raises(NotFound):
            handle(principal, guess)
    assert {world.attacker.get(f"/v1/handles/{g}").status for g in guesses[:100]} == {404}


def _secret(caller: Caller) -> str:
    return caller._headers["authorization"].removeprefix("Bearer ")


def test_case_29_guessing_is_slowed_down(world: World) -> None:
    """After too many wrong ids in a minute a key is told to wait, and how long; others are not."""
    made = mint(world.server, "guesser")
    caller, most = (
        Caller(world.server.app, made.secret),
        world.server.service.gate.policy.people.refusals_per_minute,
    )
    pace = world.server.service._pace
    for _ in range(most - 5):
        assert pace.wait_s(made.principal.key_id, most) == 0
    heard = [caller.get(f"/v1/handles/act_{i:032x}") for i in range(60)]
    slowed = [h for h in heard if codes(h) != ["handle_not_found"]]
    assert slowed
    assert all(h.status in (429, 503) and int(h.headers["retry-after"]) >= 1 for h in slowed)
    assert codes(world.attacker.get("/v1/handles/act_" + "0" * 32)) == ["handle_not_found"]
    assert caller.get("/v1/handles").status == 200


class Held:
    """Holds an engine before its next step, so that what arrives meanwhile shares the one after."""

    def __init__(self, engine: Any) -> None:
        self._engine, self._plain, self._open = engine, engine._run, threading.Event()

    def __enter__(self) -> Held:
        def held(taken: Any) -> None:
            self._open.wait(30)
            self._plain(taken)

        self._engine._run = held
        return self

    def __exit__(self, *_: object) -> None:
        self._open.set()
        del self._engine._run


def together(world: World, attack: Callable[[], Heard], body: dict[str, Any]) -> tuple[Heard, Heard]:
    """An attack and a neighbour's run in one forward pass: both wait while a third request is held in the engine."""
    engine, service = world.server.engines["tiny"], world.server.service
    with Held(engine):
        first = world.neighbour.post("/v1/runs", request(LOGPROBS, prompts=["first"])).json["job"]
        _until(lambda: engine.stats().live_requests == 1)
        one = attack()
        assert one.status == 202, one.body[:300]
        two = world.neighbour.post("/v1/runs", body).json["job"]
        _until(lambda: engine.stats().live_requests == 3)
    assert service.check() == []
    world.neighbour.result(first)
    return world.attacker.result(one.json["job"]), world.neighbour.result(two)


def _until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def grown(factor: str) -> list[dict[str, Any]]:
    """Nodes that end in a value `x` of 1e38, an infinity or NaN, made of arrays that arrived finite."""
    steps = [{"op": "tensor", "id": "v", "name": "v"}]
    times = {"1e38": 6, "inf": 8, "nan": 8}[factor]
    for i in range(times):
        steps.append({"op": "scale", "id": f"x{i}", "of": f"x{i - 1}" if i else "v", "by": 1e6})
    last = f"x{times - 1}"
    tail = {"op": "sub", "id": "x", "a": last, "b": last} if factor == "nan" else {
        "op": "scale", "id": "x", "of": last, "by": 100.0}  # fmt: skip
    return [*steps, tail]


SERVED = [f"{n}.1" if SITES[n].layered else n for n in SITES if SITES[n].editable]


@pytest.mark.parametrize("poison", ["nan", "inf", "1e38"])
def test_case_30_poison_at_every_hook(world: World, poison: str) -> None:
    """NaN, infinities and 1e38 written at every site, in a step that a stranger shares: hers is as without."""
    facts = world.server.engines["tiny"].facts
    sites = [s for s in SERVED if s.partition(".")[0] in facts.sites]
    assert len(sites) > 8
    body = request(
        {**LOGPROBS, "at": "prompt[*]"}, TEXT, prompts=["a stranger's prompt", "two"], max_new_tokens=3
    )
    nothing = request(LOGPROBS, prompts=["mallory", "eve"])
    _, quiet = together(world, lambda: world.attacker.post("/v1/runs", nothing), body)
    for site in sites:
        width = int(facts.width(site))
        write = [*grown(poison), edit("set", site, at="all", value="x"), LOGPROBS]
        bad = request(*write, prompts=["mallory", "eve"])
        before = world.spent()
        hurt, beside = together(
            world, lambda b=bad, w=width: world.attacker.frame("/v1/runs", b, {"v": np.ones(w)}), body
        )
        assert (hurt.status, codes(hurt)) == (422, ["edit_not_finite"]), site
        clean(hurt)
        assert numbers(beside) == numbers(quiet), site
        assert world.spent()["tiny"] - before.get("tiny", 0) == 256


def test_case_31_extreme_activations(world: World) -> None:
    """The largest numbers that may be written, in every row of a step: no scale is shared, no neighbour's bit moves."""
    body = request({**LOGPROBS, "at": "prompt[*]"}, prompts=["a stranger's prompt"])
    nothing = request({**LOGPROBS}, prompts=["mallory"] * 8)
    _, quiet = together(world, lambda: world.attacker.post("/v1/runs", nothing), body)
    for size in (1e2, 1e4, 1e6):
        nodes = [
            {"op": "tensor", "id": "v", "name": "v"},
            edit("set", "resid_pre.0", at="all", value="v"),
            LOGPROBS,
        ]
        bad = request(*nodes, prompts=["mallory"] * 8)
        vectors = {"v": np.full(32, size)}
        _, beside = together(world, lambda b=bad, v=vectors: world.attacker.frame("/v1/runs", b, v), body)
        assert numbers(beside) == numbers(quiet), size


LONG = " the same long beginning of a prompt, which is worth keeping" * 3


def test_case_32_a_kept_prefix_is_the_tenants_own(world: World) -> None:
    """A prompt that a stranger ran before is computed again; the same prompt of one's own is not."""
    engine = world.server.engines["tiny"]
    body = request(LOGPROBS, prompts=["prefix" + LONG])

    def hits(caller: Caller) -> int:
        before = engine.stats().prefix_hit_tokens
        assert caller.run(body).status == 200
        return int(engine.stats().prefix_hit_tokens - before)

    assert hits(world.attacker) == 0
    assert hits(world.neighbour) == 0
    assert hits(world.neighbour) > 0
    assert world.attacker.get("/v1/engine").status == 403


def test_case_32_latency_does_not_tell(world: World) -> None:
    """What another tenant has asked before does not show in how long one's own answer takes."""
    service = world.server.service
    mallory, victor = (service.gate.keys.authenticate(_secret(c)) for c in (world.attacker, world.neighbour))
    number = iter(range(100_000))

    def run(who: Any, prompt: str) -> None:
        asked = strict.parse(RunRequest, json.dumps(request(LOGPROBS, prompts=[prompt])).encode())
        job = json.loads(service.run(who, asked, {}, None).payload)["job"]
        assert service.job_result(who, job, 20.0).status == 200

    def took(*, before: bool) -> float:
        mine = f"{next(number)} {LONG}"
        run(mallory, mine if before else f"{next(number)} {LONG}")
        started = time.perf_counter()
        run(victor, mine)
        return time.perf_counter() - started

    assert alike(lambda: took(before=True), lambda: took(before=False), 100)


def test_case_33_identical_uploads_are_two(world: World) -> None:
    """The same rows of two tenants: two random ids, two full sizes, nothing shared and nothing said."""
    before = [c.get("/v1/handles").json["stored_bytes"] for c in (world.attacker, world.neighbour)]
    one, two = kept(world.attacker), kept(world.neighbour)
    after = [c.get("/v1/handles").json["stored_bytes"] for c in (world.attacker, world.neighbour)]
    assert one != two
    assert after[0] - before[0] == after[1] - before[1] == 12 * 32 * 4
    first, second = (
        c.get(f"/v1/handles/{h}").json for c, h in ((world.attacker, one), (world.neighbour, two))
    )
    assert {k: v for k, v in first.items() if k not in ("handle", "created")} == {
        k: v for k, v in second.items() if k not in ("handle", "created")
    }
    assert world.attacker.delete(f"/v1/handles/{one}").status == 200
    assert world.neighbour.get(f"/v1/handles/{two}").status == 200


PATHS = ["../ledger.db", "..%2fledger.db", "%2e%2e/%2e%2e/ledger.db", "..\\ledger.db", "/etc/passwd", "//etc/passwd",
         "%2fetc%2fpasswd", "....//....//etc/passwd", "..%252fledger.db", "%c0%ae%c0%ae/ledger.db", "act_%00", "act_*",
         "file:///etc/passwd", "act_{0}/../../catalog.db", "~root", "\u2025/x", "act_{0}%00",
         "act_{0}%0a"]  # fmt: skip


@pytest.mark.parametrize("path", PATHS, ids=ascii)
def test_case_34_paths_in_ids(world: World, path: str) -> None:
    """Dots, slashes, NUL, URLs and encodings of them where an id stands: not an id, so not there."""
    other = kept(world.neighbour)
    raw = f"/v1/handles/{path}".replace("{0}", other[4:])
    for method in ("GET", "DELETE"):
        heard = Wire(world.server.app, _secret(world.attacker)).send(method, raw)
        assert heard.status == 404
        assert codes(heard)[0] in ("handle_not_found", "no_route")
        clean(heard)
    assert world.neighbour.get(f"/v1/handles/{other}").status == 200


def test_case_34_links_in_the_store_are_not_followed(world: World) -> None:
    """A file of the store that became a link to another tenant's file is not read."""
    mine, other = kept(world.attacker), kept(world.neighbour)
    data = world.server.store._depot.shelf._data
    ours, theirs = (sorted((data / h).iterdir()) for h in (mine, other))
    target = next(p for p in ours if p.stat().st_size >= 12 * 32 * 4)
    was = target.read_bytes()
    target.unlink()
    target.symlink_to(next(p for p in theirs if p.name == target.name))
    try:
        stored = {"op": "stored", "id": "s", "handle": mine, "site": "resid_post.1"}
        patch = request(
            stored, edit("set", "resid_post.1", at="prompt[-1]", value="s"), LOGPROBS, prompts=WORDS
        )
        heard = world.attacker.run(patch)
        assert codes(heard)[0] in ("internal", "store_damaged")
        clean(heard, str(data))
    finally:
        target.unlink()
        target.write_bytes(was)


def test_case_35_one_deletes_while_the_other_reads(world: World) -> None:
    """A tenant makes and deletes handles, and tries the other's, while the other reads its own: every read succeeds."""
    theirs = kept(world.neighbour)
    stop, tried = threading.Event(), []

    def vandal() -> None:
        caller = Caller(world.server.app, _secret(world.attacker))
        while not stop.is_set():
            mine = kept(caller, prompts=["x"])
            tried.append(caller.delete(f"/v1/handles/{theirs}").status)
            tried.append(-caller.delete(f"/v1/handles/{mine}").status)

    stored = {"op": "stored", "id": "s", "handle": theirs, "site": "resid_post.1"}
    patch = request(stored, edit("set", "resid_post.1", at="prompt[-1]", value="s"), LOGPROBS, prompts=WORDS)
    quiet = numbers(world.neighbour.run(patch))
    thread = threading.Thread(target=vandal)
    thread.start()
    try:
        answers = [numbers(world.neighbour.run(patch)) for _ in range(20)]
    finally:
        stop.set()
        thread.join(30)
    assert answers == [quiet] * 20
    assert set(tried) == {404, -200}
    assert world.server.service.check() == []


def test_case_36_a_key_revoked_while_its_run_runs(world: World) -> None:
    """Nothing is released to a key revoked in the middle; what the start had cost stays charged."""
    keys, engine = world.server.service.gate.keys, world.server.engines["tiny"]
    made = mint(world.server, "leaver")
    caller, again = Caller(world.server.app, made.secret), mint(world.server, "leaver")
    with Held(engine):
        job = caller.post("/v1/runs", request(TEXT, max_new_tokens=4)).json["job"]
        _until(lambda: engine.stats().live_requests == 1)
        keys.revoke(made.principal.key_id)
        heard = caller.get(f"/v1/jobs/{job}/result")
        assert (heard.status, codes(heard)) == (401, ["bad_key"])
    colleague = Caller(
        world.server.app, again.secret
    )  # another key of the same tenant sees how the job ended
    heard = colleague.result(job)
    assert (heard.status, codes(heard)) == (401, ["bad_key"])
    assert "outputs" not in heard.json
    assert world.spent(made.principal.key_id) == {"tiny": 256}
    assert caller.post("/v1/runs", request(LOGPROBS)).status == 401


BAD_SECRETS = ["", "x", "trk_", "Bearer", "null", "trk_" + "0" * 16 + "_" + "A" * 43, "eyJhbGciOiJub25lIn0.e30.",
               "' OR 1=1 --", "trk_" + "0" * 16 + "_" + "A" * 43 + "\t", "*", "trk_%00"]  # fmt: skip


@pytest.mark.parametrize("secret", BAD_SECRETS, ids=ascii)
def test_case_37_credentials_that_are_none(world: World, secret: str) -> None:
    """Empty, made up, unsigned or with something appended: 401, and always the same one."""
    wire = Wire(world.server.app, secret)
    for secret_of in (secret, _secret(world.attacker) + secret, _secret(world.attacker)[:-1]):
        if secret_of == _secret(world.attacker):
            continue
        heard = Wire(world.server.app, secret_of).send("GET", "/v1/handles")
        assert (heard.status, codes(heard)[0]) in ((401, "bad_key"), (401, "no_key")), secret_of
        clean(heard)
    assert wire.send("POST", "/v1/runs", json.dumps(request(LOGPROBS)).encode()).status == 401


@pytest.fixture(scope="module")
def token(world: World, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A token of the attacker's own key: one model, two ops, one site, 600 bits."""
    keys = world.server.service.gate.keys
    scope = Scope(frozenset({"tiny"}), frozenset({"read", "logprobs"}), frozenset({"resid_post.1"}), 600)
    root = tmp_path_factory.mktemp("root") / "tokens.key"
    return str(keys.mint(keys.authenticate(_secret(world.attacker)), scope, root=root).text)


def test_case_37_a_token_is_no_wider_than_it_says(world: World, token: str) -> None:
    """Another model, op, site or more bits than the token names: refused, and its key pays nothing."""
    caller = Caller(world.server.app, token)
    assert caller.run(request(LOGPROBS, prompts=["abc"])).status == 200
    spent = world.spent()
    wrong = [request(LOGPROBS, model="shut"), request(read("resid_post.1"), capture("r")),
             request(read("resid_post.2"), LOGPROBS),
             request({**LOGPROBS, "at": "prompt[*]"}, prompts=["x" * 200])]  # fmt: skip
    for body in wrong:
        heard = caller.post("/v1/runs", body)
        assert (heard.status, codes(heard)[0]) in (
            (403, "out_of_scope"), (403, "not_allowed"), (403, "budget_exhausted")), heard.json  # fmt: skip
        clean(heard)
    assert world.spent() == spent
    wider = tokens.attenuate(token, Scope(None, None, None, 2**40))
    for body in wrong:
        assert Caller(world.server.app, wider).post("/v1/runs", body).status == 403


def test_case_37_tokens_that_were_changed_or_are_over(world: World, token: str) -> None:
    """A block removed, a byte changed, a token that has expired or was revoked, and claims of other formats: 401."""
    keys = world.server.service.gate.keys
    narrow = tokens.attenuate(token, Scope(most_bits=300))
    public, narrow_raw = tokens._split(narrow)
    _, raw = tokens._split(token)
    over = tokens.attenuate(token, Scope(expires_ms=1))
    cut = narrow[: len(token)]
    changed = [
        narrow[:i] + ("A" if narrow[i] != "A" else "B") + narrow[i + 1 :] for i in range(60, len(narrow), 37)
    ]
    for text in (over, cut, *changed, token + "A", "trt_", "trt_" + "A" * 100):
        heard = Caller(world.server.app, text).get("/v1/handles")
        assert (heard.status, codes(heard)) == (401, ["bad_key"]), text[:20]
        clean(heard)
    assert public
    assert raw != narrow_raw
    assert Caller(world.server.app, narrow).get("/v1/handles").status == 200
    keys.revoke_token(tokens.ids(narrow)[-1])
    assert Caller(world.server.app, narrow).get("/v1/handles").status == 401
    assert Caller(world.server.app, token).get("/v1/handles").status == 200


GAMES: list[dict[str, str]] = [
    {"x-forwarded-for": "127.0.0.1", "x-real-ip": "10.0.0.1", "forwarded": "for=127.0.0.1;host=evil"},
    {"x-request-id": "http://169.254.169.254/latest/meta-data"},
    {"x-request-id": "req_" + "0" * 24},
    {"host": "evil.example"},
    {"host": "127.0.0.1@evil.example:99999"},
    {"x-forwarded-host": "evil.example", "x-forwarded-proto": "gopher"},
    {"referer": "http://evil.example/", "origin": "http://evil.example"},
    {"x-original-url": "/v1/engine", "x-rewrite-url": "/v1/engine", "x-http-method-override": "DELETE"},
    {"traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01", "baggage": "x=http://evil.example"},
    {"accept": "text/html", "accept-language": "../../etc", "range": "bytes=0-1", "if-none-match": "*"},
    {"cookie": "key=trk_0", "x-api-key": "trk_0", "proxy-authorization": "Basic x"},
]


class Dialled:
    """Whether anything in this process looked a name up or connected; audit hooks see both, whoever does it."""

    seen: ClassVar[list[tuple[str, str]]] = []
    on: ClassVar[bool] = False
    installed: ClassVar[bool] = False

    @classmethod
    @contextlib.contextmanager
    def watched(cls) -> Iterator[list[tuple[str, str]]]:
        if not cls.installed:
            sys.addaudithook(cls._hear)
            cls.installed = True
        cls.seen.clear()
        cls.on = True
        try:
            yield cls.seen
        finally:
            cls.on = False

    @classmethod
    def _hear(cls, event: str, args: tuple[Any, ...]) -> None:
        if cls.on and event in (
            "socket.connect",
            "socket.getaddrinfo",
            "socket.sendto",
            "urllib.Request",
            "subprocess.Popen",
        ):
            cls.seen.append((event, repr(args)[:200]))


@pytest.mark.parametrize("headers", GAMES, ids=lambda h: next(iter(h)))
def test_case_38_headers_that_want_to_be_believed(world: World, headers: dict[str, str]) -> None:
    """Headers that name a host, a route, an id or an origin change no answer, and nobody is called because of them."""
    plain = world.attacker.send("GET", "/v1/handles")
    with Dialled.watched() as seen:
        heard = world.attacker.send("GET", "/v1/handles", headers=headers)
        ran = world.attacker.send("POST", "/v1/runs", json=request(LOGPROBS), headers=headers)
        result = world.attacker.result(ran.json["job"])
    assert seen == []
    assert (heard.status, heard.body) == (plain.status, plain.body)
    assert numbers(result) == numbers(world.attacker.run(request(LOGPROBS)))
    for answer in (heard, ran, result):
        assert answer.headers["x-request-id"] not in headers.values()
        echoed = " ".join(f"{k}: {v}" for k, v in answer.headers.items()) + answer.body.decode()
        assert "evil" not in echoed
        assert "169.254" not in echoed


def test_case_38_the_watch_hears(world: World) -> None:
    """The audit above would notice a connection: one is made."""
    import socket

    with Dialled.watched() as seen, contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", 9), 0.2)
    assert seen
    assert world.attacker.get("/healthz").status == 200


PLAIN = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"
TWO_LENGTHS = (
    b"POST /v1/runs HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"0\r\n\r\nGET /v1/engine HTTP/1.1\r\nHost: x\r\n\r\n"
)
SMUGGLED = {
    "folded": PLAIN + b"X-A: b\r\n\tContent-Length: 5\r\n\r\n",
    "bare line feed": PLAIN + b"X-Request-Id: a\nSet-Cookie: b\r\n\r\n",
    "absolute": b"GET http://evil.example/healthz HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    "connect": b"CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    "encoded": b"GET /healthz%0d%0aSet-Cookie:%20x=1 HTTP/1.1\r\nHost: x\r\n\r\n",
    "two hosts": PLAIN + b"Host: b\r\n\r\n",
    "upgrade": PLAIN + b"Upgrade: websocket\r\nConnection: upgrade\r\n\r\n",
    "two lengths": TWO_LENGTHS,
}


@pytest.mark.parametrize("raw", SMUGGLED.values(), ids=SMUGGLED)
def test_case_38_bytes_that_smuggle(live: Any, raw: bytes) -> None:
    """On a real socket: split headers, other hosts, tunnels, upgrades and two lengths never make a second answer."""
    said = live.talk(raw)
    head, _, _ = said.partition(b"\r\n\r\n")
    assert len(re.findall(rb"HTTP/1\.1 \d{3} ", said)) <= 1
    assert b"set-cookie" not in head.lower()
    assert b"location" not in head.lower()
    assert b"evil" not in head
    assert b"Traceback" not in said
    assert b"101 Switching" not in said
    assert live.dialled() == []
    assert live.healthy()


def test_case_38_a_slash_at_the_end(live: Any) -> None:
    """An address with a slash too many is an address that does not exist; the named host is not redirected to."""
    said = live.talk(b"GET /v1/models/ HTTP/1.1\r\nHost: evil.example\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 404 ")
    assert b"evil" not in said


def test_case_37_and_38_tiers_are_not_claims(world: World) -> None:
    """Nothing a request says makes its key of another tier or role: the ledger's answer is the same as without."""
    agent = mint(world.server, "small", Tier.agent)
    caller = Caller(world.server.app, agent.secret)
    for headers in ({"x-tier": "open", "x-role": "operator", "x-tenant": "victor"}, {}):
        heard = caller.send("GET", "/v1/ledger", headers=headers)
        assert {b["tier"] for b in heard.json["budgets"].values()} == {"agent"}
        assert caller.send("GET", "/v1/engine", headers=headers).status == 403
