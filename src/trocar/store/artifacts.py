"""Artifacts: small named arrays by site, the result of a fit, stored whole in one safetensors file.

An artifact follows the same rules as a handle: one owner, a random id, one commit that makes it visible. It
is read with its hash checked. This module packs and unpacks; what the arrays mean is not its business.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load, save

from trocar import errors
from trocar.store import ids
from trocar.store.catalog import Entry
from trocar.store.ids import ArtifactId

Arrays = Mapping[str, Mapping[str, npt.NDArray[Any]]]
_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,31}")
_DTYPES: Final = ("float32", "float64", "int64")


@dataclass(frozen=True, slots=True)
class ArtifactInfo:
    """What an artifact is.

    Attributes:
        kind: what made it, for example "logistic".
        shapes: shape of each array, by site and name.
        info: what its maker remembered (JSON values).
        created_s, expires_s: Unix time in seconds; expires_s is None for an artifact that stays.
        pinned: whether it stays after `expires_s`.
    """

    id: ArtifactId
    owner: str
    kind: str
    fingerprint: str
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
    info: Any
    created_s: float
    expires_s: float | None
    pinned: bool
    size_bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class Artifact:
    """An opened artifact: `arrays[site][name]`."""

    info: ArtifactInfo
    arrays: Arrays


def layout_of(arrays: Arrays) -> str:
    """JSON of the shapes, after checking sites, names and dtypes.

    Raises:
        ProgramError: `unknown_site`, or `bad_value` for a name or a dtype that cannot be stored.
    """
    for site, named in arrays.items():
        ids.require_site(site, "arrays")
        for name, array in named.items():
            if _NAME.fullmatch(name) is None or array.dtype.name not in _DTYPES:
                reason = f"{name!r} of {array.dtype} cannot be stored"
                raise errors.refuse("bad_value", f"arrays.{site}", reason)
    return json.dumps({site: {n: a.shape for n, a in named.items()} for site, named in arrays.items()})


def pack(arrays: Arrays) -> bytes:
    """One safetensors file with tensors named `site/name`."""
    tensors = {
        f"{site}/{name}": np.ascontiguousarray(array)
        for site, named in arrays.items()
        for name, array in named.items()
    }
    return bytes(save(tensors))


def unpack(info: ArtifactInfo, raw: bytes) -> Artifact:
    """Reads what `pack` wrote and whose hash has been checked."""
    tensors = load(raw)
    named = {s: {n: tensors[f"{s}/{n}"] for n in shapes} for s, shapes in info.shapes.items()}
    return Artifact(info, named)


def info_of(entry: Entry, size_bytes: int) -> ArtifactInfo:
    """The public description of an entry."""
    shapes = {s: {n: tuple(shape) for n, shape in v.items()} for s, v in json.loads(entry.layout).items()}
    return ArtifactInfo(
        id=ArtifactId(entry.id),
        owner=entry.owner,
        kind=entry.kind,
        fingerprint=entry.fingerprint,
        shapes=shapes,
        info=json.loads(entry.info),
        created_s=entry.created_s,
        expires_s=entry.expires_s,
        pinned=entry.pinned,
        size_bytes=size_bytes,
    )
