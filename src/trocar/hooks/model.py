"""A served model with hooks. A hook is called once, when the run is recorded, with the rows of its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

from trocar import aliases, sites
from trocar.client.results import Text
from trocar.client.sync import Model
from trocar.client.trace import is_single
from trocar.fronts import words
from trocar.fronts.saved import Texts
from trocar.fronts.values import Recording, View
from trocar.graph.builder import EditSpec, Position, SiteRows, selector
from trocar.hooks.answers import Logits, answered, asks_of
from trocar.hooks.cache import Cache, Entry, act_name, chosen, hook_names

Hook = Callable[..., Any] | EditSpec
Hooks = Sequence[tuple[Any, Hook]]
_PER_RUN: Final = (
    "Hooks belong to a run: fwd_hooks=[...], or `with model.hooks(fwd_hooks=[...]):` around several."
)
_TOKENS: Final = "`trocar_model.tokenize(text)` gives ids and texts; prompts may be lists of ids."
_WEIGHTS: Final = "Weights never leave the server; logits.top(k) and t.lens use the unembedding there."
_ELSEWHERE: Final = {
    **dict.fromkeys(("add_hook", "add_perma_hook", "reset_hooks", "remove_all_hook_fns"), _PER_RUN),
    **dict.fromkeys(
        ("to_tokens", "to_str_tokens", "to_string", "to_single_token", "get_token_position"), _TOKENS
    ),
    **dict.fromkeys(
        ("W_E", "W_U", "W_Q", "W_K", "W_V", "W_O", "W_in", "W_out", "W_pos", "b_U", "unembed", "ln_final"),
        _WEIGHTS,
    ),
    "hook_dict": "`model.hook_names` lists the hooks.",
    "from_pretrained": "HookedModel(trocar.Client().model(name)).",
}


@dataclass(frozen=True, slots=True)
class Config:
    """Sizes of the model, under their names in TransformerLens."""

    model_name: str
    n_layers: int
    d_model: int
    n_heads: int
    n_key_value_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int


@dataclass(frozen=True, slots=True)
class HookPoint:
    """What a hook function gets as `hook`."""

    name: str
    site: sites.Site

    def layer(self) -> int:
        if self.site.layer is None:
            raise words.refuse("layer", f"{self.name} is in no layer", "Ask hooks of layers only.")
        return self.site.layer

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        step = "A hook is called once, when the run is recorded: keep what you need in variables of your own."
        raise words.not_recorded(name, f"hook {self.name}", step=step)


class HookedModel:
    """A served model in the spelling of TransformerLens.

    Args:
        model: `trocar.Client().model(name)`.
    """

    def __init__(self, model: Model) -> None:
        if not isinstance(model, Model):
            step = (
                "Connect first: HookedModel(trocar.Client().model(name)). A model is served, not loaded here."
            )
            raise words.refuse("model", f"{model!r} is not a model of a trocar.Client", step)
        self._served = model
        self._hooks: tuple[tuple[Any, Hook], ...] = ()

    @property
    def cfg(self) -> Config:
        f = self._served.facts
        return Config(
            f.name, f.n_layers, f.d_model, f.n_heads, f.n_kv_heads, f.d_head, f.d_mlp, f.vocab_size, f.context
        )

    @property
    def hook_names(self) -> tuple[str, ...]:
        """Hooks whose rows can be stored or edited."""
        return tuple(hook_names(self._served.facts))

    def __call__(self, prompts: Any, *, return_type: Any = "logits") -> Any:
        """A run without hooks of its own; see `run_with_hooks`."""
        return self.run_with_hooks(prompts, return_type=return_type)

    def run_with_hooks(
        self, prompts: Any, *, return_type: Any = "logits", fwd_hooks: Hooks = (), bwd_hooks: Hooks = ()
    ) -> Any:
        """Records a run with edits.

        Args:
            return_type: "logits" gives an object to ask, and each question runs; "loss", `top(k)`,
                `logprobs(tokens)`, `logit_diff(a, b)` or a list of them runs now and gives the answers.
            fwd_hooks: pairs of a hook's name, or a function of names, and a function or a `trocar.edit`.
        """
        _no_backward(bwd_hooks)
        recording = self._record(prompts, fwd_hooks, {})
        if asks_of(return_type) is None:
            return Logits(recording)
        find = answered(recording, return_type)
        return find(recording.run())

    def run_with_cache(
        self,
        prompts: Any,
        *,
        names_filter: Any = None,
        return_type: Any = "logits",
        pos_slice: Position | None = None,
        stop_at_layer: int | None = None,
    ) -> tuple[Any, Cache]:
        """Runs and stores rows on the server: what is asked of the logits, and the cache.

        Args:
            names_filter: a hook's name, several, a function of the name, or None for all.
            pos_slice: an index or slice of positions; None for all prompt tokens.
            stop_at_layer: the first layer that is not computed; there are no logits then.
        """
        facts = self._served.facts
        recording = self._record(prompts, (), {})
        at = "prompt[*]" if pos_slice is None else selector(pos_slice)
        entries: dict[str, Entry] = {}
        for name, site in chosen(names_filter, facts).items():
            place = replace(recording.view(site).places()[0], at=at)
            rows = SiteRows(recording.trace._recorder, place)
            entries[name] = recording.save(recording.trace.capture(rows), Entry(str(site), recording.prompts))
        if stop_at_layer is not None:
            return_type = self._stopped(recording, stop_at_layer, return_type)
        later = asks_of(return_type) is None
        find = answered(recording, None if later else return_type)
        results = recording.run()
        logits = Logits(self._record(prompts, (), {})) if later else find(results)
        return logits, Cache(facts, entries)

    @contextmanager
    def hooks(self, *, fwd_hooks: Hooks = (), bwd_hooks: Hooks = ()) -> Iterator[HookedModel]:
        """Hooks for every run in the block; each run records them anew."""
        _no_backward(bwd_hooks)
        outer, self._hooks = self._hooks, (*self._hooks, *fwd_hooks)
        try:
            yield self
        finally:
            self._hooks = outer

    def generate(self, prompts: Any, *, max_new_tokens: int = 10, **generation: Any) -> Text | list[Text]:
        """Generates with the hooks of the block; options are those of `trocar.Model.generate`."""
        recording = self._record(prompts, (), {**generation, "max_new_tokens": max_new_tokens})
        texts = recording.save(recording.trace.text(), Texts())
        recording.run()
        found: list[Text] = texts.value
        return found[0] if is_single(prompts) else found

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        known = tuple(x for x in dir(HookedModel) if not x.startswith("_"))
        raise words.not_recorded(name, "a model", known, step=_ELSEWHERE.get(name))

    def __repr__(self) -> str:
        return f"HookedModel({self._served!r})"

    def _stopped(self, recording: Recording, layer: int, return_type: Any) -> Any:
        if layer < 1:
            layer += self._served.n_layers
        if return_type not in ("logits", None):
            step = "Leave return_type or stop_at_layer out."
            raise words.refuse("return_type", "the run stops before the logits", step)
        recording.trace.stop_after(layer - 1)
        return None

    def _record(self, prompts: Any, fwd_hooks: Hooks, generation: dict[str, Any]) -> Recording:
        recording = Recording(self._served, prompts, generation)
        recording.steps = recording.every_step
        for where, hook in (*self._hooks, *fwd_hooks):
            for name, site in self._where(where):
                _record(recording, name, site, hook)
        return recording

    def _where(self, where: Any) -> list[tuple[str, sites.Site]]:
        if isinstance(where, str):
            return [(where, aliases.resolve(where, self._served.facts, "fwd_hooks"))]
        if isinstance(where, tuple):
            return self._where(act_name(*where))
        return list(chosen(where, self._served.facts, "fwd_hooks").items())


def _no_backward(bwd_hooks: Hooks) -> None:
    if bwd_hooks:
        reason, step = words.REFUSED["backward"]
        raise words.refuse("bwd_hooks", f"bwd_hooks: {reason}", step)


def _record(recording: Recording, name: str, site: sites.Site, hook: Hook) -> None:
    """Writes down what a hook does at a place."""
    if isinstance(hook, EditSpec):
        if hook.site not in ("", "*") and aliases.resolve(hook.site, recording.facts) != site:
            step = 'Write the edit for the hook\'s own place: trocar.edit.add("*", v).'
            raise words.refuse("fwd_hooks", f"the hook is at {name}, its edit at {hook.site}", step)
        recording.trace.apply(replace(hook, site=str(site)))
        return
    if not callable(hook):
        step = 'Give a function hook(value, hook), or an edit: trocar.edit.add("*", v).'
        raise words.refuse("fwd_hooks", f"{hook!r} is no hook", step)
    rows = recording.view(site, heads=True)
    made = hook(rows, hook=HookPoint(name, site))
    unchanged = made is None or (isinstance(made, View) and made.key == rows.key)
    if not unchanged:
        recording.assign(rows, made, replaces=False)
