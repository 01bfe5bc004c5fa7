"""Random legal programs: a draft writes nodes and remembers of each value what the language says about it."""

from __future__ import annotations

from typing import Any, NamedTuple

from graph_room import MANY, PROBE, node
from hypothesis import strategies as st

LAYERED = {"resid_post": 8, "resid_pre": 8, "mlp_out": 8, "mlp_act": 16, "v": 4, "z": 8}
PROMPT_AT = ("prompt[-1]", "prompt[0]", "prompt[1:3]", "prompt[:-1]", "prompt[*]")
GEN_AT = ("gen[*]", "gen[0:2]", "gen[1]", "all")
LATER = ("gen[*]", "gen[0:2]", "gen[1]")
STORED = "stored"  # the selector of what does not come from this pass


class Known(NamedTuple):
    """What the language says of a value: structure 0 to 2, content, width, selector, layer known at."""

    structure: int
    content: str
    width: int
    at: str | None = None
    layer: int = -1


class Draft:
    """Writes a legal program, remembering of each value what the language says about it."""

    def __init__(self, draw: st.DrawFn, lengths: tuple[int, ...]) -> None:
        self.draw = draw
        self.lengths = lengths
        self.nodes: list[dict[str, Any]] = []
        self.values: dict[str, Known] = {}
        self.constants: dict[str, str] = {}

    def pick(self, options: Any) -> Any:
        return self.draw(st.sampled_from(list(options)))

    def flip(self) -> bool:
        return self.draw(st.booleans())

    def number(self) -> float:
        return self.draw(st.floats(-1e6, 1e6))

    def add(self, op: str, value: Known | None = None, /, **fields: Any) -> str:
        name = f"x{len(self.nodes)}"
        self.nodes.append(node(op, name, **fields))
        if value is not None:
            self.values[name] = value
        return name

    def fits(self, content: str, width: int | None = None, *beside: Known) -> list[str]:
        """Values of a content whose rows pair with those of all `beside`."""
        rows = {k.at for k in beside if k.structure == 2}
        return [
            n
            for n, v in self.values.items()
            if v.content == content and width in (None, v.width) and (v.structure < 2 or rows <= {v.at})
        ]

    def widest(self, content: str, width: int, *names: str) -> Known:
        known = [self.values[n] for n in names]
        top = max(known, key=lambda k: k.structure)
        return Known(top.structure, content, width, top.at, max(k.layer for k in known))

    def site(self) -> tuple[str, int, int]:
        name, layer = self.pick(LAYERED), self.draw(st.integers(0, 3))
        return f"{name}.{layer}", LAYERED[name], layer

    def part(self, text: str, width: int) -> tuple[dict[str, Any], int]:
        """Perhaps some heads or neurons of a site, and the width that is left."""
        if self.flip():
            return {}, width
        if text.startswith("mlp_act"):
            return {"neurons": [5, 0, 3]}, 3
        if text.startswith("v"):
            return {"heads": [0]}, 4
        return ({"heads": [1]}, 4) if text.startswith("z") else ({}, width)

    def read(self, at: str | None = None, *, plain: bool = False) -> str:
        text, width, layer = self.site()
        at = at or self.pick(PROMPT_AT + GEN_AT)
        fields, width = ({}, width) if plain else self.part(text, width)
        return self.add("read", Known(2, "wide", width, at, layer), site=text, at=at, **fields)

    def seed(self, rows: str) -> None:
        """A number and a mask of the rows, and the constants that few ops take: they are rarely met by chance."""
        known = self.values[rows]._replace(content="number", width=1)
        size = self.add("norm", known, of=rows)
        self.add("gt", known._replace(content="truth"), a=size, b=1.0)
        self.constants |= {name: self.add("tensor", name=name) for name in ("m", "up")}
        arrays = {f: f for f in ("w_enc", "b_enc", "w_dec", "b_dec")}
        self.constants["sae"] = self.add("sae", **arrays)

    def constant(self) -> None:
        kind = self.draw(st.integers(0, 5))
        if kind == 0:
            self.add("tensor", Known(0, "wide", 8), name="v")
        elif kind == 1:
            self.add("vector", Known(0, "wide", 8), handle=PROBE, site="resid_post.1")
        elif kind == 2:
            prompts = [self.draw(st.integers(0, 2)) for _ in self.lengths]
            at = {"at": "prompt[-1]"} if self.flip() else {}
            known = Known(2, "wide", 16, f"{STORED} {prompts} {at}")
            self.add("stored", known, handle=MANY, site="mlp_act.2", prompts=prompts, **at)
        elif kind == 3:
            self.constants["m"] = self.add("tensor", name="m")
        elif kind == 4:
            self.constants["up"] = self.add("tensor", name="up")
        else:
            more = self.pick(
                ({}, {"activation": "topk", "k": 3}, {"activation": "jumprelu", "threshold": "b_enc"})
            )
            arrays = {f: f for f in ("w_enc", "b_enc", "w_dec", "b_dec")}
            self.constants["sae"] = self.add("sae", **arrays, **more, center=self.flip())

    def arithmetic(self) -> None:
        a = self.pick(self.values)
        known = self.values[a]
        self.pick((self.unary, self.binary, self.reduce, self.mask))(a, known)

    def unary(self, a: str, known: Known) -> None:
        wide, number = known.content == "wide", known.content == "number"
        if wide and "sae" in self.constants and known.width == 8 and known.structure and self.flip():
            self.add("encode", known._replace(width=12), of=a, sae=self.constants["sae"])
        elif wide and "m" in self.constants and known.width == 8 and self.flip():
            self.add("matmul", known._replace(width=2), a=a, b=self.constants["m"])
        elif wide:
            op = self.pick(("relu", "normalize", "topk"))
            self.add(op, known, of=a, **({"k": known.width} if op == "topk" else {}))
        elif number:
            self.add("relu", known, of=a)
        else:
            self.add("not", known, of=a)

    def binary(self, a: str, known: Known) -> None:
        b = self.pick(self.fits(known.content, known.width, known))
        numbers = self.fits("number", None, known)
        if known.content == "truth":
            self.add(self.pick(("and", "or")), self.widest("truth", 1, a, b), a=a, b=b)
        elif numbers and self.flip():
            by = self.pick(numbers)
            self.add("scale", self.widest(known.content, known.width, a, by), of=a, by=by)
        elif self.flip():
            self.add("scale", known, of=a, by=self.number())
        else:
            self.add(self.pick(("add", "sub")), self.widest(known.content, known.width, a, b), a=a, b=b)

    def reduce(self, a: str, known: Known) -> None:
        countable = known.structure == 2 and known.content != "truth" and known.at not in GEN_AT
        b = self.pick(self.fits(known.content, known.width, known))
        top = self.widest("number", 1, a, b)
        if countable and self.flip():
            self.add("mean", Known(1, known.content, known.width, None, known.layer), of=a)
        elif known.content == "wide" and known.structure and self.flip():
            op = self.pick(("norm", "mean"))
            over = {"over": "width"} if op == "mean" else {}
            self.add(op, known._replace(content="number", width=1), of=a, **over)
        elif known.content == "wide" and top.structure:
            self.add("dot", top, a=a, b=b)

    def mask(self, a: str, known: Known) -> None:
        if known.content == "number":
            numbers = self.fits("number", None, known)
            b = self.number() if self.flip() else self.pick(numbers)
            beside = [a] if isinstance(b, float) else [a, b]
            self.add(self.pick(("eq", "gt", "lt")), self.widest("truth", 1, *beside), a=a, b=b)
            return
        conds = self.fits("truth", None, known)
        if conds and known.content == "wide":
            cond = self.pick(conds)
            others = self.fits("wide", known.width, known, self.values[cond])
            b = self.pick(others) if others else a
            self.add("where", self.widest("wide", known.width, cond, a, b), cond=cond, a=a, b=b)

    def legal(self, names: list[str], at: str, layer: int) -> list[str]:
        """Values that an edit of a layer may use: known earlier, with the edit's rows, or for later tokens."""
        return [
            n
            for n in names
            if (v := self.values[n]).structure == 0
            or ((v.structure == 1 or v.at == at) and v.layer < layer)
            or (v.structure == 1 and at in LATER)
        ]

    def edit(self) -> None:
        if self.flip() and self.flip():
            self.knockout()
            return
        text, width, layer = self.site()
        at = self.pick(PROMPT_AT + GEN_AT)
        fields: dict[str, Any] = {"site": text, "at": at}
        gates = self.legal(self.fits("number") + self.fits("truth"), at, layer)
        if gates and self.flip():
            fields["gate"] = self.pick(gates)
        if width == 8 and "sae" in self.constants and self.flip():
            change = [{"index": 3, "set": self.number()}, {"index": 0, "scale": 0.0}]
            self.add("edit.sae", **fields, sae=self.constants["sae"], features=change, keep_error=self.flip())
            return
        if width == 8 and {"m", "up"} <= set(self.constants) and self.flip():
            self.add("edit.affine", **fields, down=self.constants["m"], up=self.constants["up"])
            return
        part, width = self.part(text, width)
        fields |= part
        values = self.legal(self.fits("wide", width), at, layer)
        op = self.pick(("edit.add", "edit.set", "edit.project_out", "edit.clamp")) if values else "edit.scale"
        more = {"edit.clamp": {"low": -1.0, "high": 1.0}, "edit.scale": {"by": 0.5}}.get(op, {})
        self.add(op, **fields, **more, **({"value": self.pick(values)} if values else {}))

    def knockout(self) -> None:
        at, keys = self.pick(
            (("prompt[-1]", "prompt[0]"), ("prompt[1:]", "prompt[0]"), ("gen[0:2]", "prompt[*]"))
        )
        layer = self.draw(st.integers(0, 3))
        heads = {"heads": [1]} if self.flip() else {}
        self.add("edit.knockout", site=f"attn_probs.{layer}", at=at, keys=keys, **heads)

    def metric(self) -> None:
        which = self.draw(st.integers(0, 2))
        if which == 0:
            self.add("metric", metric="logit_diff", at=self.pick(PROMPT_AT), tokens=["a", 7])
        elif which == 1:
            self.add("metric", metric="cross_entropy", at=self.pick(("prompt[0]", "prompt[:-1]")))
        else:
            at = self.pick(PROMPT_AT)
            to = self.add("read", site="final_norm", at=at)
            self.add("metric", metric="kl", at=at, to=to)

    def output(self) -> None:
        rows = [n for n in self.fits("wide", 8) if self.values[n].structure]
        numbers = self.fits("number") + self.fits("truth")
        verb = self.draw(st.integers(0, 8))
        if verb == 0 and rows:
            self.add("lens", of=[self.pick(rows)], top_k=self.draw(st.integers(1, 20)))
        elif verb in (1, 2) and numbers:
            self.add("score", of=self.pick(numbers))
        elif verb == 3:
            self.add("text")
        elif verb == 4:
            self.add("capture", of=[self.read(plain=True)])
        elif verb == 5:
            self.metric()
        elif verb == 6:
            layer = self.draw(st.integers(0, 3))
            probs = self.add(
                "read", site=f"attn_probs.{layer}", at=self.pick(PROMPT_AT + GEN_AT), keys="prompt[1:3]"
            )
            self.add("pattern", of=probs)
        elif verb == 7:
            self.add("raw", of=[self.read(plain=True)])
        else:
            self.add("logprobs", at=self.pick(PROMPT_AT + GEN_AT), tokens=["a", 7])


@st.composite
def drafts(draw: st.DrawFn) -> tuple[list[dict[str, Any]], tuple[int, ...]]:
    lengths = tuple(draw(st.lists(st.integers(4, 12), min_size=1, max_size=3)))
    draft = Draft(draw, lengths)
    first = draft.read("prompt[-1]")
    if draft.flip():
        draft.seed(first)
    for step in draw(
        st.lists(st.sampled_from(("read", "constant", "arithmetic", "edit", "output")), max_size=24)
    ):
        getattr(draft, step)()
    draft.output()
    return draft.nodes, lengths
