"""Models from the command line, on a tiny model made here; nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trocar.cli import show
from trocar.models import cache
from trocar.models.catalog import CATALOG

NAME = "smollm2-135m-instruct"


def plant(home: Path) -> Path:
    """A cached catalog model with the right papers and weights of four bytes."""
    folder = cache.catalog_home(NAME)
    folder.mkdir(parents=True)
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    (folder / "config.json").write_text("{}")
    described = cache.describe(folder, source="local", name=NAME)
    told = described.model_copy(update={"source": "catalog", "license": "Apache-2.0"})
    (folder / cache.MANIFEST).write_text(told.model_dump_json())
    return folder


def _row(trocar: Any) -> Any:
    return next(row for row in trocar("model", "list", "--json").json if row["name"] == NAME)


def test_the_catalog_is_listed_without_a_cache(trocar: Any) -> None:
    rows = {row["name"]: row for row in trocar("model", "list", "--json").json}
    assert rows.keys() == CATALOG.keys()
    row = rows[NAME]
    assert (row["state"], row["license"], row["path"]) == ("not pulled", "Apache-2.0", "")
    assert "not pulled" in trocar("model", "list").out


def test_a_cached_model_has_a_place_and_a_size(trocar: Any, home: Path) -> None:
    folder = plant(home)
    row = _row(trocar)
    assert (row["state"], row["path"]) == ("cached", str(folder))
    assert row["size_bytes"] == sum(p.stat().st_size for p in folder.iterdir())
    assert str(folder) in trocar("model", "list").out  # a pipe is not folded


def test_changed_files_show_as_damaged_and_doctor_fails(trocar: Any, home: Path) -> None:
    folder = plant(home)
    assert "cache" not in {f["check"] for f in trocar("doctor", "--json").json if f["level"] == "fail"}
    (folder / "config.json").write_text('{"a": 1}')
    assert _row(trocar)["state"] == "damaged"
    ran = trocar("doctor", "--json")
    assert ran.code == 1
    [bad] = [f for f in ran.json if f["level"] == "fail"]
    assert (bad["check"], NAME in bad["next_step"]) == ("cache", True)


def test_pull_of_what_is_there_says_where(trocar: Any, home: Path) -> None:
    folder = plant(home)
    ran = trocar("model", "pull", NAME)
    assert ran.code == 0
    assert str(folder) in ran.out
    assert f"trocar serve --model {NAME}" in ran.out


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("pull", "smolm2-135m-instruct"), "unknown_model"),
        (("pull", "org/name"), "bad_value"),
        (("pull", NAME, "--revision", "a" * 40), "bad_value"),
        (("show", NAME), "model_not_pulled"),
        (("show", "./nowhere"), "model_not_pulled"),
    ],
)
def test_refusals(trocar: Any, words: tuple[str, ...], code: str) -> None:
    ran = trocar("model", *words)
    assert ran.code == 2
    assert f"[{code}]" in ran.err


@pytest.mark.parametrize(
    ("amount", "said"),
    [(0, "0 bit"), (9_999, "9999 bit"), (10_000, "10 kbit"), (999_400, "999 kbit"), (999_600, "1 Mbit"),
     (1_120_000_000, "1.12 Gbit"), (None, "uncapped")],
)  # fmt: skip
def test_amounts(amount: int | None, said: str) -> None:
    assert show.bits(amount) == said
