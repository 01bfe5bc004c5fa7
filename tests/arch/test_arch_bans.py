"""What may not be written in `src`: anything that runs what was sent, and anything left for later."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from source_tree import called, dotted, modules, name_of, tree

MODULES = {
    "_pickle", "cloudpickle", "code", "codeop", "dill", "joblib", "jsonpickle", "marshal", "pickle", "runpy", "shelve",
}  # fmt: skip
CALLS = {
    "__import__", "compile", "eval", "exec", "np.load", "numpy.load", "os.popen", "os.system", "torch.jit.load",
    "torch.load", "yaml.full_load", "yaml.load", "yaml.unsafe_load",
}  # fmt: skip
CHANNELS = {"Connection", "JoinableQueue", "Manager", "Pipe", "Queue", "SimpleQueue"}
SUBPROCESS = {"models/pull.py"}
DYNAMIC_IMPORT = {"__init__.py"}
LATER = ("TODO", "FIXME", "XXX", "HACK")


def bans(module: ast.Module, name: str) -> Iterator[str]:
    """Every banned thing in a module, as `line: what`."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from _imports(node, name)
        elif isinstance(node, ast.Call):
            yield from _calls(node, name)
        elif isinstance(node, ast.Name | ast.Attribute) and dotted(node) == "NotImplementedError":
            yield f"{node.lineno}: NotImplementedError"
        elif isinstance(node, ast.Assert) and name.split("/")[0] in ("graph", "gate"):
            yield f"{node.lineno}: assert does not hold under python -O"


def _imports(node: ast.Import | ast.ImportFrom, name: str) -> Iterator[str]:
    origin = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
    for module in origin:
        top = module.split(".")[0]
        if top in MODULES:
            yield f"{node.lineno}: import of {module}"
        if top == "subprocess" and name not in SUBPROCESS and not name.startswith("cli/"):
            yield f"{node.lineno}: import of subprocess"
        if module.startswith(("multiprocessing.connection", "multiprocessing.managers")):
            yield f"{node.lineno}: import of {module}, which pickles"
        if top == "multiprocessing" and isinstance(node, ast.ImportFrom):
            yield from (f"{node.lineno}: {a.name} pickles" for a in node.names if a.name in CHANNELS)


def _calls(call: ast.Call, name: str) -> Iterator[str]:
    target = called(call)
    if target in CALLS or target.startswith(("os.exec", "os.spawn", "builtins.")):
        yield f"{call.lineno}: call of {target}"
    if target.split(".")[0] in ("multiprocessing", "mp") and target.split(".")[-1] in CHANNELS:
        yield f"{call.lineno}: {target} pickles"
    computed = call.args and not isinstance(call.args[0], ast.Constant)
    if target.endswith("import_module") and computed and name not in DYNAMIC_IMPORT:
        yield f"{call.lineno}: import of a computed name"
    for keyword in call.keywords:
        off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
        if keyword.arg in ("trust_remote_code", "allow_pickle", "shell") and not off:
            yield f"{call.lineno}: {keyword.arg} is not False"


def later(text: str) -> Iterator[str]:
    """Comments that promise something."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and any(word in token.string for word in LATER):
            yield f"{token.start[0]}: {token.string}"


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_nothing_banned(path: Path) -> None:
    assert [*bans(tree(path), name_of(path)), *later(path.read_text())] == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "import subprocess",
        "from multiprocessing import Queue",
        "import multiprocessing as mp; mp.Pipe()",
        "torch.load('x')",
        "eval('1')",
        "exec(body)",
        "compile(body, 'x', 'exec')",
        "yaml.load(body)",
        "os.system('ls')",
        "np.load(path)",
        "importlib.import_module(body['name'])",
        "load(x, trust_remote_code=True)",
        "load(x, trust_remote_code=flag)",
        "raise NotImplementedError",
        "raise NotImplementedError('later')",
        "def f():\n    assert limit > 0",
    ],
)
def test_each_ban_is_noticed(line: str) -> None:
    assert list(bans(ast.parse(line), "gate/x.py"))


def test_what_only_resembles_a_ban_passes() -> None:
    kind = "model.eval(); re.compile('x'); safetensors.numpy.load(x); load(x, trust_remote_code=False)"
    assert list(bans(ast.parse(kind), "engine/x.py")) == []
    assert list(later("x = 1  # TO" + "DO: more")) == ["1: # TO" + "DO: more"]
