"""The table of attacks: name, what each is after, where it is described, and the function that makes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from trocar.attacks import embedding, layer, targets, unembedding, unsaid
from trocar.attacks.loot import Loot
from trocar.attacks.purse import Raid


@dataclass(frozen=True, slots=True)
class Attack:
    """One row.

    Attributes:
        name: as the command line and reports spell it.
        after: what it is after.
        reference: where it is described.
        run: makes it, with the purses of a raid.
        keys: how many keys take part.
        offline: whether the server has no way to run it, so that its off side is measured on the model itself.
    """

    name: str
    after: str
    reference: str
    run: Callable[[Raid], Loot]
    keys: int = 1
    offline: bool = False


ATTACKS: Final = (
    Attack("embedding-read", "the embedding", "the stream at layer 0 is a row of it", embedding.embedding_read),
    Attack("hidden-dimension", "the width", "Carlini et al. 2024", unembedding.hidden_dimension),
    Attack("subspace", "the unembedding's span", "Finlayson et al. 2024", unembedding.subspace),
    Attack("steer-logprobs", "the unembedding", "basis vectors where it reads", unembedding.steer),
    Attack("basis-injection", "an MLP", "basis vectors where it reads", layer.basis_injection),
    Attack("passive-regression", "a value projection", "least squares on text", layer.passive_regression),
    Attack("activation-target", "a value projection", "a probe from one site to another", targets.probe),
    Attack("gradient-read", "rows of the unembedding", "Milli et al. 2019", unsaid.gradient_read, offline=True),
    Attack("boolean-oracle", "the embedding", "bisection by truth values", embedding.boolean_oracle),
    Attack("k-average", "the embedding", "means with a known design", embedding.k_average),
    Attack("coalition", "the embedding", "several keys, one secret", embedding.coalition, keys=5),
    Attack(
        "adapter-initialisation", "a query projection", "PiSSA, Meng et al. 2024", unsaid.adapter_initialisation,
        offline=True,
    ),
)  # fmt: skip
BY_NAME: Final = {attack.name: attack for attack in ATTACKS}
