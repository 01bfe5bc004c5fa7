"""The rank budget against who asks for one number a row that is another direction in every row.

What counts is compared with what is learned: the gradient of each score by the rows it was made of says along which
direction the number lies, and their rank says how many there are. It is worked out by the reference of the
conformance suite.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from case_room import codes, guarded, mint
from graph_room import Case, node, program
from http_room import Caller, capture, read, request
from reference_values import Values

from trocar.gate.policy import Tier
from trocar.graph import check, exposure
from trocar.graph.cost import Prices
from trocar.graph.exposure import Content
from trocar.graph.facts import HandleFacts
from trocar.graph.scope import Scope

N, D, F = 5, 8, 12
HANDLE = "act_" + "a" * 32
LIVE, STORED = "resid_pre.2", "resid_pre.4"


class Writer:
    """A random program that makes one number a row of rows `r` of this pass, stored rows `g`, and constants."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.nodes: list[dict[str, Any]] = [
            {"op": "read", "id": "r", "site": "resid_post.1", "at": "prompt[*]"},
            {"op": "stored", "id": "g", "handle": HANDLE, "site": "resid_post.3"},
            {"op": "mean", "id": "p", "of": "r"},
        ]
        self.arrays: dict[str, torch.Tensor] = {}
        self.wide = {"r": D, "g": D}
        self.of = {"r": {"r"}, "g": {"g"}, "p": {"r"}}
        self.numbers: list[str] = []
        self.masks: list[str] = []

    def add(self, op: str, *refs: str, **fields: Any) -> str:
        name = f"n{len(self.nodes)}"
        self.nodes.append({"op": op, "id": name, **fields})
        self.of[name] = set().union(*(self.of.get(ref, set()) for ref in refs))
        return name

    def array(self, *shape: int) -> str:
        """A constant with some zeros in it."""
        name = f"t{len(self.nodes)}"
        thin = torch.rand(shape, dtype=torch.float64) < self.rng.choice([0.2, 0.6, 1.0])
        self.arrays[name] = torch.randn(shape, dtype=torch.float64) * thin
        self.nodes.append({"op": "tensor", "id": name, "name": name})
        return name

    def row(self, width: int | None = None) -> str | None:
        fits = [name for name, w in self.wide.items() if width in (None, w)]
        return self.rng.choice(fits) if fits else None

    def beside(self, width: int) -> str:
        """Another value of a width: rows, the mean of rows, or a constant."""
        mean = ["p"] if width == D else []
        return self.rng.choice([self.array(width), self.row(width) or self.array(width), *mean])

    def step(self) -> None:
        getattr(
            self,
            self.rng.choice(["sums", "scales", "dots", "bends", "lengths", "features", "logic", "choices"]),
        )()

    def sums(self) -> None:
        if self.rng.random() < 0.5 and len(self.numbers) > 1:
            a, b = self.rng.sample(self.numbers, 2)
            self.numbers.append(self.add(self.rng.choice(["add", "sub"]), a, b, a=a, b=b))
        else:
            a = self.row()
            b = self.beside(self.wide[a])
            self.wide[self.add("add", a, b, a=a, b=b)] = self.wide[a]

    def scales(self) -> None:
        by = self.rng.choice(self.numbers) if self.numbers else 0.5
        refs = (by,) if isinstance(by, str) else ()
        if self.rng.random() < 0.5 and self.numbers:
            of = self.rng.choice(self.numbers)
            self.numbers.append(self.add("scale", of, *refs, of=of, by=by))
        else:
            of = self.rng.choice([self.row(D), self.array(D)]) if refs else self.row(D)
            self.wide[self.add("scale", of, *refs, of=of, by=by)] = D

    def dots(self) -> None:
        a = self.row()
        b = self.array(self.wide[a]) if self.rng.random() < 0.7 else self.beside(self.wide[a])
        self.numbers.append(self.add("dot", a, b, a=a, b=b))

    def bends(self) -> None:
        if self.rng.random() < 0.3 and self.numbers:
            of = self.rng.choice(self.numbers)
            self.numbers.append(self.add("relu", of, of=of))
            return
        of = self.row()
        bent = self.rng.choice(["relu", "topk", "matmul", "mean"])
        if bent == "mean":
            self.numbers.append(self.add("mean", of, of=of, over="width"))
        elif bent == "matmul":
            self.wide[self.add("matmul", of, a=of, b=self.array(self.wide[of], 3))] = 3
        else:
            more = {"k": 2} if bent == "topk" else {}
            self.wide[self.add(bent, of, of=of, **more)] = self.wide[of]

    def lengths(self) -> None:
        """Of sums of rows with rows: of rows alone they are known to count as one direction."""
        of = self.row()
        if self.of[of] != {"r", "g"}:
            return
        if self.rng.random() < 0.5:
            self.numbers.append(self.add("norm", of, of=of))
        else:
            self.wide[self.add("normalize", of, of=of)] = self.wide[of]

    def features(self) -> None:
        of, shapes = self.row(D), {"w_enc": (D, F), "b_enc": (F,), "w_dec": (F, D), "b_dec": (D,)}
        names = {field: self.array(*shape) for field, shape in shapes.items()}
        sae = self.add("sae", **names, activation="relu")
        for field, name in names.items():
            self.arrays[f"{sae}.{field}"] = self.arrays[name]
        self.wide[self.add("encode", of, of=of, sae=sae)] = F

    def logic(self) -> None:
        if len(self.masks) > 1:
            a, b = self.rng.sample(self.masks, 2)
            self.masks.append(self.add(self.rng.choice(["and", "or"]), a, b, a=a, b=b))
        elif self.numbers:
            a = self.rng.choice(self.numbers)
            self.masks.append(self.add("gt", a, a=a, b=self.rng.choice([0.0, 1.0])))

    def choices(self) -> None:
        if not self.masks:
            return
        cond = self.rng.choice(self.masks)
        if self.rng.random() < 0.5 and len(self.numbers) > 1:
            a, b = self.rng.sample(self.numbers, 2)
            self.numbers.append(self.add("where", cond, a, b, cond=cond, a=a, b=b))
        else:
            a = self.row()
            b = self.beside(self.wide[a])
            self.wide[self.add("where", cond, a, b, cond=cond, a=a, b=b)] = self.wide[a]

    def write(self) -> str:
        """The number that is scored."""
        for _ in range(self.rng.randint(4, 14)):
            self.step()
        if not self.numbers:
            self.dots()
        return self.numbers[-1]


def counted(written: Writer, last: str, request: str = "request") -> list[Any]:
    """The directions of a request."""
    paper = Case()
    facts = HandleFacts(handle=HANDLE, kind="activations", fingerprint=paper.model.fingerprint,
                        widths={"resid_post.3": D}, rows_per_prompt=(N,))  # fmt: skip
    shapes = {name: tuple(a.shape) for name, a in written.arrays.items() if "." not in name}
    scope = Scope(paper.model, (N,), paper.scope().generation, shapes, {HANDLE: facts}, paper.scope().encode)
    checked = check.check(program(*written.nodes, node("score", "s", of=last)), scope, Prices(32, 256))
    contents = {
        n["id"]: Content(n["id"], int(written.arrays[n["id"]].count_nonzero()) if n["op"] == "tensor" else 0)
        for n in written.nodes
        if n["op"] in ("tensor", "sae")
    }
    return list(exposure.directions(checked, contents, request, paper.model.n_layers))


def learned(written: Writer, last: str, draws: int) -> dict[str, int]:
    """By stream, the rank of the gradients of the scores, each by its own row, or by all where it is of all."""
    nodes = program(*written.nodes, node("score", "s", of=last)).nodes
    found: dict[str, list[torch.Tensor]] = {"r": [], "g": []}
    for seed in range(draws):
        torch.manual_seed(seed)
        rows = {name: torch.randn(N, D, dtype=torch.float64, requires_grad=True) for name in found}
        values = Values(nodes, {**written.arrays, "g": rows["g"]}, torch.float64, read={"r": rows["r"]})
        scores = values.get(last).data
        for i, score in enumerate(scores.reshape(-1)) if scores.requires_grad else ():
            grads = torch.autograd.grad(score, list(rows.values()), retain_graph=True, allow_unused=True)
            for name, grad in zip(rows, grads, strict=True):
                if grad is not None:
                    found[name].append(grad[i : i + 1] if scores.ndim else grad.sum(dim=0, keepdim=True))
    return {LIVE: rank(found["r"]), STORED: rank(found["g"])}


def rank(gradients: list[torch.Tensor]) -> int:
    rows = torch.cat([torch.zeros(1, D, dtype=torch.float64), *gradients])
    size = rows.norm(dim=1)
    kept = rows[size > 1e-9] / size[size > 1e-9, None]
    return int(torch.linalg.matrix_rank(kept, rtol=1e-7)) if len(kept) else 0


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
def test_no_score_lies_along_more_directions_than_are_counted() -> None:
    tight = many = 0
    for seed in range(400):
        torch.manual_seed(seed)
        written = Writer(Random(seed))
        last = written.write()
        directions = counted(written, last)
        fixed = directions == counted(written, last, "another")  # not of these rows alone
        shown = learned(written, last, 4 if fixed else 1)
        for stream, seen in shown.items():
            most = min(D, sum(d.rank for d in directions if d.site == stream))
            assert seen <= most, (seed, stream, written.nodes)
            tight += seen == most > 0
            many += seen > 1
    assert tight > 300
    assert many > 120


# ---- through the server ---------------------------------------------------------------------------

K = 8
PROMPT = [[*range(10, 10 + K)]]
EYE = np.eye(32, dtype=np.float32)


@pytest.fixture
def eve(tiny_of: Any, tmp_path: Path) -> Iterator[Caller]:
    """A key of tier external on secret weights: 3 directions of a width of 32."""
    server = guarded(tmp_path, tiny_of("closed", open_weights=False, weight_bits=10**10), rank_ppm=100_000)
    yield Caller(server.app, mint(server, "eve", Tier.external).secret)
    server.service.close()


def asked(caller: Caller, nodes: list[dict[str, Any]], vectors: dict[str, Any]) -> list[str]:
    """The codes of a refusal; none when it ran."""
    started = caller.frame("/v1/runs", request(*nodes, model="closed", prompts=PROMPT), vectors)
    return codes(started) if started.status == 403 else []


def scored(site: str) -> list[dict[str, Any]]:
    dot = {"op": "dot", "id": "d", "a": "r", "b": "t"}
    return [read(site), {"op": "tensor", "id": "t", "name": "v"}, dot, {"op": "score", "id": "s", "of": "d"}]


def test_three_names_of_one_stream_have_one_budget(eve: Caller) -> None:
    vectors = np.random.default_rng(0).normal(size=(4, 32))
    sites = ("resid_post.1", "resid_pre.2", "attn_in.2", "resid_pre.2")
    found = [asked(eve, scored(site), {"v": v}) for site, v in zip(sites, vectors, strict=True)]
    assert found == [[], [], [], ["rank_exhausted"]]
    assert asked(eve, scored("resid_post.2"), {"v": vectors[3]}) == []


def stored_gates(eve: Caller) -> str:
    """A handle whose row i is the unit vector i: written at the embeddings, and captured there."""
    writes = [
        x
        for i in range(K)
        for x in (
            {"op": "tensor", "id": f"t{i}", "name": f"e{i}"},
            {"op": "edit.set", "id": f"w{i}", "site": "embeddings", "at": f"prompt[{i}]", "value": f"t{i}"},
        )
    ]
    body = request(*writes, read("embeddings", "prompt[*]"), capture("r"), model="closed", prompts=PROMPT)
    started = eve.frame("/v1/runs", body, {f"e{i}": EYE[i] for i in range(K)})
    return str(eve.result(started.json["job"]).json["outputs"]["kept"]["handle"])


def test_products_with_stored_gates_have_no_more_than_masks(eve: Caller) -> None:
    """One score over eight rows, each of which is a product with another vector."""
    vectors = np.random.default_rng(0).normal(size=(K, 32)).astype(np.float32)
    nodes = [read("resid_post.2", "prompt[*]"),
             {"op": "stored", "id": "g", "handle": stored_gates(eve), "site": "embeddings"}]  # fmt: skip
    for i in range(K):
        nodes += [
            {"op": "tensor", "id": f"u{i}", "name": f"u{i}"}, {"op": "tensor", "id": f"e{i}", "name": f"e{i}"},
            {"op": "dot", "id": f"d{i}", "a": "r", "b": f"u{i}"}, {"op": "dot", "id": f"m{i}", "a": "g", "b": f"e{i}"},
            {"op": "scale", "id": f"p{i}", "of": f"d{i}", "by": f"m{i}"},
        ]  # fmt: skip
        if i:
            nodes.append({"op": "add", "id": f"s{i}", "a": "p0" if i == 1 else f"s{i - 1}", "b": f"p{i}"})
    arrays = {f"u{i}": v for i, v in enumerate(vectors)} | {f"e{i}": EYE[i] for i in range(K)}
    for last, expected in ((1, []), (2, []), (3, ["rank_exhausted"]), (K - 1, ["rank_exhausted"])):
        upto = next(j for j, n in enumerate(nodes) if n["id"] == f"s{last}") + 1
        used = {n["name"] for n in nodes[:upto] if n["op"] == "tensor"}
        score = {"op": "score", "id": "out", "of": f"s{last}"}
        sent = {name: array for name, array in arrays.items() if name in used}
        assert asked(eve, [*nodes[:upto], score], sent) == expected, last
