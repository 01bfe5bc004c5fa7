"""`with model.trace(prompts) as t:` records a program; `t.plan()` prices it, `t.run()` runs it.

Attributes of a trace are the sites; methods are the outputs and what has no operator (`where`, `sae`,
`knockout`, `stop_after`, `sweep`, `mask`). Operators are in `trocar.graph.builder_expr`, sites in `builder_sites`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, Self, SupportsIndex, TypeVar

import numpy as np
import numpy.typing as npt

from trocar import aliases, errors, sites, strict
from trocar.client import sweeps
from trocar.client.prompts import Prompts, is_single, prompt_tuple
from trocar.graph import ops
from trocar.graph.builder import (
    EditSpec,
    Expr,
    Held,
    Place,
    Position,
    Recorder,
    Sae,
    SiteFamily,
    SiteProxy,
    SiteRows,
    indices,
    selector,
    vectors_of,
)
from trocar.graph.facts import ModelFacts
from trocar.graph.program import Generation
from trocar.graph.sweep import Axis
from trocar.wire.requests import RunRequest

__all__ = [
    "Prompts",
    "Recorded",
    "Runner",
    "Saved",
    "Trace",
    "as_array",
    "is_single",
    "place",
    "prompt_tuple",
]

PlanT = TypeVar("PlanT", covariant=True)
JobT = TypeVar("JobT", covariant=True)


@dataclass(frozen=True, slots=True)
class Recorded:
    """A finished request: what is sent, and the vectors beside it."""

    request: RunRequest
    vectors: dict[str, npt.NDArray[np.float32]]


class Runner(Protocol[PlanT, JobT]):
    """What a trace needs of a model, sync or async."""

    def plan(self, recorded: Recorded) -> PlanT: ...

    def run(self, recorded: Recorded) -> JobT: ...


@dataclass(frozen=True, slots=True)
class Saved:
    """An output that was made inside `t.save(name, ...)`'s argument, waiting for its name."""

    kind: type[Any]
    fields: dict[str, Any]


class Trace(Generic[PlanT, JobT]):
    """A recording. Sites are attributes: `t.resid_post[12][-1]`; outputs are saved by name.

    Raises:
        NoSuchSite: for an attribute that is no site, with the closest spelling.
    """

    def __init__(
        self, runner: Runner[PlanT, JobT], model: ModelFacts, prompts: Prompts, generation: Generation
    ) -> None:
        self._runner = runner
        self._model = model
        self._prompts = prompt_tuple(prompts)
        self._generation = generation
        self._recorder = Recorder(model)
        self._axes: tuple[Axis, ...] = ()
        self._alternatives: tuple[str, ...] = ()
        self._masks: dict[str, tuple[tuple[bool, ...], ...]] = {}
        self._failed = False

    # ---- sites ----

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._recorder.at_site(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, value)
            return
        if isinstance(self._recorder.at_site(name), SiteProxy):
            raise errors.refuse("bad_argument", name, f"t.{name} needs a layer: t.{name}[12] = ...")
        self._recorder.assign(Place(sites.Site(name)), value)

    def __dir__(self) -> Iterable[str]:
        return [*object.__dir__(self), *self._model.sites]

    def site(self, name: str) -> SiteRows:
        """Rows of a site by its name: `t.site("resid_post.12")`, or the spelling of another library
        (`t.site("blocks.12.hook_resid_post")`).

        Raises:
            ProgramError: `unknown_site`, or `ambiguous_site` for a spelling that means two places here.
        """
        return self._recorder.named(name)

    # ---- edits ----

    def apply(self, *edits: EditSpec) -> None:
        """Records edits made with `trocar.edit`."""
        for edit in edits:
            self._recorder.apply(edit)

    def knockout(
        self, layers: Any, *, at: Position = "prompt[-1]", keys: Position, heads: Any = None
    ) -> None:
        """Cuts attention edges (Geva et al. 2023): the queries `at` give nothing to the `keys`.

        Args:
            layers: one layer, a slice or several.
            at: selector, index or slice of the queries.
            keys: of the prompt tokens cut off.
            heads: one index, several, or None for all.
        """
        proxy = SiteProxy(self._recorder, "attn_probs")
        fields = {"keys": selector(keys)}
        for place in proxy.places(layers):
            spec = EditSpec(
                "edit.knockout", str(place), selector(at), heads=indices(heads, "heads"), fields=fields
            )
            self._recorder.apply(spec)

    def sweep(self, target: EditSpec | Expr | str, **values: Sequence[Any]) -> None:
        """Runs the whole program once for each value, or for each combination of several fields' values.

        Args:
            target: an edit made with `trocar.edit`, which is recorded here; an expression; or an output's name.
            values: what a field takes in turn: `coef=[0, 4, 8]`, `layer=range(8, 16)`, `at=[-1, "prompt[*]"]`,
                and `by`, `low`, `high`, `site`; `value=` takes arrays, directions or expressions.
        """
        if "value" in values:
            refs = tuple(self._recorder.value(v) for v in values["value"])
            self._alternatives += refs
            values = {**values, "value": refs}
        axes = sweeps.axes(self._recorder, self._target(target), values)
        self._axes += axes

    def _target(self, target: EditSpec | Expr | str) -> str:
        """The id of the node that is swept."""
        if isinstance(target, str):
            return target
        if isinstance(target, Expr):
            return self._recorder.value(target)
        if not isinstance(target, EditSpec):
            raise errors.refuse(
                "bad_argument", "target", f"{target!r} is not an edit, an expression or an output's name"
            )
        before = len(self._recorder._nodes)
        self._recorder.apply(target)
        edits = [n.id for n in self._recorder._nodes[before:] if isinstance(n, ops.EDIT_NODES)]
        if len(edits) != 1:
            raise errors.refuse(
                "bad_argument", "target", f"{target.site!r} is {len(edits)} edits; a sweep changes one",
                next_step="Name one site, and sweep its layer: t.sweep(edit, layer=range(...)).",
            )  # fmt: skip
        return edits[0]

    # ---- values and control ----

    def mask(self, name: str, rows: Sequence[Sequence[bool]]) -> str:
        """Carries a mask, true or false for each token of each prompt; the selector that selects its tokens.

        Args:
            rows: one per prompt, as long as its prompt, special tokens included.
        """
        self._masks[name] = tuple(tuple(bool(x) for x in row) for row in rows)
        return f"mask({json.dumps(name, ensure_ascii=False)})"

    def vector(self, value: Any, site: str | None = None) -> Expr:
        """A constant: float array [width], a matrix [rows, columns], a fitted direction or stored rows."""
        return self._recorder.constant(value, site)

    def where(self, cond: Expr, a: Any, b: Any) -> Expr:
        """Row by row: `a` where the mask is true, `b` where it is false."""
        value = self._recorder.value
        return self._recorder.emit(ops.Where, cond=value(cond), a=value(a), b=value(b))

    def sae(self, dictionary: Sae | None = None, **arrays: Any) -> Expr:
        """A sparse autoencoder: a `trocar.Sae`, or its arrays by name (w_enc, b_enc, w_dec, b_dec, ...)."""
        return self._recorder.constant(Sae(**arrays) if dictionary is None else dictionary)

    def stop_after(self, layer: SupportsIndex) -> None:
        """Layers after this one are not computed; what would need them is refused. -1 is the last."""
        place = SiteProxy(self._recorder, "resid_post").place(layer)
        self._recorder.emit(ops.StopAfter, layer=place.layer)

    # ---- outputs ----

    def lens(self, of: SiteRows | SiteFamily | Expr | Sequence[Expr], *, top_k: int = 5) -> Saved:
        """Logit lens (nostalgebraist 2020): top-k next tokens of each row, with log-probabilities in nats."""
        rows = [of] if isinstance(of, Expr) else list(of)
        return Saved(ops.Lens, {"of": tuple(x.id for x in rows), "top_k": top_k})

    def logprobs(self, tokens: Sequence[Any], *, at: Position = -1) -> Saved:
        """Log-probabilities of named next tokens; a list for all prompts, or one list per prompt."""
        nested = any(isinstance(t, list | tuple) for t in tokens)
        fixed = tuple(tuple(t) for t in tokens) if nested else tuple(tokens)
        return Saved(ops.Logprobs, {"at": selector(at), "tokens": fixed})

    def score(self, of: Expr, probe: Held | None = None) -> Saved:
        """One number per row: numbers, a mask, or a fitted probe's logit on the rows of its site."""
        if probe is None:
            return Saved(ops.Score, {"of": of.id})
        site = of.site if isinstance(of, SiteRows) else None
        node, _ = probe.operand("probe", site)
        if not isinstance(node, ops.Vector):
            raise errors.refuse("bad_argument", "probe", f"{probe!r} is not a fitted probe")
        return Saved(ops.Score, {"of": of.id, "probe": node.handle, "site": node.site})

    def capture(
        self,
        of: SiteRows | SiteFamily | Sequence[SiteRows],
        *,
        reduce: Literal["none", "mean"] = "none",
    ) -> Saved:
        """Writes rows to the store, or their mean over each prompt's tokens; the result is a handle."""
        rows = [of] if isinstance(of, Expr) else list(of)
        return Saved(ops.Capture, {"of": tuple(x.id for x in rows), "reduce": reduce})

    def raw(self, of: SiteRows | Sequence[SiteRows]) -> Saved:
        """The rows themselves, quantised, where the policy lets them leave: open weights. `capture` keeps them."""
        rows = [of] if isinstance(of, Expr) else list(of)
        return Saved(ops.Raw, {"of": tuple(x.id for x in rows)})

    def logit_diff(self, first: Any, second: Any, *, at: Position = -1) -> Saved:
        """Logit of the first token minus that of the second, per prompt; tokens, or one token per prompt."""
        several = [isinstance(x, list | tuple) for x in (first, second)]
        if any(several) and not all(several):
            raise errors.refuse(
                "bad_argument", "second", "one side is a list of tokens and the other is one token"
            )
        if all(several) and len(first) != len(second):
            raise errors.refuse(
                "bad_argument", "second", f"{len(first)} first tokens and {len(second)} second"
            )
        pairs = tuple(zip(first, second, strict=True)) if all(several) else (first, second)
        return Saved(ops.Metric, {"metric": "logit_diff", "at": selector(at), "tokens": pairs})

    def cross_entropy(self, *, at: Position = "prompt[:-1]") -> Saved:
        """Minus the log-probability (nats) of the token that follows, the mean over the tokens of each prompt."""
        return Saved(ops.Metric, {"metric": "cross_entropy", "at": selector(at)})

    def kl(self, to: Any, *, at: Position = -1) -> Saved:
        """KL(p || q) in nats: q is the model's next-token distribution at `at`, p that of rows `to` of final_norm."""
        ref = self._recorder.value(to, "final_norm")
        return Saved(ops.Metric, {"metric": "kl", "at": selector(at), "to": ref})

    def pattern(self, of: Expr) -> Saved:
        """Attention probabilities of `t.attn_probs[layer].read(...)`."""
        if not isinstance(of, Expr):
            raise errors.refuse("bad_argument", "of", f"{of!r} is not a read; use .read(at=, keys=, heads=)")
        return Saved(ops.Pattern, {"of": of.id})

    def text(self) -> Saved:
        """The generated text."""
        return Saved(ops.Text, {})

    def save(self, name: str, what: Saved) -> None:
        """Names an output; `job.result()[name]` will hold it.

        Raises:
            ClientError: `not_here` for a bare value: raw rows stay on the server.
        """
        if isinstance(what, Expr | SiteProxy | SiteFamily):
            raise errors.refuse(
                "not_here", name, "raw activations do not leave the server",
                next_step="Save t.lens(...), t.score(...) or t.capture(...) of it; t.raw(...) where the policy allows.",
            )  # fmt: skip
        if not isinstance(what, Saved):
            raise errors.refuse("bad_argument", name, f"{what!r} is not an output of this trace")
        self._recorder.output(name, what.kind, **what.fields)

    # ---- running ----

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._failed = kind is not None
        self._recorder.close()

    @property
    def recorded(self) -> Recorded:
        """The request as it would be sent."""
        if self._failed:
            raise errors.refuse(
                "bad_argument", "trace", "the trace's block raised, so what it recorded is incomplete"
            )
        program = self._recorder.build(self._alternatives)
        request = strict.make(
            RunRequest,
            model=self._model.name,
            prompts=self._prompts,
            program=program,
            generation=self._generation,
            masks=self._masks,
            sweep=self._axes,
        )
        vectors = {k: as_array(k, v) for k, v in vectors_of(self._recorder, program).items()}
        return Recorded(request, vectors)

    def plan(self) -> PlanT:
        """Shapes, cost and bits out; nothing runs and nothing is spent."""
        return self._runner.plan(self.recorded)

    def run(self) -> JobT:
        """Submits the program."""
        return self._runner.run(self.recorded)

    def __repr__(self) -> str:
        nodes = self._recorder._nodes
        lines = [f"{n.id:>8}  {n.op:<16} {_fields(n)}" for n in nodes] or ["  (nothing recorded)"]
        return "\n".join([f"Trace on {self._model.name}, {len(self._prompts)} prompts", *lines])


def _fields(node: Any) -> str:
    return "  ".join(f"{k}={v!r}" for k, v in node if k not in ("id", "op") and v is not None)[:90]


def as_array(name: str, value: Any) -> npt.NDArray[np.float32]:
    """A local array as float32 [width], or as a matrix [rows, columns].

    Raises:
        ClientError: `bad_argument` if it is not an array of numbers with one or two dimensions.
    """
    detached = value.detach().cpu() if hasattr(value, "detach") else value
    try:
        array = np.asarray(detached, dtype=np.float32)
    except (TypeError, ValueError) as e:
        raise errors.refuse("bad_argument", name, f"not an array of numbers: {e}") from None
    if array.ndim not in (1, 2):
        raise errors.refuse(
            "bad_argument", name, f"shape {array.shape}; a vector has shape [width], a matrix [rows, columns]"
        )
    return array


def place(site: str, model: ModelFacts) -> sites.Site:
    """Parses a site and checks it against the model's facts."""
    found = aliases.resolve(site, model)
    model.require(found, "site")
    return found
