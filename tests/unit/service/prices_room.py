"""Random requests for a whole server, and what their answers must have cost, counted from the answers alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parents[2] / "conformance"))  # the writer of random programs lives there

import programs_combine
from reference_rows import in_generated, rows_at

from trocar.graph import ops
from trocar.graph.program import Generation, Program
from trocar.graph.sweep import Axis
from trocar.wire.requests import FitRequest, RunRequest

TOKEN_BITS, OVERHEAD, WAIT_S = 9, 256, 30.0
LONGEST = 7
SAME_ROWS = {  # what the writer's marks mean, without marks
    'span("b")': "prompt[1]",
    'role("user")': "prompt[0]",
    'role("assistant")': "prompt[1:]",
    'role("assistant")[-1]': "prompt[-1]",
    'role("assistant")[0]': "prompt[1]",
}


@dataclass(frozen=True)
class Asked:
    """One program as a request, with its arrays and everything that the count needs."""

    request: RunRequest
    vectors: Mapping[str, Any]

    @property
    def most(self) -> int:
        return self.request.generation.max_new_tokens

    @property
    def lengths(self) -> list[int]:
        return [len(p) for p in self.request.prompts]  # type: ignore[arg-type]

    def node(self, name: str) -> Any:
        return next(n for n in self.request.program.nodes if n.id == name)

    def reads_generated(self) -> bool:
        looked = [n.at for n in self.request.program.nodes if isinstance(n, ops.Read | ops.Logprobs)]
        return self.most > 0 and any(in_generated(at) for at in looked)


@dataclass(frozen=True)
class Held:
    """Handles of a tenant: rows of five prompts of 3 to 7 tokens, and a probe."""

    rows: str
    probe: str


def held(server: Any, principal: Any, model: str) -> Held:
    """Captures rows and fits a probe, as a researcher would."""
    reads = [
        ops.Read(id=f"r{i}", site=s, at="prompt[*]")
        for i, s in enumerate(("resid_post.1", "resid_post.2", "final_norm"))
    ]
    keep = ops.Capture(id="k", of=tuple(r.id for r in reads))
    prompts = tuple(tuple(range(40 + n, 40 + 2 * n)) for n in range(3, LONGEST + 1))
    request = RunRequest(model=model, prompts=prompts, program=Program(nodes=(*reads, keep)))
    rows = json.loads(finish(server, principal, server.service.run(principal, request, {}, None)).payload)
    last = ops.Read(id="r", site="resid_post.1", at="prompt[-1]")
    few = RunRequest(
        model=model,
        prompts=tuple((i, 2 * i, 3 * i) for i in range(1, 41)),
        program=Program(nodes=(last, ops.Capture(id="k", of=("r",)))),
    )
    fitted = json.loads(finish(server, principal, server.service.run(principal, few, {}, None)).payload)
    fit = FitRequest(
        handle=fitted["outputs"]["k"]["handle"], kind="logistic", labels=tuple(i % 2 == 0 for i in range(40))
    )
    made = json.loads(finish(server, principal, server.service.fit(principal, fit, None)).payload)
    return Held(rows["outputs"]["k"]["handle"], made["outputs"]["fit"]["artifact"])


def finish(server: Any, principal: Any, started: Any) -> Any:
    """Waits for a job; what it released."""
    job = json.loads(started.payload)["job"]
    found = server.service.job_result(principal, job, WAIT_S)
    while found.status == 202:
        found = server.service.job_result(principal, job, WAIT_S)
    return found


def written(facts: Any, model: str, seed: int, have: Held, *, rows: bool) -> Asked:
    """A random program over the whole language, on the server's own handles.

    Args:
        rows: whether rows may leave as they are.
    """
    rng = Random(seed)
    bench = SimpleNamespace(facts=facts, layers=facts.n_layers, width=facts.width)
    ask = programs_combine.program(bench, rng, LONGEST)  # type: ignore[arg-type]
    nodes = [_served(node, ask, have) for node in ask.nodes]
    whole = [n.id for n in nodes if isinstance(n, ops.Read) and not (n.heads or n.neurons or n.keys)]
    if rows and whole:
        nodes.append(ops.Raw(id="rows", of=(rng.choice(whole),)))
    most = {0: 0, 1: 1, 3: rng.choice([3, 6])}[ask.generation.max_new_tokens]
    request = RunRequest(
        model=model,
        prompts=tuple(tuple(p) for p in ask.prompts),
        program=Program(nodes=tuple(nodes)),
        generation=Generation(
            max_new_tokens=most,
            temperature=rng.choice([0.0, 1.0, 3.0]),
            seed=seed,
            stop_at_eos=rng.random() < 0.8,
        ),
        masks={"m": tuple(tuple(marks.masks["m"]) for marks in ask.marks)},
        sweep=_axes(nodes, rng),
    )
    return Asked(request, {name: np.asarray(v, np.float32) for name, v in ask.vectors.items()})


def _served(node: Any, ask: Any, have: Held) -> Any:
    """The node as a client of this server would send it."""
    changes = {f: SAME_ROWS[at] for f in ("at", "keys") if (at := getattr(node, f, None)) in SAME_ROWS}
    if isinstance(node, ops.Stored):
        rows = ask.stored[node.id]
        chosen = range(len(rows)) if node.prompts is None else node.prompts
        changes |= {"handle": have.rows, "prompts": tuple(len(rows[i]) - 3 for i in chosen)}
    elif isinstance(node, ops.Vector):
        changes["handle"] = have.probe
    elif isinstance(node, ops.Score) and node.probe is not None:
        changes["probe"] = have.probe
    return node.model_copy(update=changes)


def _axes(nodes: Sequence[Any], rng: Random) -> tuple[Axis, ...]:
    """Now and then a sweep over a number of an edit."""
    found = [
        (n.id, f)
        for n in nodes
        for f in ("coef", "by")
        if n.op in ("edit.add", "edit.scale") and hasattr(n, f)
    ]
    if not found or rng.random() > 0.2:
        return ()
    name, field = rng.choice(found)
    return (Axis(node=name, field=field, values=(0.25, 1.5, -1.0)[: rng.randint(1, 3)]),)  # type: ignore[arg-type]


# ---- the count ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Count:
    """Bits by hand.

    Attributes:
        sent: of every number, token and truth value in the answer.
        missing: what the rows and tokens would have cost that were reserved and never made.
    """

    sent: int
    missing: int


@dataclass(frozen=True)
class Tariff:
    scalar: int
    vector: int

    @property
    def scale(self) -> int:
        return 0 if self.scalar == 32 else 16

    @property
    def row_scale(self) -> int:
        return 0 if self.vector == 32 else 16


def count(asked: Asked, answer: Mapping[str, Any], tariff: Tariff) -> Count:
    """Of one run's answer without its overhead."""
    parts = answer.get("sweep") or [{"outputs": answer["outputs"], "edits": answer["receipt"]["edits"]}]
    found = [_variant(asked, part["outputs"], part["edits"], tariff) for part in parts]
    return Count(sum(c.sent for c in found), sum(c.missing for c in found))


def _variant(asked: Asked, outputs: Mapping[str, Any], edits: Sequence[Any], tariff: Tariff) -> Count:
    prompts = len(asked.lengths)
    sent = len(edits) * (2 * max(16, tariff.scalar) + (prompts * asked.most).bit_length())
    if asked.reads_generated():
        sent += prompts * asked.most.bit_length()
    made = _sampled(asked, outputs)
    missing = 0
    for name, output in outputs.items():
        bits, each = _COUNTED[output["kind"]](output, tariff)
        sent += bits
        if output["kind"] == "text":
            missing += TOKEN_BITS * sum(asked.most - len(row) for row in output["ids"])
        else:
            missing += each * _absent(asked, asked.node(name), made)
    return Count(sent, missing)


def _sampled(asked: Asked, outputs: Mapping[str, Any]) -> list[int]:
    """Tokens sampled for each prompt, an end token included; every program that generates returns its text."""
    if not asked.most:
        return [0] * len(asked.lengths)
    (text,) = [o for o in outputs.values() if o["kind"] == "text"]
    return [len(row) + end for row, end in zip(text["ids"], text["finished"], strict=True)]


def _absent(asked: Asked, node: Any, made: Sequence[int]) -> int:
    """Rows that an output would have had if nothing had ended early, and has not."""
    at = _at(asked, node)
    if at is None or not in_generated(at):
        return 0
    return sum(
        len(rows_at(at, n, asked.most)) - len(rows_at(at, n, k))
        for n, k in zip(asked.lengths, made, strict=True)
    )


def _at(asked: Asked, node: Any) -> str | None:
    """The selector of a value's generated rows: that of any read behind it which has some."""
    if isinstance(node, ops.Read | ops.Logprobs):
        return node.at
    given = [getattr(node, f, None) for f in ("of", "a", "b", "cond", "by", "sae")]
    refs = [ref for g in given for ref in (g if isinstance(g, tuple) else (g,)) if isinstance(ref, str)]
    found = [at for ref in refs if (at := _at(asked, asked.node(ref))) is not None]
    return next((at for at in found if in_generated(at)), found[0] if found else None)


def _numbers(nested: Any) -> int:
    return sum(_numbers(x) for x in nested) if isinstance(nested, list) else 1


def _lens(o: Any, t: Tariff) -> tuple[int, int]:
    rows = len(o["prompts"])
    bits = _numbers(o["ids"]) * TOKEN_BITS + _numbers(o["logprobs"]) * t.scalar
    return bits, bits // rows


def _logprobs(o: Any, t: Tariff) -> tuple[int, int]:
    return _numbers(o["logprobs"]) * t.scalar, len(o["logprobs"][0]) * t.scalar


def _score(o: Any, t: Tariff) -> tuple[int, int]:
    if o["truth"]:
        assert set(o["scores"]) <= {0.0, 1.0}
        return len(o["scores"]), 1
    return len(o["scores"]) * t.scalar + t.scale, t.scalar


def _metric(o: Any, t: Tariff) -> tuple[int, int]:
    return len(o["values"]) * t.scalar + t.scale, 0


def _pattern(o: Any, t: Tariff) -> tuple[int, int]:
    return _numbers(o["probs"]) * t.scalar, _numbers(o["probs"][0]) * t.scalar


def _raw(o: Any, t: Tariff) -> tuple[int, int]:
    each = sum(v["width"] * t.vector + t.row_scale for v in o["values"].values())
    assert all(len(v["scales"]) == (len(o["prompts"]) if t.row_scale else 0) for v in o["values"].values())
    return len(o["prompts"]) * each, each


def _text(o: Any, _t: Tariff) -> tuple[int, int]:
    return sum(len(row) + 1 for row in o["ids"]) * TOKEN_BITS, 0


_COUNTED = {
    "lens": _lens, "logprobs": _logprobs, "score": _score, "metric": _metric, "pattern": _pattern, "raw": _raw,
    "text": _text, "capture": lambda _o, _t: (0, 0),
}  # fmt: skip
