"""Gemma 3 270M from the cache: tokens, text, and taps against plain torch hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trocar.models.catalog import entry
from trocar.models.load import Loaded
from trocar.models.pull import locate
from trocar.models.taps import tapped
from trocar.sites import SITES, Site

NAME = "gemma3-270m"
pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def gemma(gemma3_270m: Any) -> Loaded:
    found: Loaded = gemma3_270m
    return found


def greedy(loaded: Loaded, text: str, n: int) -> str:
    ids = loaded.encode_prompt(text)
    with torch.no_grad():
        for _ in range(n):
            ids = [*ids, int(loaded.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
    return loaded.decode(ids)


def test_every_claimed_site_is_served_and_facts_hold(gemma: Loaded) -> None:
    facts = gemma.facts
    assert len(facts.sites) == 16
    assert set(facts.unavailable) == set(SITES) - set(facts.sites)
    stored = {value.data_ptr(): value.numel() for value in gemma.model.state_dict().values()}
    assert facts.parameters == entry(NAME).parameters == sum(stored.values())
    assert (facts.family, facts.eos, facts.context, facts.d_head) == ("gemma3", (1,), 32768, 256)
    assert gemma.packed


def test_the_layers_alternate_as_published(gemma: Loaded) -> None:
    """Five layers see 512 tokens, the sixth sees everything."""
    config = gemma.model.config
    whole = [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"]
    assert (whole, config.sliding_window) == ([5, 11, 17], 512)
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 10_000
    assert config.rope_parameters["full_attention"]["rope_theta"] == 1_000_000


def test_it_speaks(gemma: Loaded) -> None:
    assert greedy(gemma, "Water boils at a temperature of", 6).endswith("100 degrees Celsius")
    assert "girl" in greedy(gemma, "Once upon a time, there was a little", 3)


def test_a_prompt_begins_with_bos_and_plain_tokens_do_not(gemma: Loaded) -> None:
    assert gemma.encode_prompt("Hello world") == [2, 9259, 1902]
    assert gemma.tokenize("Hello world") == [9259, 1902]
    assert gemma.encode_prompt("The capital of France is") == [2, 818, 5279, 529, 7001, 563]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("In 1969,  7 men", ["In", " ", "1", "9", "6", "9", ",", "  ", "7", " men"]),
        ("a\n\n\nb", ["a", "\n\n\n", "b"]),
        (" Hello", [" Hello"]),
        ("日本語 \U0001f642", ["日本語", " \U0001f642"]),
        ("<table>x</table>", ["<table>", "x", "</table>"]),
    ],
)
def test_texts_are_split_as_in_training_and_come_back(gemma: Loaded, text: str, tokens: list[str]) -> None:
    ids = gemma.tokenize(text)
    assert gemma.token_texts(ids) == tokens
    assert gemma.decode(ids) == text


def test_marks_of_turns_are_special(gemma: Loaded) -> None:
    special = gemma.tokenizer.convert_tokens_to_ids(["<start_of_turn>", "<end_of_turn>"])
    assert special == [105, 106]
    assert not set(special) & set(gemma.tokenize("<start_of_turn>user"))


def test_the_terms_lie_beside_the_weights(gemma: Loaded) -> None:
    home, manifest = locate(NAME)
    assert "Gemma Terms of Use" in (home / "TERMS.html").read_text("utf-8")
    assert (manifest.license, manifest.lineage, manifest.open_weights) == ("Gemma", NAME, True)


def test_tapped_reads_are_bit_equal_to_plain_hooks(gemma: Loaded) -> None:
    ids = torch.tensor([gemma.encode_prompt("The quick brown fox jumps over the lazy dog")])
    plain: dict[str, torch.Tensor] = {}
    ours: dict[str, torch.Tensor] = {}
    block = gemma.model.model.layers[11]
    modules = {
        "resid_post": block,
        "attn_out_post": block.post_attention_layernorm,
        "mlp_out_post": block.post_feedforward_layernorm,
        "q": block.self_attn.q_proj,
    }
    hooks = [
        m.register_forward_hook(lambda _m, _a, out, n=n: plain.__setitem__(n, out.clone()))
        for n, m in modules.items()
    ]
    with torch.no_grad():
        gemma.model(input_ids=ids)
        for hook in hooks:
            hook.remove()
        looks = {Site(n, 11): (lambda live, n=n: ours.__setitem__(n, live.clone())) for n in modules}
        with tapped(gemma.adapter, looks):
            gemma.model(input_ids=ids)
    assert all(torch.equal(ours[n], plain[n]) for n in modules)
