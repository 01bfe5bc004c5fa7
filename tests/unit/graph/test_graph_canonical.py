"""Programs in other libraries' spellings become canonical before they are checked, and are echoed so."""

from __future__ import annotations

import pytest
from graph_room import facts

from trocar import errors
from trocar.graph import ops
from trocar.graph.builder import EditSpec, Recorder
from trocar.graph.canonical import canonical_sites, expand
from trocar.graph.program import Program

FACTS = facts()
LENS = ops.Lens(id="l", of=("r",))


def _program(site: str) -> Program:
    return Program(nodes=(ops.Read(id="r", site=site, at="prompt[-1]"), LENS))


def test_foreign_names_become_canonical() -> None:
    found = canonical_sites(_program("blocks.1.hook_resid_post"), FACTS)
    assert found == _program("resid_post.1")
    assert found.digest() == _program("resid_post.1").digest()


def test_a_canonical_program_is_left_alone() -> None:
    program = _program("resid_post.1")
    assert canonical_sites(program, FACTS) is program


def test_what_cannot_be_resolved_is_left_for_the_checker() -> None:
    program = _program("blocks.1.hook_resid_pots")
    assert canonical_sites(program, FACTS) is program


def test_stars_in_any_spelling() -> None:
    every = [f"resid_post.{i}" for i in range(FACTS.n_layers)]
    assert [str(s) for s in expand("resid_post.*", FACTS)] == every
    assert [str(s) for s in expand("blocks.*.hook_resid_post", FACTS)] == every
    assert [str(s) for s in expand("hook_embed", FACTS)] == ["embeddings"]
    with pytest.raises(errors.ProgramError):
        expand("hidden_states[*]", FACTS)


def test_the_recorder_takes_foreign_names() -> None:
    recorder = Recorder(FACTS)
    rows = recorder.named("blocks.1.hook_resid_post")[-1]
    recorder.apply(EditSpec("edit.scale", "blocks.*.hook_mlp_out", "all", number=0.5))
    recorder.output("l", ops.Lens, of=(rows.id,))
    sites = [n.site for n in recorder.build().nodes if n.op != "lens"]
    assert sites == ["resid_post.1", *(f"mlp_out.{i}" for i in range(FACTS.n_layers))]
