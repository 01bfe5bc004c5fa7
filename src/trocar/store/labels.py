"""Labels that come later: a column beside the rows of a finished handle, whose vectors nobody touches.

They lie in one file for all rows. A column is there or not, from one transaction to the next; it is replaced by
dropping it and adding another.
"""

from __future__ import annotations

import secrets
from typing import Literal

import numpy as np
import sqlalchemy as sa

from trocar import errors
from trocar.store import catalog, ids, rows, sidecars
from trocar.store.catalog import WHOLE, File
from trocar.store.depot import Depot
from trocar.store.quota import Quota
from trocar.store.reader import Reader
from trocar.store.rows import GivenLabels, Ints, Labels
from trocar.store.shelf import Slot

By = Literal["row", "prompt"]


def add(depot: Depot, quota: Quota, reader: Reader, name: str, values: GivenLabels, by: By) -> None:
    """Adds a column; see `Store.add_labels`."""
    rows.require_name(name, "name")
    entry = reader.info.id
    if name in reader.index.columns:
        raise errors.refuse("bad_value", "name", f"{entry} has labels {name!r} already")
    found = _by_id(reader, rows.label_values("values", values), by)
    raw = sidecars.pack_labels(name, found)
    slot = Slot(f"labels.{name}.{secrets.token_hex(8)}.parquet", WHOLE, "", len(found), name)
    draft = depot.shelf.draft(entry, [raw], slot)

    def admit(c: sa.Connection) -> None:
        if catalog.find(c, entry) is None:
            raise ids.not_found(entry)
        if any(f.label == name for f in catalog.files(c, entry)):
            raise errors.refuse("bad_value", "name", f"{entry} has labels {name!r} already")
        quota.admit(c, reader.info.owner, draft.size_bytes)

    depot.publish(entry, [draft], admit)


def drop(depot: Depot, reader: Reader, name: str) -> None:
    """Removes a column that `add` has made; see `Store.drop_labels`."""

    def change(c: sa.Connection) -> list[File]:
        gone = [f for f in catalog.files(c, reader.info.id) if name and f.label == name]
        if not gone:
            near = errors.closest(name, reader.index.columns)
            reason = f"no labels {name[:40]!r} were added to {reader.info.id}"
            raise errors.refuse("bad_value", "name", reason, closest=near)
        catalog.remove_files(c, gone)
        return gone

    depot.withdraw(change)


def _by_id(reader: Reader, values: Labels, by: By) -> Labels:
    """The labels in the order of ids, from one per row in canonical order or one per prompt."""
    index = reader.index
    if by == "prompt":
        return values[_prompts(reader, len(values))]
    if len(values) != len(index):
        reason = f"{len(values)} labels for {len(index)} rows"
        raise errors.refuse("rows_mismatch", "values", reason)
    out = np.empty_like(values)
    out[index.ids] = values
    return out


def _prompts(reader: Reader, n: int) -> Ints:
    prompts = rows.prompts(reader.index.keys)
    if len(prompts) and prompts.max() >= n:
        reason = f"{n} labels, and a row of prompt {prompts.max()}"
        raise errors.refuse("rows_mismatch", "values", reason)
    return prompts
