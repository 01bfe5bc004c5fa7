"""How long a row is at each site: the mean norm over a fixed paragraph, the unit of relative coefficients.

A vector of length one is a whisper at one site and a shout at another. One pass over the paragraph below, by the
model that is served, gives the mean Euclidean norm of a row at every site as wide as the stream. The first tokens
are left out, because models park attention on them and their rows can be a hundred times as long. The numbers
describe this paragraph; they are a yardstick, not a property of all texts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch

from trocar.models.adapters import SiteAdapter
from trocar.models.taps import tapped
from trocar.models.text import TextCodec
from trocar.sites import SITES, Site

PARAGRAPH: Final = (
    "The ferry leaves the old harbour at half past six, when the gulls are still louder than the engines. On most "
    "mornings it carries about forty people: nurses who change shifts on the far side, two teachers, a man who "
    "repairs clocks, and students who try to finish their homework before the second bell. In winter the crossing "
    "takes nearly an hour, because the captain keeps away from the sandbanks that the river moves every year. "
    "Nobody complains. There is hot tea below deck, and the windows show the lights of the city growing smaller, "
    "then the dark line of the hills, and at last the small white station with its single lamp. People say that a "
    "bridge would be faster, and they are right; but when the town voted on it in 1998, the ferry won by 212 votes."
)
"""The reference text."""
LONGEST: Final = 160
"""Tokens of it that are read; fewer where the model's context is shorter."""
SKIPPED: Final = 4
"""Tokens at its start whose rows do not count."""


@torch.no_grad()
def mean_norms(adapter: SiteAdapter, codec: TextCodec) -> dict[str, tuple[float, ...]]:
    """Mean norm of a row by site name: one number per layer, or one for a site that exists once.

    Args:
        adapter: the validated sites; only served ones are measured.
        codec: the model's tokenizer.
    """
    longest = min(LONGEST, adapter.model.config.get_text_config().max_position_embeddings)
    ids = torch.tensor([codec.encode_prompt(PARAGRAPH)[:longest]])
    found: dict[Site, float] = {}
    sites = [site for name in adapter.sites if SITES[name].width == "d_model" for site in _all(name, adapter)]
    with tapped(adapter, {site: _measure(site, found) for site in sites}):
        adapter.inner(input_ids=ids, use_cache=False)
    names = dict.fromkeys(site.name for site in sites)
    return {name: tuple(found[site] for site in _all(name, adapter)) for name in names}


def _all(name: str, adapter: SiteAdapter) -> list[Site]:
    return [Site(name, i) for i in range(adapter.n_layers)] if SITES[name].layered else [Site(name)]


def _measure(site: Site, found: dict[Site, float]) -> Callable[[torch.Tensor], None]:
    def visit(live: torch.Tensor) -> None:
        found[site] = float(torch.linalg.vector_norm(live[0, SKIPPED:].double(), dim=-1).mean())

    return visit
