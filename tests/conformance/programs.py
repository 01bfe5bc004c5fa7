"""Random programs over the whole language: sites, selectors, arithmetic, edits and outputs, mostly legal.

A writer keeps a pool of values it has made and combines what fits together; the checker has the last word on
whether a program is legal. Sizes stay small and values tame, so that rounding stays far below the tolerances.

Words: the `level` of a value is request, prompt or row; its `content` wide, number or truth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from bench_room import Ask, Bench, Fit, handle
from reference_rows import in_generated, rows_at

from trocar.graph import ops
from trocar.graph.positions import Marks
from trocar.graph.program import Generation
from trocar.sites import SITES, order, parse

TOKENS = (1, 17, 42, 99)
FEATURES = 12
HEADED = ("q", "k", "v", "z")
LEVELS = ("request", "prompt", "row")


@dataclass(frozen=True)
class Known:
    """A value in the pool.

    Attributes:
        at: selector of its rows; None for what is one for the request or for a prompt.
        ready: place in the pass where it is known.
        plain: a read of whole rows.
        normed: whether it is behind the last norm; None when it comes from no site.
    """

    id: str
    level: str
    content: str
    width: int
    at: str | None = None
    ready: int = 0
    site: str | None = None
    plain: bool = False
    normed: bool | None = None

    @property
    def gen(self) -> bool:
        return self.at is not None and in_generated(self.at)


@dataclass
class Writer:
    """Writes one request.

    Attributes:
        late: whether only the end of a prompt and what follows is touched, so that its beginning may be shared.
    """

    bench: Bench
    rng: Random
    prompts: list[tuple[int, ...]]
    most: int
    stop: int | None
    late: bool = False
    nodes: list[Any] = field(default_factory=list)
    vectors: dict[str, torch.Tensor] = field(default_factory=dict)
    stored: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    fits: dict[str, Fit] = field(default_factory=dict)
    pool: list[Known] = field(default_factory=list)
    masks: list[tuple[bool, ...]] = field(default_factory=list)

    # ---- where ----

    def marked(self, prompt: int) -> dict[str, Sequence[int]]:
        """The rows that span, role and mask selectors must mean."""
        n = len(self.prompts[prompt])
        return {
            'mask("m")': [i for i, on in enumerate(self.masks[prompt]) if on],
            'span("b")': [1],
            'role("user")': [0],
            'role("assistant")': range(1, n),
        }

    def marks(self, prompt: int) -> Marks:
        """One letter per token; the first token is the user's, the rest the assistant's."""
        n = len(self.prompts[prompt])
        text = "".join(chr(97 + i) for i in range(n))
        offsets = tuple((i, i + 1) for i in range(n))
        return Marks(text, offsets, (("user", 0, 1), ("assistant", 1, n)), {"m": self.masks[prompt]})

    def selector(self, *, gen: bool = True) -> str:
        found = [
            "prompt[*]", "prompt[*]", "prompt[-1]", "prompt[0]", "prompt[1]", "prompt[1:]", "prompt[:-1]",
            "prompt[0,-1]", 'mask("m")', 'mask("m")[0]', 'span("b")', 'role("assistant")', 'role("assistant")[-1]',
        ]  # fmt: skip
        if self.late:
            found = ["prompt[-1]", "prompt[-2:]", "prompt[-2]"]
        if gen and self.most:
            found += ["gen[*]", "gen[0]"] if self.late else ["all", "all", "gen[*]", "gen[0]"]
        if gen and self.most > 1:
            found += ["gen[1:]", "gen[1]"]
        return self.rng.choice(found)

    def counts(self, at: str) -> tuple[int, ...]:
        return tuple(len(rows_at(at, len(p), 0, self.marked(i))) for i, p in enumerate(self.prompts))

    def site(self, *, editable: bool = False) -> str:
        names = [
            n for n in self.bench.facts.sites if n != "attn_probs" and (SITES[n].editable or not editable)
        ]
        if self.stop is not None:
            names.remove("final_norm")
        name = self.rng.choice(names)
        return f"{name}.{self.layer()}" if SITES[name].layered else name

    def layer(self) -> int:
        return self.rng.randrange(self.bench.layers if self.stop is None else self.stop + 1)

    def ready(self, site: str) -> int:
        return order(parse(site), self.bench.layers)

    def part(self, site: str) -> dict[str, Any]:
        """Sometimes some heads or neurons of a site that has them."""
        name, facts = site.partition(".")[0], self.bench.facts
        if name in HEADED and self.rng.random() < 0.4:
            count = facts.n_heads if name in ("q", "z") else facts.n_kv_heads
            return {"heads": tuple(self.rng.sample(range(count), self.rng.randint(1, count)))}
        if name == "mlp_act" and self.rng.random() < 0.4:
            return {"neurons": tuple(self.rng.sample(range(facts.d_mlp), 5))}
        return {}

    def width(self, site: str, part: dict[str, Any]) -> int:
        if "heads" in part:
            return len(part["heads"]) * int(self.bench.facts.d_head)
        return len(part["neurons"]) if "neurons" in part else self.bench.width(site)

    # ---- values ----

    def name(self, letter: str) -> str:
        return f"{letter}{len(self.nodes)}"

    def add(self, node: Any, known: Known | None = None) -> Any:
        self.nodes.append(node)
        if known is not None:
            self.pool.append(known)
        return known

    def pick(self, *wanted: Callable[[Known], bool]) -> Known | None:
        """A value that fits, the latest ones rather than the first."""
        found = [k for k in self.pool if all(w(k) for w in wanted)]
        return self.rng.choice(found[-4:]) if found else None

    def array(self, *shape: int, size: float = 1.0) -> str:
        name = f"t{len(self.vectors)}"
        draw = torch.Generator().manual_seed(self.rng.randrange(1 << 30))
        made = torch.randn(*shape, generator=draw)
        self.vectors[name] = size * made / max(1.0, float(shape[0])) ** 0.5
        return name

    def read(self) -> None:
        site, at = self.site(), self.selector()
        part, name = self.part(site), self.name("r")
        normed = site == "final_norm"
        known = Known(
            name,
            "row",
            "wide",
            self.width(site, part),
            at,
            self.ready(site),
            site,
            plain=not part,
            normed=normed,
        )
        self.add(ops.Read(id=name, site=site, at=at, **part), known)

    def tensor(self, width: int | None = None) -> Known:
        width = width or self.bench.width("resid_post")
        name = self.name("v")
        if self.rng.random() < 0.15 and width == self.bench.width("resid_post"):
            draw = [self.vectors.pop(self.array(width, size=3.0)) for _ in range(2)]
            self.fits[name] = Fit(draw[0], draw[1], 0.25)
            part = self.rng.choice(["direction", "weights"])
            node: Any = ops.Vector(
                id=name, handle="art_" + "0" * 30 + f"{len(self.nodes):02x}", site="resid_post.1", part=part
            )
        else:
            node = ops.Tensor(id=name, name=self.array(width, size=4.0))
        return self.add(node, Known(name, "request", "wide", width))  # type: ignore[no-any-return]

    def keep(self) -> None:
        """Rows stored before, for the prompts in another order or in theirs."""
        site, name = self.rng.choice(["resid_post.1", "resid_post.2", "final_norm"]), self.name("s")
        width, at = (
            self.bench.width(site),
            self.rng.choice(["prompt[*]", "prompt[-1]", "prompt[1:]", "prompt[0,-1]"]),
        )
        rows = [self.vectors.pop(self.array(len(p), width, size=3.0)) for p in self.prompts]
        shuffled = list(range(len(rows)))
        self.rng.shuffle(shuffled)
        chosen = None if self.rng.random() < 0.5 else tuple(shuffled)
        self.stored[name] = rows if chosen is None else [rows[shuffled.index(j)] for j in range(len(rows))]
        node = ops.Stored(id=name, handle=handle(len(self.nodes)), site=site, at=at, prompts=chosen)
        self.add(node, Known(name, "row", "wide", width, at, site=site, normed=site == "final_norm"))

    def dictionary(self) -> str:
        name, d = self.name("d"), self.bench.width("resid_post")
        kind = self.rng.choice(["relu", "topk", "jumprelu"])
        extra: dict[str, Any] = {"k": 3} if kind == "topk" else {}
        if kind == "jumprelu":
            extra["threshold"] = self.array(FEATURES, size=0.5)
        arrays = [
            self.array(d, FEATURES, size=2.0),
            self.array(FEATURES),
            self.array(FEATURES, d, size=4.0),
            self.array(d),
        ]
        self.add(
            ops.Sae(
                id=name, w_enc=arrays[0], b_enc=arrays[1], w_dec=arrays[2], b_dec=arrays[3],
                activation=kind, center=self.rng.random() < 0.5, **extra,
            )
        )  # fmt: skip
        return name

    def aligned(self, with_: Known) -> Callable[[Known], bool]:
        """Values that pair with another one."""
        return lambda k: self.pairs(k, with_.at) or with_.level != "row"

    def pairs(self, known: Known, at: str | None) -> bool:
        """Whether a value pairs with the rows of a selector."""
        if known.level != "row" or at is None:
            return True
        if known.at == at and not known.id.startswith("s"):
            return True
        static = not in_generated(at) and not known.gen
        return static and self.counts(at) == self.counts(known.at or at)

    def requested(self) -> Ask:
        n = range(len(self.prompts))
        return Ask(
            self.nodes,
            self.prompts,
            Generation(max_new_tokens=self.most, stop_at_eos=False),
            vectors=self.vectors,
            stored=self.stored,
            fits=self.fits,
            marks=[self.marks(i) for i in n],
            marked=[self.marked(i) for i in n],
        )


def blank(bench: Bench, rng: Random, longest: int) -> Writer:
    """Prompts and a generation; nothing written yet. Some prompts begin alike."""
    sizes = [*range(3, 8), *[n for n in (18, 40, 62, 63, 63) if n <= longest]]
    lengths = [rng.choice(sizes) for _ in range(rng.randint(1, 3))]
    seed = rng.randrange(4)
    prompts = [(*_alike(seed, n - 2), rng.randrange(256), rng.randrange(256)) for n in lengths]
    stop = rng.randrange(bench.layers) if rng.random() < 0.12 else None
    most = 0 if stop is not None else rng.choice([0, 0, 0, 1, 3] if longest == 7 else [0, 1, 3, 6])
    writer = Writer(bench, rng, prompts, most, stop, late=longest > 7 and rng.random() < 0.4)
    writer.masks = [tuple(rng.random() < 0.5 or i == 1 for i in range(n)) for n in lengths]
    return writer


def _alike(seed: int, length: int) -> list[int]:
    draw = Random(seed)
    return [draw.randrange(256) for _ in range(length)]
