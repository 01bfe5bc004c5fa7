"""Training: SAELens's trainer, fed from a source, one public step at a time; TopK with the fused step.

A training can be cut short and taken up again: its state is arrays, and the rows that come next follow from the seed
and a count. With one thread the result has the same bits either way. No file is written, and no pickle is made.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from trocar import errors
from trocar.analysis import streams
from trocar.analysis.source import Source
from trocar.dictionaries import library
from trocar.dictionaries.batches import Batches
from trocar.dictionaries.dictionary import Dictionary, assemble
from trocar.dictionaries.recipe import Recipe, require

State = Mapping[str, npt.NDArray[Any]]
LENGTH_ROWS: Final = 65_536
WATCH_STEPS: Final = 50
_MOMENTS: Final = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a training is: steps, the loss of the last batch, and features that are dead by the recipe."""

    steps: int
    of: int
    loss: float
    dead: int


class Training:
    """One dictionary on its way.

    Args:
        state: what `state()` gave for the same recipe and rows.
        metadata: words to be kept in the dictionary's file, for example `model_name` and `hook_name`.
        fused: False trains TopK by the library's own step, which is slower and gives the same within rounding.

    Raises:
        ProgramError: `bad_value`, `too_few_rows`, `rows_not_finite`; `wrong_handle` for a state of another recipe.
        ClientError: `missing_extra`.
    """

    def __init__(
        self,
        source: Source,
        recipe: Recipe,
        *,
        state: State | None = None,
        metadata: Mapping[str, str] | None = None,
        fused: bool = True,
    ) -> None:
        require(recipe)
        self.recipe = recipe
        self._batches = Batches(source, recipe.batch, recipe.seed)
        self._metadata = dict(metadata or {})
        self._trainer = _trainer(recipe, source.width, self._batches, fused)
        if recipe.normalise:
            self._trainer.activation_scaler.scaling_factor = _scale(source)
        if state is not None:
            self._restore(state)

    @property
    def steps(self) -> int:
        """Steps that are done."""
        return int(self._trainer.n_training_steps)

    @property
    def done(self) -> bool:
        return self.steps >= self.recipe.steps

    def run(self, most: int | None = None, watch: Callable[[Progress], None] | None = None) -> None:
        """Trains to the end, or for at most so many steps.

        Args:
            watch: told after every 50th step and the last one; what it raises ends the run between two steps.

        Raises:
            RunFailed: `fit_not_converged` when the loss is not finite, seen when `watch` would be told.
            ProgramError: `rows_not_finite`.
        """
        last = self.recipe.steps if most is None else min(self.recipe.steps, self.steps + most)
        while self.steps < last:
            output = self._trainer.step(next(self._batches))
            self._trainer.n_training_steps += 1
            if self.steps % WATCH_STEPS == 0 or self.steps == last:
                progress = self._progress(float(output.loss.detach()))
                if watch is not None:
                    watch(progress)

    def _progress(self, loss: float) -> Progress:
        if not math.isfinite(loss):
            reason = f"the loss is {loss} after {self.steps} steps"
            raise errors.refuse("fit_not_converged", "rate", reason, next_step="Lower rate.")
        return Progress(self.steps, self.recipe.steps, loss, int(self._trainer.dead_neurons.sum()))

    def dictionary(self) -> Dictionary:
        """As it is now, for inference; training can go on."""
        trained = copy.deepcopy(self._trainer.sae)
        factor = self._trainer.activation_scaler.scaling_factor
        if factor is not None:
            trained.fold_activation_norm_scaling_factor(factor)
        tensors = {name: value.detach().clone() for name, value in trained.state_dict().items()}
        trained.process_state_dict_for_saving_inference(tensors)
        config = trained.cfg.get_inference_sae_cfg_dict()
        metadata = {**config["metadata"], **self._metadata}
        return assemble(config, {k: v.contiguous() for k, v in tensors.items()}, metadata)

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Everything that the next step needs, but the rows: plain arrays, for safetensors."""
        trainer = self._trainer
        out = {f"weights.{name}": _copied(value) for name, value in trainer.sae.state_dict().items()}
        for name, value in trainer.sae.named_parameters():
            kept = trainer.optimizer.state.get(value, {})
            out.update({f"adam.{name}.{part}": _copied(kept[part]) for part in _MOMENTS if part in kept})
        out["fired"] = _copied(trainer.act_freq_scores)
        out["idle"] = _copied(trainer.n_forward_passes_since_fired)
        out["counts"] = np.array([self.steps, trainer.n_training_samples, trainer.n_frac_active_samples])
        out["recipe"] = np.frombuffer(self.recipe.digest(), dtype=np.uint8).copy()
        return out

    def _restore(self, state: State) -> None:
        trainer = self._trainer
        if "recipe" not in state or state["recipe"].tobytes() != self.recipe.digest():
            step = "Resume with the recipe that the state was made with."
            raise errors.refuse("wrong_handle", "state", "it is of another recipe", next_step=step)
        steps, trainer.n_training_samples, trainer.n_frac_active_samples = (int(n) for n in state["counts"])
        trainer.n_training_steps = steps
        weights = {
            name: torch.from_numpy(state[f"weights.{name}"].copy()) for name in trainer.sae.state_dict()
        }
        trainer.sae.load_state_dict(weights)
        trainer.act_freq_scores = torch.from_numpy(state["fired"].copy())
        trainer.n_forward_passes_since_fired = torch.from_numpy(state["idle"].copy())
        if steps:
            for name, value in trainer.sae.named_parameters():
                arrays = {part: state[f"adam.{name}.{part}"].copy() for part in _MOMENTS}
                trainer.optimizer.state[value] = {k: torch.from_numpy(a) for k, a in arrays.items()}
        _replay(trainer, steps)
        self._batches.skip(steps)


def train(
    source: Source,
    recipe: Recipe,
    *,
    metadata: Mapping[str, str] | None = None,
    watch: Callable[[Progress], None] | None = None,
) -> Dictionary:
    """Trains a dictionary from start to end.

    Raises:
        ProgramError, RunFailed, ClientError: as `Training`.
    """
    training = Training(source, recipe, metadata=metadata)
    training.run(watch=watch)
    return training.dictionary()


def _trainer(recipe: Recipe, width: int, batches: Batches, fused: bool) -> Any:
    lens = library.saelens()
    settings = {
        "d_in": width,
        "d_sae": recipe.features,
        "normalize_activations": "expected_average_only_in" if recipe.normalise else "none",
    }
    pace = lens.config.SAETrainerConfig(
        total_training_samples=recipe.steps * recipe.batch,
        train_batch_size_samples=recipe.batch,
        lr=recipe.rate,
        lr_end=recipe.rate,
        lr_warm_up_steps=recipe.warm_up,
        lr_decay_steps=recipe.cool_down,
        dead_feature_window=recipe.dead_after,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        module = _module(lens, recipe, settings, fused)
    return lens.SAETrainer(pace, module, batches)


def _module(lens: Any, recipe: Recipe, settings: dict[str, Any], fused: bool) -> Any:
    if recipe.kind == "jumprelu":
        aim = {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": float(recipe.k)}
        penalty = {"l0_coefficient": recipe.penalty, "l0_warm_up_steps": recipe.penalty_warm_up}
        return lens.JumpReLUTrainingSAE(lens.JumpReLUTrainingSAEConfig(**settings, **aim, **penalty))
    if recipe.kind == "batch_topk":
        return lens.BatchTopKTrainingSAE(lens.BatchTopKTrainingSAEConfig(**settings, k=float(recipe.k)))
    if recipe.kind == "matryoshka":
        levels = [*recipe.levels, recipe.features]
        config = lens.MatryoshkaBatchTopKTrainingSAEConfig(
            **settings, k=float(recipe.k), matryoshka_widths=levels
        )
        return lens.MatryoshkaBatchTopKTrainingSAE(config)
    from trocar.dictionaries.fused import FusedTopK

    kind = FusedTopK if fused else lens.TopKTrainingSAE
    return kind(lens.TopKTrainingSAEConfig(**settings, k=int(recipe.k)))


def _scale(source: Source) -> float:
    """What makes the mean length of the first rows the square root of their width."""
    total, rows = 0.0, 0
    for block in streams.finite(source):
        total += float(np.sqrt(np.einsum("nd,nd->n", block, block, dtype=np.float64)).sum())
        rows += len(block)
        if rows >= LENGTH_ROWS:
            break
    if not total > 0:
        raise errors.refuse("too_few_rows", "rows", f"the first {rows} rows are zero")
    return math.sqrt(source.width) * rows / total


def _replay(trainer: Any, steps: int) -> None:
    """Takes the schedules to where they were; they follow from the number of steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # schedules expect a step of the optimizer before each of theirs
        for _ in range(steps):
            trainer.lr_scheduler.step()
            for schedule in trainer.coefficient_schedulers.values():
                schedule.step()


def _copied(value: torch.Tensor) -> npt.NDArray[Any]:
    return np.array(value.detach().cpu().numpy())
