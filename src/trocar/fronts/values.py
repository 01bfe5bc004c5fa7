"""Values of a recording in the spelling of tensors: `h[:, -1] += v`. They write to a native trace; nothing runs.

A `View` is the rows of a place. It is live, as a tensor in the forward pass is: it reads when it is used, after the
edits that were written before. Giving a place another value (`layer.output = ...`) leaves earlier views as they
were. A `Computed` is a value that was made from others. Several passes of a generation give a value several parts.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, Final, TypeVar

from trocar import sites
from trocar.client.trace import Trace, prompt_tuple
from trocar.fronts import words
from trocar.fronts.indexing import Dim, Steps, Window
from trocar.fronts.saved import Numbers, Rows, Saved
from trocar.graph import ops
from trocar.graph.builder import Expr, Held, Place, SiteRows

S = TypeVar("S", bound=Saved)
HEADS: Final = ("q", "k", "v", "z")
NO_ROWS: Final = {
    "logits": "Ask for tokens, log-probabilities or a difference of logits; edit final_norm.",
    "attn_probs": "In a native trace: t.pattern(t.attn_probs[5].read(...)) reads, t.knockout(5, keys=...) cuts edges.",
}


class Recording:
    """One native trace, and what its values have in common.

    Attributes:
        steps: which forward passes what is written now is for.
        deepest: the deepest layer that was named so far; None after the last one.
    """

    def __init__(self, model: Any, prompts: Any, generation: dict[str, Any]) -> None:
        prompts = listed(prompts)
        self.trace: Trace[Any, Any] = model.trace(prompts, **generation)
        self.facts: Final = model.facts
        self.prompts: Final = len(prompt_tuple(prompts))
        self.max_new_tokens: Final[int] = self.trace._generation.max_new_tokens
        self.steps = Steps()
        self.deepest: int | None = 0
        self._views: list[View] = []
        self._saved: list[Saved] = []
        self._expected: View | None = None

    @property
    def every_step(self) -> Steps:
        """All passes of the generation; the token that is generated last is not fed in."""
        return Steps(True, ("gen[*]",)) if self.max_new_tokens > 1 else Steps()

    def view(self, site: sites.Site, *, heads: bool = False) -> View:
        """The rows of a place. With `heads`, those of q, k, v and z have a dimension of heads."""
        if site.name in NO_ROWS:
            raise words.refuse(str(site), f"{site} has no rows to read or write here", NO_ROWS[site.name])
        self.facts.require(site, "site")
        self.reach(site)
        last: tuple[Dim, ...] = ("neuron",) if site.name == "mlp_act" else ("column",)
        if site.name in HEADS:
            last = ("head", "column") if heads else ("flat",)
        return View(self, site, Window(("batch", "token", *last), d_head=self.facts.d_head), self.steps)

    def reach(self, site: sites.Site) -> None:
        after = site.layer is None and site.name != "embeddings"
        if after or self.deepest is None:
            self.deepest = None
        else:
            self.deepest = max(self.deepest, site.layer or 0)

    def stop(self) -> None:
        """Leaves out the layers after the deepest one named so far."""
        if self.deepest is None:
            step = "Stop before naming the logits, or leave tracer.stop() out."
            raise words.refuse(
                "stop", "what was named comes after the last layer: nothing is left to stop", step
            )
        self.trace.stop_after(self.deepest)

    def save(self, what: Any, saved: S) -> S:
        """Records an output and what will hold it."""
        name = f"saved{len(self._saved)}"
        self.trace.save(name, what)
        return self.share(name, saved)

    def share(self, name: str, saved: S) -> S:
        """What will hold an output."""
        saved.name = name
        self._saved.append(saved)
        return saved

    def run(self) -> Any:
        """Sends the request, waits, and fills what was saved; gives the native results."""
        results = self.trace.run().result()
        for saved in self._saved:
            saved.fill(results)
        return results

    def branch(self) -> Recording:
        """A recording that begins with what is written here and goes its own way."""
        twin, recorder = copy.copy(self), copy.copy(self.trace._recorder)
        recorder._nodes, recorder._ids = list(recorder._nodes), set(recorder._ids)
        twin.trace = copy.copy(self.trace)
        twin.trace._recorder = recorder
        return twin

    # ---- edits ----

    def register(self, view: View) -> None:
        self._views.append(view)

    def edited(self, view: View, op: Any, value: Any, number: float = 1.0) -> View:
        """An edit in place; the view goes on as the rows after it."""
        for place, part in zip(view.places(), self._operands(value, len(view.places())), strict=True):
            self.trace.apply(place.edit(op, part, number))
        self._expected = view
        return view

    def assign(self, view: View, value: Any, *, replaces: bool) -> None:
        """`=`: the tail of `+=`, or edit.set."""
        tail, self._expected = self._expected, None
        if tail is not None and value is tail and tail.key == view.key:
            return
        if isinstance(value, Real) and not isinstance(value, bool):
            if value != 0:
                step = "Assign 0, or a vector: numpy.full(width, value)."
                raise words.refuse("value", f"{value!r} is assigned to rows", step)
            value = ops.ZERO
        if isinstance(value, tuple):
            step = "Assign to .output[0], or to .output as if it were the tensor."
            raise words.refuse("value", "a tuple is assigned: the rows are its first entry", step)
        if replaces:
            for earlier in [v for v in self._views if v.site == view.site and v is not view]:
                earlier.freeze()
        self.edited(view, "edit.set", value)
        self._expected = None

    def _operands(self, value: Any, parts: int) -> Sequence[Any]:
        if not isinstance(value, Value):
            return [value] * parts
        return paired(value.of(self), parts)


def listed(prompts: Any) -> Any:
    """Prompts as a native trace takes them: arrays of ids as lists, one list of ids as one prompt."""
    if isinstance(prompts, dict):
        step = "Give texts, lists of token ids, or a conversation; padding and masks are made on the server."
        raise words.refuse("prompts", "a dictionary of tensors", step)
    given = prompts.tolist() if hasattr(prompts, "tolist") else prompts
    return [given] if isinstance(given, list) and given and isinstance(given[0], int) else given


def paired(exprs: Sequence[Expr], parts: int) -> Sequence[Expr]:
    """One operand for each part."""
    if len(exprs) not in (1, parts):
        step = "Write both under the same tracer.iter[...]."
        raise words.refuse("iter", "a value of some steps meets a value of others", step)
    return exprs if len(exprs) == parts else list(exprs) * parts


class Value(words.Elsewhere):
    """What views and computed values can do."""

    recording: Recording
    dims: tuple[Dim, ...]
    home: str
    """The place it began at, for directions that are fitted for each place."""

    def exprs(self) -> Sequence[Expr]:
        """The native value, one for each group of passes."""
        raise words.not_recorded("exprs", repr(self))

    def of(self, recording: Recording) -> Sequence[Expr]:
        """The native values, for use in a recording."""
        if self.recording is not recording:
            step = "save() it there, and use what that gives: it holds the rows on the server."
            raise words.refuse("value", f"{self!r} belongs to another trace or invoke", step)
        return self.exprs()

    def _made(self, made: Callable[[Expr], Expr], dims: tuple[Dim, ...] | None = None) -> Computed:
        exprs = [made(x) for x in self.exprs()]
        return Computed(self.recording, exprs, self.dims if dims is None else dims, self.home)

    def _with(self, other: Any, op: Callable[[Any, Any], Any], *, drops: bool = False) -> Computed:
        mine = self.exprs()
        dims = self.dims[:-1] if drops else self.dims
        if not isinstance(other, Value):
            held = isinstance(other, Held)
            value = self.recording.trace.vector(other, self.home) if held else other
            return Computed(self.recording, [op(a, value) for a in mine], dims, self.home)
        theirs = other.of(self.recording)
        parts = max(len(mine), len(theirs))
        pairs = zip(paired(mine, parts), paired(theirs, parts), strict=True)
        return Computed(self.recording, [op(a, b) for a, b in pairs], dims, self.home)

    def __add__(self, other: Any) -> Value:
        return self._with(other, operator.add)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Value:
        return self._with(other, operator.sub)

    def __rsub__(self, other: Any) -> Value:
        return self._with(other, lambda a, b: b - a)

    def __mul__(self, by: Any) -> Value:
        return self._with(by, operator.mul)

    __rmul__ = __mul__

    def __truediv__(self, by: Any) -> Value:
        if isinstance(by, Value):
            step = "Rows divided by their norm are .normalize()."
            raise words.refuse("/", f"{self!r} is divided by a value", step)
        return self._with(1.0 / by, operator.mul)

    def __neg__(self) -> Value:
        return self._made(operator.neg)

    def __matmul__(self, other: Any) -> Value:
        return self._with(other, operator.matmul, drops=True)

    def __rmatmul__(self, other: Any) -> Value:
        return self._with(other, lambda a, b: b @ a, drops=True)

    def dot(self, other: Any) -> Value:
        """Inner product of each row."""
        return self._with(other, lambda a, b: a.dot(b), drops=True)

    def norm(self, *, dim: int = -1, keepdim: bool = False) -> Computed:
        """Norm of each row; `keepdim` changes nothing, since numbers belong to their rows."""
        if self._dim(dim) in ("batch", "token"):
            raise words.refuse("dim", f"norm over dim={dim}", "Norms are of rows: dim=-1.")
        return self._made(lambda x: x.norm(), self.dims[:-1])

    def normalize(self) -> Computed:
        """Each row divided by its norm."""
        return self._made(lambda x: x.normalize())

    def relu(self) -> Computed:
        """max(x, 0)."""
        return self._made(lambda x: x.relu())

    def mean(self, dim: int | None = None, *, keepdim: bool = False) -> Computed:
        """Mean over the positions of each prompt, or over the numbers of each row."""
        over = "batch" if dim is None else self._dim(dim)
        if over == "batch":
            step = "dim=1 is the mean over a prompt's positions; mean_diff of a fit is a mean over prompts."
            raise words.refuse("dim", "a mean over prompts: prompts never mix in a pass", step)
        dims = tuple(d for d in self.dims if d != over)
        return self._made(lambda x: x.mean("positions" if over == "token" else "width"), dims)

    def clone(self) -> Computed:
        """The value as it is here, whatever is edited later."""
        return self._made(lambda x: x)

    def detach(self) -> Value:
        """The value itself: there are no gradients."""
        return self

    def save(self) -> Any:
        """Numbers leave the server; rows stay there under a handle."""
        expr = self._one()
        if expr.content == "wide" and not isinstance(expr, SiteRows):
            step = "save() the reads and do the arithmetic on the stored rows, or reduce it: rows @ v."
            raise words.not_here("save", f"{self!r} was computed: only rows of a place are stored", step)
        if isinstance(expr, SiteRows):
            return self.recording.save(self.recording.trace.capture(expr), Rows(expr.site))
        return self.recording.save(self.recording.trace.score(expr), Numbers("numbers"))

    def _one(self) -> Expr:
        found = self.exprs()
        if len(found) > 1:
            step = "save() under tracer.iter[0] and under tracer.iter[1:], or only the text: tracer.result.save()."
            raise words.refuse(
                "save", f"{self!r}: the prompt's rows and generated rows are two outputs", step
            )
        return found[0]

    def _dim(self, dim: int) -> Dim:
        if not -len(self.dims) <= dim < len(self.dims):
            raise words.refuse("dim", f"dim={dim} of {self!r}", f"The dimensions are {', '.join(self.dims)}.")
        return self.dims[dim]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise words.not_recorded(name, repr(self), tuple(x for x in dir(Value) if not x.startswith("_")))


class Computed(Value):
    """A value that was made from others."""

    def __init__(self, recording: Recording, exprs: Sequence[Expr], dims: tuple[Dim, ...], home: str) -> None:
        self.recording = recording
        self.dims = dims
        self.home = home
        self._exprs = exprs

    def exprs(self) -> Sequence[Expr]:
        return self._exprs

    def __getitem__(self, index: Any) -> Any:
        raise words.refuse("index", f"{self!r} is indexed", "Index the place first: output[:, -1] * 2.")

    def __setitem__(self, index: Any, value: Any) -> None:
        raise words.refuse("index", f"{self!r} is no place to write to", "Assign to the output of a module.")

    def __repr__(self) -> str:
        return "<a computed value on the server>"


class View(Value):
    """Rows of a place; an index gives some of them, assigning edits them."""

    def __init__(
        self, recording: Recording, site: sites.Site, window: Window, steps: Steps, *, tuple_: bool = False
    ) -> None:
        self.recording = recording
        self.site: Final = site
        self.window: Final = window
        self.steps: Final = steps
        self.dims = window.dims
        self.home = str(site)
        self._tuple = tuple_
        self._frozen: Sequence[Expr] | None = None
        recording.register(self)

    @property
    def key(self) -> tuple[Any, ...]:
        w = self.window
        return self.site, str(w.tokens), w.picked, w.kind, self.steps

    def places(self) -> list[Place]:
        """Where it writes."""
        if self._frozen is not None:
            step = "Name the place again: layer.output[...] = ..."
            raise words.refuse("value", f"{self!r} are rows of before the place was given others", step)
        parts = {self.window.kind: self.window.picked} if self.window.kind else {}
        return [
            Place(self.site, at, parts.get("heads"), parts.get("neurons"))
            for at in self.steps.selectors(self.window.tokens)
        ]

    def exprs(self) -> Sequence[Expr]:
        if self._frozen is not None:
            return self._frozen
        return [SiteRows(self.recording.trace._recorder, place) for place in self.places()]

    def freeze(self) -> None:
        """Keeps the rows of now: its place gets others."""
        self._frozen = self.exprs()

    def __getitem__(self, index: Any) -> View:
        if self._tuple and type(index) is int and index == 0:
            return View(self.recording, self.site, self.window, self.steps)
        if self._frozen is not None:
            step = "Index before the place is given other rows, or take .clone() first."
            raise words.refuse("index", f"{self!r} are rows of before", step)
        window = self.window.at(index, self.recording.prompts)
        return View(self.recording, self.site, window, self.steps)

    def __setitem__(self, index: Any, value: Any) -> None:
        replaces = self._tuple and type(index) is int and index == 0
        self.recording.assign(self[index], value, replaces=replaces)

    def __iadd__(self, value: Any) -> View:
        return self.recording.edited(self, "edit.add", value)

    def __isub__(self, value: Any) -> View:
        return self.recording.edited(self, "edit.add", value, -1.0)

    def __imul__(self, by: Any) -> View:
        if isinstance(by, Value):
            step = "Assign the product: rows[:] = rows * numbers."
            raise words.refuse("*=", f"{self!r} *= a value", step)
        return self.recording.edited(self, "edit.scale", None, by)

    def __itruediv__(self, by: Any) -> View:
        return self.__imul__(1.0 / by)

    def __repr__(self) -> str:
        ats = " and ".join(self.steps.selectors(self.window.tokens))
        return f"<rows of {self.site} at {ats}, on the server>"
