"""The one door to SAELens and sparsify, which only the extra `sae` installs and which take seconds to import.

SAELens brings a logger for experiments; it is told to stay off before anything of it is loaded.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator
from types import ModuleType

from trocar import errors


def saelens() -> ModuleType:
    """The package `sae_lens`, with sparsify's kernel loaded beside it.

    Raises:
        ClientError: `missing_extra`.
    """
    os.environ.setdefault("WANDB_MODE", "disabled")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        with _silent():
            import sae_lens
            import sparsify.fused_encoder  # noqa: F401 - prints when it is first loaded
    except ImportError as e:
        reason = f"dictionaries need SAELens and sparsify: {e}"
        step = "Run `pip install 'trocar[sae]'`."
        raise errors.refuse("missing_extra", "dictionaries", reason, next_step=step) from e
    found: ModuleType = sae_lens
    return found


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
