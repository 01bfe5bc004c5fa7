"""Names of things in the store: random, unguessable, and safe to use in a path.

A handle is `act_` and an artifact `art_`, each followed by 32 hexadecimal digits (128 random bits). Nothing
reaches the file system or the catalog before it has matched that form exactly. Absent, expired, malformed
and "somebody else's" are one answer with one text, so that an id cannot be probed.
"""

from __future__ import annotations

import re
import secrets
from typing import Final, NewType

from trocar import errors, sites

HandleId = NewType("HandleId", str)
ArtifactId = NewType("ArtifactId", str)

_HANDLE: Final = re.compile(r"act_[0-9a-f]{32}")
_ARTIFACT: Final = re.compile(r"art_[0-9a-f]{32}")
_SHOWN: Final = 40


def new_handle() -> HandleId:
    return HandleId(f"act_{secrets.token_hex(16)}")


def new_artifact() -> ArtifactId:
    return ArtifactId(f"art_{secrets.token_hex(16)}")


def is_handle(text: str) -> bool:
    return _HANDLE.fullmatch(text) is not None


def is_artifact(text: str) -> bool:
    return _ARTIFACT.fullmatch(text) is not None


def require_site(text: str, path: str) -> None:
    """Refuses a site that is not in its one canonical spelling: sites become parts of file names."""
    if str(sites.parse(text, path)) != text:
        raise errors.refuse("unknown_site", path, f"{text!r} is not the canonical spelling of a site")


def not_found(text: str) -> errors.TrocarError:
    """The one answer for an id that does not open: `handle_not_found`."""
    return errors.refuse("handle_not_found", "handle", f"you have no handle {text[:_SHOWN]!r}")
