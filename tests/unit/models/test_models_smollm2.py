"""The real model from the cache: text, tokens, and a tapped read against a plain torch hook."""

from __future__ import annotations

import pytest
import torch

from trocar.models.catalog import entry
from trocar.models.load import Loaded, load
from trocar.models.pull import pull
from trocar.models.taps import tapped
from trocar.sites import Site

NAME = "smollm2-135m-instruct"
pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def smollm2() -> Loaded:
    pull(NAME)
    return load(NAME)


def greedy(loaded: Loaded, ids: list[int], n: int) -> str:
    with torch.no_grad():
        for _ in range(n):
            ids = [*ids, int(loaded.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
    return loaded.decode(ids)


def test_every_claimed_site_is_served_and_facts_hold(smollm2: Loaded) -> None:
    assert len(smollm2.facts.sites) == 14
    stored = {value.data_ptr(): value.numel() for value in smollm2.model.state_dict().values()}
    assert smollm2.facts.parameters == sum(stored.values())
    assert smollm2.facts.weight_bits == entry(NAME).weight_bits
    assert smollm2.facts.eos == (2,)
    assert smollm2.facts.context == 8192


def test_it_speaks(smollm2: Loaded) -> None:
    assert (
        greedy(smollm2, smollm2.tokenize("The capital of France is"), 2) == "The capital of France is Paris."
    )
    question = smollm2.chat([{"role": "user", "content": "What is the capital of France?"}])
    assert "Paris" in greedy(smollm2, question, 8)[-40:]


def test_digits_are_split_before_spaces_are_joined(smollm2: Loaded) -> None:
    """SmolLM2's own pre-tokenizer: each digit alone, so blanks before a number stay one token."""
    assert smollm2.token_texts(smollm2.tokenize("Q\n\n12")) == ["Q", "\n\n", "1", "2"]
    assert smollm2.token_texts(smollm2.tokenize("a  7")) == ["a", "  ", "7"]


def test_a_tapped_read_is_bit_equal_to_a_plain_hook(smollm2: Loaded) -> None:
    ids = torch.tensor([smollm2.tokenize("The quick brown fox jumps over the lazy dog")])
    plain: list[torch.Tensor] = []
    ours: list[torch.Tensor] = []
    hook = smollm2.model.model.layers[12].register_forward_hook(lambda _m, _a, out: plain.append(out.clone()))
    with torch.no_grad():
        smollm2.model(input_ids=ids)
        hook.remove()
        with tapped(smollm2.adapter, {Site("resid_post", 12): lambda live: ours.append(live.clone())}):
            smollm2.model(input_ids=ids)
    assert torch.equal(ours[0], plain[0])
