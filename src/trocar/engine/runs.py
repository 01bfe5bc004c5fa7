"""The state of one task while it is live: constants on the device, receipts, what a prompt keeps, failure."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Final

import torch

from trocar import errors
from trocar.engine.protocol import EditEffect, Task
from trocar.graph import ops
from trocar.sites import Site, parse

SiteNode = ops.Read | ops.EditNode
SITE_NODES: Final = (ops.Read, *ops.EDIT_NODES)
PROMPT_LEVEL: Final = frozenset({"per_prompt", "prompt_scalars", "prompt_mask"})
REQUEST_LEVEL: Final = frozenset({"vector", "matrix", "dictionary"})


@dataclass(slots=True)
class Tally:
    """Running effect of one edit: rows, and sums of their norms before and after."""

    rows: int = 0
    before: float = 0.0
    after: float = 0.0

    def add(self, rows: int, before: float, after: float) -> None:
        self.rows += rows
        self.before += before
        self.after += after

    def effect(self, name: str) -> EditEffect:
        rows = max(self.rows, 1)
        return EditEffect(name, self.rows, self.before / rows, self.after / rows)


@dataclass(frozen=True, slots=True)
class Dictionary:
    """A sparse autoencoder on the device: w_enc [D, F], b_enc [F], w_dec [F, D], b_dec [D]."""

    node: ops.Sae
    w_enc: torch.Tensor
    b_enc: torch.Tensor
    w_dec: torch.Tensor
    b_dec: torch.Tensor
    threshold: torch.Tensor | None

    def encode(self, rows_ND: torch.Tensor) -> torch.Tensor:
        """Feature activations [N, F]."""
        centred_ND = rows_ND - self.b_dec if self.node.center else rows_ND
        raw_NF = centred_ND @ self.w_enc + self.b_enc
        if self.threshold is not None:
            return torch.where(raw_NF > self.threshold, raw_NF, 0.0)
        acts_NF = raw_NF.relu()
        return acts_NF if self.node.activation == "relu" else top_k(acts_NF, self.node.k or 1)

    def decode(self, acts_NF: torch.Tensor) -> torch.Tensor:
        return acts_NF @ self.w_dec + self.b_dec


def top_k(rows_ND: torch.Tensor, k: int) -> torch.Tensor:
    """All but the k largest numbers of each row become zero; of equal ones the first stays."""
    order = rows_ND.argsort(dim=-1, descending=True, stable=True)[..., :k]
    return torch.zeros_like(rows_ND).scatter_(-1, order, rows_ND.gather(-1, order))


@dataclass(slots=True, eq=False)
class Run:
    """One task from its first step to its last.

    Attributes:
        kept: one-row-per-prompt values by prompt, once its prompt has been seen.
        failed: why the task stopped, if it did.
        serial: tells this run from every other, also from one that is gone.
        ats: the selectors of its reads and edits.
    """

    task: Task
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    dictionaries: dict[str, Dictionary] = field(default_factory=dict)
    tallies: dict[str, Tally] = field(default_factory=dict)
    kept: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    nodes: dict[str, ops.Node] = field(default_factory=dict)
    by_site: dict[Site, list[SiteNode]] = field(default_factory=dict)
    columns: dict[str, torch.Tensor] = field(default_factory=dict)
    failed: errors.TrocarError | None = None
    serial: int = field(default_factory=itertools.count().__next__)
    ats: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checked = self.task.checked
        self.constants = {name: torch.from_numpy(v) for name, v in self.task.vectors.items()}
        self.tallies = {node.id: Tally() for node in checked.edits()}
        self.nodes = {node.id: node for node in checked.program.nodes}
        self.columns = {name: torch.tensor(c) for name, c in checked.columns.items()}
        for node in checked.program.nodes:
            if isinstance(node, SITE_NODES):
                self.by_site.setdefault(parse(node.site), []).append(node)
            elif isinstance(node, ops.Sae):
                self.dictionaries[node.id] = self._dictionary(node)

        self.ats = tuple(dict.fromkeys(n.at for nodes in self.by_site.values() for n in nodes))

    def _dictionary(self, node: ops.Sae) -> Dictionary:
        arrays = [self.constants[f"{node.id}.{part}"] for part in ("w_enc", "b_enc", "w_dec", "b_dec")]
        threshold = None if node.threshold is None else self.constants[f"{node.id}.threshold"]
        return Dictionary(node, arrays[0], arrays[1], arrays[2], arrays[3], threshold)

    def kind(self, name: str) -> str:
        return self.task.checked.values[name].kind

    def fail(self, error: errors.TrocarError) -> None:
        """The first reason counts."""
        self.failed = self.failed or error

    def effects(self) -> tuple[EditEffect, ...]:
        return tuple(tally.effect(name) for name, tally in self.tallies.items())

    def scale(self, node_id: str) -> float:
        """What a coefficient of this edit counts in."""
        return self.task.checked.scales.get(node_id, 1.0)
