"""What is public of a model, asked of its worker once and never again.

The facts decide how programs are checked and priced, and everybody may read them; so what a worker says of itself
at the very first start is written beside the ledger and its digest into the log. What the budget rests on (whose
secret it is, how large, whether it is one) is not asked at all: it is what the gate itself reads in the manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from trocar import errors, sites, strict
from trocar.gate.chain import Kind
from trocar.gate.ledger import Ledger
from trocar.models.cache import Manifest
from trocar.wire.orders import MOST_FACTS_BYTES, Pinned

FOLDER: Final = "facts"
_MOST_REASON: Final = 400
_PAGE: Final = 1000
_SAME: Final = ("name", "fingerprint", "lineage", "weight_bits", "open_weights", "parameters")
Ask = Callable[[str], bytes]


def pinned(data: Path, ledger: Ledger, manifest: Manifest, ask: Ask) -> Pinned:
    """The facts of a model that hold from now on.

    Args:
        data: folder of the ledger.
        manifest: of the model, as this process read it.
        ask: what a worker says of the model of that name; called when nothing is pinned for these files.

    Raises:
        RunFailed: `checksum_mismatch` when the pinned facts are not those of the log.
        ServerFault: `bad_result` when a worker's facts cannot be those of the model.
    """
    path = data / FOLDER / f"{hashlib.sha256(manifest.name.encode()).hexdigest()[:32]}.json"
    if path.is_file():
        raw = path.read_bytes()
        kept = _kept(ledger, manifest.name, raw)
        if kept.facts.fingerprint == manifest.fingerprint:
            return kept
    made = _checked(ask(manifest.name), manifest)
    raw = made.model_dump_json().encode()
    detail = {"model": manifest.name[:200], "fingerprint": manifest.fingerprint}
    ledger.note(Kind.facts_pinned, lineage=made.facts.lineage, digest=_digest(raw), detail=detail)
    _write(path, raw)
    return made


def _kept(ledger: Ledger, name: str, raw: bytes) -> Pinned:
    if _logged(ledger, name) != _digest(raw):
        raise errors.refuse(
            "checksum_mismatch", "model", f"the pinned facts of {name!r} are not those of the log",
            next_step="Restore the file, or delete it to pin what the worker says today as an entry of the log.",
        )  # fmt: skip
    return strict.parse(Pinned, raw)


def _logged(ledger: Ledger, name: str) -> str:
    """Digest of the last pin of a model; empty without one."""
    found, after = "", 0
    while entries := ledger.entries(after_seq=after, limit=_PAGE, kind=Kind.facts_pinned):
        after = entries[-1].seq
        for entry in entries:
            if json.loads(entry.detail)["model"] == name[:200]:
                found = entry.digest
    return found


def _checked(raw: bytes, manifest: Manifest) -> Pinned:
    """A worker's facts, unless they cannot be those of the model, or say more than facts do."""
    if len(raw) > MOST_FACTS_BYTES:
        raise _bad(f"they take {len(raw)} bytes")
    try:
        made = strict.parse(Pinned, raw)
    except errors.TrocarError:
        raise _bad("they are no facts") from None
    facts = made.facts
    other = [name for name in _SAME if getattr(facts, name) != getattr(manifest, name)]
    if other:
        raise _bad(f"{other[0]} is not what the manifest says")
    names = {*facts.sites, *facts.unavailable, *facts.norms}
    if not names <= set(sites.SITES):
        raise _bad("they name a site that there is not")
    words = (*facts.unavailable.values(), made.engine, facts.family, facts.dtype)
    if any(len(word) > _MOST_REASON or not word.isprintable() for word in words):
        raise _bad("a text in them is too long or cannot be printed")
    return made


def _bad(why: str) -> errors.TrocarError:
    return errors.refuse("bad_result", "model", f"the worker's facts are refused: {why}")


def _digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def _write(path: Path, raw: bytes) -> None:
    path.parent.mkdir(mode=0o700, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_bytes(raw)
    partial.chmod(0o600)
    partial.replace(path)
