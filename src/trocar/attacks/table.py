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
        how: what it does, in one line.
        reference: where it, or the idea of it, is described; empty where there is nothing to describe.
        run: makes it, with the purses of a raid.
        keys: how many keys take part.
        offline: whether the server has no way to run it, so that its off side is measured on the model itself.
    """

    name: str
    after: str
    how: str
    reference: str
    run: Callable[[Raid], Loot]
    keys: int = 1
    offline: bool = False


ATTACKS: Final = (
    Attack(
        "embedding-read", "the embedding",
        "reads the stream before the first block, whose row at a token is the token's row of the matrix",
        "", embedding.embedding_read,
    ),
    Attack(
        "hidden-dimension", "the width",
        "takes the rank of enough log-probabilities",
        "Carlini et al. 2024, arXiv:2403.06634", unembedding.hidden_dimension,
    ),
    Attack(
        "subspace", "the span of the unembedding",
        "collects log-probabilities, which span the matrix's columns, up to an invertible map of them",
        "Finlayson et al. 2024, arXiv:2403.09539", unembedding.subspace,
    ),
    Attack(
        "steer-logprobs", "the unembedding",
        "writes basis vectors where the matrix reads, so that log-probabilities are its columns with no map left open",
        "after Carlini et al. 2024", unembedding.steer,
    ),
    Attack(
        "basis-injection", "an MLP",
        "writes one neuron or one input at a time and reads what the MLP makes of it",
        "", layer.basis_injection,
    ),
    Attack(
        "passive-regression", "a value projection",
        "edits nothing: reads what the projection takes and gives on ordinary text, and solves for it",
        "", layer.passive_regression,
    ),
    Attack(
        "activation-target", "a value projection",
        "has the server fit a map from one site to the next, which is the matrix, and takes the map home",
        "fits as of tuned lenses: Belrose et al. 2023, arXiv:2303.08112", targets.probe,
    ),
    Attack(
        "gradient-read", "rows of the unembedding",
        "takes the gradient of a logit by the last row, which is a row of the matrix",
        "Milli et al. 2019, arXiv:1807.05185", unsaid.gradient_read, offline=True,
    ),
    Attack(
        "boolean-oracle", "the embedding",
        "asks for truth values alone, and halves an interval with each",
        "", embedding.boolean_oracle,
    ),
    Attack(
        "k-average", "the embedding",
        "asks for means over eight tokens alone, in a known design, and solves for the rows",
        "after Huth et al. 2023, who undid the sums of DataSHIELD", embedding.k_average,
    ),
    Attack(
        "coalition", "the embedding",
        "reads with five keys of five tenants, each some of the columns",
        "Douceur 2002, The Sybil Attack", embedding.coalition, keys=5,
    ),
    Attack(
        "adapter-initialisation", "a query projection",
        "takes an adapter that starts at the largest singular vectors of the matrix",
        "PiSSA, Meng et al. 2024, arXiv:2404.02948", unsaid.adapter_initialisation, offline=True,
    ),
)  # fmt: skip
BY_NAME: Final = {attack.name: attack for attack in ATTACKS}
