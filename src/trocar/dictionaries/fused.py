"""SAELens's TopK training step with sparsify's encoder and a decoder that touches active features only.

Loss and gradients are those of `TopKTrainingSAE`, auxiliary loss included: sparsify gives the gradients of the
active features, k of thousands, and of the dead ones a product of their own. This module is loaded after
`library.saelens`, because it extends classes of an optional package.

Legend: N rows, D width, F features, K active per row.
"""

from __future__ import annotations

from typing import Any, Final, cast

import torch
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopKTrainingSAE, act_times_W_dec, calculate_topk_aux_acts
from sparsify.fused_encoder import fused_encoder
from torch import Tensor
from torch.nn.functional import embedding_bag

PRODUCT_BYTES: Final = 256 << 20  # the kernel's backward pass holds N x K x D numbers at once


class FusedTopK(TopKTrainingSAE):  # type: ignore[misc]
    """Raises ValueError for what the kernel does not do: rows normalised one by one, heads apart, sparse tensors."""

    def __init__(self, cfg: Any) -> None:
        rowwise = cfg.normalize_activations in ("constant_norm_rescale", "layer_norm")
        if rowwise or cfg.reshape_activations != "none" or cfg.use_sparse_activations:
            raise ValueError("the fused step takes rows as they are, or scaled or whitened as a whole")
        super().__init__(cfg)

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        x_ND = step_input.sae_in
        inside_ND = self.process_sae_in(x_ND)
        values_NK, features_NK = self._active(inside_ND)
        out_ND = self._decoded(values_NK, features_NK)
        mse = self.mse_loss_fn(out_ND, x_ND).sum(dim=-1).mean()
        auxiliary = self._auxiliary(inside_ND, (x_ND - out_ND).detach(), step_input.dead_neuron_mask)
        with torch.no_grad():
            acts_NF = torch.zeros(len(x_ND), self.cfg.d_sae, dtype=values_NK.dtype, device=values_NK.device)
            acts_NF.scatter_(1, features_NK, values_NK)
        return TrainStepOutput(
            sae_in=x_ND,
            sae_out=out_ND,
            feature_acts=acts_NF,
            hidden_pre=acts_NF,  # nothing but logs of the library reads it
            loss=mse + auxiliary,
            losses={"mse_loss": mse, "auxiliary_reconstruction_loss": auxiliary},
        )

    def _active(self, inside_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Values and numbers of the K largest features of each row."""
        weight_FD, bias_F = self.W_enc.T, self.b_enc
        if self.cfg.rescale_acts_by_decoder_norm:
            norm_F = self.W_dec.norm(dim=-1)
            weight_FD, bias_F = weight_FD * norm_F[:, None], bias_F * norm_F
        weight_FD = weight_FD.contiguous()  # without this the kernel is as slow as the dense step
        rows = max(1, PRODUCT_BYTES // (self.cfg.k * self.cfg.d_in * inside_ND.element_size()))
        parts = [
            fused_encoder(part, weight_FD, bias_F, self.cfg.k, "topk")
            for part in torch.split(inside_ND, rows)
        ]
        values_NK = torch.cat([part.top_acts for part in parts])
        # The kernel gives features at zero the gradient of active ones; relu takes it away again.
        return values_NK.relu(), torch.cat([part.top_indices for part in parts])

    def _decoded(self, values_NK: Tensor, features_NK: Tensor) -> Tensor:
        if self.cfg.rescale_acts_by_decoder_norm:
            values_NK = values_NK * (1 / self.W_dec.norm(dim=-1))[features_NK]
        out_ND = embedding_bag(features_NK, self.W_dec, mode="sum", per_sample_weights=values_NK)
        return out_ND + cast(Tensor, self.b_dec)

    def _auxiliary(self, inside_ND: Tensor, residual_ND: Tensor, dead_F: Tensor | None) -> Tensor:
        """What dead features fail to say about the residual, as in the library, computed for them alone."""
        dead = 0 if dead_F is None else int(dead_F.sum())
        if dead_F is None or not dead:
            return residual_ND.new_tensor(0.0)
        most = residual_ND.shape[-1] // 2
        which = dead_F.nonzero()[:, 0]
        rescale = self.cfg.rescale_acts_by_decoder_norm
        decoder = self.W_dec[which]
        before = inside_ND @ self.W_enc[:, which] + self.b_enc[which]
        if rescale:
            before = before * decoder.norm(dim=-1)
        acts = calculate_topk_aux_acts(min(most, dead), before, torch.ones_like(which, dtype=torch.bool))
        found_ND = act_times_W_dec(acts, decoder, rescale)
        loss: Tensor = (found_ND - residual_ND).pow(2).sum(dim=-1).mean()
        return loss * float(self.cfg.aux_loss_coefficient * min(dead / most, 1.0))
