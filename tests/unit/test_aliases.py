"""Foreign spellings: the documented tables, every row of every family, refusals, and real modules.

The references are the page `docs/aliases.md`, which is written by hand, and small Hugging Face models: all
spellings of one site must be one tensor there, and the sites must add up as a transformer's do.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from trocar import aliases, errors
from trocar.sites import SITES, Site

PAGE = (Path(__file__).parents[2] / "docs" / "aliases.md").read_text()
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "gpt2")
LLAMAS = FAMILIES[:4]
CODE = re.compile(r"`([^`]+)`")


@dataclass(frozen=True)
class Model:
    family: str
    n_layers: int = 12
    sites: tuple[str, ...] = tuple(SITES)


def refused(text: str, family: str = "llama", n_layers: int = 12) -> errors.Refusal:
    with pytest.raises(errors.ProgramError) as caught:
        aliases.resolve(text, Model(family, n_layers), "nodes[2].site")
    (refusal,) = caught.value.refusals
    assert refusal.path == "nodes[2].site"
    assert len(refusal.reason) < 400
    return refusal


def rows(heading: str) -> list[list[str]]:
    """Cells of the table under a heading of the page, without its two head lines."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[c.strip() for c in line.strip("|").split("|")] for line in lines[1:]]


def accepted() -> Iterator[tuple[str, str, str]]:
    """(family, spelling, site) of every accepted spelling on the page."""
    tables = {
        "The same in every family": FAMILIES,
        "llama, mistral, qwen2, qwen3": LLAMAS,
        "gemma3": ("gemma3",),
        "gpt2": ("gpt2",),
    }
    for heading, families in tables.items():
        for spellings, site in rows(heading):
            for family in families:
                yield from ((family, spelling, CODE.findall(site)[0]) for spelling in CODE.findall(spellings))


def doubtful(heading: str) -> Iterator[tuple[str, str, str]]:
    for spelling, families, cell in rows(heading):
        for family in FAMILIES if families == "all" else families.split(", "):
            yield family, CODE.findall(spelling)[0], cell


@pytest.mark.parametrize(("family", "spelling", "site"), list(accepted()))
def test_the_page_says_what_is_accepted(family: str, spelling: str, site: str) -> None:
    assert str(aliases.resolve(spelling, Model(family))) == site
    if family == "gpt2" and spelling.startswith("layers["):
        assert "path of another family" in refused(f"model.{spelling}", family).reason
    elif not spelling.startswith(("model.model.", "model.transformer.")):
        assert str(aliases.resolve(f"model.{spelling}", Model(family))) == site


@pytest.mark.parametrize(
    ("family", "spelling", "cell"), list(doubtful("Refused because they mean two things"))
)
def test_the_page_says_what_is_ambiguous(family: str, spelling: str, cell: str) -> None:
    refusal = refused(spelling, family)
    candidates = [name for name in CODE.findall(cell) if name.partition(".")[0] in SITES]
    assert refusal.code == "ambiguous_site"
    assert refusal.closest == candidates[0]
    assert refusal.next_step.endswith(f": {', '.join(candidates)}.")
    assert repr(spelling) in refusal.reason


@pytest.mark.parametrize(
    ("family", "spelling", "cell"), list(doubtful("Refused because there is no such site"))
)
def test_the_page_says_what_is_absent(family: str, spelling: str, cell: str) -> None:
    refusal = refused(spelling, family)
    assert refusal.code == "unknown_site"
    assert refusal.reason == f"{spelling!r} means {cell}: not a site"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_page_has_every_bare_name(family: str) -> None:
    """Module paths are on the page with one suffix each; hook names and accessors are all there."""
    like = {"gemma3": ("gemma3", "llama")}.get(family, (family,))  # the page says: as above, except
    page = {spelling for name, spelling, _ in accepted() if name in like}
    mine = {s for site in every_site() for s in aliases.spellings(site, Model(family))}
    assert {s for s in mine if not re.search(r"\.(output|input|inputs)\b", s)} - page <= {
        "layers.3", "layers.3.self_attn", "layers.3.mlp", "attentions.3", "mlps.3", "ln_final",
        "ln_final.hook_in", "embed_tokens.output",
    }  # fmt: skip


def test_gemma3_is_as_above_except_around_its_output_norms() -> None:
    table = [(s, site) for name, s, site in accepted() if name == "llama"]
    other = [s for s, site in table if not same(s, site)]
    assert other == [
        "blocks.3.hook_attn_out", "blocks.3.hook_mlp_out", "blocks.3.mlp.hook_out",
        "model.layers.3.post_attention_layernorm.input", "model.layers.3.post_attention_layernorm",
    ]  # fmt: skip


def same(spelling: str, site: str) -> bool:
    try:
        return str(aliases.resolve(spelling, Model("gemma3"))) == site
    except errors.ProgramError:
        return False


def every_site(layer: int = 3) -> list[Site]:
    return [Site(s.name, layer if s.layered else None) for s in SITES.values()]


@pytest.mark.parametrize("family", FAMILIES)
def test_canonical_names_pass(family: str) -> None:
    for site in every_site():
        assert aliases.resolve(str(site), Model(family)) == site


@pytest.mark.parametrize("text", ["resid_post", "resid_post.-1", "resid_post.x", "final_norm.0", "q.5.attn"])
def test_what_sites_refuses_is_refused_alike(text: str) -> None:
    refusal = refused(text)
    with pytest.raises(errors.ProgramError) as caught:
        aliases.sites.parse(text, "nodes[2].site")
    assert refusal == caught.value.refusals[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [0, 3, 11, 99999])
def test_spellings_resolve_to_their_site(family: str, layer: int) -> None:
    seen: set[str] = set()
    for site in every_site(layer):
        mine = aliases.spellings(site, Model(family))
        assert {aliases.resolve(text, Model(family)) for text in mine} <= {site}
        assert len(set(mine)) == len(mine)
        assert not seen & set(mine)
        seen |= set(mine)
    assert len(seen) > 100


@pytest.mark.parametrize("family", FAMILIES)
def test_which_sites_have_spellings(family: str) -> None:
    without = {s.name for s in every_site() if not aliases.spellings(s, Model(family))}
    sandwich = set() if family == "gemma3" else {"attn_out_post", "mlp_out_post"}
    assert without == {"router_logits"} | sandwich


def test_the_input_of_the_final_norm_is_the_last_layer() -> None:
    assert "model.norm.input" in aliases.spellings(Site("resid_post", 11), Model("llama"))
    assert "model.norm.input" not in aliases.spellings(Site("resid_post", 10), Model("llama"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_is_accepted_or_refused_as_it_says(family: str) -> None:
    codes = {"ambiguous": "ambiguous_site", "absent": "unknown_site"}
    table = aliases._rows(family)
    for row in table.values():
        text = row.spelling.replace("*", "3")
        if row.kind == "site":
            assert (
                str(aliases.resolve(text, Model(family))).partition(".")[0] == row.sites[0].partition(".")[0]
            )
        else:
            assert refused(text, family).code == codes[row.kind]
    # errors.closest looks at so many
    assert len([r for r in table.values() if r.kind == "site"]) + len(SITES) <= errors.MAX_OPTIONS


def test_the_index_has_two_spellings() -> None:
    for text in ("blocks.3.hook_resid_post", "blocks[3].hook_resid_post", "model.blocks[3].hook_resid_post"):
        assert aliases.resolve(text, Model("llama")) == Site("resid_post", 3)


@pytest.mark.parametrize(("text", "site"), [
    ("model.layers[-1].output[0]", "resid_post.11"), ("model.layers[-12]", "resid_post.0"),
    ("layers_output[-2]", "resid_post.10"),
])  # fmt: skip
def test_a_negative_index_counts_from_the_last_layer(text: str, site: str) -> None:
    assert str(aliases.resolve(text, Model("llama"))) == site


def test_a_negative_index_beyond_the_first_layer() -> None:
    refusal = refused("model.layers[-13]")
    assert (refusal.code, "12 layers, -12 to 11" in refusal.reason) == ("layer_out_of_range", True)


def test_layers_and_served_sites_are_for_the_checker() -> None:
    assert aliases.resolve("blocks.40.attn.hook_pattern", Model("llama", 12, ())) == Site("attn_probs", 40)


@pytest.mark.parametrize("text", ["blocks.-1.hook_resid_post", "model.layers.-1", "blocks.03.hook_resid_post",
                                  "model.layers[+1]", "model.layers[1:3]", "layers_output[٣]", "blocks.*.hook_in",
                                  "k*", "model.layers[*].output", "model.layers[100000]", "layers_output[3]\n",
                                  " layers_output[3]", "blocks.3.hook_in.4", "K6", "z6a"])  # fmt: skip
def test_what_no_library_writes(text: str) -> None:
    assert refused(text).code == "unknown_site"


@pytest.mark.parametrize(("index", "n_layers", "candidates"), [
    (0, 12, "embeddings, resid_post.0"), (1, 12, "resid_post.0, resid_post.1"),
    (11, 12, "resid_post.10, resid_post.11"), (12, 12, "final_norm, resid_post.11"),
    (-1, 12, "final_norm, resid_post.11"), (-2, 12, "resid_post.10, resid_post.11"),
    (-13, 12, "embeddings, resid_post.0"), (0, 1, "embeddings, resid_post.0"), (1, 1, "final_norm, resid_post.0"),
])  # fmt: skip
@pytest.mark.parametrize("prefix", ["", "outputs.", "model.output."])
def test_hidden_states_are_always_ambiguous(index: int, n_layers: int, candidates: str, prefix: str) -> None:
    refusal = refused(f"{prefix}hidden_states[{index}]", n_layers=n_layers)
    assert refusal.code == "ambiguous_site"
    assert refusal.next_step.endswith(f": {candidates}.")
    assert f"the last entry, {n_layers}," in refusal.reason


@pytest.mark.parametrize(("family", "text", "closest", "site"), [
    ("llama", "transformer.h.3", "model.layers.3", "resid_post.3"),
    ("llama", "model.transformer.h[3].output[0]", "model.layers.3", "resid_post.3"),
    ("llama", "transformer.h[-1].output[0]", "model.layers.11", "resid_post.11"),
    ("qwen2", "transformer.h.3.attn.c_proj.input", "model.layers[3].self_attn.o_proj.input", "z.3"),
    ("mistral", "transformer.h.3.attn.c_attn", "model.layers.3.self_attn.q_proj", "q.3"),
    ("qwen3", "transformer.ln_f", "model.norm", "final_norm"),
    ("llama", "model.layers.3.pre_feedforward_layernorm", "model.layers.3.post_attention_layernorm", "mlp_in.3"),
    ("llama", "model.layers.3.post_feedforward_layernorm", "mlp_out_post.3", "mlp_out_post.3"),
    ("gpt2", "model.layers.3", "transformer.h.3", "resid_post.3"),
    ("gpt2", "model.model.layers[3].mlp", "transformer.h.3.mlp", "mlp_out.3"),
    ("gpt2", "model.layers.3.post_attention_layernorm.input", "transformer.h[3].ln_2.input", "resid_mid.3"),
    ("gpt2", "model.layers.3.self_attn.q_proj", "q.3", "q.3"),
    ("gpt2", "model.embed_tokens", "transformer.drop", "embeddings"),
    ("gemma3", "transformer.h.3.ln_2", "model.layers.3.pre_feedforward_layernorm", "mlp_in.3"),
])  # fmt: skip
def test_a_path_of_another_family(family: str, text: str, closest: str, site: str) -> None:
    refusal = refused(text, family)
    assert (refusal.code, refusal.closest) == ("unknown_site", closest)
    assert f"this model is of family '{family}'" in refusal.reason
    assert str(aliases.resolve(closest, Model(family))) == site
    assert closest in refusal.next_step
    assert site in refusal.next_step


@pytest.mark.parametrize("text", ["transformer.wpe", "transformer.h.3.mlp.c_fc"])
def test_a_path_of_another_family_that_is_no_site_there_either(text: str) -> None:
    refusal = refused(text, "llama")
    assert (refusal.code, refusal.closest) == ("unknown_site", None)
    assert "path of another family" in refusal.reason


def test_one_path_means_two_places_in_two_families() -> None:
    path = "model.layers.3.post_attention_layernorm"
    assert str(aliases.resolve(path, Model("llama"))) == "mlp_in.3"
    assert str(aliases.resolve(path, Model("gemma3"))) == "attn_out_post.3"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_output_hooks_are_refused_only_with_a_sandwich(family: str) -> None:
    for hook in ("attn", "mlp"):
        text = f"blocks.4.hook_{hook}_out"
        if family == "gemma3":
            assert refused(text, family).next_step.endswith(f": {hook}_out_post.4, {hook}_out.4.")
        else:
            assert str(aliases.resolve(text, Model(family))) == f"{hook}_out.4"


@pytest.mark.parametrize(("text", "closest"), [
    ("blocks.3.hook_resid_pots", "blocks.3.hook_resid_post"), ("resid_post10", "resid_post.10"),
    ("resid_pots.12", "resid_post.12"), ("final-norm", "final_norm"), ("layer_output[4]", "layers_output[4]"),
    ("model.layers[-1].ouput", "model.layers[11].output"),
    ("model.layers.3.mlp.output[1]", "model.layers[3].mlp.output"),
    ("", None), ("!", None), ("__class__", None), ("a.b.c", None),
])  # fmt: skip
def test_anything_else_gets_what_is_nearest(text: str, closest: str | None) -> None:
    refusal = refused(text)
    assert (refusal.code, refusal.closest) == ("unknown_site", closest)
    assert refusal.reason == f"{text!r} is not a site"
    if closest is not None:
        aliases.resolve(closest, Model("llama"))


@pytest.mark.parametrize("text", ["model.layers[3].mlp.output[0]", "lm_head.output[0]", "mlps[3].output[0]"])
def test_the_first_element_of_what_is_no_tuple(text: str) -> None:
    assert "the first prompt of the batch" in refused(text).reason


@pytest.mark.parametrize("text", ["10-res-jb", "20-gemmascope-res-16k", "layer_20/width_16k/average_l0_71"])
def test_the_id_of_a_dictionary_is_no_place(text: str) -> None:
    assert "id of a dictionary" in refused(text).reason


def test_a_family_without_a_table_understands_canonical_names_only() -> None:
    model = Model("mamba")
    assert aliases.resolve("resid_post.3", model) == Site("resid_post", 3)
    assert aliases.spellings(Site("resid_post", 3), model) == ()
    for text in ("blocks.3.hook_mlp_out", "model.layers.3", "layers_output[3]"):
        assert "not known for family 'mamba'" in refused(text, "mamba").reason


def test_long_texts_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aliases, "_INDEX", None)
    monkeypatch.setattr(aliases, "_SHORT", None)
    text = "blocks.3." * 100_000
    refusal = refused(text)
    assert (refusal.code, refusal.closest) == ("unknown_site", None)
    assert "900000 characters; no name of a site has over 160" in refusal.reason
    assert refused("resid_post." + "1" * 150).code == "unknown_site"


@pytest.mark.parametrize(
    "unit", ["[0", ".0", "a", "9", "model.", "[-", ".output", "ln1", "[0][0]", "\x00", "é"]
)
def test_the_longest_texts_are_quick(unit: str) -> None:
    text = (unit * aliases.MAX_TEXT)[: aliases.MAX_TEXT]
    start = time.process_time()
    assert refused(text).code == "unknown_site"
    assert time.process_time() - start < 0.5


def test_it_imports_neither_torch_nor_numpy() -> None:
    program = "import sys, trocar.aliases; sys.exit(bool({'torch', 'numpy', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0


def hugging_face(family: str) -> Any:
    """A small model of the family with random weights, eager, in eval mode."""
    import torch
    import transformers as t

    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "max_position_embeddings": 32,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    kind, config = {
        "llama": (t.LlamaForCausalLM, t.LlamaConfig),
        "mistral": (t.MistralForCausalLM, t.MistralConfig),
        "qwen2": (t.Qwen2ForCausalLM, t.Qwen2Config),
        "qwen3": (t.Qwen3ForCausalLM, t.Qwen3Config),
        "gemma3": (t.Gemma3ForCausalLM, t.Gemma3TextConfig),
        "gpt2": (t.GPT2LMHeadModel, t.GPT2Config),
    }[family]
    if family == "gpt2":
        size = {
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "vocab_size": 64,
            "n_positions": 32,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
    model = kind(config(**size)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name:  # else a norm's weight is 1 and hides which side one reads
                parameter.add_(torch.rand_like(parameter))
    return model


def tensors(model: Any, spellings: list[str]) -> dict[str, Any]:
    """What plain hooks see at each module path, on one forward pass."""
    import torch

    seen: dict[str, Any] = {}

    def hook(spelling: str, side: str, _module: Any, args: Any, kwargs: Any, output: Any) -> None:
        value = (*args, *kwargs.values()) if side == "input" else output
        seen[spelling] = (value[0] if isinstance(value, tuple) else value).clone()

    for spelling in spellings:
        dotted = re.sub(
            r"\[(\d+)\]", r".\1", spelling.replace(".inputs[0][0]", ".input").replace(".output[0]", ".output")
        )
        path, _, side = dotted.rpartition(".")
        path, side = (path, side) if side in ("input", "output") else (dotted, "output")

        def one(*a: Any, spelling: str = spelling, side: str = side) -> None:
            hook(spelling, side, *a)

        model.get_submodule(path).register_forward_hook(one, with_kwargs=True)
    with torch.no_grad():
        seen["logits"] = model(torch.tensor([[5, 9, 17, 3, 22]]), use_cache=False).logits
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_the_paths_of_a_family_are_those_of_its_modules(family: str) -> None:
    import torch

    model, layer = hugging_face(family), 1
    facts = Model(family, 3)
    tree = {
        row.spelling.replace("*", str(layer))
        for row in aliases._tree_rows(family).values()
        if row.kind == "site"
    }
    names = {
        str(s): [t for t in aliases.spellings(s, facts) if t in tree]
        for s in [*every_site(layer), Site("resid_post", 2)]
    }
    assert {t for ts in names.values() for t in ts} == tree
    seen = tensors(model, sorted(tree))
    value = {}
    for site, mine in names.items():
        for spelling in mine:
            torch.testing.assert_close(seen[spelling], seen[mine[0]], rtol=0, atol=0)
        value[site] = seen[mine[0]] if mine else None
    post = "_post" if family == "gemma3" else ""
    torch.testing.assert_close(value["resid_mid.1"], value["resid_pre.1"] + value[f"attn_out{post}.1"])
    torch.testing.assert_close(value["resid_post.1"], value["resid_mid.1"] + value[f"mlp_out{post}.1"])
    torch.testing.assert_close(value["logits"], seen["logits"])
    kinds = [v for v in value.values() if v is not None]
    for i, a in enumerate(kinds):  # different sites are different tensors
        assert not any(a.shape == b.shape and torch.equal(a, b) for b in kinds[i + 1 :])


def test_where_positions_are_added_the_stream_starts_after_them() -> None:
    import torch

    seen = tensors(hugging_face("gpt2"), ["transformer.drop", "transformer.wte", "transformer.h[0].input"])
    assert torch.equal(seen["transformer.drop"], seen["transformer.h[0].input"])
    assert not torch.allclose(seen["transformer.wte"], seen["transformer.h[0].input"])


def test_where_embeddings_are_scaled_the_module_scales_them() -> None:
    import torch

    seen = tensors(hugging_face("gemma3"), ["model.embed_tokens", "model.layers[0].input"])
    assert torch.equal(seen["model.embed_tokens"], seen["model.layers[0].input"])
