"""Rows made of few atoms, whose dictionary is known, and modules of SAELens with random weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from trocar.dictionaries import Dictionary, library
from trocar.dictionaries.dictionary import assemble

Rows = npt.NDArray[np.float32]
WIDTH, ATOMS = 12, 16


def made_of_atoms(n: int = 3000, active: int = 2, seed: int = 0, scale: float = 1.0) -> tuple[Rows, Rows]:
    """Rows [n, 12] of `active` of 16 atoms each, and the atoms [16, 12] of length 1."""
    rng = np.random.default_rng(seed)
    atoms = rng.standard_normal((ATOMS, WIDTH))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    chosen = np.argsort(rng.random((n, ATOMS)), axis=1) < active
    strength = np.where(chosen, rng.uniform(1, 2, (n, ATOMS)), 0)
    return (scale * (strength @ atoms + 0.01 * rng.standard_normal((n, WIDTH)))).astype(
        np.float32
    ), atoms.astype(np.float32)


def random_dictionary(architecture: str = "topk", seed: int = 0, **settings: Any) -> Dictionary:
    """Of an inference class of SAELens, width 12 to 16 features; transcoders give rows of width 7."""
    kind, config = library.saelens().registry.get_sae_class(architecture)
    if "transcoder" in architecture:
        settings = {"apply_b_dec_to_input": False, "d_out": 7, **settings}
    if architecture == "topk":
        settings = {"k": 3, **settings}
    module = kind(config(d_in=WIDTH, d_sae=ATOMS, **settings))
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(v.shape, generator=generator) for name, v in module.state_dict().items()}
    if "threshold" in tensors:
        tensors["threshold"].abs_()
    return assemble({**module.cfg.to_dict(), "architecture": architecture}, tensors, {"hook_name": "here"})
