"""How the suite talks to an engine: programs become tasks, tasks share forward passes, sinks keep rows.

An `Ask` is one request as a test writes it. The engine gets it through the product's checker; the reference gets
the same nodes and arrays and resolves everything a second time.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from reference import Plain, Solo, solo
from reference_rows import Marked, rows_at

from trocar.engine.protocol import Task, TaskResult
from trocar.errors import TrocarError
from trocar.graph import check, ops
from trocar.graph.cost import Prices
from trocar.graph.facts import HandleFacts
from trocar.graph.positions import Marks
from trocar.graph.program import Generation, Program
from trocar.graph.scope import Scope
from trocar.sites import SITES

WAIT_S = 120.0
PARTS = ("w_enc", "b_enc", "w_dec", "b_dec", "threshold")
_numbers = itertools.count()


@dataclass
class Shelf:
    """A sink that keeps what it gets: float32 rows by site, ordered by prompt, then position."""

    parts: list[tuple[dict[str, np.ndarray], Any]] = field(default_factory=list)

    def append(self, vectors: Mapping[str, np.ndarray], tags: Any) -> None:
        self.parts.append(({k: v.copy() for k, v in vectors.items()}, tags))

    def keys(self) -> np.ndarray:
        """[N, 3] of prompt, position, token id, sorted."""
        found = np.concatenate([np.stack([t.prompts, t.positions, t.token_ids], 1) for _, t in self.parts])
        return found[np.lexsort((found[:, 1], found[:, 0]))]

    def rows(self, site: str, prompt: int | None = None) -> torch.Tensor:
        """[N, D] of every prompt, or of one."""
        tags = [t for _, t in self.parts]
        prompts = np.concatenate([t.prompts for t in tags])
        order = np.lexsort((np.concatenate([t.positions for t in tags]), prompts))
        chosen = order if prompt is None else order[prompts[order] == prompt]
        return torch.from_numpy(np.concatenate([v[site] for v, _ in self.parts])[chosen])


@dataclass(frozen=True)
class Fit:
    """What a fit left on the server for one site."""

    direction: torch.Tensor
    weights: torch.Tensor
    bias: float


@dataclass
class Ask:
    """One request: nodes, prompts, and what stands beside them.

    Attributes:
        vectors: arrays that the request carries, by name: of a `tensor` node, of the parts of an `sae` node.
        stored: by id of a `stored` node, float32 [N_j, D] per stored prompt j.
        fits: by id of a `vector` node, or of a `score` node with a probe.
        marks: what is known of each prompt besides its tokens, for span, role and mask.
        marked: the rows that those selectors must mean, per prompt, for the reference.
        own: sinks to use instead of shelves, by id of a `capture` node.
        sinks: where the captured rows of the latest run went.
    """

    nodes: Sequence[Any]
    prompts: Sequence[Sequence[int]]
    generation: Generation = field(default_factory=Generation)
    vectors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    stored: Mapping[str, Sequence[torch.Tensor]] = field(default_factory=dict)
    fits: Mapping[str, Fit] = field(default_factory=dict)
    marks: Sequence[Marks] = ()
    marked: Sequence[Marked] = ()
    tenant: str = ""
    progress: Any = None
    own: Mapping[str, Any] = field(default_factory=dict)
    sinks: dict[str, Any] = field(default_factory=dict)

    def node(self, name: str) -> Any:
        return next(n for n in self.nodes if n.id == name)

    def probe(self, name: str) -> tuple[torch.Tensor, float] | None:
        """Weights and bias of a `score` node that names a probe."""
        fit = self.fits.get(name)
        return None if fit is None else (fit.weights, fit.bias)

    def arrays(self) -> dict[str, torch.Tensor]:
        """By node id, and `id.part` for dictionaries: what engine and reference get alike."""
        out: dict[str, torch.Tensor] = {}
        for node in self.nodes:
            if isinstance(node, ops.Tensor):
                out[node.id] = self.vectors[node.name]
            elif isinstance(node, ops.Sae):
                named = [(part, getattr(node, part)) for part in PARTS]
                out.update({f"{node.id}.{part}": self.vectors[name] for part, name in named if name})
            elif isinstance(node, ops.Vector):
                out[node.id] = getattr(self.fits[node.id], node.part)
        return out

    def constants(self, prompt: int) -> dict[str, torch.Tensor]:
        """What the reference knows for one prompt; which stored rows it gets is worked out here, by hand."""
        out = self.arrays()
        for node in self.nodes:
            if isinstance(node, ops.Stored):
                rows = self.stored[node.id][prompt if node.prompts is None else node.prompts[prompt]]
                out[node.id] = rows[rows_at(node.at, len(rows), 0)]
        return out

    def handles(self, fingerprint: str) -> dict[str, HandleFacts]:
        found: dict[str, HandleFacts] = {}
        for node in self.nodes:
            if isinstance(node, ops.Stored):
                rows = self.stored[node.id]
                found[node.handle] = HandleFacts(
                    handle=node.handle,
                    kind="activations",
                    fingerprint=fingerprint,
                    widths={node.site: int(rows[0].shape[1])},
                    rows_per_prompt=tuple(len(r) for r in rows),
                )
            elif node.id in self.fits:
                handle = node.handle if isinstance(node, ops.Vector) else node.probe
                found[handle] = HandleFacts(
                    handle=handle,
                    kind="artifact",
                    fingerprint=fingerprint,
                    widths={node.site: len(self.fits[node.id].direction)},
                    has_probe=True,
                )
        return found


@dataclass(frozen=True)
class Bench:
    """A model under test with its engine, and the reference's own copy of the model.

    Attributes:
        loaded: what the engine was made of.
        plain: weights that no engine touches.
        prompts: four prompts of different lengths, one of two or three tokens.
        most: how far log-probabilities may be from the reference.
    """

    name: str
    loaded: Any
    engine: Any
    plain: Plain
    prompts: tuple[tuple[int, ...], ...]
    most: float
    _usual: dict[str, float] = field(default_factory=dict)
    _bare: dict[tuple[tuple[int, ...], ...], Solo] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<bench of {self.name}>"

    @property
    def facts(self) -> Any:
        return self.engine.facts

    @property
    def layers(self) -> int:
        return int(self.facts.n_layers)

    @property
    def middle(self) -> int:
        return self.layers // 2

    def width(self, site: str) -> int:
        return int(self.facts.width(site))

    def sites(self, *, editable: bool = False) -> list[str]:
        """Every served site of rows, at a layer in the middle."""
        names = [n for n in self.facts.sites if n != "attn_probs" and (SITES[n].editable or not editable)]
        return [f"{n}.{self.middle}" if SITES[n].layered else n for n in names]

    def serves(self, name: str) -> bool:
        return name in self.facts.sites

    def vector(self, site: str, size: float = 3.0, seed: int = 0) -> torch.Tensor:
        v = torch.randn(self.width(site), generator=torch.Generator().manual_seed(seed))
        return size * v / v.norm()

    def usual(self, site: str) -> float:
        """How long rows of a site usually are."""
        if site not in self._usual:
            rows = self.solo([read(site)], self.prompts[0]).first.read["r"]
            self._usual[site] = float(rows[1:].norm(dim=-1).mean())
        return self._usual[site]

    def pushing(self, site: str, times: float = 1.0, seed: int = 0) -> torch.Tensor:
        """A vector some times as long as the site's rows usually are."""
        return self.vector(site, times * self.usual(site), seed)

    # ---- the engine ----

    def task(self, ask: Ask) -> Task:
        """Checks the program and makes a task; `ask.sinks` gets a new shelf per capture.

        Raises:
            ProgramError: what the checker finds.
        """
        arrays = ask.arrays()
        scope = Scope(
            model=self.facts,
            lengths=tuple(len(p) for p in ask.prompts),
            generation=ask.generation,
            tensors={name: tuple(v.shape) for name, v in ask.vectors.items()},
            handles=ask.handles(self.facts.fingerprint),
            encode=self.loaded.tokenize,
            marks=tuple(ask.marks),
        )
        checked = check.check(Program(nodes=tuple(ask.nodes)), scope, Prices(32, 256))
        ask.sinks = {n.id: ask.own.get(n.id, Shelf()) for n in ask.nodes if isinstance(n, ops.Capture)}
        return Task(
            request=f"test-{next(_numbers)}",
            checked=checked,
            tokens=tuple(tuple(p) for p in ask.prompts),
            vectors={k: v.float().numpy() for k, v in arrays.items()},
            stored={
                name: tuple(ask.stored[name][j][list(rows)].numpy() for j, rows in wanted)
                for name, wanted in checked.stored.items()
            },
            probes={
                n.id: (ask.fits[n.id].weights.numpy(), ask.fits[n.id].bias)
                for n in ask.nodes
                if isinstance(n, ops.Score) and n.probe is not None
            },
            sinks=ask.sinks,
            progress=ask.progress or (lambda _done: None),
            tenant=ask.tenant,
        )

    def alone(self, ask: Ask) -> TaskResult:
        return self.engine.submit(self.task(ask)).result(WAIT_S)

    def started(self, *asks: Ask) -> list[Future[TaskResult]]:
        """Futures of requests that are all waiting when the engine looks."""
        return self.submitted([self.task(ask) for ask in asks])

    def submitted(self, tasks: Sequence[Task]) -> list[Future[TaskResult]]:
        with self.engine._wake:  # the engine sees all of them or none
            return [self.engine.submit(task) for task in tasks]

    def together(self, *asks: Ask) -> list[TaskResult | TrocarError]:
        """Results, or what each failed with, of requests that share the engine."""
        return [f.exception(WAIT_S) or f.result() for f in self.started(*asks)]  # type: ignore[misc]

    # ---- the reference ----

    def solo(self, nodes: Sequence[Any], prompt: Sequence[int], **more: Any) -> Solo:
        return solo(self.plain, nodes, prompt, **more)

    def bare(self, prompt: Sequence[int], ids: Sequence[int] = ()) -> Solo:
        """The model without any edit, on a prompt and a text after it."""
        key = (tuple(prompt), tuple(ids))
        if key not in self._bare:
            self._bare[key] = self.solo([logprobs((0,), "all")], prompt, forced=ids)
        return self._bare[key]

    def reference(self, ask: Ask, prompt: int, *, forced: Sequence[int] | None = None) -> Solo:
        """One prompt of a request, as the hooks have it; greedy, or along ids that were generated."""
        return solo(
            self.plain,
            ask.nodes,
            ask.prompts[prompt],
            ask.constants(prompt),
            marked=ask.marked[prompt] if ask.marked else None,
            max_new_tokens=ask.generation.max_new_tokens,
            forced=forced,
        )


def read(site: str, at: str = "prompt[*]", name: str = "r", **more: Any) -> ops.Read:
    return ops.Read(id=name, site=site, at=at, **more)


def capture(*names: str, name: str = "kept") -> ops.Capture:
    return ops.Capture(id=name, of=names)


def logprobs(tokens: Sequence[int], at: str = "prompt[*]", name: str = "lp") -> ops.Logprobs:
    return ops.Logprobs(id=name, at=at, tokens=tuple(tokens))


def text() -> ops.Text:
    return ops.Text(id="text")


def greedy(most: int, *, stop: bool = False) -> Generation:
    return Generation(max_new_tokens=most, stop_at_eos=stop)


def handle(number: int = 0) -> str:
    return f"act_{number:032x}"


def ok(found: TaskResult | TrocarError) -> TaskResult:
    assert isinstance(found, TaskResult), found
    return found
