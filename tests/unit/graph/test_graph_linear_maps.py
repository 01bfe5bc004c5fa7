"""Both ends of a linear map are found, also behind other names, sums and norms; ordinary sets are not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trocar.graph.linear_maps import LINEAR_MAPS, canonical, ends, known
from trocar.sites import SITES, Site, parse


def sites(words: str) -> list[Site]:
    return [parse(word) for word in words.split()]


@pytest.mark.parametrize(
    ("held", "found"),
    [
        ("attn_in.3 q.3", "attn_in.3 q.3"),
        ("attn_in.3 k.3", "attn_in.3 k.3"),
        ("attn_in.3 v.3", "attn_in.3 v.3"),
        ("z.3 attn_out.3", "z.3 attn_out.3"),
        ("z.3 attn_out_post.3", "z.3 attn_out.3"),
        ("mlp_in.3 mlp_act.3", "mlp_in.3 mlp_act.3"),
        ("mlp_in.3 router_logits.3", "mlp_in.3 router_logits.3"),
        ("mlp_act.3 mlp_out.3", "mlp_act.3 mlp_out.3"),
        # a norm is known
        ("resid_pre.3 q.3", "attn_in.3 q.3"),
        ("resid_mid.3 mlp_act.3", "mlp_in.3 mlp_act.3"),
        # the stream has two names
        ("resid_post.2 v.3", "attn_in.3 v.3"),
        ("embeddings k.0", "attn_in.0 k.0"),
        # two of a sum give the third
        ("z.3 resid_pre.3 resid_mid.3", "z.3 attn_out.3"),
        ("z.3 resid_post.2 resid_mid.3", "z.3 attn_out.3"),
        ("mlp_act.3 resid_mid.3 resid_post.3", "mlp_in.3 mlp_act.3"),
        ("mlp_act.3 resid_pre.3 attn_out.3 resid_post.3", "mlp_in.3 mlp_act.3"),
        # normed rows are the stream but for their lengths
        ("z.3 attn_in.3 mlp_in.3", "z.3 attn_out.3"),
        ("mlp_act.3 attn_in.3 attn_out.3", "mlp_in.3 mlp_act.3"),
    ],
)
def test_both_ends_are_found(held: str, found: str) -> None:
    assert tuple(sites(found)) in ends(sites(held))


@pytest.mark.parametrize(
    "held",
    [
        "",
        "final_norm",
        "resid_post.3",
        "resid_post.0 resid_post.1 resid_post.2 resid_post.3",
        "resid_pre.3 resid_mid.3 resid_post.3",
        "attn_in.3 q.4",
        "z.3 attn_out.4",
        "q.3 k.3 v.3",
        "z.3 resid_post.3",
        "mlp_in.3 mlp_out.3",
    ],
)
def test_what_gives_no_matrix_away_is_not_found(held: str) -> None:
    assert ends(sites(held)) == ()


def test_at_position_0_attention_is_linear() -> None:
    for held in (
        "resid_pre.3 resid_mid.3",
        "resid_post.2 attn_out.3",
        "attn_in.3 attn_out_post.3",
        "attn_in.3 resid_mid.3",
        # a head gives its own value back
        "attn_in.3 z.3",
        "resid_post.2 z.3",
        "v.3 attn_out.3",
        "v.3 resid_mid.3",
    ):
        assert ends(sites(held)) == (), held
        found = {target.name for _, target in ends(sites(held), sites(held))}
        assert found & {"z", "attn_out", "resid_mid"}, held
        assert ends(sites(held), sites(held.split()[0])) == (), held


def test_heads_and_values_are_the_same_rows_at_position_0_only() -> None:
    assert Site("v", 3) in known(sites("z.3"), first=True)
    assert Site("z", 3) in known(sites("v.3"), first=True)
    assert not {Site("v", 3), Site("z", 4)} & known(sites("z.3 v.4"))
    assert ends(sites("z.3 resid_mid.3")) == ()


def test_the_maps_are_those_of_a_model() -> None:
    """A layer in numpy: each map is solved from its two ends, and position 0 too; unlisted pairs are not."""
    rng = np.random.default_rng(0)
    d, n = 8, 64
    w_v, w_o, w_up, w_down = (rng.normal(size=(d, d)) for _ in range(4))
    resid_pre = rng.normal(size=(n, d))
    attn_in = resid_pre / np.sqrt((resid_pre**2).mean(1, keepdims=True))
    v = attn_in @ w_v
    attn_out_first = v @ w_o  # a token that sees itself alone
    pattern = np.tril(rng.random((n, n)))
    attn_out = (pattern / pattern.sum(1, keepdims=True)) @ v @ w_o
    z = (pattern / pattern.sum(1, keepdims=True)) @ v
    mlp_act = attn_in @ w_up
    pairs = {
        "attn_in v": (attn_in, v),
        "attn_in z first": (attn_in, v),
        "attn_in z": (attn_in, z),
        "v attn_out first": (v, attn_out_first),
        "v attn_out": (v, attn_out),
        "attn_in attn_out first": (attn_in, attn_out_first),
        "attn_in attn_out": (attn_in, attn_out),
        "attn_in mlp_act": (attn_in, mlp_act),
        "mlp_act mlp_out": (mlp_act, mlp_act @ w_down),
        "resid_pre v": (resid_pre, v),
    }
    linear = {name for name, (x, y) in pairs.items() if np.linalg.lstsq(x, y, rcond=None)[1].sum() < 1e-9}
    assert linear == set(pairs) - {"attn_in attn_out", "attn_in z", "v attn_out", "resid_pre v"}


def test_sums_tell_the_lengths_that_a_norm_loses() -> None:
    """`z`, and two normed rows around the sum that `z` goes into, give W_O up to one factor (gains known here)."""
    rng = np.random.default_rng(0)
    d, n = 8, 64
    w_o, gains = rng.normal(size=(d, d)), rng.uniform(0.5, 2.0, size=(2, d))
    resid_pre, z = rng.normal(size=(n, d)), rng.normal(size=(n, d))
    resid_mid = resid_pre + z @ w_o
    attn_in, mlp_in = (
        g * x / np.sqrt((x**2).mean(1, keepdims=True))
        for g, x in zip(gains, (resid_pre, resid_mid), strict=True)
    )
    # for one column j of W_O: z_i . w - s_i * mlp_in_ij / g_j + t_i * attn_in_ij / h_j = 0, over all columns at once
    unknown = np.zeros((n * d, d * d + 2 * n))
    for i in range(n):
        for j in range(d):
            row = unknown[i * d + j]
            row[j * d : (j + 1) * d] = z[i]
            row[d * d + i] = -mlp_in[i, j] / gains[1, j]
            row[d * d + n + i] = attn_in[i, j] / gains[0, j]
    *_, smallest, singular = np.linalg.svd(unknown)[1]
    assert singular < 1e-10 < smallest  # one solution, up to a factor
    found = np.linalg.svd(unknown)[2][-1][: d * d].reshape(d, d).T
    assert abs(np.vdot(found, w_o)) / np.linalg.norm(found) / np.linalg.norm(w_o) > 1 - 1e-9


def test_every_name_in_a_map_is_canonical() -> None:
    for one in LINEAR_MAPS:
        assert one.source in SITES
        assert canonical(Site(one.source, 3)) == Site(one.source, 3)
        assert canonical(Site(one.target, 3)) == Site(one.target, 3)


ANY = st.builds(
    lambda name, layer: Site(name, layer if SITES[name].layered else None),
    st.sampled_from(sorted(SITES)),
    st.integers(0, 3),
)


@given(st.sets(ANY), ANY)
def test_more_sites_never_give_away_less(held: set[Site], more: Site) -> None:
    assert set(ends(held, held)) <= set(ends(held | {more}, held | {more}))
    assert known(held) == known(known(held))
    assert {canonical(s) for s in held} <= known(held)
