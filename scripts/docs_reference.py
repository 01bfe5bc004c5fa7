"""Writes the parts of the docs that follow from tables: `make reference`. A test holds that they are current.

Ops from `graph.spec`, sites from `sites`, codes from `errors`, routes from the API, the JSON Schema of a
program, and the example programs of `docs/programs.md` as JSON made by the Python above them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final, cast

import docs_attacks
import docs_security
import numpy as np
from docs_blocks import blocks, fill

import trocar
from trocar import strict
from trocar.client.aio import generation_of
from trocar.client.handles import Probe, Stored
from trocar.client.notebook import bits_text
from trocar.client.trace import Prompts, Trace
from trocar.codes import CODES
from trocar.errors import kind_of
from trocar.graph.facts import ModelFacts
from trocar.graph.program import json_schema
from trocar.graph.spec import SPEC, OpSpec
from trocar.sites import SITES
from trocar.wire.requests import RunRequest

ROOT: Final = Path(__file__).resolve().parents[1]
DOCS: Final = ROOT / "docs"
RESULTS: Final = ROOT / "bench" / "results"
SCHEMA: Final = DOCS / "program.schema.json"
LEAVES: Final = {
    "top_k": "the k most likely tokens of each row, with log-probabilities",
    "scalars": "numbers",
    "metric": "numbers",
    "raw": "rows, where the policy allows",
    "tokens": "generated tokens",
    "handle": "a handle; the rows stay on the server",
}
FACTS: Final = ModelFacts(
    name="smollm2-135m-instruct", fingerprint="sha256:" + "0" * 64, lineage="smollm2-135m", family="llama",
    dtype="float32", n_layers=30, d_model=576, d_mlp=1536, n_heads=9, n_kv_heads=3, d_head=64, vocab_size=49152,
    context=8192, parameters=134_515_008, weight_bits=134_515_008 * 16, open_weights=True,
    sites=("embeddings", "resid_pre", "attn_in", "q", "k", "v", "attn_probs", "z", "attn_out", "resid_mid", "mlp_in",
           "mlp_act", "mlp_out", "resid_post", "final_norm"),
    unavailable={}, eos=(2,),
)  # fmt: skip
"""The model that the example programs are written for; a test compares it with the loaded one."""
LARGE: Final = FACTS.model_copy(update={"vocab_size": 128_256, "d_model": 4096})
"""The sizes that prices are told for."""


class PaperModel:
    """A model that only records: programs can be written down without a server."""

    facts = FACTS
    n_layers = FACTS.n_layers
    d_model = FACTS.d_model

    def trace(self, prompts: Prompts, **generation: Any) -> Trace[None, None]:
        return Trace(self, self.facts, prompts, generation_of(generation))

    def plan(self, recorded: Any) -> None: ...

    def run(self, recorded: Any) -> None: ...


def paper_names() -> dict[str, Any]:
    """The names that the example programs use: a model, stored rows, a probe, numpy."""
    layers = tuple(f"resid_post.{i}" for i in range(FACTS.n_layers))
    stored = Stored("act_" + "0" * 32, layers, dict.fromkeys(layers, FACTS.d_model), 1, 0)
    metrics = {site: {"auroc": 0.5} for site in layers}

    class Acts:
        def __getitem__(self, site: str) -> Any:
            return stored.at(site)

    probe = Probe("art_" + "0" * 32, "logistic", metrics, 1, 1)
    return {"trocar": trocar, "np": np, "model": PaperModel(), "clean": Acts(), "probe": probe}


def example_requests() -> list[RunRequest]:
    """What each Python block of docs/programs.md records, in order."""
    page = (DOCS / "programs.md").read_text()
    found = []
    for block in blocks(page):
        if block.language == "python":
            names = paper_names()
            exec(compile(block.text, f"docs/programs.md:{block.line}", "exec"), names)  # noqa: S102 - our own docs
            found.append(names["t"].recorded.request)
    return found


def request_json(request: RunRequest) -> str:
    """JSON for reading: one node per line."""
    body = request.model_dump(mode="json")
    nodes = ",\n".join(
        "      " + json.dumps(_said(node), ensure_ascii=False) for node in body["program"]["nodes"]
    )
    lines = [
        f'  "model": {json.dumps(body["model"])}',
        f'  "prompts": {json.dumps(body["prompts"], ensure_ascii=False)}',
        f'  "program": {{\n    "version": {body["program"]["version"]},\n    "nodes": [\n{nodes}\n    ]\n  }}',
        f'  "generation": {json.dumps(body["generation"])}',
    ]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _said(node: dict[str, Any]) -> dict[str, Any]:
    """A node without what it leaves open, its id and op first."""
    first = {name: node[name] for name in ("id", "op")}
    return first | {name: value for name, value in node.items() if value is not None}


def ops_table() -> str:
    rows = ["| op | group | result | leaves the server as |", "|---|---|---|---|"]
    for row in SPEC.values():
        leaves = LEAVES.get(row.declassifier, "does not leave")
        rows.append(f"| [`{row.op}`](#{_anchor(row.op)}) | {row.group} | {row.gives} | {leaves} |")
    return "\n".join(rows) + "\n"


def _anchor(op: str) -> str:
    return op.replace(".", "")


def ops_reference() -> str:
    return "\n".join(_op(row) for row in SPEC.values())


def _op(row: OpSpec) -> str:
    shape = strict.schema(row.node)
    required = shape.get("required", [])
    lines = [
        f"### `{row.op}` {{#{_anchor(row.op)}}}",
        "",
        row.doc,
        "",
        "| field | accepts | default |",
        "|---|---|---|",
    ]
    for name, field in shape["properties"].items():
        if name != "op":
            given = json.dumps(field.get("default"))
            default = "required" if name in required else "nothing" if given == "null" else f"`{given}`"
            lines.append(f"| `{name}` | {_accepts(name, field, row)} | {default} |")
    return "\n".join(lines) + "\n"


def _accepts(name: str, field: dict[str, Any], row: OpSpec) -> str:
    if name in row.takes:
        kinds = ", ".join(row.takes[name])
        if field.get("type") == "array":
            return f"ids of earlier nodes that are: {kinds}"
        others = [f for f in field.get("anyOf", ()) if f["type"] == "number"]
        number = "".join(f"{_schema_text(f)}, or " for f in others)
        return f"{number}id of an earlier node that is: {kinds}"
    return {
        "id": "a name: a letter or `_`, then letters, digits, `_`, `.`, `-`; at most 64 characters",
        "site": "a [site](sites.md)",
        "at": "a [position selector](positions.md)",
        "keys": "a [position selector](positions.md) of prompt tokens",
        "features": 'at most 256 of `{"index": ..., "set": ...}` or `{"index": ..., "scale": ...}`',
        "handle": "`act_...` or `art_...`",
        "heads": "a list of 1 to 512 head indices",
        "neurons": "a list of 1 to 4096 neuron indices",
        "probe": "`art_...` of a fit with weights, or nothing",
    }.get(name) or _schema_text(field)


def _schema_text(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_schema_text(f) for f in field["anyOf"] if f.get("type") != "null"))
    if "enum" in field:
        return " or ".join(f"`{json.dumps(v)}`" for v in field["enum"])
    if field["type"] == "array":
        return f"a list of 1 to {field['maxItems']}: {_schema_text(field['items'])}"
    limits = [field.get("minimum"), field.get("maximum")]
    low, high = (str(n) if isinstance(n, int) else f"{n:g}" for n in (limits[0] or 0, limits[1] or 0))
    span = f" from {low} to {high}" if None not in limits else ""
    words = {"integer": "an integer", "number": "a number", "string": "text", "boolean": "true or false"}
    return words[field["type"]] + span


def sites_table() -> str:
    rows = ["| site | once per | width | programs may write | meaning |", "|---|---|---|---|---|"]
    for row in SITES.values():
        where = "layer" if row.layered else "model"
        example = f"`{row.name}.L`" if row.layered else f"`{row.name}`"
        rows.append(
            f"| {example} | {where} | `{row.width}` | {'yes' if row.editable else 'no'} | {row.meaning} |"
        )
    return "\n".join(rows) + "\n"


def codes_table() -> str:
    rows = ["| code | raised as | HTTP | meaning |", "|---|---|---|---|"]
    for code in CODES.values():
        status = str(kind_of(code.name).status) if kind_of(code.name).status else "-"
        rows.append(f"| [`{code.name}`]({code.name}.md) | `{code.kind}` | {status} | {code.summary} |")
    return "\n".join(rows) + "\n"


def code_facts(name: str) -> str:
    """The line under a code's heading."""
    code = CODES[name]
    status = (
        f"HTTP {kind_of(code.name).status}" if kind_of(code.name).status else "found before anything is sent"
    )
    again = "The same request may work later." if code.retryable else "The same request is refused again."
    if kind_of(code.name).status == 500 and not code.retryable:
        again = "Trying again does not help by itself."
    return f"`trocar.{code.kind}`, {status}. {again}\n\n**{code.summary}**\n"


def routes_table() -> str:
    from trocar.api import openapi
    from trocar.api.app import create_app
    from trocar.service.service import Service

    app = create_app(cast(Service, None))
    rows = ["| method | address | what it does |", "|---|---|---|"]
    for path, verbs in openapi.describe(app)["paths"].items():
        for method, facts in verbs.items():
            rows.append(f"| {method.upper()} | `{path}` | {facts['description'].splitlines()[0]} |")
    return "\n".join(rows) + "\n"


def schema_text() -> str:
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **json_schema()}
    return json.dumps(schema, indent=1, sort_keys=True) + "\n"


def tour_table() -> str:
    """Checks and bits of the committed tour."""
    tour = json.loads((RESULTS / "tour.json").read_text())
    rows = [
        f"| {c['chapter']} | {check['name']} | {check['measured']} | {check['goal']} |"
        for c in tour["chapters"]
        for check in c["checks"]
    ]
    bits, download = (sum(c[k] for c in tour["chapters"]) for k in ("bits", "download_bits"))
    seconds = sum(c["seconds"] for c in tour["chapters"])
    head = "| experiment | check | measured | goal |\n|---|---|---|---|\n"
    end = (
        f"\n{bits_text(bits)} left the server; the same activations as a bf16 download would have been "
        f"{bits_text(download)}. The experiments took {seconds:.0f} s on: {tour['machine']}.\n"
    )
    return head + "\n".join(rows) + "\n" + end


def forward_table() -> str:
    """Speed of a first pass against the plain model, as committed."""
    bench = json.loads((RESULTS / "forward.json").read_text())
    rows = [
        f"| {name.replace('_', ' ')} | {ratio:.2f} | {low:.2f} to {high:.2f} |"
        for (name, ratio), (low, high) in zip(bench["ratios"].items(), bench["spread"].values(), strict=True)
    ]
    return (
        "| requests with | speed, plain forward = 1 | over all turns |\n|---|---|---|\n" + "\n".join(rows)
        + f"\n\nMedian CPU time of alternating turns in one process, on: {bench['machine']}.\n"
    )  # fmt: skip


def texts(page: Path) -> dict[str, str]:
    """The generated parts of one page, by name."""
    if page.parent.name == "errors" and page.stem in CODES:
        return {"facts": code_facts(page.stem)}
    if page.name == "programs.md":
        programs = {
            f"program-{i}": f"```json\n{request_json(r)}```\n" for i, r in enumerate(example_requests(), 1)
        }
        return {"ops": ops_table(), "op-reference": ops_reference(), **programs}
    made = {
        "sites.md": lambda: {"sites": sites_table()},
        "tour.md": lambda: {"tour": tour_table(), "forward": forward_table()},
        "api.md": lambda: {"routes": routes_table()},
        "attacks.md": docs_attacks.texts,
        "security.md": lambda: docs_security.texts(LARGE),
    }
    if page.name in made:
        return made[page.name]()
    return {"codes": codes_table()} if page.parent.name == "errors" else {}


def current() -> dict[Path, str]:
    """Every page with generated parts, and the schema, as they should be."""
    pages = [p for p in sorted(DOCS.rglob("*.md")) if re.search("<!-- generated: ", p.read_text())]
    return {**{p: fill(p.read_text(), texts(p)) for p in pages}, SCHEMA: schema_text()}


if __name__ == "__main__":
    for path, text in current().items():
        path.write_text(text)
