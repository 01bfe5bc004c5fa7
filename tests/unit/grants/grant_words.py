"""Scopes for Hypothesis, and requests to try them on."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from trocar.errors import TrocarError
from trocar.grants.scope import Scope

MODELS = ("smollm2-135m-instruct", "gemma3-270m", "gemma3-270m.tuned", "lab/model:1")
OPS = ("read", "lens", "edit", "edit.add", "edit.scale", "fit")
SITES = ("resid_post", "resid_post.1", "resid_post.12", "z", "z.0", "final_norm")
MOMENTS = (0, 999, 1000, 2**62)


def _words(options: tuple[str, ...]) -> st.SearchStrategy[frozenset[str] | None]:
    return st.none() | st.frozensets(st.sampled_from(options), min_size=1)


scopes = st.builds(
    Scope, models=_words(MODELS), ops=_words(OPS), sites=_words(SITES),
    most_bits=st.none() | st.integers(0, 50), expires_ms=st.none() | st.sampled_from(MOMENTS),
)  # fmt: skip
requests = st.fixed_dictionaries(
    {
        "model": st.sampled_from(MODELS),
        "ops": st.lists(st.sampled_from(OPS), max_size=3),
        "sites": st.lists(st.sampled_from(SITES), max_size=3),
        "bits": st.integers(0, 60),
        "now_ms": st.sampled_from((0, 998, 999, 1000, 2**61)),
    }
)


def allows(scope: Scope, request: dict[str, Any]) -> bool:
    try:
        scope.require(**request)
    except TrocarError:
        return False
    return True


def allowed_by_the_book(scope: Scope, request: dict[str, Any]) -> bool:
    """The same question answered from the sentences in the docs, one at a time."""
    if scope.models is not None and request["model"] not in scope.models:
        return False
    for words, asked in ((scope.ops, request["ops"]), (scope.sites, request["sites"])):
        for word in asked:
            family = word.split(".")[0]
            if words is not None and word not in words and family not in words:
                return False
    in_time = scope.expires_ms is None or request["now_ms"] < scope.expires_ms
    return in_time and (scope.most_bits is None or request["bits"] <= scope.most_bits)
