"""What cannot be recorded, by name, and how it is done here. A table and the exceptions made from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Final

from trocar import errors

# fmt: off
_NO_GRADIENTS: Final = (
    "gradients are not computed on the server",
    "Measure an effect instead: patch or ablate the place and compare logit_diff.",
)
_NOT_LOCAL: Final = (
    "the rows stay on the server, so there is nothing to move or convert",
    "Leave it out: save() keeps the rows there under a handle.",
)
_SHAPE: Final = (
    "rows are selected by position and prompt, and have no other shape",
    "Index as [:, position] or [:, position, :]; heads of q, k, v and z have an index of their own.",
)
REFUSED: Final[dict[str, tuple[str, str]]] = {  # attribute -> why it is not recorded, and what to do
    **dict.fromkeys(("grad", "backward", "requires_grad_", "requires_grad", "retain_grad"), _NO_GRADIENTS),
    **dict.fromkeys(("cpu", "cuda", "to", "numpy", "item", "tolist", "float", "half", "bfloat16"), _NOT_LOCAL),
    **dict.fromkeys(
        ("view", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "flatten", "T", "mT", "expand"), _SHAPE
    ),
    "shape": ("how many tokens a prompt has is known on the server",
              "`model.tokenize(text)` gives the tokens; `model.width(site)` gives the width."),
    "skip": ("a module is computed or the program stops before it",
             "Assign to its output: the rows of an earlier place, or 0. tracer.stop() ends the pass."),
    "source": ("operations inside a module are not addressed by its source code",
               "docs/sites.md lists the places inside modules: q, k, v, z, attn_probs, mlp_act."),
    "edit": ("a model is shared, so no edit outlives its request",
             "Keep a list of trocar.edit values and give it to t.apply(*edits) or model.generate(edits=...)."),
    "clear_edits": ("no edit outlives its request", "Leave it out."),
    "session": ("each trace is a request of its own, sent when its block ends",
                "Write the traces one after another; a saved value is an operand of later ones."),
    "cache": ("what is kept is named before the pass",
              "save() the places you want, or use model.capture(prompts, sites=[...])."),
    "barrier": ("invokes run one after another", "Leave it out: save() in the first invoke, use it in the second."),
    "next": ("steps of a generation are named, not walked",
             "Use `with tracer.iter[2]:`, `tracer.iter[1:4]` or `tracer.all()`."),
    "inputs": ("a module's other arguments are no places", "Write .input: the rows that enter the module."),
    "tokenizer": ("the tokenizer is on the server",
                  "Saved tokens have .texts; `trocar_model.tokenize(text)` gives ids and texts."),
    **dict.fromkeys(("parameters", "state_dict", "named_parameters", "weight"),
                    ("weights never leave the server", "model.facts has the sizes; a lens uses the unembedding.")),
}
# fmt: on


_NATIVE: Final = "docs/programs.md lists the ops; a native trace writes all of them."


class NotRecorded(errors.ClientError, AttributeError):
    """A refusal that is also an AttributeError, so that `hasattr` keeps working."""


def not_recorded(name: str, what: str, known: tuple[str, ...] = (), step: str | None = None) -> NotRecorded:
    """The refusal of an attribute that `what` does not have."""
    reason, usual = REFUSED.get(name, ("no op records it", _NATIVE))
    near = None if name in REFUSED else errors.closest(name, known)
    refused = errors.refusal(
        "bad_argument", name, f".{name} of {what}: {reason}", closest=near, next_step=step or usual
    )
    return NotRecorded([refused])


def refuse(path: str, reason: str, step: str) -> errors.TrocarError:
    """A spelling that is understood and not recorded."""
    return errors.refuse("bad_argument", path, reason, next_step=step)


def not_here(path: str, reason: str, step: str) -> errors.TrocarError:
    """A value that would have to be on this side."""
    return errors.refuse("not_here", path, reason, next_step=step)


_IN_TORCH: Final[dict[str, str]] = {  # function of torch -> how it is written here
    "where": "Use a gate: t.apply(trocar.edit.set(site, value, gate=rows @ v > 0.5)) in a native trace.",
    "softmax": "Use the method of the logits: .softmax(-1).topk(k).",
    "log_softmax": "Use the method of the logits: .log_softmax(-1)[:, -1, token].",
    "argmax": "Use the method of the logits: .argmax(-1).",
    "topk": "Use the method: .topk(k).",
    "norm": "Use the method: .norm(dim=-1).",
    "mean": "Use the method: .mean(dim=1), over the positions of each prompt.",
    "zeros_like": "Assign 0.",
    "einsum": "Use rows @ vector, or rows @ matrix.",
    "cat": "Save each part by itself.",
    "stack": "Save each part by itself.",
}
_OPERATORS: Final = ("add", "sub", "mul", "matmul")


class Elsewhere:
    """A value on the server: everything that Python would need its numbers for is refused, by name."""

    __array_ufunc__ = None  # `array + value` asks `__radd__`, not numpy
    _instead: ClassVar[str] = (
        "save() it and use the handle; rows @ v and .norm(dim=-1) give numbers that can be saved."
    )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if name in _OPERATORS and type(func).__name__ == "method_descriptor":
            return NotImplemented  # `tensor + value` goes on to `__radd__`
        step = _IN_TORCH.get(
            name, "Use the operators and methods of the value; docs/programs.md lists the ops."
        )
        raise refuse(f"torch.{name}", f"torch.{name} cannot run on a value that is on the server", step)

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise not_here("value", f"{self!r} is not a local array", self._instead)

    def __float__(self) -> float:
        raise not_here("value", f"{self!r} is not a local number", self._instead)

    def __int__(self) -> int:
        raise not_here("value", f"{self!r} is not a local number", self._instead)

    def __index__(self) -> int:
        raise not_here("value", f"{self!r} is not a local number", self._instead)

    def __bool__(self) -> bool:
        step = "Gate the edit in a native trace: trocar.edit.add(site, v, gate=rows @ v > 0.5), row by row."
        raise not_here("if", f"{self!r} has no truth value here: a program has no branches on values", step)

    def __iter__(self) -> Iterator[Any]:
        step = "Loop over layers or positions, which are numbers; an index selects rows."
        raise not_here("for", f"{self!r} cannot be walked through here", step)

    def __len__(self) -> int:
        raise not_recorded("shape", repr(self))

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise refuse("call", f"{self!r} is called", "Values are no functions; modules are called by name.")

    def _alone(self) -> Any:
        raise refuse("operator", f"no op records this arithmetic on {self!r}", self._instead)

    def _combined(self, other: Any, /) -> Any:
        if isinstance(other, Elsewhere) and type(other) is not type(self):
            return NotImplemented  # the other one may know how
        return self._alone()

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _combined
    __matmul__ = __rmatmul__ = __floordiv__ = __mod__ = __pow__ = __rpow__ = __and__ = __or__ = _combined
    __neg__ = __abs__ = __invert__ = _alone

    def _compared(self, other: object) -> Any:
        step = "In a native trace a comparison is a gate: trocar.edit.zero(site, gate=rows @ v > 0.5)."
        raise refuse("value", f"{self!r} is compared with {other!r}", step)

    __lt__ = __gt__ = __le__ = __ge__ = _compared
    __eq__ = __ne__ = _compared
    __hash__ = object.__hash__
