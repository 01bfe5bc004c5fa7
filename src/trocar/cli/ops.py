"""`trocar ops`: the op table of the language, straight from `graph.spec`."""

from __future__ import annotations

from trocar.cli import show
from trocar.cli.show import JsonOption


def ops(json: JsonOption = False) -> None:
    """Print the ops that a program may use."""
    from trocar.graph.spec import SPEC

    if not json:
        columns = ("op", "group", "fields", "gives", "leaves as", "what it does")
        show.table(
            columns,
            (
                (row.op, row.group, ", ".join(_fields(row.node)), row.gives, row.declassifier, row.doc)
                for row in SPEC.values()
            ),
        )
        return
    show.as_json(
        [
            {
                "op": row.op,
                "group": row.group,
                "fields": _fields(row.node),
                "takes": {name: list(kinds) for name, kinds in row.takes.items()},
                "gives": row.gives,
                "leaves_as": row.declassifier,
                "lane": row.lane,
                "doc": row.doc,
            }
            for row in SPEC.values()
        ]
    )


def _fields(node: type) -> list[str]:
    fields: dict[str, object] = getattr(node, "model_fields", {})
    return [name for name in fields if name not in ("op", "id")]
