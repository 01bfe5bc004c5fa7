"""A served model as a tree of modules. `trocar.aliases` says which place a path means on the served family.

A block is recorded by running it once. No source code is read; the request is sent when the block ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from trocar import aliases, errors
from trocar.client.sync import Model
from trocar.fronts import words
from trocar.fronts.logits import Logits
from trocar.fronts.values import Recording, Value, View
from trocar.nnsight.tracer import Generator, Iteration, Output, Tracer

_SIDES: Final = ("output", "input")
_ELSEWHERE: Final = ("dispatch", "device", "save", "rename", "export_edits", "import_edits")


def save(value: Any) -> Any:
    """`nnsight.save(value)`: the same as `value.save()`.

    Raises:
        ClientError: `bad_argument` for a list or another local object.
    """
    if not isinstance(value, words.Elsewhere) and not hasattr(value, "save"):
        step = "Append what .save() gives to an ordinary list; it is filled when the block ends."
        raise words.refuse("save", f"a {type(value).__name__} is not a value of the trace", step)
    return value.save()


class LanguageModel:
    """A served model in the spelling of nnsight.

    Args:
        model: `trocar.Client().model(name)`.
    """

    def __init__(self, model: Model) -> None:
        if not isinstance(model, Model):
            step = "Connect first: LanguageModel(trocar.Client().model(name)). A model is served, not loaded here."
            raise words.refuse("model", f"{model!r} is not a model of a trocar.Client", step)
        self._served = model
        self._recording: Recording | None = None

    def trace(self, *prompts: Any, **options: Any) -> Tracer:
        """Opens a trace of one pass over each prompt."""
        return self._open(prompts, options)

    def generate(self, *prompts: Any, max_new_tokens: int, **options: Any) -> Tracer:
        """Opens a trace of a generation; options are those of `trocar.Model.trace`."""
        return self._open(prompts, {**options, "max_new_tokens": max_new_tokens})

    def scan(self, *prompts: Any, **options: Any) -> Tracer:
        """Opens a trace that is priced and not run: after the block, `tracer.plan` says what it would cost."""
        return self._open(prompts, options, runs=False)

    def all(self) -> Iteration:
        """Every step of the generation, as `tracer.all()`."""
        return Iteration(self.recording, self.recording.every_step)

    @property
    def recording(self) -> Recording:
        """What is recorded now."""
        if self._recording is None:
            step = (
                "Open `with lm.trace(prompt):`, or `with tracer.invoke(prompt):` in a trace without a prompt."
            )
            raise words.refuse("trace", "a value of a module outside a trace", step)
        return self._recording

    @property
    def output(self) -> Output:
        """What the model gives: `.output.logits`."""
        return Output(self.recording)

    @property
    def logits(self) -> Logits:
        """The model's logits."""
        return Logits(self.recording)

    @property
    def generator(self) -> Generator:
        """`lm.generator.output.save()`: the generated text."""
        return Generator(self.recording)

    def __getattr__(self, name: str) -> Module:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in words.REFUSED or name in _ELSEWHERE:
            raise words.not_recorded(name, "a model")
        return Module(self, name)

    def __repr__(self) -> str:
        return f"LanguageModel({self._served!r})"

    def _open(self, prompts: tuple[Any, ...], options: dict[str, Any], *, runs: bool = True) -> Tracer:
        if self._recording is not None:
            raise words.refuse(
                "trace", "a trace inside a trace", "End the first block; save() what it is for."
            )
        return Tracer(self, prompts, options, runs=runs)


class Module:
    """A module by its path; `.output` and `.input` are the rows there."""

    _lm: LanguageModel
    _path: str

    def __init__(self, lm: LanguageModel, path: str) -> None:
        object.__setattr__(self, "_lm", lm)
        object.__setattr__(self, "_path", path)

    @property
    def output(self) -> View | Logits:
        return self._value("output")

    @property
    def input(self) -> View | Logits:
        return self._value("input")

    def all(self) -> Iteration:
        """Every step of the generation, as `tracer.all()`."""
        return self._lm.all()

    def _value(self, side: str) -> View | Logits:
        recording = self._lm.recording
        facts, text = recording.facts, f"{self._path}.{side}"
        site = aliases.resolve(text, facts, self._path)
        if site.name == "logits":
            return Logits(recording)
        view = recording.view(site)
        if side == "input" or not self._is_tuple(text):
            return view
        return View(recording, site, view.window, view.steps, tuple_=True)

    def _is_tuple(self, text: str) -> bool:
        try:
            aliases.resolve(f"{text}[0]", self._lm.recording.facts)
        except errors.ProgramError:
            return False
        return True

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _SIDES:
            raise words.refuse(name, f"{self._path}.{name} is assigned", "Assign to .output or .input.")
        target = self._value(name)
        if isinstance(target, Logits):
            target[:] = value
        else:
            self._lm.recording.assign(target, value, replaces=True)

    def __getattr__(self, name: str) -> Module:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in words.REFUSED:
            raise words.not_recorded(name, f"module {self._path}")
        if name in ("save", "register_forward_hook"):
            step = f"Write {self._path}.output.save()."
            raise words.refuse(name, f"{self._path} is a module, not a value", step)
        return Module(self._lm, f"{self._path}.{name}")

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        return Module(self._lm, f"{self._path}[{int(index)}]")

    def __len__(self) -> int:
        """The number of layers, of the list of them."""
        facts = self._lm._served.facts
        aliases.resolve(f"{self._path}[0].output", facts, self._path)
        return int(facts.n_layers)

    def __iter__(self) -> Iterator[Any]:
        return iter(self[:])

    def __bool__(self) -> bool:
        return True

    def __call__(self, rows: Any) -> Any:
        """The logit lens: `lm.lm_head(lm.model.norm(rows))`. No other module is applied to rows."""
        recording = self._lm.recording
        site = aliases.resolve(f"{self._path}.output", recording.facts, self._path)
        if site.name == "final_norm" and isinstance(rows, Value):
            return Normed(rows)
        if site.name == "logits":
            if isinstance(rows, Normed):
                return Logits(recording, of=rows.rows)
            if isinstance(rows, View) and rows.site.name == "final_norm":
                return Logits(recording, of=rows)
        step = (
            "The one composition that is recorded is the logit lens, lm_head(norm(rows)), with the last norm."
        )
        raise words.refuse(self._path, f"{self._path} is applied to rows", step)

    def __repr__(self) -> str:
        return f"<module {self._path} of {self._lm._served.name}>"


class Normed(words.Elsewhere):
    """Rows after the last norm, on their way to `lm_head`."""

    _instead = "Apply lm_head to it: lm_head(norm(rows)) is a logit lens."

    def __init__(self, rows: Value) -> None:
        self.rows: Final = rows

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise words.refuse(name, f".{name} of rows after the last norm", self._instead)

    def __repr__(self) -> str:
        return f"<{self.rows!r} after the last norm>"
