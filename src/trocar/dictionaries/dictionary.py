"""A trained dictionary: rows to feature activations and back, in blocks; the arithmetic is SAELens's.

Legend: N rows, D width, F features, O width of what comes out (D, but for a transcoder).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trocar import errors
from trocar.analysis import streams
from trocar.analysis.labels import Ints
from trocar.analysis.source import BLOCK_ROWS, Block, Source
from trocar.dictionaries import library

ACTS_BYTES: Final = 64 << 20


class Dictionary:
    """Features of rows.

    Attributes:
        architecture: SAELens's name of the inference class, for example `topk`; a dictionary trained as `batch_topk`
            or `matryoshka` is a `jumprelu` with one threshold.
        metadata: what its file says about where it came from; nothing here reads it.
    """

    def __init__(self, module: Any, metadata: Mapping[str, Any]) -> None:
        self._module = module.eval().requires_grad_(False)
        self.metadata = dict(metadata)
        self.architecture: str = module.cfg.architecture()

    @property
    def width(self) -> int:
        return int(self._module.cfg.d_in)

    @property
    def width_out(self) -> int:
        """Of reconstructions."""
        return int(self._module.W_dec.shape[1])

    @property
    def features(self) -> int:
        return int(self._module.cfg.d_sae)

    @property
    def block_rows(self) -> int:
        """How many rows to encode at once: a block, or fewer where their activations would take `ACTS_BYTES`."""
        return max(1, min(BLOCK_ROWS, ACTS_BYTES // (4 * self.features)))

    @property
    def config(self) -> dict[str, Any]:
        """As SAELens writes it to `cfg.json`."""
        return {**self._module.cfg.to_dict(), "metadata": self.metadata}

    def tensors(self) -> dict[str, Tensor]:
        """As SAELens names them: copies, float32."""
        return {name: value.detach().clone() for name, value in self._module.state_dict().items()}

    def encode(self, rows: Block) -> Block:
        """float32 [N, F]: zero for features that are not active."""
        with torch.no_grad():
            acts: Block = self._module.encode(torch.from_numpy(rows)).numpy()
        return acts

    def decode(self, acts: Block) -> Block:
        """float32 [N, O] from [N, F]; without what a skip connection would add."""
        with torch.no_grad():
            out: Block = self._module.decode(torch.from_numpy(acts)).numpy()
        return out

    def both(self, rows: Block) -> tuple[Block, Block]:
        """Activations [N, F] and reconstructions [N, O] of the same rows."""
        acts = self.encode(rows)
        out = self.decode(acts)
        if hasattr(self._module, "W_skip"):
            out += rows @ self._module.W_skip.numpy().T
        return acts, out

    def require(self, source: Source) -> None:
        """Refuses with `width_mismatch` rows of another width."""
        if source.width != self.width:
            reason = f"the dictionary takes rows of width {self.width}, not {source.width}"
            raise errors.refuse("width_mismatch", "rows", reason)


def assemble(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> Dictionary:
    """The dictionary of a config and tensors of SAELens that are known to fit each other."""
    module = skeleton(config)
    module.cfg.device = "cpu"
    module.load_state_dict(dict(tensors), assign=True)
    return Dictionary(module.to(device="cpu", dtype=torch.float32), metadata)


def skeleton(config: Mapping[str, Any]) -> Any:
    """SAELens's module for a config, without memory for its weights."""
    kind, settings = library.saelens().registry.get_sae_class(config["architecture"])
    chosen = {name: value for name, value in config.items() if name not in ("architecture", "metadata")}
    return kind(settings(**{**chosen, "dtype": "float32", "device": "meta"}))


@dataclass(frozen=True, slots=True, eq=False)
class Codes:
    """The active features of some rows, row by row.

    Attributes:
        first: number of the first row.
        starts: int64 [n + 1]; row i has the entries from `starts[i]` to `starts[i + 1]`.
        features: int64 [m], ascending in each row.
        values: float32 [m].
    """

    first: int
    starts: Ints
    features: Ints
    values: npt.NDArray[np.float32]


def encode(dictionary: Dictionary, source: Source) -> Iterator[Codes]:
    """The codes of all rows, a block at a time.

    Raises:
        ProgramError: `width_mismatch`, `rows_not_finite`.
    """
    dictionary.require(source)
    first = 0
    for block in streams.finite(source, most=dictionary.block_rows):
        acts = dictionary.encode(block)
        row, feature = np.nonzero(acts)
        starts = np.searchsorted(row, np.arange(len(block) + 1)).astype(np.int64)
        yield Codes(first, starts, feature.astype(np.int64), acts[row, feature])
        first += len(block)


class FeatureRows:
    """Activations of a dictionary as rows, for whatever reads a `Source`: probes on features, clusters of them.

    Raises:
        ProgramError: `width_mismatch`; `rows_not_finite` when such a row is read.
    """

    def __init__(self, dictionary: Dictionary, source: Source) -> None:
        dictionary.require(source)
        self._dictionary, self._source = dictionary, source

    @property
    def width(self) -> int:
        return self._dictionary.features

    def __len__(self) -> int:
        return len(self._source)

    def blocks(self, most: int = BLOCK_ROWS) -> Iterator[Block]:
        for block in streams.finite(self._source, most=min(most, self._dictionary.block_rows)):
            yield self._dictionary.encode(block)
