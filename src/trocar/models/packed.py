"""Linear layers whose weights lie in the order in which the CPU reads them, so that a row is a row.

The plain float32 GEMM of torch takes other paths for few rows than for many, and a prompt's numbers would depend
on how many strangers share the step. The packed GEMM of oneDNN gives the same bits for a row whatever stands beside
it (tested from 1 to 300 rows), and is quicker. It has no gradient. This module knows nothing about models beyond
the two kinds of linear layers that the library has; what cannot be packed stays as it is, and says so.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

_ROWS_HINT: Final = 16
TOGETHER: Final = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers that read one input, where they stand in one module."""


class Panel:
    """One packed matrix for layers that read the same rows; the product is made for the first that asks.

    A layer that asks with the very tensor of the last call takes its columns of the product that is there; with
    another one, or a second time, the product is made anew. Nobody may write into the tensor between the first and
    the last layer: the models call them in one expression. Layers in other threads do not disturb each other, they
    only compute more.
    """

    def __init__(self, layers: Sequence[nn.Linear | Conv1D]) -> None:
        parts = [_dense(layer) for layer in layers]
        self._packed = torch.ops.mkldnn._reorder_linear_weight(torch.cat(parts), _ROWS_HINT)
        given = [layer.bias for layer in layers]
        made = [torch.zeros(len(p)) if b is None else b for p, b in zip(parts, given, strict=True)]
        self._bias = None if all(b is None for b in given) else torch.cat(made)
        self._count = len(layers)
        self._last: tuple[torch.Tensor, torch.Tensor, set[int]] | None = None

    def columns(self, x: torch.Tensor, part: int, here: slice) -> torch.Tensor:
        """`[..., in]` to `[..., out]` of one layer: a view of the product."""
        if self._count == 1:
            return self._product(x)
        last = self._last
        if last is None or last[0] is not x or part in last[2]:
            last = self._last = (x, self._product(x), set())
        last[2].add(part)
        if len(last[2]) == self._count:
            self._last = None
        return last[1][..., here]

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return out

    def dense(self, here: slice) -> torch.Tensor:
        """The matrix `[out, in]` of one layer, unpacked."""
        whole: torch.Tensor = self._packed.to_dense()
        return whole if self._count == 1 else whole[here].clone()


def _dense(layer: nn.Linear | Conv1D) -> torch.Tensor:
    dense = layer.weight.detach()
    return dense.T.contiguous() if isinstance(layer, Conv1D) else dense.contiguous()


class PackedLinear(nn.Module):
    """`x @ weight.T + bias` with the matrix packed; float32 on the CPU, no gradient.

    A deep copy is the plain layer that it was made from, and `state_dict` has that layer's names and shapes.

    Args:
        layer: the layer to stand in for.
        tied: the parameter that the layer shares with the embedding, whose dense form stays in memory anyway.
        place: the panel that holds its matrix, which of the panel's layers it is, and its first column of the
            product; a panel of its own by default.
    """

    def __init__(
        self,
        layer: nn.Linear | Conv1D,
        tied: nn.Parameter | None = None,
        place: tuple[Panel, int, int] | None = None,
    ) -> None:
        super().__init__()
        self.transposed = isinstance(layer, Conv1D)
        size = [int(n) for n in layer.weight.shape]
        self.out_features, self.in_features = reversed(size) if self.transposed else size
        self.bias = layer.bias
        panel, part, start = place or (Panel([layer]), 0, 0)
        self._place = (panel, part, slice(start, start + self.out_features))
        # in a tuple, because a module would list a bare parameter as its own
        self._tied = (tied,)

    @property
    def weight(self) -> torch.Tensor:
        """The dense matrix `[out, in]`: the embedding's own where it is tied, else unpacked for this call."""
        (tied,), (panel, _, here) = self._tied, self._place
        return panel.dense(here) if tied is None else tied

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` to `[..., out]`."""
        assert not (x.requires_grad and torch.is_grad_enabled()), (
            "packed weights have no gradient: pack=False"
        )
        panel, part, here = self._place
        return panel.columns(x, part, here)

    def plain(self) -> nn.Linear | Conv1D:
        """The layer that this one stands in for."""
        with torch.device("meta"):
            size = (self.out_features, self.in_features)
            made = Conv1D(*size) if self.transposed else nn.Linear(size[1], size[0], self.bias is not None)
        (tied,) = self._tied
        made.weight = nn.Parameter(self._stored(), requires_grad=False) if tied is None else tied
        made.bias = self.bias
        return made

    def _stored(self) -> torch.Tensor:
        return self.weight.T.contiguous() if self.transposed else self.weight

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return copy.deepcopy(self.plain(), memo)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self._stored().detach()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLinear:
        raise TypeError(
            "packed weights stay float32 on the CPU: load with pack=False, or convert a deep copy"
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )


def can_pack(model: nn.Module) -> bool:
    """Whether `pack` would do anything: all parameters are float32 on the CPU, and oneDNN is there."""
    here = all(p.device.type == "cpu" and p.dtype == torch.float32 for p in model.parameters())
    return here and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


def pack(model: Any) -> int:
    """Replaces every linear layer of `model` in place and returns how many; 0 where `can_pack` is False."""
    if not can_pack(model):
        return 0
    shared = model.get_input_embeddings().weight
    count = 0
    for parent in list(model.modules()):
        here = {name: x for name, x in parent.named_children() if type(x) in (nn.Linear, Conv1D)}
        for names in _panels(here):
            count += len(names)
            _pack_together(parent, {name: here[name] for name in names}, shared)
    return count


def _panels(layers: dict[str, Any]) -> list[tuple[str, ...]]:
    """The names of a module's linear layers, those together that share a panel."""
    joint = [
        names
        for names in TOGETHER
        if all(n in layers for n in names) and len({layers[n].in_features for n in names}) == 1
    ]
    taken = {name for names in joint for name in names}
    return [*joint, *((name,) for name in layers if name not in taken)]


def _pack_together(parent: nn.Module, layers: dict[str, Any], shared: nn.Parameter) -> None:
    panel, start = Panel(list(layers.values())), 0
    for part, (name, layer) in enumerate(layers.items()):
        made = PackedLinear(layer, shared if layer.weight is shared else None, (panel, part, start))
        setattr(parent, name, made)
        start += made.out_features
