"""Cases 13 to 27: programs that are no graph, are too large, or would carry something out under another name."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from case_room import JSON, LOGPROBS, World, clean, codes, fastest_s, guarded, mint, numbers
from http_room import Caller, Heard, capture, edit, read, request
from pydantic import ValidationError

from trocar import strict
from trocar.errors import TrocarError
from trocar.gate.policy import Tier, TierTerms
from trocar.graph import check
from trocar.graph.cost import Prices
from trocar.graph.facts import ModelFacts
from trocar.graph.program import Generation, Program
from trocar.graph.scope import Scope
from trocar.graph.spec import OUTPUTS, SPEC
from trocar.wire.requests import RunRequest

ROWS = read("resid_post.1", "prompt[*]")
MATRIX = {"op": "tensor", "id": "m", "name": "m"}
LENS = {"op": "lens", "id": "top", "of": ["r"]}


def add(name: str, a: str, b: str) -> dict[str, Any]:
    return {"op": "add", "id": name, "a": a, "b": b}


def test_case_13_cycles(world: World) -> None:
    """A node that names itself, the next one, or a ring of three: list order is the only order there is."""
    world.refuses_json(request(add("a", "a", "a"), LOGPROBS), "unknown_ref")
    world.refuses_json(request(add("a", "r", "r"), ROWS, LOGPROBS), "unknown_ref")
    world.refuses_json(
        request(add("a", "c", "c"), add("b", "a", "a"), add("c", "b", "b"), LOGPROBS), "unknown_ref"
    )
    world.refuses_json(request(capture("r"), ROWS), "unknown_ref")
    gated = edit("add", "resid_post.1", value="r", gate="e")
    world.refuses_json(request(ROWS, gated, LOGPROBS), "unknown_ref")


WORDS = ["__class__", "__import__", "eval", "exec", "import", "edit.__init__", "re\u0430d", "rеad", "read ", "READ",
         "read\x00", "\u202eread", "", "constructor", "read;text", "python", "torch.load"]  # fmt: skip


@pytest.mark.parametrize("op", [*WORDS, None, 1, True, ["read"], {"op": "read"}], ids=ascii)
def test_case_14_ops_that_are_not_in_the_table(world: World, op: Any) -> None:
    """Names of Python, look-alike letters, other types: the table is closed."""
    world.refuses_json(request({**ROWS, "op": op}, capture("r")), "unknown_op")


def test_case_14_no_op_at_all(world: World) -> None:
    """A node without an op, and nodes that are no objects."""
    world.refuses_json(request({"id": "x"}, LOGPROBS), "missing_field")
    for node in ("read", 1, None, ["read"]):
        world.refuses_json({**request(LOGPROBS), "program": {"nodes": [node]}}, "bad_value", "missing_field")


def test_case_15_ids_and_operands(world: World) -> None:
    """An id twice, a reserved id, an operand that never was, one too few, one too many, none, the wrong kind."""
    world.refuses_json(request(ROWS, ROWS, capture("r")), "duplicate_id")
    for name in ("zero", "overhead", "receipts", "lengths"):
        world.refuses_json(request({**LOGPROBS, "id": name}), "duplicate_id")
    world.refuses_json(request(capture("never")), "unknown_ref")
    world.refuses_json(request(ROWS, {"op": "add", "id": "a", "a": "r"}, capture("r")), "missing_field")
    world.refuses_json(request(ROWS, {**add("a", "r", "r"), "c": "r"}, capture("r")), "unknown_field")
    world.refuses_json(request(ROWS, {**add("a", "r", "r"), "b": ["r", "r"]}, capture("r")), "bad_value")
    world.refuses_json(request(ROWS, {"op": "capture", "id": "k", "of": []}), "bad_value")
    world.refuses_json(request(ROWS, {"op": "not", "id": "n", "of": "r"}, capture("r")), "wrong_operand")
    world.refuses_json(request(LENS | {"id": "other"}, LENS), "unknown_ref")


def test_case_16_more_nodes_than_the_table_of_a_request_holds(world: World) -> None:
    """5,001 nodes are refused by their number, before a node is looked at."""
    raw = json.dumps(request(*({**LOGPROBS, "id": f"x{i}"} for i in range(5001)))).encode()

    def decode() -> None:
        with pytest.raises(TrocarError) as caught:
            strict.parse(RunRequest, raw)
        assert caught.value.code == "too_many_nodes"

    assert fastest_s(decode) < 0.5  # most of it is reading 400 kB of JSON
    world.refuses_raw(raw, "too_many_nodes")


def edges(count: int) -> bytes:
    """JSON of a program with `count` edges: lenses of 512 reads each."""
    reads = [read("resid_post.1", name=f"r{j}") for j in range(512)]
    every = [r["id"] for r in reads]
    lenses = [{"op": "lens", "id": f"l{i}", "of": every, "top_k": 1} for i in range(count // 512 + 1)]
    return json.dumps(request(*reads, *lenses)).encode()


def test_case_16_a_million_edges(world: World) -> None:
    """A million references between few nodes are refused, however little each costs."""
    heard = world.attacker.send("POST", "/v1/plan", content=edges(1_000_000), headers=JSON)
    assert heard.status == 422
    assert heard.refusal["code"] in ("too_many_nodes", "too_expensive", "too_large")


def test_case_16_edges_of_one_node(world: World) -> None:
    """More than 512 operands of one node are refused."""
    body = request(ROWS, {"op": "lens", "id": "l", "of": ["r"] * 513})
    world.refuses_json(body, "bad_value", "too_large")


def doubling(depth: int) -> list[dict[str, Any]]:
    nodes = [read("resid_post.1", "prompt[-1]", name="n0")]
    return [*nodes, *(add(f"n{i + 1}", f"n{i}", f"n{i}") for i in range(depth))]


def test_case_17_two_to_the_sixty_paths(world: World) -> None:
    """A chain of 60 sums of a value with itself has 2^60 paths and 61 nodes: checked once each, priced exactly."""
    body = request(*doubling(60), {**LENS, "of": ["n60"]}, prompts=["abc"])
    assert fastest_s(lambda: world.attacker.post("/v1/plan", body), 3) < 0.5
    plan = world.attacker.post("/v1/plan", body).json
    assert plan["cost"]["bits_out"] == {"overhead": 256, "top": 5 * (32 + 9)}
    assert plan["cost"]["rows_read"] == 1
    heard = world.attacker.run(body)
    assert heard.status in (
        200,
        422,
    )  # 2^60 times a row may be too large to release; never too much to compute
    assert fastest_s(lambda: world.attacker.post("/v1/plan", request(*doubling(2000), LOGPROBS)), 2) < 5


@pytest.mark.parametrize("op", ["outer", "expand", "einsum", "pad", "repeat", "broadcast_to", "reshape", "tile", "kron",
                                "cat", "stack", "arange", "full"])  # fmt: skip
def test_case_18_ops_that_make_shapes(world: World, op: str) -> None:
    """No op makes a value wider or longer than what it was made from."""
    world.refuses_json(request(ROWS, {"op": op, "id": "x", "of": "r"}, LOGPROBS), "unknown_op")


def test_case_18_many_large_values(world: World) -> None:
    """5,000 patterns of a long prompt would be 5 GB: refused from their shapes, before anything is allocated."""
    wide = [read("attn_probs.1", "prompt[*]", name=f"r{i}") | {"keys": "prompt[0:255]"} for i in range(4999)]
    body = request(*wide, {"op": "pattern", "id": "p", "of": "r0"}, prompts=["x" * 255])
    tracemalloc.start()
    try:
        world.refuses_json(body, "too_expensive")
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 100 << 20
    heard = world.refuses(
        lambda: world.attacker.frame("/v1/runs", request(ROWS, MATRIX, {"op": "matmul", "id": "x", "a": "r", "b": "m"},
                                     LOGPROBS), {"m": np.ones((32, 65))}), "too_expensive")  # fmt: skip
    assert heard.refusal["path"] == "program.nodes[2].b"


LARGE = ModelFacts(
    name="large", fingerprint="sha256:0", lineage="large", family="llama", dtype="bfloat16", n_layers=80, d_model=8192,
    d_mlp=28672, n_heads=64, n_kv_heads=8, d_head=128, vocab_size=128_256, context=8192, parameters=70_000_000_000,
    weight_bits=1_120_000_000_000, open_weights=False, sites=("resid_post",), unavailable={}, eos=(0,),
)  # fmt: skip


def priced(
    lengths: tuple[int, ...], *nodes: dict[str, Any], tensors: dict[str, tuple[int, ...]] | None = None
) -> Any:
    scope = Scope(LARGE, lengths, Generation(), tensors or {}, {}, lambda _: [1])
    return check.check(Program.model_validate_json(json.dumps({"nodes": nodes})), scope, Prices(32, 256))


def refused(act: Any) -> str:
    with pytest.raises(TrocarError) as caught:
        act()
    return caught.value.code


def test_case_19_more_arithmetic_than_a_request_may_ask_for(world: World) -> None:
    """A million tokens through 70 billion parameters, or a wide dictionary on every row, at once: too expensive."""
    assert priced((1000,), LOGPROBS).cost.flops < check.MAX_FLOPS
    assert refused(lambda: priced((8000,) * 125, LOGPROBS)) == "too_expensive"
    assert refused(lambda: priced((8000,) * 126, LOGPROBS)) == "too_expensive"
    shapes = {"w": (8192, 1 << 17), "b": (1 << 17,), "u": (1 << 17, 8192), "c": (8192,)}
    sae = {"op": "sae", "id": "d", "w_enc": "w", "b_enc": "b", "w_dec": "u", "b_dec": "c"}
    many = [{"op": "edit.sae", "id": f"e{i}", "site": f"resid_post.{i}", "sae": "d",
              "features": [{"index": 1, "set": 1.0}]} for i in range(50)]  # fmt: skip
    few = priced((1000,), sae, *many[:1], LOGPROBS, tensors=shapes).cost.flops
    assert few > 4 * 1000 * 8192 * (1 << 17)
    assert refused(lambda: priced((8000,) * 8, sae, *many, LOGPROBS, tensors=shapes)) == "too_expensive"
    world.refuses_json(request(LOGPROBS, prompts=["x" * 250] * 4096), "too_expensive")


def test_case_19_matmuls_count(world: World) -> None:
    """Fifty products of matrices cost more than one."""
    frame = {"m": np.ones((32, 32))}
    chain = [{"op": "matmul", "id": f"x{i}", "a": f"x{i - 1}" if i else "r", "b": "m"} for i in range(50)]
    score = [{"op": "norm", "id": "n", "of": "x49"}, {"op": "score", "id": "s", "of": "n"}]
    long = world.attacker.frame("/v1/plan", request(ROWS, MATRIX, *chain, *score), frame).json
    score[0]["of"] = "x0"
    short = world.attacker.frame("/v1/plan", request(ROWS, MATRIX, *chain[:1], *score), frame).json
    assert long["cost"]["flops"] >= short["cost"]["flops"] + 49 * 2 * 8 * 32 * 32


def test_case_20_nothing_is_stretched(world: World) -> None:
    """Rows, matrices and vectors of other sizes are never made to fit; only the kind `vector` is one for all rows."""

    def of(name: str, shape: tuple[int, ...], *expected: str) -> None:
        body = request(ROWS, MATRIX, add("x", "r", "m"), {**LENS, "of": ["x"]})
        world.refuses(lambda: world.attacker.frame(f"/v1/{name}", body, {"m": np.ones(shape)}), *expected)

    for route in ("runs", "plan"):
        of(route, (1, 32), "wrong_operand")
        of(route, (3, 32), "wrong_operand")
        of(route, (1,), "width_mismatch")
        of(route, (31,), "width_mismatch")
        of(route, (64,), "width_mismatch")
    last = read("resid_post.2", name="q")
    world.refuses_json(request(ROWS, last, add("x", "r", "q"), {**LENS, "of": ["x"]}), "rows_mismatch")
    patch = edit("set", "resid_post.3", at="prompt[0:2]", value="r")
    world.refuses_json(request(ROWS, patch, LOGPROBS), "rows_mismatch")
    gate = [{"op": "norm", "id": "n", "of": "q"}, {"op": "gt", "id": "g", "a": "n", "b": 0.5}]
    gated = edit("scale", "resid_post.3", at="prompt[*]", by=2.0, gate="g")
    world.refuses_json(request(last, *gate, gated, LOGPROBS), "rows_mismatch")


SITES = ["resid_post.-1", "resid_post.4", f"resid_post.{2**31}", f"resid_post.{2**64}", "resid_post.2.0",
         "resid_post.'2'", "resid_post",
         "resid_post.01", "resid_post. 1", "resid_post.1 ", "resid_post.\u0661", "resid_post.1e0",
         "resid_post.1\n", "resid_post.1;", "resid_post.*", "../resid_post.1", "embeddings.0"]  # fmt: skip
PLACES = ["prompt[3]", "prompt[-4]", "prompt[99]", "prompt[0:99]", "prompt[2:1]", "prompt[1:1]", "prompt[::0]",
          "prompt[0:2:0]", "prompt[::-1]", "prompt[-99:]", "prompt[2147483648]", "prompt[1e3]", "prompt['2']",
          "prompt[True]", "prompt[1,1]", "prompt[\u0661]", "prompt[*]\n", "prompt[]", "prompt", "", "gen[0]",
          "prompt[0" + "0" * 350 + "]", "span('a')", 'role("system")', 'mask("none")', "all[0]"]  # fmt: skip


@pytest.mark.parametrize("site", SITES, ids=ascii)
def test_case_21_layers_that_do_not_exist(world: World, site: str) -> None:
    """A layer below 0, above the last, beyond 32 bits, or spelled in any way but one."""
    expected = ("unknown_site", "layer_out_of_range", "ambiguous_site")
    world.refuses_json(request(read(site), capture("r")), *expected)
    world.refuses_json(request(edit("scale", site, by=2.0), LOGPROBS), *expected)


@pytest.mark.parametrize("at", PLACES, ids=ascii)
def test_case_21_positions_that_do_not_exist(world: World, at: str) -> None:
    """A position past the end, a slice backwards, a step of zero, or a number spelled otherwise."""
    expected = ("bad_position", "position_out_of_range", "touches_nothing", "bad_value")
    world.refuses_json(request(read("resid_post.1", at), capture("r"), prompts=["abc"]), *expected)
    world.refuses_json(
        request(edit("scale", "resid_post.1", by=2.0, at=at), LOGPROBS, prompts=["abc"]), *expected
    )


@pytest.mark.parametrize("wrong", ["2", -1, 4, 2**31, 1.0, True])
def test_case_21_layers_that_are_no_numbers(world: World, wrong: Any) -> None:
    """The layer of `stop_after` is an integer that the model has."""
    stop = {"op": "stop_after", "id": "s", "layer": wrong}
    world.refuses_json(request(stop, ROWS, capture("r")), "bad_value", "layer_out_of_range")


NOT_SITES = ["weights", "W_E", "W_U", "lm_head", "unembed", "embed.weight", "model.embed_tokens.weight",
             "q_proj.weight.1",
             "grad.resid_post.1", "resid_post.1.grad", "resid_post.grad.1", "kv_cache.1", "optimizer", "hidden_states",
             "logits"]  # fmt: skip


@pytest.mark.parametrize("site", NOT_SITES)
def test_case_22_weights_and_gradients_have_no_name(world: World, site: str) -> None:
    """Parameters, gradients and whole logits cannot be read, so they cannot be an output."""
    world.refuses_json(request(read(site), capture("r")), "unknown_site", "site_unavailable")


@pytest.fixture(scope="module")
def secret(tiny_of: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Caller, Any]]:
    """A researcher of tier external on secret weights, whose policy lets rows leave under the structure rules."""
    server = guarded(tmp_path_factory.mktemp("secret"), tiny_of("closed", open_weights=False), raw="direct")
    yield Caller(server.app, mint(server, "mallory", Tier.external).secret), server
    assert server.service.check() == []
    server.service.close()


def raw(*names: str) -> dict[str, Any]:
    return {"op": "raw", "id": "rows", "of": list(names)}


def asked(caller: Caller, *nodes: dict[str, Any], model: str = "closed", **vectors: Any) -> Heard:
    """A run, which must cost nothing if it is refused."""
    before = [b["spent_bits"] for b in caller.get("/v1/ledger").json["budgets"].values()]
    body = request(*nodes, model=model)
    started = caller.frame("/v1/runs", body, vectors) if vectors else caller.post("/v1/runs", body)
    if started.status == 202:
        return caller.result(started.json["job"])
    assert [b["spent_bits"] for b in caller.get("/v1/ledger").json["budgets"].values()] == before
    clean(started)
    return started


def test_case_22_rows_do_not_leave(world: World) -> None:
    """Every output names how its result leaves and what it costs; rows of a secret leave through none of them."""
    assert {SPEC[op].declassifier for op in OUTPUTS} == {
        "scalars",
        "top_k",
        "tokens",
        "metric",
        "raw",
        "handle",
    }
    assert all(SPEC[op].bits is not None for op in OUTPUTS)
    world.refuses_json(request(ROWS, {"op": "score", "id": "s", "of": "r"}), "wrong_operand")
    world.refuses_json(request(ROWS, {"op": "output", "id": "s", "of": "r"}), "unknown_op")
    world.refuses_json(request(ROWS, {"op": "text", "id": "t", "of": "r"}), "unknown_field")
    made = world.attacker.run(request(ROWS, capture("r"))).json["outputs"]["kept"]
    facts = world.attacker.get(f"/v1/handles/{made['handle']}").json
    assert floats(made) + floats(facts) == []
    assert floats(world.attacker.run(request(LOGPROBS)).json["outputs"])
    eve = Caller(world.server.app, world.server.keys["eve"])
    for route in ("/v1/runs", "/v1/plan"):
        heard = world.refuses(lambda r=route: eve.post(r, request(read("resid_post.3"), raw("r"), model="shut")),
                              "needs_airlock")  # fmt: skip
        assert floats(heard.json["error"]["refusals"]) == []


def test_case_22_only_reads_leave_as_rows(secret: tuple[Caller, Any]) -> None:
    """What was computed from rows, an uploaded matrix, a stored row or a fit's direction is no row that may leave."""
    caller, _ = secret
    late = read("resid_post.3", "prompt[*]")
    heard = asked(caller, late, {"op": "normalize", "id": "n", "of": "r"}, raw("n"))
    assert codes(heard)[0] in ("wrong_operand", "policy")
    heard = asked(caller, MATRIX, raw("m"), m=np.ones((2, 32)))
    assert codes(heard)[0] == "wrong_operand"
    handle = asked(caller, late, capture("r")).json["outputs"]["kept"]["handle"]
    stored = {"op": "stored", "id": "s", "handle": handle, "site": "resid_post.3"}
    assert codes(asked(caller, stored, raw("s")))[0] in ("wrong_operand", "policy")
    assert asked(caller, late, raw("r")).status == 200


def floats(value: Any) -> list[float]:
    """Every number with a fraction in an answer."""
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return [x for part in inner for x in floats(part)]
    return [value] if isinstance(value, float) else []


@pytest.mark.parametrize("bits", [0, -1, 0.5, 33, 3, 17, 31, "32", None, True])
def test_case_23_widths_of_released_numbers(world: World, bits: Any) -> None:
    """A program does not choose how finely its numbers leave; a policy chooses 4 to 16 bits, or 32, or is refused."""
    for output in ({**LOGPROBS, "bits": bits}, {**LOGPROBS, "scalar_bits": bits}):
        world.refuses_json(request(output), "unknown_field")
    world.refuses_json({**request(LOGPROBS), "scalar_bits": bits}, "unknown_field")
    with pytest.raises(ValidationError):
        TierTerms(life_ppm=1, day_ppm=1, rank_ppm=1, scalar_bits=bits)


def test_case_24_what_is_released_is_no_operand(world: World) -> None:
    """An output cannot be an operand, and one name is one output."""
    world.refuses_json(
        request(ROWS, LENS, {**LENS, "id": "again", "of": ["top"]}), "unknown_ref", "wrong_operand"
    )
    world.refuses_json(
        request(ROWS, LENS, {"op": "score", "id": "s", "of": "top"}), "unknown_ref", "wrong_operand"
    )
    world.refuses_json(
        request(LOGPROBS, edit("scale", "resid_post.1", by=2.0, gate="lp")), "unknown_ref", "wrong_operand"
    )
    world.refuses_json(request(ROWS, LENS, LENS), "duplicate_id")
    world.refuses_json(request(ROWS, capture("r", "r")), "duplicate_id", "wrong_operand")


def test_case_24_the_same_rows_twice_in_one_lens(world: World) -> None:
    """The same value twice in one output is a mistake, as it is for a capture."""
    heard = world.attacker.post("/v1/plan", request(ROWS, {**LENS, "of": ["r", "r"]}))
    assert (heard.status, heard.refusal["code"]) == (422, "duplicate_id")


def kept(caller: Caller, *sites: str) -> str:
    """A handle of twelve rows."""
    nodes = [read(site, name=f"r{i}") for i, site in enumerate(sites)]
    body = request(*nodes, capture(*[n["id"] for n in nodes]), prompts=[f"word {i}" for i in range(12)])
    return str(caller.run(body).json["outputs"]["kept"]["handle"])


def test_case_25_targets_are_what_the_caller_says(world: World) -> None:
    """A probe's targets are numbers of the request: no handle, site or node can stand there."""
    handle = kept(world.attacker, "resid_post.1", "resid_post.2")
    fit = {"handle": handle, "kind": "ridge", "labels": [float(i) for i in range(12)]}
    for labels in (
        handle,
        [handle] * 12,
        {"handle": handle, "site": "resid_post.2"},
        "resid_post.2",
        [["resid_post.2"]] * 12,
    ):
        world.refuses_json({**fit, "labels": labels}, "bad_value", route="/v1/fits")
    for field in ("targets", "target_handle", "y"):
        world.refuses_json({**fit, field: handle}, "unknown_field", route="/v1/fits")
    world.refuses_json({**fit, "target": handle}, "bad_value", route="/v1/fits")
    for row in ([1.0] * 32, [[1.0] * 32]):
        world.refuses_json({**fit, "labels": [row] * 12}, "bad_value", route="/v1/fits")


def test_case_25_activations_as_targets_are_the_weights(secret: tuple[Caller, Any]) -> None:
    """A fit of rows to rows is a matrix of the model: refused where that is a secret, whatever it would cost."""
    caller, _ = secret
    sites = ("attn_in.2", "q.2")
    nodes = [read(site, name=f"r{i}") for i, site in enumerate(sites)]
    handle = asked(caller, *nodes, capture("r0", "r1")).json["outputs"]["kept"]["handle"]
    body = {"handle": handle, "kind": "linear_map", "target": handle, "target_site": "q.2"}
    before = caller.get("/v1/ledger").json["budgets"]
    heard = caller.post("/v1/fits", body)
    assert (heard.status, codes(heard), heard.refusal["path"]) == (403, ["policy"], "target")
    clean(heard)
    assert caller.get("/v1/ledger").json["budgets"] == before


def test_case_25_no_artifact_starts_from_weights_or_leaves(world: World) -> None:
    """No start from weights, no state of an optimiser, no merged weights, and no address that hands them out."""
    handle = kept(world.attacker, "resid_post.1")
    fit = {"handle": handle, "kind": "mean_diff", "labels": [i % 2 for i in range(12)]}
    for kind in ("lora", "pissa", "svd", "pca", "sae", "transcoder", "tuned_lens"):
        world.refuses_json({**fit, "kind": kind}, "bad_value", route="/v1/fits")
    for field in ("init", "init_from", "optimizer", "export", "merge", "return_weights"):
        world.refuses_json({**fit, field: "svd"}, "unknown_field", route="/v1/fits")
    started = world.attacker.post("/v1/fits", fit)
    found = world.attacker.result(started.json["job"]).json["outputs"]["fit"]
    assert set(found["sites"][0]) == {"site", "metrics"}
    artifact = found["artifact"]
    for tail in (
        "/weights",
        "/download",
        "/rows",
        "/export",
        "/optimizer",
        "/merged",
        ".safetensors",
        "?raw=1",
    ):
        heard = world.attacker.get(f"/v1/handles/{artifact}{tail}")
        assert heard.status == 404 or "arrays" not in heard.json
        assert len(heard.body) < 1000


@pytest.mark.parametrize(
    "write", ["attn_out.2", "resid_mid.2", "mlp_out.2", "resid_post.2", "resid_pre.3", "attn_in.3"]
)
@pytest.mark.parametrize("how", ["edit.set", "edit.add", "edit.scale"])
def test_case_26_written_and_read_in_one_block(secret: tuple[Caller, Any], write: str, how: str) -> None:
    """Rows read with less than a whole block between them and a write of the caller's own stay."""
    caller, _ = secret
    vector = {"op": "tensor", "id": "v", "name": "v"}
    change = {"op": how, "id": "e", "site": write, **({"by": 2.0} if how == "edit.scale" else {"value": "v"})}
    heard = asked(caller, vector, change, read("resid_mid.3", "prompt[*]"), raw("r"), v=np.eye(32)[3])
    assert (heard.status, codes(heard)) == (403, ["policy"])
    assert "blocks after the last write" in heard.refusal["reason"]


def test_case_26_a_block_between_is_allowed_and_charged(secret: tuple[Caller, Any]) -> None:
    """With a block or more between write and read, rows leave at their price; a later write does not matter."""
    caller, _ = secret
    vector = {"op": "tensor", "id": "v", "name": "v"}
    change = {"op": "edit.add", "id": "e", "site": "resid_post.1", "value": "v"}
    rows = read("resid_post.3", "prompt[*]")
    plan = caller.frame(
        "/v1/plan", request(vector, change, rows, raw("r"), model="closed"), {"v": np.ones(32)}
    ).json
    assert plan["cost"]["bits_out"]["rows"] >= 8 * 32 * 8
    heard = asked(caller, vector, change, rows, raw("r"), v=np.ones(32))
    assert heard.status == 200, heard.json
    assert int(heard.headers["x-trocar-bits"]) == plan["cost"]["total_bits"]
    late = {**change, "site": "resid_post.3"}
    assert asked(caller, vector, late, read("resid_post.2"), raw("r"), v=np.ones(32)).status == 200


def test_case_26_first_layers_and_both_ends_of_a_matrix(secret: tuple[Caller, Any]) -> None:
    """Rows close to the embeddings, and rows of both ends of one matrix, stay without any write."""
    caller, _ = secret
    for site in ("embeddings", "resid_pre.0", "resid_post.1", "mlp_out.1"):
        assert codes(asked(caller, read(site), raw("r"))) == ["policy"], site
    for one, other in (
        ("attn_in.2", "q.2"),
        ("mlp_act.3", "mlp_out.3"),
        ("resid_pre.2", "k.2"),
        ("z.2", "attn_out.2"),
    ):
        both = [read(one, "prompt[*]"), read(other, "prompt[*]", name="q")]
        assert "policy" in codes(asked(caller, *both, raw("r", "q"))), (one, other)
        apart = [raw("r"), {**raw("q"), "id": "more"}]
        assert "policy" in codes(asked(caller, *both, *apart)), (one, other)


@pytest.mark.parametrize(
    "names", [("attn_in.2", "z.2"), ("resid_pre.2", "z.2"), ("v.2", "attn_out.2"), ("v.2", "resid_mid.2")]
)
def test_case_26_both_ends_of_a_matrix_at_position_0(
    secret: tuple[Caller, Any], names: tuple[str, str]
) -> None:
    """A first token sees itself alone: there a head gives its value back, and attention is one matrix."""
    caller, _ = secret
    one, other = names
    both = [read(one, "prompt[0]"), read(other, "prompt[0]", name="q")]
    assert set(codes(asked(caller, *both, raw("r", "q")))) == {"policy"}


@pytest.mark.parametrize("order", [("attn_in.3", "v.3"), ("v.3", "attn_in.3")])
def test_case_26_both_ends_in_two_requests(secret: tuple[Caller, Any], order: tuple[str, str]) -> None:
    """The two ends of a matrix in two requests are the same two ends."""
    caller, _ = secret
    heard = [asked(caller, read(site, "prompt[*]"), raw("r")) for site in order]
    assert codes(next(h for h in heard if h.status != 200)) == ["policy"]


@pytest.mark.parametrize("owner", ["neighbour", "nobody"])
def test_case_27_handles_of_two_tenants(world: World, owner: str) -> None:
    """A program, a fit or a session that joins one's own rows with a stranger's gets `handle_not_found`, no more."""
    mine = kept(world.attacker, "resid_post.1")
    other = kept(world.neighbour, "resid_post.1") if owner == "neighbour" else "act_" + "0" * 32
    nodes = [
        {"op": "stored", "id": name, "handle": h, "site": "resid_post.1"}
        for name, h in (("a", mine), ("b", other))
    ]
    joined = [*nodes, add("x", "a", "b"), edit("set", "resid_post.1", at="prompt[-1]", value="x"), LOGPROBS]
    prompts = [f"word {i}" for i in range(12)]
    heard = world.refuses_json(request(*joined, prompts=prompts), "handle_not_found")
    assert heard.refusal["path"] == "program.nodes[1].handle"
    world.refuses_json(
        {"steps": [request(*joined, prompts=prompts)]}, "handle_not_found", route="/v1/sessions"
    )
    world.refuses_json({"handle": other, "kind": "ridge", "labels": [float(i) for i in range(12)]}, "handle_not_found",
                       route="/v1/fits")  # fmt: skip
    probe = {"op": "score", "id": "s", "of": "r", "probe": "art_" + other[4:], "site": "resid_post.1"}
    world.refuses_json(request(ROWS, probe), "handle_not_found")


def test_case_13_to_27_what_is_right_still_runs(world: World) -> None:
    """The programs above are wrong for the reason each names: without it they run."""
    assert numbers(world.attacker.run(request(ROWS, LENS, capture("r"))))
    assert world.attacker.run(request(ROWS, add("x", "r", "r"), {**LENS, "of": ["x"]})).status == 200
    stored = {
        "op": "stored",
        "id": "a",
        "handle": kept(world.attacker, "resid_post.1"),
        "site": "resid_post.1",
    }
    patched = request(stored, edit("set", "resid_post.1", at="prompt[-1]", value="a"), LOGPROBS,
                      prompts=[f"word {i}" for i in range(12)])  # fmt: skip
    assert world.attacker.run(patched).status == 200
