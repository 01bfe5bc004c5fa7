"""Foreign spellings of sites: the only file that knows what other libraries call a place.

`resolve` reads a canonical name, or a spelling of TransformerLens (hook names, bridge names, short names),
SAELens (`hook_name`), nnterp, nnsight or Hugging Face (module paths), and returns the canonical site. What a
spelling means depends on the model's family: one path is the MLP's input in one family and the attention's
output in another. A spelling that means two things is refused with the candidates, one that means a place we
do not have is refused with what it means; nothing is guessed. A name means a place in the model as published:
weights that a library folds or centres when it loads a model are not imitated. Whether a model serves the
site, and how many layers it has, is for the checker.

In a table `*` is the layer; texts may write it `[10]` or `.10`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Final, Literal, Protocol

from trocar import errors, sites
from trocar.sites import SITES, Site

MAX_TEXT: Final = 160


class Facts(Protocol):
    """What this module needs to know of a model; the public facts of a served model have it."""

    @property
    def family(self) -> str: ...
    @property
    def n_layers(self) -> int: ...
    @property
    def sites(self) -> tuple[str, ...]: ...


@dataclass(frozen=True, slots=True)
class Row:
    """One foreign spelling.

    Attributes:
        spelling: as its library writes it, with `*` for the layer.
        kind: "site" is accepted; "ambiguous" and "absent" are refused.
        sites: the site, or the candidates of a refusal, best first; `resid_post.-1` is the last layer's.
        reason: of a refusal.
    """

    spelling: str
    kind: Literal["site", "ambiguous", "absent"]
    sites: tuple[str, ...]
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Module:
    """One module of a tree: the sites at its input and output, and whether its output is, or was, a tuple.

    A side that is no site has the text `: what it means` instead of a name, or names joined by `|`.
    """

    path: str
    reads: str | None
    gives: str
    tuple_: bool = False


# fmt: off
_BLOCK_HOOKS: Final = {  # below `blocks.*.`
    "hook_resid_pre": "resid_pre", "hook_resid_mid": "resid_mid", "hook_resid_post": "resid_post",
    "attn.hook_q": "q", "attn.hook_k": "k", "attn.hook_v": "v", "attn.hook_z": "z",
    "attn.hook_pattern": "attn_probs", "mlp.hook_post": "mlp_act",
    # bridge: the input and output of the wrapped module
    "hook_in": "resid_pre", "hook_out": "resid_post",
    "ln1.hook_in": "resid_pre", "ln1.hook_out": "attn_in", "ln2.hook_in": "resid_mid", "ln2.hook_out": "mlp_in",
    "attn.hook_in": "attn_in", "attn.q.hook_out": "q", "attn.k.hook_out": "k", "attn.v.hook_out": "v",
    "attn.o.hook_in": "z", "attn.o.hook_out": "attn_out",
    "mlp.hook_in": "mlp_in", "mlp.out.hook_in": "mlp_act", "mlp.out.hook_out": "mlp_out",
}
_PLAIN_HOOKS: Final = {"hook_attn_out": "attn_out", "hook_mlp_out": "mlp_out", "mlp.hook_out": "mlp_out"}
_SANDWICH_HOOKS: Final = {
    "ln1_post.hook_in": "attn_out", "ln1_post.hook_out": "attn_out_post",
    "ln2_post.hook_in": "mlp_out", "ln2_post.hook_out": "mlp_out_post",
}
_NAMES: Final = {
    "ln_final.hook_in": "resid_post.-1", "ln_final.hook_out": "final_norm",
    "unembed.hook_in": "final_norm", "unembed.hook_out": "logits",
    # short names
    "q*": "q", "query*": "q", "k*": "k", "key*": "k", "v*": "v", "value*": "v", "z*": "z",
    "pattern*": "attn_probs", "post*": "mlp_act",
    # accessors of nnterp
    "layers_input[*]": "resid_pre", "layers_output[*]": "resid_post",
    "attentions_input[*]": "attn_in", "attentions_output[*]": "attn_out",
    "attention_probabilities[*]": "attn_probs",
    "mlps_input[*]": "mlp_in", "mlps_output[*]": "mlp_out", "model.logits": "logits",
}
_EMBEDDING_NAMES: Final = ("hook_embed", "embed", "embed.hook_out", "token_embeddings")

_SEVERAL: Final = "is several sites in one tensor"
_TWO_VERSIONS: Final = "is the stream before the norm in one version and after it in another"
_UNWEIGHTED: Final = "is before the norm's weight is applied, unless the weight was folded into the next matrix"
_POST_NORM: Final = "is after the block's own output norm in one library and before it in others"
_Doubts = tuple[tuple[str, tuple[str, ...], str], ...]
_AMBIGUOUS: Final[_Doubts] = (
    ("blocks.*.attn.hook_out", ("attn_out", "resid_mid"), "is listed for two places by its own library"),
    *((f"blocks.*.hook_{x}", ("resid_pre", "attn_in"), _TWO_VERSIONS)
      for x in ("attn_in", "q_input", "k_input", "v_input")),
    *((f"blocks.*.attn.{x}.hook_in", ("attn_in", "resid_pre"), _TWO_VERSIONS) for x in "qkv"),
    ("blocks.*.hook_mlp_in", ("resid_mid", "mlp_in"), _TWO_VERSIONS),
    ("blocks.*.ln1.hook_normalized", ("attn_in",), _UNWEIGHTED), ("normalized*ln1", ("attn_in",), _UNWEIGHTED),
    ("blocks.*.ln2.hook_normalized", ("mlp_in",), _UNWEIGHTED), ("normalized*ln2", ("mlp_in",), _UNWEIGHTED),
    ("ln_final.hook_normalized", ("final_norm",), _UNWEIGHTED), ("normalized", ("final_norm",), _UNWEIGHTED),
    ("attn*", ("attn_probs", "attn_out"), "is short for the attention pattern, and reads like the output"),
)
_SANDWICH_AMBIGUOUS: Final[_Doubts] = (
    ("blocks.*.hook_attn_out", ("attn_out_post", "attn_out"), _POST_NORM),
    ("blocks.*.hook_mlp_out", ("mlp_out_post", "mlp_out"), _POST_NORM),
    ("blocks.*.mlp.hook_out", ("mlp_out", "mlp_out_post"), _POST_NORM),
    ("blocks.*.ln1_post.hook_normalized", ("attn_out_post",), _UNWEIGHTED),
    ("blocks.*.ln2_post.hook_normalized", ("mlp_out_post",), _UNWEIGHTED),
)
_PRE, _GATE = "the MLP's pre-activation", "the output of the MLP's gate projection"
_UP: Final = "the output of the MLP's up projection"
_NORMED: Final = "queries or keys after their own norm"
_POSITIONS: Final = "position embeddings alone"
_TOKENS_ALONE: Final = "token embeddings without the position embeddings"
_ABSENT: Final = {  # what each means -> its spellings
    "the attention scores before the softmax": ("blocks.*.attn.hook_attn_scores",),
    "the output of each head after the output projection": ("blocks.*.attn.hook_result", "result*"),
    "queries or keys after the rotary embedding": ("blocks.*.attn.hook_rot_q", "blocks.*.attn.hook_rot_k"),
    _NORMED: ("blocks.*.attn.q_norm.hook_out", "blocks.*.attn.k_norm.hook_out"),
    _PRE: ("blocks.*.mlp.hook_pre", "pre*"),
    "the MLP's linear branch before the product": ("blocks.*.mlp.hook_pre_linear",),
    "MLP neurons before a norm of their own": ("blocks.*.mlp.hook_mid", "mid*"),
    _UP: ("blocks.*.mlp.in.hook_out",), _GATE: ("blocks.*.mlp.gate.hook_out",),
    "the scale of a norm": (
        *(f"blocks.*.{x}.hook_scale" for x in ("ln1", "ln2", "ln1_post", "ln2_post")),
        "ln_final.hook_scale", "scale*ln1", "scale*ln2", "scale",
    ),
    _POSITIONS: ("hook_pos_embed", "pos_embed", "pos_embed.hook_out"),
}

_NNTERP_MODULES: Final = (
    Module("layers[*]", "resid_pre", "resid_post", tuple_=True),
    Module("layers[*].self_attn", "attn_in", "attn_out", tuple_=True),
    Module("layers[*].mlp", "mlp_in", "mlp_out"),
    Module("attentions[*]", "attn_in", "attn_out", tuple_=True),
    Module("mlps[*]", "mlp_in", "mlp_out"),
    Module("ln_final", "resid_post.-1", "final_norm"),
)
_LLAMA_TOP: Final = (
    Module("model.embed_tokens", None, "embeddings"),
    Module("model.layers[*]", "resid_pre", "resid_post", tuple_=True),
    Module("model.layers[*].input_layernorm", "resid_pre", "attn_in"),
)
_LLAMA_BLOCKS: Final = (
    Module("model.layers[*].self_attn", "attn_in", "attn_out", tuple_=True),
    *(Module(f"model.layers[*].self_attn.{x}_proj", "attn_in", x) for x in "qkv"),
    Module("model.layers[*].self_attn.o_proj", "z", "attn_out"),
    Module("model.layers[*].mlp", "mlp_in", "mlp_out"),
    Module("model.layers[*].mlp.gate_proj", "mlp_in", f": {_GATE}"),
    Module("model.layers[*].mlp.up_proj", "mlp_in", f": {_UP}"),
    Module("model.layers[*].mlp.act_fn", f": {_GATE}", ": the MLP's gate after the activation, before the product"),
    Module("model.layers[*].mlp.down_proj", "mlp_act", "mlp_out"),
    Module("model.norm", "resid_post.-1", "final_norm"),
    Module("lm_head", "final_norm", "logits"),
)
_LLAMA_NORM: Final = Module("model.layers[*].post_attention_layernorm", "resid_mid", "mlp_in")
_LLAMA: Final = (*_LLAMA_TOP, _LLAMA_NORM, *_LLAMA_BLOCKS)
_QK_NORMS: Final = tuple(Module(f"model.layers[*].self_attn.{x}_norm", None, f": {_NORMED}") for x in "qk")
_GEMMA: Final = (
    *_LLAMA_TOP,
    Module("model.layers[*].pre_feedforward_layernorm", "resid_mid", "mlp_in"),
    *_LLAMA_BLOCKS,
    Module("model.layers[*].post_attention_layernorm", "attn_out", "attn_out_post"),
    Module("model.layers[*].post_feedforward_layernorm", "mlp_out", "mlp_out_post"),
    *_QK_NORMS,
)
_GPT2: Final = (
    Module("transformer.drop", None, "embeddings"),
    Module("transformer.wte", None, f": {_TOKENS_ALONE}"),
    Module("transformer.wpe", None, f": {_POSITIONS}"),
    Module("transformer.h[*]", "resid_pre", "resid_post", tuple_=True),
    Module("transformer.h[*].ln_1", "resid_pre", "attn_in"),
    Module("transformer.h[*].attn", "attn_in", "attn_out", tuple_=True),
    Module("transformer.h[*].attn.c_attn", "attn_in", "q|k|v"),
    Module("transformer.h[*].attn.c_proj", "z", "attn_out"),
    Module("transformer.h[*].ln_2", "resid_mid", "mlp_in"),
    Module("transformer.h[*].mlp", "mlp_in", "mlp_out"),
    Module("transformer.h[*].mlp.c_fc", "mlp_in", f": {_PRE}"),
    Module("transformer.h[*].mlp.act", f": {_PRE}", "mlp_act"),
    Module("transformer.h[*].mlp.c_proj", "mlp_act", "mlp_out"),
    Module("transformer.ln_f", "resid_post.-1", "final_norm"),
    Module("lm_head", "final_norm", "logits"),
)
# fmt: on
_LIKE_LLAMA: Final = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA}
_TREES: Final = {**_LIKE_LLAMA, "qwen3": (*_LLAMA, *_QK_NORMS), "gemma3": _GEMMA, "gpt2": _GPT2}
_INDEX: Final = re.compile(r"\[(-?(?:0|[1-9][0-9]{0,4}))\]|\.(0|[1-9][0-9]{0,4})(?=[.\[]|\Z)")
_SHORT: Final = re.compile(r"([a-z_]+)(0|[1-9][0-9]{0,4})(ln[12])?")
_DICTIONARY: Final = re.compile(r"[0-9]{1,5}-[a-z]|layer_[0-9]{1,5}/")
_SIDES: Final = (".output", ".input", ".inputs")
_FIRST_PROMPT: Final = "the first prompt of the batch, because this module returns no tuple"


def resolve(text: str, model: Facts, path: str = "site") -> Site:
    """The site that `text` means on this model: canonical, or a spelling of another library.

    Raises:
        ProgramError: `ambiguous_site` with the candidates; `unknown_site` with what it means or what is
            nearest; `layer_out_of_range` for a negative index beyond the first layer.
    """
    if len(text) > MAX_TEXT:
        reason = f"{text[:80]!r}... has {len(text)} characters; no name of a site has over {MAX_TEXT}"
        raise errors.refuse("unknown_site", path, reason)
    if text.partition(".")[0] in SITES:
        return sites.parse(text, path)
    for reading in _readings(text):
        template, layer = _split(reading)
        if template.endswith("hidden_states.*") and layer is not None:
            raise _hidden_state(text, layer, model, path)
        row = _find(_rows(model.family), template, layer)
        if row is not None:
            return _answer(row, text, layer, model, path)
        foreign = _foreign(model.family, template, layer)
        if foreign is not None:
            raise _other_family(foreign, text, layer, model, path)
    raise _unknown(text, model, path)


def spellings(site: Site, model: Facts) -> tuple[str, ...]:
    """The accepted foreign spellings of one site on this model; empty for a family without a table."""
    return tuple(_spellings(site, model, _rows(model.family).values()))


def _spellings(site: Site, model: Facts, rows: Iterable[Row]) -> Iterator[str]:
    for row in rows:
        layer = site.layer if "*" in row.spelling else None
        if row.kind == "site" and _site(row.sites[0], layer, model) == site:
            yield row.spelling.replace("*", str(layer))


def _readings(text: str) -> tuple[str, ...]:
    """As written, and without the name of the variable that holds the model."""
    bare = text.removeprefix("model.")
    return (text,) if bare == text else (text, bare)


def _split(text: str) -> tuple[str, int | None]:
    """`blocks[3].hook_in` is (`blocks.*.hook_in`, 3), `k6` is (`k*`, 6), `lm_head` is (`lm_head`, None)."""
    index, short = _INDEX.search(text), _SHORT.fullmatch(text)
    if short is not None:
        return f"{short[1]}*{short[3] or ''}", int(short[2])
    if index is None or text[: index.start()].endswith(_SIDES):
        return text, None
    return f"{text[: index.start()]}.*{text[index.end() :]}", int(index[1] or index[2])


def _find(rows: dict[str, Row], template: str, layer: int | None) -> Row | None:
    """The row of a template; a star that the text itself wrote finds nothing."""
    return None if layer is None and "*" in template else rows.get(template)


@cache
def _rows(family: str) -> dict[str, Row]:
    """Every foreign spelling on one family by its template; none for a family without a table."""
    if family not in _TREES:
        return {}
    return _by_template((*_hook_rows(family), *_module_rows((*_TREES[family], *_NNTERP_MODULES))))


@cache
def _tree_rows(family: str) -> dict[str, Row]:
    return _by_template(_module_rows(_TREES[family]))


def _by_template(rows: Iterable[Row]) -> dict[str, Row]:
    return {row.spelling.replace("[*]", ".*"): row for row in rows}


def _hook_rows(family: str) -> Iterator[Row]:
    sandwich = _TREES[family] is _GEMMA
    blocks = {**_BLOCK_HOOKS, **(_SANDWICH_HOOKS if sandwich else _PLAIN_HOOKS)}
    yield from (Row(f"blocks.*.{hook}", "site", (site,)) for hook, site in blocks.items())
    yield from (Row(spelling, "site", (site,)) for spelling, site in _NAMES.items())
    doubts = (*_AMBIGUOUS, *(_SANDWICH_AMBIGUOUS if sandwich else ()))
    yield from (Row(spelling, "ambiguous", names, reason) for spelling, names, reason in doubts)
    yield from (Row(name, "absent", (), what) for what, names in _ABSENT.items() for name in names)
    yield from _gpt2_hooks() if family == "gpt2" else _embeddings()


def _embeddings() -> Iterator[Row]:
    yield from (Row(name, "site", ("embeddings",)) for name in _EMBEDDING_NAMES)
    yield from _module_rows((Module("embed_tokens", None, "embeddings"),))


def _gpt2_hooks() -> Iterator[Row]:
    """Positions are added to the token embeddings, which alone are no site; q, k and v are one projection."""
    yield from (Row(name, "absent", ("embeddings",), _TOKENS_ALONE) for name in _EMBEDDING_NAMES)
    yield from _module_rows((Module("embed_tokens", None, f": {_TOKENS_ALONE}"),))
    yield Row("blocks.*.attn.qkv.hook_out", "ambiguous", ("q", "k", "v"), _SEVERAL)


def _module_rows(modules: Iterable[Module]) -> Iterator[Row]:
    """The output of each module (a bare path means it) and its input, with the suffixes of nnsight."""
    for m in modules:
        yield _side(m.path.replace("[*]", ".*"), m.gives)
        yield _side(f"{m.path}.output", m.gives)
        first = f"{m.path}.output[0]"
        yield _side(first, m.gives) if m.tuple_ else Row(first, "absent", (), _FIRST_PROMPT)
        if m.reads is not None:
            yield _side(f"{m.path}.input", m.reads)
            yield _side(f"{m.path}.inputs[0][0]", m.reads)


def _side(spelling: str, what: str) -> Row:
    if what.startswith(": "):
        return Row(spelling, "absent", (), what[2:])
    if "|" in what:
        return Row(spelling, "ambiguous", tuple(what.split("|")), _SEVERAL)
    return Row(spelling, "site", (what,))


def _site(name: str, layer: int | None, model: Facts) -> Site:
    bare, last, _ = name.partition(".")
    if last:
        return Site(bare, model.n_layers - 1)
    return Site(bare, layer if SITES[bare].layered else None)


def _answer(row: Row, text: str, layer: int | None, model: Facts, path: str) -> Site:
    if layer is not None and layer < -model.n_layers:
        reason = f"{text!r}: the model has {model.n_layers} layers, -{model.n_layers} to {model.n_layers - 1}"
        raise errors.refuse("layer_out_of_range", path, reason)
    found = [_site(name, _from_start(layer, model), model) for name in row.sites]
    if row.kind == "site":
        return found[0]
    if row.kind == "ambiguous":
        raise _ambiguous(text, row.reason, found, path)
    nearest = str(found[0]) if found else None
    raise errors.refuse("unknown_site", path, f"{text!r} means {row.reason}: not a site", closest=nearest)


def _from_start(layer: int | None, model: Facts) -> int:
    """A layer counted from the start; 0 where there is none to count."""
    return max(layer + model.n_layers, 0) if layer is not None and layer < 0 else layer or 0


def _ambiguous(text: str, reason: str, candidates: list[Site], path: str) -> errors.TrocarError:
    names = [str(site) for site in candidates]
    step = f"If you mean one of these, write it: {', '.join(names)}."
    return errors.refuse("ambiguous_site", path, f"{text!r} {reason}", closest=names[0], next_step=step)


def _hidden_state(text: str, index: int, model: Facts, path: str) -> errors.TrocarError:
    """Entry i holds what enters layer i, except the last, which is after the final norm."""
    last = model.n_layers
    i = index + last + 1 if index < 0 else index
    if i == 0:
        found = [Site("embeddings"), Site("resid_post", 0)]
    elif 0 < i < last:
        found = [Site("resid_post", i - 1), Site("resid_post", i)]
    else:
        found = [Site("final_norm"), Site("resid_post", last - 1)]
    reason = f"counts from the embeddings at 0, and the last entry, {last}, is after the final norm"
    return _ambiguous(text, reason, found, path)


def _foreign(family: str, template: str, layer: int | None) -> Row | None:
    """The row of a path that another family's tree has."""
    rows = (_find(_tree_rows(other), template, layer) for other in _TREES if family in _TREES)
    return next((row for row in rows if row is not None), None)


def _other_family(row: Row, text: str, layer: int | None, model: Facts, path: str) -> errors.TrocarError:
    own, near, step = _module_rows(_TREES[model.family]), None, None
    if row.sites:
        found = _site(row.sites[0], _from_start(layer, model), model)
        near = next(_spellings(found, model, own), str(found))
        step = f"Write {near}." if near == str(found) else f"Write {near} or {found}."
    reason = f"{text!r} is a path of another family; this model is of family {model.family!r}"
    return errors.refuse("unknown_site", path, reason, closest=near, next_step=step)


def _unknown(text: str, model: Facts, path: str) -> errors.TrocarError:
    if _DICTIONARY.match(text):
        reason = f"{text!r} is the id of a dictionary, not a place: use the hook_name in its config"
        return errors.refuse("unknown_site", path, reason)
    template, layer = _split(text)
    accepted = {t: row.spelling for t, row in _rows(model.family).items() if row.kind == "site"}
    canonical = (f"{s.name}.*" if s.layered else s.name for s in SITES.values())
    near = errors.closest(template, (*canonical, *accepted))
    spelling = accepted.get(near or "", near or "").replace("*", str(_from_start(layer, model)))
    why = "" if accepted else f"; foreign spellings are not known for family {model.family!r}"
    return errors.refuse("unknown_site", path, f"{text[:80]!r} is not a site{why}", closest=spelling or None)
