"""The examples of the two pages run on the real model, and print what the pages show.

In these pages a fenced block of code is followed by a block of what it prints.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import trocar
from trocar import aliases
from trocar.hooks import HookedModel
from trocar.nnsight import LanguageModel

DOCS = Path(__file__).resolve().parents[3] / "docs"
PAGES = ("from-nnsight.md", "from-transformerlens.md")
FENCE = re.compile(r"^```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WORDS = [f"The film was {w}" for w in ("good", "bad", "great", "poor", "fine", "dull", "lovely", "awful")]


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory, serve: Any, smollm2: Any) -> Iterator[dict[str, Any]]:
    served = serve(tmp_path_factory.mktemp("pages"), [smollm2])
    with trocar.Client(
        "http://server", served.keys["alice"], transport=served.transport(), quiet=True
    ) as client:
        model = client.model("smollm2-135m-instruct")
        acts = model.capture(WORDS, sites="resid_post.12")
        probe = acts.fit("mean_diff", [1, 0] * 4)
        yield {"trocar": trocar, "client": client, "model": model, "probe": probe}
    served.service.close()


def steady(text: str) -> str:
    return re.sub(r"\b(act|art)_[0-9a-f]{12,}", r"\1_...", text)


@pytest.mark.model
@pytest.mark.parametrize("page", PAGES)
def test_a_page_shows_what_its_examples_print(page: str, names: dict[str, Any]) -> None:
    found = FENCE.findall((DOCS / page).read_text())
    assert found
    namespace = dict(names)
    for code, shown in zip(found[::2], found[1::2], strict=True):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, page, "exec"), namespace)
        assert steady(printed.getvalue()) == shown, page


def rows(page: str, heading: str) -> list[list[str]]:
    table = (DOCS / page).read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in table.splitlines() if line.startswith("|")][2:]
    return [re.findall(r"`([^`]+)`", line.split("|")[1]) for line in lines]


def test_every_refused_name_of_the_pages_is_refused(model: trocar.Model) -> None:
    spelled = {"from-nnsight.md": LanguageModel(model), "from-transformerlens.md": HookedModel(model)}
    asked = 0
    for page, front in spelled.items():
        cells = " ".join(spelling for row in rows(page, "What is refused") for spelling in row)
        for name in re.findall(r"(?:lm|model)\.([A-Za-z_]+)", cells):
            with pytest.raises(trocar.ClientError):
                getattr(front, name)
            asked += 1
    assert asked >= 7


def test_every_hook_of_the_pages_is_a_place(model: trocar.Model) -> None:
    text = (DOCS / "from-transformerlens.md").read_text()
    named = set(re.findall(r"blocks\.\d+\.[a-z_.]+[a-z]", text))
    assert len(named) >= 3
    for name in named:
        aliases.resolve(name, model.facts)
