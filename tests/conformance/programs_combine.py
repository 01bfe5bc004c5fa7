"""Random programs, second part: arithmetic, edits and outputs of a `Writer`."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

from bench_room import Ask, Bench, Fit
from programs import FEATURES, LEVELS, TOKENS, Known, Writer, blank
from reference_rows import in_generated

from trocar.graph import ops, words

PAIRED = {"add": ops.Add, "sub": ops.Sub}
COMPARED = {"eq": ops.Eq, "gt": ops.Gt, "lt": ops.Lt}


def wide(k: Known) -> bool:
    return k.content == "wide"


def number(k: Known) -> bool:
    return k.content == "number"


def truth(k: Known) -> bool:
    return k.content == "truth"


def own(k: Known) -> bool:
    """One per prompt or per row."""
    return k.level != "request"


def joined(*values: Known, content: str, width: int) -> dict[str, Any]:
    """Fields of a result: the widest level, known when the last operand is."""
    shape = max(values, key=lambda k: (LEVELS.index(k.level), k.at is not None and not k.id.startswith("s")))
    return {
        "level": shape.level,
        "content": content,
        "width": width,
        "at": shape.at,
        "ready": max(k.ready for k in values),
        "normed": any(bool(k.normed) for k in values),
    }


def combine(w: Writer) -> None:
    """One node of arithmetic on values of the pool, if something fits."""
    kind = w.rng.choice(list(ARITHMETIC))
    ARITHMETIC[kind](w, kind)


def _add(w: Writer, kind: str) -> None:
    a = w.pick(own)
    if a is None or a.content == "truth":
        return
    b = w.pick(lambda k: (k.content, k.width) == (a.content, a.width), w.aligned(a))
    if b is None or (b is a and kind == "sub"):
        if a.content != "wide":
            return
        b = w.tensor(a.width)
    name = w.name("n")
    w.add(
        PAIRED[kind](id=name, a=a.id, b=b.id), Known(name, **joined(a, b, content=a.content, width=a.width))
    )


def _scale(w: Writer, _kind: str) -> None:
    of = w.pick(lambda k: k.content != "truth")
    if of is None:
        return
    by = w.pick(number, w.aligned(of)) if w.rng.random() < 0.4 else None
    name = w.name("n")
    if by is None:
        node = ops.Scale(id=name, of=of.id, by=w.rng.choice([-1.0, 0.5, 0.0, 2.0]))
        w.add(node, replace(of, id=name, plain=False))
        return
    w.add(
        ops.Scale(id=name, of=of.id, by=by.id),
        Known(name, **joined(of, by, content=of.content, width=of.width)),
    )


def _dot(w: Writer, _kind: str) -> None:
    a = w.pick(wide, own)
    if a is None:
        return
    b = w.pick(wide, lambda k: k.width == a.width, w.aligned(a)) if w.rng.random() < 0.5 else None
    b = b or w.tensor(a.width)
    name = w.name("n")
    w.add(ops.Dot(id=name, a=a.id, b=b.id), Known(name, **joined(a, b, content="number", width=1)))


def _matmul(w: Writer, _kind: str) -> None:
    a = w.pick(wide)
    if a is None:
        return
    rank = w.rng.choice([2, a.width if a.width <= 64 else 3])
    matrix, name = w.name("m"), f"{w.name('n')}m"
    w.add(ops.Tensor(id=matrix, name=w.array(a.width, rank)))
    w.add(ops.MatMul(id=name, a=a.id, b=matrix), replace(a, id=name, width=rank, plain=False))


def _unary(w: Writer, kind: str) -> None:
    of = w.pick(wide, own) if kind in ("norm", "mean_width") else w.pick(wide)
    if of is None:
        return
    name, same = w.name("n"), replace(of, id=w.name("n"), plain=False)
    one = replace(same, content="number", width=1)
    if kind == "norm":
        w.add(ops.Norm(id=name, of=of.id), one)
    elif kind == "mean_width":
        w.add(ops.Mean(id=name, of=of.id, over="width"), one)
    elif kind == "normalize":
        w.add(ops.Normalize(id=name, of=of.id), same)
    elif kind == "relu":
        w.add(ops.Relu(id=name, of=of.id), same)
    else:
        w.add(ops.TopK(id=name, of=of.id, k=w.rng.randint(1, min(5, of.width))), same)


def _mean(w: Writer, _kind: str) -> None:
    of = w.pick(lambda k: k.level == "row" and k.content != "truth" and not k.gen)
    if of is not None:
        name = w.name("n")
        known = replace(of, id=name, level="prompt", at=None, plain=False)
        w.add(ops.Mean(id=name, of=of.id), known)


def _encode(w: Writer, _kind: str) -> None:
    of = w.pick(wide, own, lambda k: k.width == w.bench.width("resid_post"))
    if of is None:
        return
    sae = w.dictionary()
    name = w.name("n")
    w.add(ops.Encode(id=name, of=of.id, sae=sae), replace(of, id=name, width=FEATURES, plain=False))


def _compare(w: Writer, kind: str) -> None:
    a = w.pick(number)
    if a is None:
        _dot(w, "dot")
        a = w.pick(number)
    if a is None:
        return
    b = w.pick(number, w.aligned(a)) if w.rng.random() < 0.4 else None
    name = w.name("n")
    to = w.rng.choice([0.0, 1.0, -2.0]) if b is None else b.id
    values = (a,) if b is None else (a, b)
    w.add(COMPARED[kind](id=name, a=a.id, b=to), Known(name, **joined(*values, content="truth", width=1)))


def _logic(w: Writer, kind: str) -> None:
    a = w.pick(truth)
    if a is None:
        _compare(w, "gt")
        return
    name = w.name("n")
    if kind == "not":
        w.add(ops.Not(id=name, of=a.id), replace(a, id=name))
        return
    b = w.pick(truth, w.aligned(a)) or a
    made = (ops.And if kind == "and" else ops.Or)(id=name, a=a.id, b=b.id)
    w.add(made, Known(name, **joined(a, b, content="truth", width=1)))


def _where(w: Writer, _kind: str) -> None:
    cond = w.pick(truth)
    if cond is None:
        _compare(w, "lt")
        return
    a = w.pick(wide, w.aligned(cond))
    if a is None:
        return
    b = w.pick(wide, lambda k: k.width == a.width, w.aligned(cond), w.aligned(a)) or w.tensor(a.width)
    name = w.name("n")
    w.add(
        ops.Where(id=name, cond=cond.id, a=a.id, b=b.id),
        Known(name, **joined(cond, a, b, content="wide", width=a.width)),
    )


ARITHMETIC = {
    **dict.fromkeys(PAIRED, _add),
    "scale": _scale,
    "dot": _dot,
    "matmul": _matmul,
    **dict.fromkeys(("norm", "normalize", "relu", "topk", "mean_width"), _unary),
    "mean": _mean,
    "encode": _encode,
    **dict.fromkeys(COMPARED, _compare),
    **dict.fromkeys(("and", "or", "not"), _logic),
    "where": _where,
}


# ---- edits ----


def edit(w: Writer) -> None:
    """One edit, with an operand of the pool where one fits, sometimes gated, sometimes on a part of the site."""
    kind = w.rng.choice(
        ["add", "add", "set", "set", "zero", "scale", "project", "affine", "clamp", "sae", "knockout"]
    )
    if kind == "knockout":
        _knockout(w)
        return
    site = f"resid_post.{w.layer()}" if kind == "sae" else w.site(editable=True)
    at, part = w.selector(), {} if kind == "sae" else w.part(site)
    width, where = w.width(site, part), {"site": site, "at": at, **part}

    def usable(k: Known) -> bool:
        late = k.ready > w.ready(site) and not at.startswith("gen")
        return not late and w.pairs(k, at) and not (k.level == "row" and at.startswith("gen") and not k.gen)

    if w.rng.random() < 0.3:
        gate = w.pick(lambda k: k.content != "wide", own, usable)
        where |= {} if gate is None else {"gate": gate.id}
    value = w.pick(wide, lambda k: k.width == width, usable) if w.rng.random() < 0.7 else None
    WRITES[kind](w, where, value, width)


def _value(w: Writer, value: Known | None, width: int) -> str:
    return (value or w.tensor(width)).id


def _unit(w: Writer, site: str) -> str:
    known = getattr(w.bench.facts, "norms", {}).get(site.partition(".")[0])
    return "site_norm" if known and w.rng.random() < 0.4 else "absolute"


def _edit_add(w: Writer, where: dict[str, Any], value: Known | None, width: int) -> None:
    ref, coef = _value(w, value, width), w.rng.choice([1.0, -0.5, 2.0])
    w.add(ops.EditAdd(id=w.name("e"), value=ref, coef=coef, unit=_unit(w, where["site"]), **where))


def _edit_set(w: Writer, where: dict[str, Any], value: Known | None, width: int) -> None:
    w.add(ops.EditSet(id=w.name("e"), value=_value(w, value, width), **where))


def _edit_zero(w: Writer, where: dict[str, Any], _value_: Known | None, _width: int) -> None:
    w.add(ops.EditSet(id=w.name("e"), value="zero", **where))


def _edit_scale(w: Writer, where: dict[str, Any], _value_: Known | None, _width: int) -> None:
    w.add(ops.EditScale(id=w.name("e"), by=w.rng.choice([-1.0, 0.0, 0.5, 2.0]), **where))


def _edit_project(w: Writer, where: dict[str, Any], _value_: Known | None, width: int) -> None:
    w.add(ops.EditProjectOut(id=w.name("e"), value=w.tensor(width).id, **where))


def _edit_affine(w: Writer, where: dict[str, Any], _value_: Known | None, width: int) -> None:
    rank = w.rng.randint(1, 3)
    shapes: dict[str, tuple[int, ...]] = {"down": (width, rank), "up": (rank, width)}
    if w.rng.random() < 0.5:
        shapes["inner"] = (rank,)
    if w.rng.random() < 0.5:
        shapes["bias"] = (width,)
    named = {field: f"{w.name('a')}{field}" for field in shapes}
    for field, shape in shapes.items():
        w.add(ops.Tensor(id=named[field], name=w.array(*shape)))
    w.add(ops.EditAffine(id=w.name("e"), **named, **where))


def _edit_clamp(w: Writer, where: dict[str, Any], value: Known | None, width: int) -> None:
    unit = _unit(w, where["site"])
    size = 0.02 if unit == "site_norm" else 0.5
    low, high = w.rng.choice([(None, -size), (size, None), (-size / 2, size / 2), (2 * size, 4 * size)])
    ref = _value(w, value, width)
    w.add(ops.EditClamp(id=w.name("e"), value=ref, low=low, high=high, unit=unit, **where))


def _edit_sae(w: Writer, where: dict[str, Any], _value_: Known | None, _width: int) -> None:
    sae = w.dictionary()
    keep = w.rng.random() < 0.6
    chosen = w.rng.sample(range(FEATURES), w.rng.randint(1 if keep else 0, 3))
    features = tuple(
        words.Feature(index=i, **w.rng.choice([{"set": 2.0}, {"set": 0.0}, {"scale": -1.0}, {"scale": 3.0}]))
        for i in chosen
    )
    w.add(ops.EditSae(id=w.name("e"), sae=sae, features=features, keep_error=keep, **where))


WRITES = {
    "add": _edit_add,
    "set": _edit_set,
    "zero": _edit_zero,
    "scale": _edit_scale,
    "project": _edit_project,
    "affine": _edit_affine,
    "clamp": _edit_clamp,
    "sae": _edit_sae,
}


def _knockout(w: Writer) -> None:
    at = w.rng.choice(["prompt[-1]", "prompt[1:]", "prompt[2:]", *(["all", "gen[*]"] if w.most else [])])
    keys = w.rng.choice(["prompt[1]", "prompt[1:]", 'role("assistant")[0]', "prompt[0]"])
    heads = w.rng.choice([None, (0,), (2, 1)])
    w.add(ops.EditKnockout(id=w.name("e"), site=f"attn_probs.{w.layer()}", at=at, keys=keys, heads=heads))


# ---- outputs ----


def outputs(w: Writer) -> None:
    """What comes back: log-probabilities always where there are any, and a few others."""
    if w.stop is not None:
        w.add(ops.StopAfter(id="stop", layer=w.stop))
        w.read()
    else:
        at = "all" if w.most and w.rng.random() < 0.7 else "prompt[*]"
        w.add(ops.Logprobs(id="lp", at="prompt[-1]" if w.late else at, tokens=TOKENS))
        if w.most:
            w.add(ops.Text(id="text"))
    for made in [k for k in w.pool if k.content != "wide" and own(k)][-3:]:
        w.add(ops.Score(id=f"score_{made.id}", of=made.id))
    _captures(w)
    for verb in w.rng.sample([_lens, _metric, _pattern, _probe], 2):
        verb(w)
    _raw(w)


def _captures(w: Writer) -> None:
    reads = [k for k in w.pool if k.plain]
    for at in dict.fromkeys(k.at for k in reads[-3:]):
        same = {k.site: k.id for k in reads if k.at == at}
        mean = not in_generated(at or "") and w.rng.random() < 0.3
        w.add(ops.Capture(id=w.name("k"), of=tuple(same.values()), reduce="mean" if mean else "none"))


def _raw(w: Writer) -> None:
    reads = [k for k in w.pool if k.plain]
    if reads and w.rng.random() < 0.3:
        same = {k.site: k.id for k in reads if k.at == reads[-1].at}
        w.add(ops.Raw(id="raw", of=tuple(same.values())))


def _lens(w: Writer) -> None:
    of = w.pick(wide, own, lambda k: k.width == w.bench.width("resid_post") and not k.id.startswith("s"))
    if of is not None:
        w.add(ops.Lens(id="lens", of=(of.id,), top_k=3))


def _metric(w: Writer) -> None:
    if w.stop is not None:
        return
    kind, at = w.rng.choice(["logit_diff", "cross_entropy", "kl"]), w.selector(gen=False)
    extra: dict[str, Any] = {}
    if kind == "logit_diff":
        pair = ((1, 2),) * len(w.prompts)
        extra["tokens"] = w.rng.choice([(5, 9), pair])
    elif kind == "cross_entropy":
        at = w.rng.choice(["prompt[:-1]", "prompt[0]", 'role("user")'])
    else:
        to = w.pick(
            lambda k: k.site == "final_norm" and (k.plain or k.id.startswith("s")), lambda k: not k.gen
        )
        if to is None or to.at is None:
            return
        at = to.at
        extra["to"] = to.id
    w.add(ops.Metric(id="metric", metric=kind, at=at, **extra))


def _pattern(w: Writer) -> None:
    name = w.name("p")
    keys = w.rng.choice(["prompt[0]", "prompt[0,1]", "prompt[0:2]"])
    heads = w.rng.choice([None, (3, 0)])
    w.add(ops.Read(id=name, site=f"attn_probs.{w.layer()}", at=w.selector(), keys=keys, heads=heads))
    w.add(ops.Pattern(id="pattern", of=name))


def _probe(w: Writer) -> None:
    width = w.bench.width("resid_post")
    of = w.pick(wide, lambda k: k.level == "row" and k.width == width and not k.id.startswith("s"))
    if of is not None:
        draw = [w.vectors.pop(w.array(width)) for _ in range(2)]
        w.fits["probed"] = Fit(draw[0], draw[1], 0.5)
        w.add(ops.Score(id="probed", of=of.id, probe="art_" + "f" * 32, site="resid_post.1"))


def program(bench: Bench, rng: Random, longest: int = 7) -> Ask:
    """A whole random request of one to three prompts of up to `longest` tokens."""
    w = blank(bench, rng, longest)
    for _ in range(rng.randint(2, 7)):
        verb = rng.choice([w.read, w.read, combine, combine, combine, edit, edit, w.keep])
        verb() if verb in (w.read, w.keep) else verb(w)  # type: ignore[call-arg]
    outputs(w)
    return w.requested()
