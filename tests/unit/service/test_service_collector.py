"""What a server's process does to Python's cycle collector."""

from __future__ import annotations

import gc

from trocar.service.compose import spare_collector


def test_what_lives_now_is_looked_at_no_more() -> None:
    before = len(gc.get_objects())
    try:
        spare_collector()
        assert gc.get_freeze_count() > before // 2
        assert len(gc.get_objects()) < before // 2
    finally:
        gc.unfreeze()
