"""What a dictionary is trained to be: the kind, its size, and for how long. Checked before anything is loaded."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Final, Literal

from trocar import errors

Kind = Literal["batch_topk", "jumprelu", "matryoshka", "topk"]
KINDS: Final[tuple[Kind, ...]] = ("batch_topk", "jumprelu", "matryoshka", "topk")
MOST_FEATURES: Final = 1 << 22


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train a dictionary.

    Attributes:
        kind: `topk` (Gao et al. 2024), `batch_topk` (Bussmann et al. 2024), `jumprelu` (Rajamanoharan et al. 2024,
            with a quadratic penalty about `k`), `matryoshka` (Bussmann et al. 2025, on BatchTopK).
        features: size of the dictionary.
        rows: rows to train on, in rounds over the source where it has fewer; rounded down to whole batches.
        k: active features per row: exactly, on average over a batch, or what the penalty aims at.
        batch: rows per step.
        rate: of Adam. `warm_up`, `cool_down`: steps in which it rises from and falls to zero.
        dead_after: steps without activity after which a feature is dead, and is trained on what the others miss.
        levels: `matryoshka`: sizes of the inner dictionaries, ascending; the whole one comes last by itself.
        penalty: `jumprelu`: weight of the penalty. `penalty_warm_up`: steps in which it rises from zero.
        normalise: scale all rows by one number that makes their mean length the square root of the width; the
            dictionary takes rows as they are all the same.
        seed: of the weights and of the order of rows.
    """

    kind: Kind
    features: int
    rows: int
    k: float = 32
    batch: int = 4096
    rate: float = 3e-4
    warm_up: int = 0
    cool_down: int = 0
    dead_after: int = 1000
    levels: tuple[int, ...] = ()
    penalty: float = 1.0
    penalty_warm_up: int = 0
    normalise: bool = True
    seed: int = 0

    @property
    def steps(self) -> int:
        return self.rows // self.batch

    def digest(self) -> bytes:
        """32 bytes that no other recipe has."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).digest()


def require(recipe: Recipe) -> None:
    """Refuses with `bad_value` what cannot be trained."""
    if recipe.kind not in KINDS:
        near = errors.closest(str(recipe.kind), KINDS)
        reason = f"{recipe.kind!r} is not a kind of dictionary: {', '.join(KINDS)}"
        raise errors.refuse("bad_value", "kind", reason, closest=near)
    _require_whole("features", recipe.features, 2, MOST_FEATURES)
    _require_whole("batch", recipe.batch, 1, 1 << 20)
    _require_whole("rows", recipe.rows, recipe.batch, 1 << 50)
    _require_whole("warm_up", recipe.warm_up, 0, recipe.steps)
    _require_whole("cool_down", recipe.cool_down, 0, recipe.steps - recipe.warm_up)
    _require_whole("dead_after", recipe.dead_after, 1, 1 << 40)
    _require_whole("penalty_warm_up", recipe.penalty_warm_up, 0, recipe.steps)
    _require_whole("seed", recipe.seed, 0, (1 << 63) - 1)
    if not 0 < recipe.rate <= 1:
        raise errors.refuse("bad_value", "rate", f"{recipe.rate!r} is not in (0, 1]")
    if not 0 <= recipe.penalty <= 1e6:
        raise errors.refuse("bad_value", "penalty", f"{recipe.penalty!r} is not between 0 and 1e6")
    _require_sparsity(recipe)


def _require_whole(name: str, value: object, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise errors.refuse("bad_value", name, f"{value!r} is not a whole number from {least} to {most}")


def _require_sparsity(recipe: Recipe) -> None:
    if not 1 <= recipe.k <= recipe.features:
        reason = f"{recipe.k!r} active features of {recipe.features}"
        raise errors.refuse("bad_value", "k", reason)
    if recipe.kind == "topk" and recipe.k != int(recipe.k):
        reason = f"{recipe.k!r} is not a whole number, and topk keeps as many in every row"
        raise errors.refuse("bad_value", "k", reason)
    ascending = all(
        a < b for a, b in zip((0, *recipe.levels), (*recipe.levels, recipe.features), strict=True)
    )
    if not ascending or bool(recipe.levels) != (recipe.kind == "matryoshka"):
        reason = f"{list(recipe.levels)} are not sizes that ascend below {recipe.features}"
        if recipe.kind != "matryoshka":
            reason = f"a {recipe.kind} dictionary has no levels"
        raise errors.refuse("bad_value", "levels", reason)
