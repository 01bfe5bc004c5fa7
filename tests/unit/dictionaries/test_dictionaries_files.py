"""Files: what we save SAELens reads, what SAELens saves we read, and whatever is wrong with a folder is named."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dictionaries_rows import WIDTH, made_of_atoms, random_dictionary
from safetensors.torch import load_file, save_file

from trocar import errors
from trocar.analysis.source import ArraySource
from trocar.dictionaries import Recipe, library, load, save, train
from trocar.dictionaries.files import ARCHITECTURES

pytestmark = pytest.mark.skipif(importlib.util.find_spec("sae_lens") is None, reason="needs the extra `sae`")

ROWS = np.random.default_rng(0).standard_normal((60, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_round_trip_gives_the_same_bits(architecture: str, tmp_path: Path) -> None:
    dictionary = random_dictionary(architecture)
    save(dictionary, tmp_path / "d")
    again = load(tmp_path / "d")
    assert again.architecture == architecture
    assert again.metadata == {"hook_name": "here"}
    for one, other in zip(dictionary.both(ROWS), again.both(ROWS), strict=True):
        assert np.array_equal(one, other)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["cfg.json", "d", "sae_weights.safetensors"]


@pytest.mark.parametrize("kind", ["topk", "batch_topk"])
def test_saelens_reads_what_we_save(kind: Any, tmp_path: Path) -> None:
    rows = ArraySource(made_of_atoms(500)[0])
    dictionary = train(rows, Recipe(kind, 32, rows=64 * 40, k=2, batch=64, rate=1e-2))
    save(dictionary, tmp_path / "d")
    theirs = library.saelens().SAE.load_from_disk(tmp_path / "d")
    with torch.no_grad():
        acts = theirs.encode(torch.from_numpy(ROWS))
        out = theirs.decode(acts)
    ours_acts, ours_out = dictionary.both(ROWS)
    assert np.array_equal(acts.numpy(), ours_acts)
    assert np.array_equal(out.numpy(), ours_out)
    assert theirs.cfg.metadata.training_architecture == kind.replace("_", "")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_we_read_what_saelens_saves(dtype: str, tmp_path: Path) -> None:
    lens = library.saelens()
    torch.manual_seed(0)
    module = lens.JumpReLUSAE(lens.JumpReLUSAEConfig(d_in=WIDTH, d_sae=20, dtype=dtype))
    with torch.no_grad():
        module.threshold.fill_(0.25)
    module.save_model(tmp_path / "d")
    ours = load(tmp_path / "d")
    with torch.no_grad():  # widening changes no weight; rows are not to be rounded to the file's type
        want = module.to(dtype=torch.float32).encode(torch.from_numpy(ROWS)).numpy()
    assert (ours.architecture, ours.width, ours.features) == ("jumprelu", WIDTH, 20)
    assert np.array_equal(ours.encode(ROWS), want)
    assert 0 < np.count_nonzero(want) < want.size
    assert all(value.dtype == torch.float32 for value in ours.tensors().values())


def changed(**settings: Any) -> Callable[[Path], None]:
    """Writes other settings; None takes one away."""

    def change(folder: Path) -> None:
        config = {**json.loads((folder / "cfg.json").read_text()), **settings}
        (folder / "cfg.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return change


def text(content: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "cfg.json").write_text(content)

    return change


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / "sae_weights.safetensors")
        change(tensors)
        save_file(tensors, folder / "sae_weights.safetensors")

    return rewrite


def cut(folder: Path) -> None:
    path = folder / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def garbled(folder: Path) -> None:
    (folder / "sae_weights.safetensors").write_bytes(b"\x80\x04pickled, or so it seems" * 9)


def of_sparsify(folder: Path) -> None:
    (folder / "sae_weights.safetensors").rename(folder / "sae.safetensors")


NAN = torch.full((16,), float("nan"))
FAULTS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "no config": (lambda f: (f / "cfg.json").unlink(), "cfg.json", "no cfg.json"),
    "long config": (text(" " * (1 << 20) + "{}"), "cfg.json", "longer"),
    "no json": (text("{architecture: topk}"), "cfg.json", "JSON"),
    "twice": (text('{"architecture": "topk", "architecture": "topk"}'), "cfg.json", "twice"),
    "nan": (text('{"k": NaN}'), "cfg.json", "NaN"),
    "a list": (text("[]"), "cfg.json", "object"),
    "metadata": (changed(metadata=[1]), "cfg.json: metadata", "object"),
    "no architecture": (changed(architecture=None), "cfg.json: architecture", "None"),
    "architecture": (changed(architecture="top_k"), "cfg.json: architecture", "top_k"),
    "architecture of no word": (changed(architecture=["topk"]), "cfg.json: architecture", "topk"),
    "temporal": (changed(architecture="temporal"), "cfg.json: architecture", "temporal"),
    "setting": (changed(activation_fn_str="relu"), "cfg.json: activation_fn_str", "not a setting"),
    "no width": (changed(d_in=None), "cfg.json: d_in", "None"),
    "width of no number": (changed(d_in="12"), "cfg.json: d_in", "12"),
    "width yes": (changed(d_in=True), "cfg.json: d_in", "True"),
    "vast": (changed(d_sae=1 << 40), "cfg.json: d_sae", str(1 << 40)),
    "no features": (changed(d_sae=0), "cfg.json: d_sae", "0"),
    "k": (changed(k=17), "cfg.json: k", "17 active"),
    "half a k": (changed(k=1.5), "cfg.json: k", "1.5"),
    "scale": (changed(normalize_activations="expected_average_only_in"), "cfg.json: normalize_activations", "fold"),
    "norm": (changed(normalize_activations=["none"]), "cfg.json: normalize_activations", "fold"),
    "heads": (changed(reshape_activations="hook_z"), "cfg.json: reshape_activations", "heads"),
    "bias": (changed(apply_b_dec_to_input="no"), "cfg.json: apply_b_dec_to_input", "true or false"),
    "rescale": (changed(rescale_acts_by_decoder_norm=1), "cfg.json: rescale_acts_by_decoder_norm", "true or false"),
    "no weights": (
        lambda f: (f / "sae_weights.safetensors").unlink(), "sae_weights.safetensors", "no sae_weights",
    ),
    "another library": (of_sparsify, "sae_weights.safetensors", "sparsify"),
    "cut": (cut, "sae_weights.safetensors", "damaged"),
    "garbled": (garbled, "sae_weights.safetensors", "damaged"),
    "a tensor less": (weights(lambda t: t.pop("b_enc")), "sae_weights.safetensors: b_enc", "no such"),
    "a tensor more": (
        weights(lambda t: t.update(threshold=torch.ones(16))), "sae_weights.safetensors: threshold", "no use",
    ),
    "shape": (
        weights(lambda t: t.update(b_enc=torch.ones(15))), "sae_weights.safetensors: b_enc", "[15]",
    ),
    "turned": (
        weights(lambda t: t.update(W_enc=t["W_enc"].T.contiguous())), "sae_weights.safetensors: W_enc", "[16, 12]",
    ),
    "whole numbers": (
        weights(lambda t: t.update(b_enc=torch.ones(16, dtype=torch.int32))), "sae_weights.safetensors: b_enc", "I32",
    ),
    "not finite": (weights(lambda t: t.update(b_enc=NAN)), "sae_weights.safetensors: b_enc", "NaN"),
    "config of another size": (changed(d_sae=17), "sae_weights.safetensors", "17"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_is_not_right_is_refused(fault: str, tmp_path: Path) -> None:
    change, path, reason = FAULTS[fault]
    save(random_dictionary(), tmp_path / "d")
    load(tmp_path / "d")
    change(tmp_path / "d")
    with pytest.raises(errors.ProgramError) as e:
        load(tmp_path / "d")
    assert e.value.code == "bad_dictionary"
    assert e.value.path.startswith(path)
    assert reason in e.value.reason


def test_a_transcoder_whose_bias_is_of_its_output_is_refused(tmp_path: Path) -> None:
    save(random_dictionary("transcoder"), tmp_path / "d")
    changed(apply_b_dec_to_input=True)(tmp_path / "d")
    with pytest.raises(errors.ProgramError) as e:
        load(tmp_path / "d")
    assert (e.value.code, e.value.path) == ("bad_dictionary", "cfg.json")


def test_nothing_is_overwritten_and_nothing_is_left_of_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(random_dictionary(), tmp_path / "d")
    before = (tmp_path / "d" / "sae_weights.safetensors").read_bytes()
    with pytest.raises(errors.ProgramError) as e:
        save(random_dictionary(seed=1), tmp_path / "d")
    assert (e.value.code, e.value.path) == ("bad_value", "folder")
    assert (tmp_path / "d" / "sae_weights.safetensors").read_bytes() == before

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "no space left")

    monkeypatch.setattr("trocar.dictionaries.files.save_file", full)
    with pytest.raises(OSError, match="no space"):
        save(random_dictionary(), tmp_path / "e")
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_metadata_of_any_name_changes_nothing(tmp_path: Path) -> None:
    save(random_dictionary(), tmp_path / "d")
    words = {"__class__": "x", "self": 1, "model_from_pretrained_kwargs": {"a": [1]}, "to_dict": None}
    changed(metadata=words)(tmp_path / "d")
    found = load(tmp_path / "d")
    assert found.metadata == words
    assert np.array_equal(found.encode(ROWS), random_dictionary().encode(ROWS))
