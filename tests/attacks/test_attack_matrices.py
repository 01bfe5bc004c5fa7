"""Matrices solved for from rows of both their ends, in one request or in several, by one key or by many.

Each way is first gone under a policy that lets both ends leave, where it gives the matrix, and then under the rule.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from case_room import codes, guarded, mint
from http_room import Caller, read, request

from trocar.gate.policy import Tier
from trocar.wire import packing

LAYER = 3
FIRST = [[token] for token in range(2, 130)]
LONG = np.random.default_rng(0).integers(2, 250, (60, 6)).tolist()
Solve = Callable[..., Any]


class Attacker:
    """Asks for rows of one site after the other, each with a key of its own."""

    def __init__(self, server: Any) -> None:
        self.server = server
        self.refused: list[str] = []

    def rows(self, site: str) -> Any:
        """Rows of a site of `LAYER`: of first tokens when it ends in `@0`, else of tokens further on."""
        first, name = site.endswith("@0"), f"{site.removesuffix('@0')}.{LAYER}"
        asked = read(name, "prompt[0]" if first else "prompt[1:6]")
        body = request(
            asked, {"op": "raw", "id": "o", "of": ["r"]}, model="closed", prompts=FIRST if first else LONG
        )
        caller = Caller(self.server.app, mint(self.server, "eve", Tier.external).secret)
        started = caller.post("/v1/runs", body)
        if started.status == 403:
            self.refused += codes(started)
            return np.zeros((1, 1))
        output = caller.result(started.json["job"]).json["outputs"]["o"]
        told = output["values"]["r"]
        packed = packing.Packed(base64.b64decode(told["data"]), np.array(told["scales"], np.float32))
        return packing.unpack(packed, told["width"], output["bits"]).astype(np.float64)


def solved(source: Any, target: Any) -> Any:
    return np.linalg.lstsq(source, target, rcond=None)[0].T


def repeated(layer: Any) -> Any:
    """W_V, with each key/value head's rows once for every query head that reads them."""
    w = layer.self_attn.v_proj.weight.numpy()
    return w.reshape(2, -1, w.shape[1]).repeat(2, axis=0).reshape(-1, w.shape[1])


def added(layer: Any) -> Any:
    """W_O, summed over the query heads that read one key/value head."""
    return layer.self_attn.o_proj.weight.numpy().reshape(32, 2, 2, 8).sum(axis=2).reshape(32, 16)


WAYS: list[tuple[str, tuple[str, ...], Solve, Callable[[Any], Any]]] = [
    (
        "W_V from what a head gives back to a token that sees itself alone",
        ("attn_in@0", "z@0"),
        solved,
        repeated,
    ),
    (
        "W_O from values that attention adds as they are",
        ("v@0", "attn_out@0"),
        solved,
        added,
    ),
    (
        "W_down from neurons, and the stream around a layer less what attention adds",
        ("mlp_act", "resid_post", "resid_pre", "attn_out"),
        lambda act, post, pre, attn: solved(act, post - pre - attn),
        lambda layer: layer.mlp.down_proj.weight.numpy(),
    ),
]


@pytest.fixture(scope="module")
def model(tiny_of: Any) -> Any:
    return tiny_of("closed", open_weights=False, weight_bits=10**10)


@pytest.fixture
def attacker(model: Any, tmp_path: Path) -> Iterator[Callable[..., Attacker]]:
    """Makes an attacker of a fresh server; `linear_maps` lets both ends leave."""
    servers = []

    def make(linear_maps: bool) -> Attacker:
        data = {"linear_maps": linear_maps, "lineage_rank_ppm": 1_000_000}
        root = tmp_path / str(len(servers))
        root.mkdir()
        servers.append(guarded(root, model, data=data, raw="direct", vector_bits=16))
        return Attacker(servers[-1])

    yield make
    for server in servers:
        server.service.close()


@pytest.mark.parametrize(
    ("sites", "solve", "matrix"), [way[1:] for way in WAYS], ids=[way[0] for way in WAYS]
)
def test_a_matrix_that_several_requests_give(
    attacker: Callable[..., Attacker], true_weights: Any, sites: tuple[str, ...], solve: Solve, matrix: Any
) -> None:
    truth = matrix(true_weights.get_submodule(f"model.layers.{LAYER}"))
    eve = attacker(linear_maps=True)
    found = solve(*map(eve.rows, sites))
    assert eve.refused == []
    assert np.linalg.norm(found - truth) < 0.001 * np.linalg.norm(truth)
    for order in (sites, sites[::-1]):
        eve = attacker(linear_maps=False)
        for site in order[:-1]:
            eve.rows(site)
        assert eve.refused == [], order
        eve.rows(order[-1])
        assert eve.refused == ["policy"], order
