"""Linear layers whose weights lie in the order in which the CPU reads them, so that a row is a row.

The plain float32 GEMM of torch takes other paths for few rows than for many, and a prompt's numbers would depend
on how many strangers share the step. The packed GEMM of oneDNN gives the same bits for a row whatever stands beside
it (tested from 1 to 300 rows), and is quicker. It has no gradient. This module knows nothing about models beyond
the two kinds of linear layers that the library has; what cannot be packed stays as it is, and says so.
"""

from __future__ import annotations

import copy
from typing import Any, Final

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

_ROWS_HINT: Final = 16


class PackedLinear(nn.Module):
    """`x @ weight.T + bias` with the matrix packed; float32 on the CPU, no gradient.

    A deep copy is the plain layer that it was made from, and `state_dict` has that layer's names and shapes.

    Args:
        layer: the layer to stand in for.
        tied: the parameter that the layer shares with the embedding, whose dense form stays in memory anyway.
    """

    def __init__(self, layer: nn.Linear | Conv1D, tied: nn.Parameter | None = None) -> None:
        super().__init__()
        self.transposed = isinstance(layer, Conv1D)
        dense = layer.weight.detach()
        dense = dense.T.contiguous() if self.transposed else dense.contiguous()
        self.out_features, self.in_features = (int(n) for n in dense.shape)
        self.bias = layer.bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(dense, _ROWS_HINT)
        # in a tuple, because a module would list a bare parameter as its own
        self._tied = (tied,)

    @property
    def weight(self) -> torch.Tensor:
        """The dense matrix `[out, in]`: the embedding's own where it is tied, else unpacked for this call."""
        (tied,) = self._tied
        if tied is not None:
            return tied
        dense: torch.Tensor = self._packed.to_dense()
        return dense

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` to `[..., out]`."""
        assert not (x.requires_grad and torch.is_grad_enabled()), (
            "packed weights have no gradient: pack=False"
        )
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return out

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
    found = [(path, layer) for path, layer in model.named_modules() if type(layer) in (nn.Linear, Conv1D)]
    for path, layer in found:
        parent, _, name = path.rpartition(".")
        tied = shared if layer.weight is shared else None
        setattr(model.get_submodule(parent), name, PackedLinear(layer, tied))
    return len(found)
