"""The two doors to the network: only `gate/release.py` makes `Released`, only `answer` makes a response."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from source_tree import called, dotted, modules, name_of, tree

from trocar.gate.release import Released
from trocar.wire import results

# The page that shows the API and its script files: public, the same for everybody, shipped in a package.
# What the application sends is handed on as it is, to see whether it began.
HANDED_ON = {("api/middleware.py", "note", "send")}
PAGES = {("api/openapi.py", "page", "get_swagger_ui_html"), ("api/openapi.py", "mount", "StaticFiles")}


def calls(module: ast.Module) -> Iterator[tuple[str, str]]:
    """(innermost enclosing function, dotted name called) of every call."""

    def walk(node: ast.AST, inside: str) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Call):
                yield inside, called(child)
            named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            yield from walk(child, child.name if named else inside)

    yield from walk(module, "")


def answers(module: ast.Module, name: str) -> set[tuple[str, str, str]]:
    """Every place that makes something a client receives."""
    made = ("Response", "get_swagger_ui_html", "get_redoc_html", "StaticFiles", "send", "jsonable_encoder")
    return {(name, where, what) for where, what in calls(module) if what.split(".")[-1].endswith(made)}


def test_only_answer_makes_responses() -> None:
    found = set().union(*(answers(tree(p), name_of(p)) for p in modules("api")))
    assert found == {("api/app.py", "answer", "Response"), *HANDED_ON, *PAGES}


def test_another_response_would_be_noticed() -> None:
    planted = ast.parse("def leak(x):\n    return starlette.responses.JSONResponse(x)")
    assert answers(planted, "api/x.py") == {("api/x.py", "leak", "starlette.responses.JSONResponse")}


def test_responses_are_made_in_api_alone() -> None:
    outside = [p for p in modules() if not name_of(p).startswith(("api/", "client/", "cli/"))]
    assert set().union(*(answers(tree(p), name_of(p)) for p in outside)) == set()


def makes_released(module: ast.Module) -> list[str]:
    """Calls of the class, of its `__new__`, and subclasses."""
    made = [what for _, what in calls(module) if what.split(".")[-1] == "Released" or "Released.__" in what]
    news = [
        "object.__new__(Released)"
        for node in ast.walk(module)
        if isinstance(node, ast.Call) and called(node).endswith("__new__")
        and any(dotted(a).endswith("Released") for a in node.args)
    ]  # fmt: skip
    classes = [n for n in ast.walk(module) if isinstance(n, ast.ClassDef)]
    return made + news + [c.name for c in classes if any(dotted(b).endswith("Released") for b in c.bases)]


def test_only_release_makes_released() -> None:
    assert [name_of(p) for p in modules() if makes_released(tree(p))] == ["gate/release.py"]


@pytest.mark.parametrize(
    "line", ["release.Released(s, b'', 200, None)", "object.__new__(Released)", "class X(Released): pass"]
)
def test_making_one_elsewhere_would_be_noticed(line: str) -> None:
    assert makes_released(ast.parse(line))


def test_released_has_a_seal() -> None:
    with pytest.raises(TypeError, match=r"trocar\.gate\.release"):
        Released(object(), b"{}", 200, None)


def test_every_route_goes_through_released() -> None:
    """A route returns what `answer` made; FastAPI never encodes a value of ours by itself."""
    routes = {
        node.name: {called(c).split(".")[-1] for c in ast.walk(node) if isinstance(c, ast.Call)}
        for path in modules("api")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.AsyncFunctionDef)
        and any(isinstance(d, ast.Call) and called(d).split(".")[0] in ("router", "app") for d in node.decorator_list)
    }  # fmt: skip
    assert len(routes) >= 15
    stray = {n for n, used in routes.items() if not used & {"answer", "_off_loop"}} - {"page"}
    assert stray == set()


def free_doors(module: ast.Module) -> set[str]:
    """The functions that wrap an answer for no charge, as called in a module."""
    free = {
        "release.public", "release.refused", "release.document", "release.replay", "release.forwarded",
    }  # fmt: skip
    return {what for _, what in calls(module) if what in free}


def test_what_is_free_is_made_in_few_places() -> None:
    found = {name_of(p): free_doors(tree(p)) for p in modules() if free_doors(tree(p))}
    assert found == {
        "api/app.py": {"release.refused"},
        "api/openapi.py": {"release.document"},
        "gate/gate.py": {"release.replay"},
        "service/exports.py": {"release.public"},
        "service/minting.py": {"release.public"},
        "host/front/front.py": {"release.forwarded"},
        "host/gate/desk.py": {"release.refused"},
        "host/gate/house.py": {"release.public"},
        "service/service.py": {"release.public"},
    }


def parts(model: type[BaseModel]) -> set[type[BaseModel]]:
    """A model and every model inside its fields."""

    def inside(annotation: Any) -> set[type[BaseModel]]:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return parts(annotation)
        return set().union(*(inside(a) for a in get_args(annotation)))

    return {model}.union(*(inside(f.annotation) for f in model.model_fields.values()))


PRICED = {*parts(results.RunResult)}


def test_no_public_view_can_hold_what_is_priced() -> None:
    views = results.Public.__subclasses__()
    assert len(views) > 7
    assert {v.__name__: parts(v) & PRICED for v in views if parts(v) & PRICED} == {}
    assert results.LensOutput in PRICED


def test_a_public_view_that_holds_an_output_would_be_noticed() -> None:
    class Leaky(BaseModel):
        rows: tuple[results.LensOutput | None, ...]

    assert parts(Leaky) & PRICED
