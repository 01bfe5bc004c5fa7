"""Dictionaries on disk, as SAELens keeps them: a folder with `cfg.json` and `sae_weights.safetensors`.

Nothing is believed: the config is read as JSON with closed names, the weights as safetensors, whose names and shapes
must be those that the config asks for before memory is taken for them. Files that are pickles are never opened.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trocar import errors, strict
from trocar.dictionaries import library
from trocar.dictionaries.dictionary import Dictionary, assemble, skeleton
from trocar.dictionaries.recipe import MOST_FEATURES

CONFIG: Final = "cfg.json"
WEIGHTS: Final = "sae_weights.safetensors"
ARCHITECTURES: Final = (
    "gated", "jumprelu", "jumprelu_skip_transcoder", "jumprelu_transcoder", "skip_transcoder", "standard", "topk",
    "transcoder",
)  # fmt: skip
_DTYPES: Final = ("BF16", "F16", "F32")
_MOST_CONFIG_BYTES: Final = 1 << 20
_MOST_WIDTH: Final = 1 << 20
_OTHERS: Final = {"sae.safetensors": "sparsify", "ae.pt": "dictionary-learning", "params.npz": "Gemma Scope"}
_FOLDED: Final = ("none", "layer_norm", "constant_norm_rescale")


def save(dictionary: Dictionary, folder: Path) -> None:
    """Writes a new folder; it is there as a whole or not at all.

    Raises:
        ProgramError: `bad_value` when something of that name exists.
    """
    if folder.exists():
        raise errors.refuse("bad_value", "folder", f"{folder.name!r} exists already")
    making = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        save_file(dictionary.tensors(), making / WEIGHTS)
        (making / CONFIG).write_text(json.dumps(dictionary.config, allow_nan=False))
        for path in (making / WEIGHTS, making / CONFIG, making):
            _sync(path)
        making.chmod(0o755)
        making.rename(folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    _sync(folder.parent)


def load(folder: Path) -> Dictionary:
    """Reads a folder that SAELens 6 or `save` wrote; weights become float32.

    Raises:
        ProgramError: `bad_dictionary` with the file at fault, for what is missing, damaged, unknown, or does not fit.
    """
    config = _config(folder)
    metadata = config.pop("metadata", {})
    module = _skeleton(config)
    tensors = _tensors(folder, {name: tuple(value.shape) for name, value in module.state_dict().items()})
    return assemble(config, tensors, metadata)


def _bad(file: str, reason: str, closest: str | None = None) -> errors.TrocarError:
    return errors.refuse("bad_dictionary", file, reason, closest=closest)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise _bad(CONFIG, f"there is no {CONFIG} in {folder.name!r}{_another(folder)}")
    if path.stat().st_size > _MOST_CONFIG_BYTES:
        raise _bad(CONFIG, f"it is longer than {_MOST_CONFIG_BYTES} bytes")
    try:
        found = strict.read_json(path.read_bytes(), most_keys=1000)
    except errors.TrocarError as e:
        raise _bad(CONFIG, e.reason) from None
    if not isinstance(found, dict):
        raise _bad(CONFIG, "it is not a JSON object")
    if not isinstance(found.get("metadata", {}), dict):
        raise _bad(f"{CONFIG}: metadata", "it is not a JSON object")
    _require_settings(found)
    return found


def _another(folder: Path) -> str:
    """Says so when the folder is in the format of another library."""
    kinds = [kind for name, kind in _OTHERS.items() if (folder / name).exists()]
    return f"; its files are those of {kinds[0]}" if kinds else ""


def _require_settings(config: Mapping[str, Any]) -> None:
    name = config.get("architecture")
    if name not in ARCHITECTURES:
        near = errors.closest(str(name), ARCHITECTURES)
        reason = f"{name!r} is not one of {', '.join(ARCHITECTURES)}"
        raise _bad(f"{CONFIG}: architecture", reason, near)
    _, settings = library.saelens().registry.get_sae_class(name)
    kinds = {field.name: field.type for field in fields(settings)}
    for key in config:
        if key not in kinds and key not in ("architecture", "metadata"):
            reason = f"{key!r} is not a setting of {name} in SAELens 6"
            raise _bad(f"{CONFIG}: {key}", reason, errors.closest(key, kinds))
    for key, most in {
        "d_in": _MOST_WIDTH,
        "d_out": _MOST_WIDTH,
        "d_sae": MOST_FEATURES,
        "k": MOST_FEATURES,
    }.items():
        if key in kinds:
            _require_whole(config, key, most)
    if "k" in kinds and config["k"] > config["d_sae"]:
        raise _bad(f"{CONFIG}: k", f"{config['k']} active features of {config['d_sae']}")
    _require_rows_as_they_are(config)


def _require_whole(config: Mapping[str, Any], key: str, most: int) -> None:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise _bad(f"{CONFIG}: {key}", f"{value!r} is not a whole number from 1 to {most}")


def _require_rows_as_they_are(config: Mapping[str, Any]) -> None:
    for key in ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm"):
        if not isinstance(config.get(key, True), bool):
            raise _bad(f"{CONFIG}: {key}", f"{config[key]!r} is not true or false")
    if config.get("normalize_activations", "none") not in _FOLDED:
        reason = f"{config['normalize_activations']!r}: its scale is not in the file; fold it into the weights first"
        raise _bad(f"{CONFIG}: normalize_activations", reason)
    if config.get("reshape_activations", "none") != "none":
        reason = f"{config['reshape_activations']!r}: rows of a site already have their heads side by side"
        raise _bad(f"{CONFIG}: reshape_activations", reason)


def _skeleton(config: Mapping[str, Any]) -> Any:
    try:
        return skeleton(config)
    except (TypeError, ValueError) as e:
        raise _bad(CONFIG, f"SAELens does not take it: {e}") from None


def _tensors(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise _bad(WEIGHTS, f"there is no {WEIGHTS} in {folder.name!r}{_another(folder)}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            _require_shapes({name: file.get_slice(name) for name in file.keys()}, shapes)  # noqa: SIM118 - no dict
            return {name: _finite(name, file.get_tensor(name)) for name in shapes}
    except (SafetensorError, OSError) as e:
        raise _bad(WEIGHTS, f"it is damaged, or not safetensors: {e}") from None


def _require_shapes(found: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name in shapes:
        if name not in found:
            raise _bad(f"{WEIGHTS}: {name}", "there is no such tensor", errors.closest(name, found))
    for name, part in found.items():
        if name not in shapes:
            near = errors.closest(name, shapes)
            raise _bad(f"{WEIGHTS}: {name[:80]}", "the config has no use for this tensor", near)
        if part.get_dtype() not in _DTYPES:
            raise _bad(f"{WEIGHTS}: {name}", f"it is {part.get_dtype()}, not one of {', '.join(_DTYPES)}")
        if tuple(part.get_shape()) != shapes[name]:
            reason = f"it is {list(part.get_shape())}, and the config asks for {list(shapes[name])}"
            raise _bad(f"{WEIGHTS}: {name}", reason)


def _finite(name: str, tensor: Tensor) -> Tensor:
    found = tensor.to(torch.float32)
    if not bool(torch.isfinite(found).all()):
        raise _bad(f"{WEIGHTS}: {name}", "it holds NaN or an infinity")
    return found


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
