"""Indices of tensors as selectors: `[:, -1]` is the last prompt token of every prompt. Pure functions.

A window is what an index leaves of a tensor: the dimensions still to be indexed, the positions, and the heads,
neurons or tokens that were picked. Prompts cannot be picked, because a program runs on each of them; `0` may stand
for the prompt where there is one. Everything that an index of a tensor could mean besides is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from trocar.fronts import words
from trocar.graph.builder import indices, selector
from trocar.graph.builder_expr import whole

Dim = Literal["batch", "token", "head", "column", "neuron", "flat", "vocab"]
Picked = Literal["heads", "neurons", "vocab"]
ALL: Final = slice(None)


@dataclass(frozen=True, slots=True)
class Steps:
    """Forward passes of a generation: pass 0 reads the prompt, pass s reads generated token s - 1.

    Attributes:
        prompt: whether pass 0 is among them.
        gen: selectors of generated tokens.
    """

    prompt: bool = True
    gen: tuple[str, ...] = ()

    @classmethod
    def of(cls, index: Any) -> Steps:
        """`iter[:]`, `iter[2]`, `iter[1:4]`, `iter[[0, 2]]`."""
        if isinstance(index, slice):
            return cls._slice(index)
        passes = indices(index, "iter") or ()
        if any(p < 0 for p in passes):
            raise _no_step(index, "how many steps there will be is not known beforehand")
        return cls(0 in passes, tuple(f"gen[{p - 1}]" for p in passes if p))

    @classmethod
    def _slice(cls, index: slice) -> Steps:
        start, stop = index.start or 0, index.stop
        if index.step is not None or start < 0 or (stop is not None and stop <= start):
            raise _no_step(index, "steps are a slice from the start, without a stride")
        first = max(start - 1, 0)
        if stop is None:
            return cls(start == 0, ("gen[*]" if first == 0 else f"gen[{first}:]",))
        return cls(start == 0, (f"gen[{first}:{stop - 1}]",) if stop > max(start, 1) else ())

    def selectors(self, tokens: Any) -> tuple[str, ...]:
        """Where an index of the token dimension lies in these passes."""
        prompt = (selector(tokens),) if self.prompt else ()
        if self.gen and not _reaches_one(tokens, prompt=self.prompt):
            step = "Index [:, -1] or [:], or edit the prompt's tokens under tracer.iter[0]."
            raise words.refuse("position", f"{shown(tokens)}: a step of a generation reads one token", step)
        if prompt == ("prompt[*]",) and self.gen == ("gen[*]",):
            return ("all",)
        return (*prompt, *self.gen)


def _no_step(index: Any, why: str) -> Exception:
    step = "Use tracer.iter[2], tracer.iter[1:4], tracer.iter[[0, 2]] or tracer.all()."
    return words.refuse("iter", f"iter[{shown(index)}]: {why}", step)


def _reaches_one(tokens: Any, *, prompt: bool) -> bool:
    """Whether the index selects the single token of a later pass; 0 alone is another token in the prompt."""
    return tokens in (ALL, slice(-1, None), -1) or (tokens == 0 and not prompt)


@dataclass(frozen=True, slots=True)
class Window:
    """What is left of a tensor.

    Attributes:
        dims: still to be indexed, outermost first.
        tokens: index of the token dimension.
        picked: heads, neurons or tokens of the vocabulary, and which of them it is.
        d_head: width of a head, for sites that keep heads side by side.
    """

    dims: tuple[Dim, ...]
    tokens: Any = field(default_factory=lambda: ALL)
    picked: tuple[Any, ...] | None = None
    kind: Picked | None = None
    d_head: int = 1

    def at(self, index: Any, prompts: int) -> Window:
        """What `[index]` leaves, for a request of so many prompts."""
        given = index if isinstance(index, tuple) else (index,)
        items = _spread(given, len(self.dims))
        if len(items) > len(self.dims):
            raise words.refuse(
                "index", f"[{shown(index)}] has {len(items)} indices, {len(self.dims)} are left", _RULE
            )
        window = replace(self, dims=())
        for dim, item in zip(self.dims, items, strict=False):
            window = window._with(dim, item, prompts)
        return replace(window, dims=(*window.dims, *self.dims[len(items) :]))

    def _with(self, dim: Dim, item: Any, prompts: int) -> Window:
        if isinstance(item, slice) and item == ALL:
            return replace(self, dims=(*self.dims, dim))
        if dim == "batch":
            return self._prompt(item, prompts)
        if dim == "token":
            return self._positions(item)
        return self._columns(dim, item)

    def _prompt(self, item: Any, prompts: int) -> Window:
        if not isinstance(item, str | slice | list) and prompts == 1 and whole(item, "index", _PROMPT) == 0:
            return self
        why = (
            f"the first index is the prompt, and the program runs on each of the {prompts} prompts"
            if prompts > 1
            else "the first index is the prompt, and there is one: 0"
        )
        raise words.refuse("index", f"[{shown(item)}]: {why}", _RULE)

    def _positions(self, item: Any) -> Window:
        if self.tokens != ALL:
            raise words.refuse("index", f"[{shown(item)}]: positions were chosen already", _RULE)
        if isinstance(item, list | range):
            picked = ",".join(map(str, indices(item, "position") or ()))
            return replace(self, tokens=f"prompt[{picked}]", dims=(*self.dims, "token"))
        if isinstance(item, slice | str):
            selector(item)
            return replace(self, tokens=item, dims=(*self.dims, "token"))
        return replace(self, tokens=whole(item, "index", "a position"))

    def _columns(self, dim: Dim, item: Any) -> Window:
        if dim == "column":
            step = (
                "Use rows @ v or trocar.edit.project_out for a direction; heads are at z, neurons at mlp_act."
            )
            raise words.refuse("index", f"[{shown(item)}]: columns of this place are not addressed", step)
        if dim == "flat":
            return replace(self, picked=self._heads(item), kind="heads", dims=(*self.dims, "column"))
        several = isinstance(item, slice | list | tuple | range) or getattr(item, "ndim", 0) > 0
        chosen = tuple(_several(item, dim)) if several else (_one(item, dim),)
        return replace(self, picked=chosen, kind=_KINDS[dim], dims=(*self.dims, *[dim] * several))

    def _heads(self, item: Any) -> tuple[int, ...]:
        """Heads that a slice of columns covers exactly."""
        d = self.d_head
        if isinstance(item, slice) and item.step is None and type(item.start or 0) is type(item.stop) is int:
            start, stop = item.start or 0, item.stop
            if 0 <= start < stop and start % d == stop % d == 0:
                return tuple(range(start // d, stop // d))
        step = f"Take whole heads: columns h * {d} to (h + 1) * {d}, or .heads(h) in a native trace."
        raise words.refuse("index", f"[{shown(item)}] cuts through heads, which are {d} wide", step)


_PROMPT: Final = "a prompt"
_KINDS: Final[dict[Dim, Picked]] = {"head": "heads", "neuron": "neurons", "vocab": "vocab"}
_RULE: Final = "Index as [:, position] or [:, position, :]; with one prompt, [0, position] is the same."


def _spread(given: tuple[Any, ...], dims: int) -> tuple[Any, ...]:
    """The indices with `...` written out."""
    where = [i for i, item in enumerate(given) if item is Ellipsis]
    if not where:
        return given
    at = where[0]
    return (*given[:at], *[ALL] * (dims - len(given) + 1), *given[at + 1 :])


def _one(item: Any, dim: Dim) -> Any:
    return item if isinstance(item, str) and dim == "vocab" else whole(item, dim, f"a {dim}")


def _several(item: Any, dim: Dim) -> list[Any]:
    if isinstance(item, slice):
        step = f"Name them: a list of {dim} indices."
        raise words.refuse("index", f"[{shown(item)}]: a slice of the {dim} dimension", step)
    if isinstance(item, list | tuple) and any(isinstance(x, str) for x in item):
        return list(item)
    return list(indices(item, dim) or ())


def shown(item: Any) -> str:
    """An index as it was written."""
    if isinstance(item, tuple):
        return ", ".join(map(shown, item))
    if isinstance(item, slice):
        parts = ["" if x is None else str(x) for x in (item.start, item.stop)]
        return ":".join(parts if item.step is None else [*parts, str(item.step)])
    return "..." if item is Ellipsis else repr(item)
