"""Cases S and 62: what the source may not contain, and that its refusals hold when `assert` does not.

`tests/arch` holds most of it, module by module; here is what is left, and each rule is shown to notice a breach.
"""

from __future__ import annotations

import ast
import enum
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from source_tree import ROOT, SRC, called, modules, name_of, tree
from test_arch_bans import bans

import trocar
from trocar.errors import TrocarError

FACING = (
    "api",
    "service",
    "graph",
    "wire",
    "gate",
    "grants",
    "store",
    "engine",
    "analysis",
    "strict.py",
    "errors.py",
    "sites.py",
)
SECURITY = ("gate", "graph", "grants", "wire", "api")


def facing(rooms: tuple[str, ...] = FACING) -> list[Path]:
    return [p for p in modules() if name_of(p).split("/")[0] in rooms]


def evaluators(module: ast.Module) -> Iterator[str]:
    """Places where text could be taken for a pattern, a template or a format."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            yield from (
                f"{node.lineno}: import of {n}"
                for n in names
                if n.split(".")[0] in ("jinja2", "mako", "regex", "string")
            )
        if not isinstance(node, ast.Call):
            continue
        target = called(node)
        fixed = node.args and isinstance(node.args[0], ast.Constant | ast.JoinedStr | ast.BinOp)
        if target.startswith("re.") and not fixed and target != "re.escape":
            yield f"{node.lineno}: {target} of something computed"
        of = node.func.value if isinstance(node.func, ast.Attribute) else None
        if target.split(".")[-1] in ("format", "format_map") and not isinstance(
            of, ast.Constant | ast.Name | None
        ):
            yield f"{node.lineno}: format of something computed"
        if target in ("vformat", "ast.literal_eval"):
            yield f"{node.lineno}: {target}"


@pytest.mark.parametrize("path", facing(), ids=name_of)
def test_case_62_nothing_evaluates_what_was_sent(path: Path) -> None:
    """No pattern, template or format string is made of input: there is no evaluator to attack."""
    assert list(evaluators(tree(path))) == []


@pytest.mark.parametrize("line", ["import jinja2", "re.compile(body['pattern'])", "re.search(pattern, text)",
                                  "ast.literal_eval(x)", "body['x']().format(secret)"])  # fmt: skip
def test_case_62_an_evaluator_would_be_noticed(line: str) -> None:
    """Each kind of evaluator is found by the look above."""
    assert list(evaluators(ast.parse(line)))


def test_case_62_patterns_are_linear() -> None:
    """The patterns that do exist take no longer than their text: a hundred thousand characters of the worst kind."""
    import time

    found = 0
    for path in facing():
        module = importlib.import_module(
            "trocar." + name_of(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        )
        for value in vars(module).values():
            if not isinstance(value, re.Pattern):
                continue
            found += 1
            for bad in (
                "a" * 50_000 + "!",
                "0" * 50_000 + "!",
                "[" * 50_000,
                '"' + "\\" * 50_000,
                "a.0" * 20_000,
                "-" * 50_000,
            ):
                text: Any = bad.encode() if isinstance(value.pattern, bytes) else bad
                started = time.thread_time()
                value.match(text)
                value.fullmatch(text)
                assert time.thread_time() - started < 1, (name_of(path), value.pattern)
    assert found > 8


BANNED = ["import pickle", "import cloudpickle", "import marshal", "import shelve", "import dill", "import joblib",
          "torch.load(x)", "eval(x)", "exec(x)", "compile(x, 'f', 'exec')", "yaml.load(x)", "import subprocess",
          "from multiprocessing import Queue", "from multiprocessing import Pipe", "import multiprocessing.connection",
          "multiprocessing.Pipe()"]  # fmt: skip


def test_case_s_every_ban_of_the_list() -> None:
    """Everything that can run or unpickle what was sent is banned in the whole source, and each ban is noticed."""
    assert {name_of(p): found for p in modules() if (found := list(bans(tree(p), name_of(p))))} == {}
    assert [line for line in BANNED if not list(bans(ast.parse(line), "service/x.py"))] == []


def asserts(module: ast.Module) -> list[int]:
    return [node.lineno for node in ast.walk(module) if isinstance(node, ast.Assert)]


@pytest.mark.parametrize("path", facing(SECURITY), ids=name_of)
def test_case_s_no_assertion_guards_anything(path: Path) -> None:
    """`python -O` removes assertions, so none stands in a room that refuses things."""
    assert asserts(tree(path)) == []


def channels(module: ast.Module) -> list[str]:
    """Ways between processes that unpickle what they receive."""
    kinds = ("multiprocessing", "concurrent.futures.process", "xmlrpc", "asyncore", "zmq", "socketserver")
    found = [a.name for n in ast.walk(module) if isinstance(n, ast.Import) for a in n.names]
    found += [
        f"{n.module}.{a.name}" for n in ast.walk(module) if isinstance(n, ast.ImportFrom) for a in n.names
    ]
    return [name for name in found if name.startswith(kinds) or name.endswith("ProcessPoolExecutor")]


def test_case_s_no_channel_unpickles() -> None:
    """No queue, pipe, manager or process pool anywhere: a compromised worker would own whoever listens."""
    assert {name_of(p): found for p in modules() if (found := channels(tree(p)))} == {}
    for line in (
        "import multiprocessing",
        "from concurrent.futures import ProcessPoolExecutor",
        "import zmq",
    ):
        assert channels(ast.parse(line)) or "concurrent" in line
    assert channels(ast.parse("from concurrent.futures import ProcessPoolExecutor"))


NETWORK = {
    "socket",
    "ssl",
    "http",
    "httpx",
    "requests",
    "urllib",
    "urllib3",
    "aiohttp",
    "ftplib",
    "smtplib",
    "websockets",
    "asyncio",
}


def test_case_s_rooms_with_weights_know_no_network() -> None:
    """Engine, analyses, store and gate import nothing that could speak to another machine."""
    found = {}
    for path in facing(("engine", "analysis", "store", "gate", "graph")):
        imports = [a.name for n in ast.walk(tree(path)) if isinstance(n, ast.Import) for a in n.names]
        imports += [n.module or "" for n in ast.walk(tree(path)) if isinstance(n, ast.ImportFrom)]
        stray = [i for i in imports if i.split(".")[0] in NETWORK]
        if stray:
            found[name_of(path)] = stray
    assert found == {}


def bodies(module: ast.Module) -> list[str]:
    """Calls that make bytes of an answer, or hand them to a server."""
    made = ("Response", "JSONResponse", "StreamingResponse", "FileResponse", "PlainTextResponse", "RedirectResponse",
            "HTMLResponse", "jsonable_encoder")  # fmt: skip
    return [
        called(n) for n in ast.walk(module) if isinstance(n, ast.Call) and called(n).split(".")[-1] in made
    ]


def test_case_s_one_place_makes_answers() -> None:
    """One call in the whole source makes a response, of what the gate released; no route returns anything else."""
    found = {
        name_of(p): b for p in modules() if (b := bodies(tree(p))) and not name_of(p).startswith("client/")
    }
    # the second is the head of an answer of the first, for bytes that never became a request
    assert found == {"api/app.py": ["Response"], "cli/connections.py": ["h11.Response"]}
    assert bodies(ast.parse("return starlette.responses.JSONResponse(x)"))


def test_case_s_no_other_answer_leaves_the_application() -> None:
    """The framework has no answers of its own: no redirects of slashes."""
    source = (SRC / "api" / "app.py").read_text()
    assert "redirect_slashes = False" in source


def enums() -> list[type[enum.StrEnum]]:
    """Every closed set of words in the rooms that decide."""
    found = []
    for path in facing(("gate", "grants", "graph")):
        module = importlib.import_module(
            "trocar." + name_of(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        )
        found += [
            v
            for v in vars(module).values()
            if isinstance(v, type) and issubclass(v, enum.StrEnum) and v.__module__ == module.__name__
        ]
    return found


def test_case_s_unknown_words_are_refused() -> None:
    """A word that is in no closed set is an error wherever one is read, never a default."""
    assert len(enums()) >= 8
    for words in enums():
        for unknown in ("", "OPEN", "root", "admin", "none", " open"):
            with pytest.raises(ValueError, match="is not a valid"):
                words(unknown)


def test_case_s_unknown_tiers_have_no_limits_to_be_without() -> None:
    """A tier, role or door that the policy does not know is refused or fails; nothing comes out uncapped."""
    from trocar.gate.policy import Lineage, Policy, Tier, TierTerms

    policy, lineage = Policy(), Lineage("x", 1_000_000, Tier.external)
    for word in ("root", "", None, "OPEN"):
        with pytest.raises((TrocarError, KeyError, ValueError, AttributeError, TypeError)):
            policy.limits(word, lineage)  # type: ignore[arg-type]
        with pytest.raises((TrocarError, KeyError, ValueError, AttributeError, TypeError)):
            policy.prices(word)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="raw"):
        TierTerms(raw="maybe")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tiers"):
        Policy.model_validate({"people": {"tiers": {"root": {}}}})


def literals(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Literal:
        yield annotation
    for part in get_args(annotation):
        yield from literals(part)


def test_case_s_words_of_requests_are_closed() -> None:
    """Every field of a request that takes one of a few words refuses another one."""
    from pydantic import TypeAdapter, ValidationError

    from trocar.graph.spec import SPEC
    from trocar.wire import requests as q

    models = [row.node for row in SPEC.values()] + [q.RunRequest, q.FitRequest, q.SessionRequest]
    found = [x for m in models for f in m.model_fields.values() for x in literals(f.annotation)]
    assert len(found) > 30
    for annotation in found:
        with pytest.raises(ValidationError):
            TypeAdapter(annotation).validate_json(b'"no such word"', strict=True)


CHOSEN = ["tests/unit/graph/test_graph_refusals.py", "tests/unit/graph/test_graph_limits.py",
          "tests/unit/gate/test_gate_ledger.py", "tests/unit/gate/test_gate_keys.py",
          "tests/unit/gate/test_gate_scopes.py",
          "tests/unit/gate/test_gate_roles.py", "tests/unit/gate/test_gate_airlock_states.py"]  # fmt: skip


def test_case_s_refusals_without_assertions() -> None:
    """Tests of the checker and the gate pass under `python -O`, where every `assert` of the source is gone.

    Those of the tests are not: pytest has rewritten them to plain statements before.
    """
    env = {**os.environ, "PYTHONPATH": str(Path(trocar.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    quiet = ("-p", "no:cacheprovider", "-W", "ignore")
    pytest_run = [sys.executable, "-O", "-W", "ignore", "-m", "pytest", "-q", *quiet]
    command = [*pytest_run, "-k", "not postgres", *CHOSEN]
    ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-2000:]
    passed = re.search(r"(\d+) passed", ran.stdout)
    assert passed
    assert int(passed[1]) > 80
