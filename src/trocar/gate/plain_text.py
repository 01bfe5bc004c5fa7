"""Text that people wrote and other people will read: bounded, printable, one line, and never interpreted.

Refused are control characters (a terminal's escapes among them), format characters (those that reverse the
order of what is read, or are not seen), surrogates, private and unassigned characters, and every space but
the plain one. What is left may still say anything: it is shown between quotes, as data.
"""

from __future__ import annotations

import re
from typing import Final

from trocar import errors

MOST_PROSE: Final = 2000
MOST_WORDS: Final = 200
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,99}")


def fault(text: str, most: int) -> str | None:
    """What is wrong with a text of at most `most` characters; None when nothing is."""
    if len(text) > most:
        return f"it has {len(text)} characters; the limit is {most}"
    if not text.isprintable():
        bad = next(c for c in text if not c.isprintable())
        return f"it contains the character U+{ord(bad):04X}, which is not printable"
    return None


def is_name(text: str) -> bool:
    """Whether `text` is a name that may leave: letters, digits, '.', '_', '/', '-'; at most 100."""
    return _NAME.fullmatch(text) is not None


def require(text: str, path: str, *, most: int = MOST_PROSE, least: int = 0) -> str:
    """Returns `text` if it may be kept and shown.

    Raises:
        ProgramError: `bad_value`; the text is not repeated in the reason.
    """
    wrong = fault(text, most)
    if wrong is None and len(text.strip()) < least:
        wrong = f"it needs at least {least} characters"
    if wrong is not None:
        raise errors.refuse("bad_value", path, f"the text cannot be kept: {wrong}")
    return text
