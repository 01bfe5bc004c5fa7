"""`trocar worker` whose engine says secrets in every way it has, and fails with them."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from trocar.cli.app import main
from trocar.errors import refuse
from trocar.service.passes import Passes

SECRET = "secret-weights-0.125"
plain = Passes.run


def leak(passes: Passes) -> Any:
    print(SECRET, flush=True)
    print(SECRET, file=sys.stderr, flush=True)
    os.write(1, SECRET.encode())
    os.write(2, SECRET.encode())
    logging.getLogger("trocar").critical(SECRET)
    prompt = passes.prepared.request.prompts[0]
    if prompt == "raise":
        raise ValueError(SECRET)
    if prompt == "refuse":
        raise refuse("edit_not_finite", SECRET, SECRET, next_step=SECRET, closest=SECRET)
    if prompt == "invent":
        raise refuse("bad_value", SECRET, SECRET)
    return plain(passes)


if __name__ == "__main__":
    Passes.run = leak  # type: ignore[method-assign]
    sys.exit(main(["worker", *sys.argv[1:]]))
