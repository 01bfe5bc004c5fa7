"""What a program may hold, store and ignore: memory of one prompt, captures of reads only, no idle options."""

from __future__ import annotations

import json

import pytest
from graph_room import facts

from trocar import errors, strict
from trocar.graph import check
from trocar.graph.cost import Prices
from trocar.graph.program import Generation, Program
from trocar.graph.scope import Scope

PRICES = Prices(scalar_bits=32, overhead_bits=256)


def _check(nodes: list[dict[str, object]], lengths: tuple[int, ...], width: int = 8) -> check.Checked:
    program = strict.parse(Program, json.dumps({"nodes": nodes}).encode())
    scope = Scope(
        facts(d_model=width, context=10**6), lengths, Generation(), {"v": (width,)}, {}, lambda _: [1]
    )
    return check.check(program, scope, PRICES)


READ = {"op": "read", "id": "r", "site": "resid_post.1"}
TENSOR = {"op": "tensor", "id": "v", "name": "v"}


def test_held_bytes_are_rows_times_width_of_every_value_but_vectors() -> None:
    nodes = [
        READ,
        TENSOR,
        {"op": "add", "id": "s", "a": "r", "b": "v"},
        {"op": "lens", "id": "out", "of": ["s"]},
    ]
    assert _check(nodes, (3, 5)).held_bytes == (2 * 3 * 8 * 4, 2 * 5 * 8 * 4)


def test_a_prompt_whose_values_do_not_fit_in_memory_is_refused_before_it_runs() -> None:
    reads = [{**READ, "id": f"r{i}"} for i in range(40)]
    nodes = [*reads, {"op": "lens", "id": "out", "of": ["r0"]}]
    with pytest.raises(errors.ProgramError) as caught:
        _check(nodes, (10, 2000), width=4096)
    assert (caught.value.code, caught.value.path) == ("too_expensive", "prompts[1]")
    assert str(40 * 2000 * 4096 * 4) in caught.value.reason
    assert _check(nodes, (10, 1000), width=4096).held_bytes[1] < check.MAX_HELD_BYTES


@pytest.mark.parametrize(
    "node",
    [
        {"op": "scale", "id": "x", "of": "r", "by": 2.0},
        {"op": "sub", "id": "x", "a": "r", "b": "v"},
        {"op": "sub", "id": "x", "a": "r", "b": "r"},
        {"op": "mean", "id": "x", "of": "r"},
    ],
    ids=["scaled", "less a vector", "difference", "mean"],
)
def test_only_reads_are_captured_because_a_capture_bears_its_sites_name(node: dict[str, object]) -> None:
    with pytest.raises(errors.ProgramError) as caught:
        _check([READ, TENSOR, node, {"op": "capture", "id": "c", "of": ["x"]}], (3,))
    assert caught.value.code == "wrong_operand"
    assert caught.value.path == "program.nodes[3].of[0]"
    assert "'x'" in caught.value.reason
    _check([READ, {"op": "capture", "id": "c", "of": ["r"]}], (3,))


def test_top_p_is_refused_where_it_would_do_nothing() -> None:
    with pytest.raises(errors.ProgramError) as caught:
        strict.parse(Generation, b'{"max_new_tokens": 4, "top_p": 0.9}')
    assert caught.value.code == "bad_value"
    assert "temperature" in caught.value.reason
    assert strict.parse(Generation, b'{"temperature": 0.7, "top_p": 0.9}').top_p == 0.9


def test_a_program_that_names_too_many_values_is_refused_before_they_are_looked_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(check, "MAX_REFERENCES", 3)
    out = {"op": "lens", "id": "out", "of": ["r", "s"]}
    nodes = [READ, {**READ, "id": "s"}, out, {"op": "capture", "id": "kept", "of": ["r"]}]
    assert _check(nodes, (3,)).outputs()
    with pytest.raises(errors.ProgramError) as caught:
        _check([*nodes, {"op": "capture", "id": "more", "of": ["s"]}], (3,))
    assert (caught.value.code, caught.value.path) == ("too_many_nodes", "program.nodes")
    assert "4 values" in caught.value.reason
