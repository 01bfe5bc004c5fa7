"""The site table: spelling, hints, and the order of the forward pass."""

from __future__ import annotations

import pytest

from trocar import errors, sites
from trocar.sites import SITES, Site

N = 4


@pytest.mark.parametrize("spec", SITES.values(), ids=lambda s: s.name)
def test_spelling_and_reading_agree(spec: sites.SiteSpec) -> None:
    for site in [Site(spec.name, i) for i in (0, 9, 10, 99999)] if spec.layered else [Site(spec.name)]:
        assert sites.parse(str(site)) == site
        assert site.spec is spec
    assert spec.meaning.endswith(".")


@pytest.mark.parametrize(
    ("text", "closest"),
    [
        ("resid_post", "resid_post.0"), ("resid_post.", "resid_post.0"), ("resid_post.x", "resid_post.0"),
        ("resid_post.-1", "resid_post.0"), ("resid_post.007", "resid_post.7"), ("resid_post.100000", "resid_post.0"),
        ("resid_post.٣", "resid_post.0"), ("resid_post.3\n", "resid_post.0"), ("Resid_post.3", "resid_post.3"),
        ("resid-post.3", "resid_post.3"), ("finalnorm", "final_norm"), ("final_norm.0", "final_norm"),
        ("resid_post.1.2", "resid_post.0"), ("", None), ("__class__", None), ("r" * 10_000, None),
    ],
)  # fmt: skip
def test_what_is_no_site(text: str, closest: str | None) -> None:
    with pytest.raises(errors.ProgramError) as caught:
        sites.parse(text, "nodes[0].site")
    assert (caught.value.code, caught.value.path, caught.value.closest) == (
        "unknown_site",
        "nodes[0].site",
        closest,
    )
    assert len(caught.value.reason) < 200


def test_a_hint_can_be_followed() -> None:
    for text in ("resid_post.007", "resid_post.100000", "resid_pots.٣", "z", "final_norm.1"):
        with pytest.raises(errors.ProgramError) as caught:
            sites.parse(text)
        assert caught.value.closest is not None
        sites.parse(caught.value.closest)


def test_order_is_the_forward_pass() -> None:
    """Written out by hand from a pre-norm transformer block, layer by layer."""
    block = [
        "resid_pre",
        "attn_in",
        "q",
        "k",
        "v",
        "attn_probs",
        "z",
        "attn_out",
        "attn_out_post",
        "resid_mid",
        "mlp_in",
        "mlp_act",
        "mlp_out",
        "mlp_out_post",
        "router_logits",
        "resid_post",
    ]
    passed = [
        Site("embeddings"),
        *(Site(name, i) for i in range(N) for name in block),
        Site("final_norm"),
        Site("logits"),
    ]
    places = [sites.order(site, N) for site in passed]
    assert places == sorted(set(places))
    assert min(places) >= 0


def test_expand() -> None:
    assert sites.expand("resid_post.*", 3) == [Site("resid_post", i) for i in range(3)]
    assert sites.expand("resid_post.1", 3) == [Site("resid_post", 1)]
    for text in ("final_norm.*", "resid_pots.*", "*"):
        with pytest.raises(errors.ProgramError) as caught:
            sites.expand(text, 3)
        assert caught.value.code == "unknown_site"


def test_unique() -> None:
    a, b = Site("z", 1), Site("z", 0)
    assert sites.unique([a, b, a]) == [a, b]
