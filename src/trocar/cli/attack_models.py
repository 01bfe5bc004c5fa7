"""What is attacked: a small random model, or one on this machine, with its true weights for the judge.

The weights are read from the folder's safetensors, not from the live model: what an attack is compared with does
not come from the code under test.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np

from trocar import errors
from trocar.attacks.loot import F64
from trocar.attacks.purse import Effort
from trocar.models.cache import describe
from trocar.models.load import Loaded, assemble, load
from trocar.models.pull import locate

SMALL: Final = "random"
SMALL_EFFORT: Final = Effort(tokens=1024, neurons=176)
LARGE_EFFORT: Final = Effort(tokens=512, neurons=256, layer=10, oracle_tokens=480)
SIZES: Final = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "bos_token_id": 1021,
    "eos_token_id": 1022,
}
SEED: Final = 7


class Weights(Mapping[str, F64]):
    """The true matrices of a Llama-shaped model, [rows, columns] as attacks name them."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._last: tuple[str, F64] | None = None

    def __getitem__(self, name: str) -> F64:
        if self._last is None or self._last[0] != name:
            self._last = (name, self._read(name))
        return self._last[1]

    def __iter__(self) -> Any:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def _read(self, name: str) -> F64:
        stored, turned = _stored_name(name)
        if stored not in self._places and stored == "lm_head.weight":
            stored = "model.embed_tokens.weight"  # tied
        path, dtype, shape, start, stop = self._places[stored]
        with path.open("rb") as stream:
            stream.seek(start)
            raw = stream.read(stop - start)
        matrix: F64 = _DECODE[dtype](raw).reshape(shape).astype(np.float64)
        return matrix.T if turned else matrix

    @cached_property
    def _places(self) -> dict[str, tuple[Path, str, list[int], int, int]]:
        found = {}
        for path in sorted(self._home.glob("*.safetensors")):
            with path.open("rb") as stream:
                size = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(size))
            for name, row in header.items():
                if name != "__metadata__":
                    start, stop = (8 + size + x for x in row["data_offsets"])
                    found[name] = (path, str(row["dtype"]), row["shape"], start, stop)
        return found


_DECODE: Final[dict[str, Callable[[bytes], Any]]] = {
    "F32": lambda raw: np.frombuffer(raw, dtype="<f4"),
    "F16": lambda raw: np.frombuffer(raw, dtype="<f2"),
    "BF16": lambda raw: (np.frombuffer(raw, dtype="<u2").astype("<u4") << 16).view("<f4"),
}
_PARTS: Final = {
    "mlp.down": ("mlp.down_proj", True),
    "mlp.gate": ("mlp.gate_proj", False),
    "mlp.up": ("mlp.up_proj", False),
    "attn.q": ("self_attn.q_proj", False),
    "attn.v": ("self_attn.v_proj", False),
}


def _stored_name(name: str) -> tuple[str, bool]:
    """The tensor's name in the folder, and whether rows and columns change places."""
    if name in ("embed", "unembed"):
        return {"embed": "model.embed_tokens.weight", "unembed": "lm_head.weight"}[name], False
    part, _, layer = name.rpartition(".")
    stored, turned = _PARTS[part]
    return f"model.layers.{layer}.{stored}.weight", turned


@dataclass(frozen=True)
class Subject:
    """A model to attack.

    Attributes:
        home: its folder.
        truth: its matrices by name.
        effort: how much of it is aimed at.
    """

    loaded: Loaded
    home: Path
    truth: Weights
    effort: Effort

    @property
    def numbers(self) -> dict[str, float]:
        """Facts that attacks try to find out."""
        return {"d_model": float(self.loaded.facts.d_model)}


def subject(model: str, folder: Path) -> Subject:
    """A model that is on this machine, or `random`, which is made in `folder`.

    Raises:
        NotFound: `model_not_pulled`, `unknown_model`.
        ClientError: `bad_argument` for a model that is not Llama-shaped.
    """
    if model == SMALL:
        return Subject(_made(folder), folder, Weights(folder), SMALL_EFFORT)
    home, _ = locate(model)
    loaded = load(model)
    if loaded.facts.family != "llama":
        reason = f"the attacks know where Llama keeps its weights; {model!r} is {loaded.facts.family!r}"
        raise errors.refuse("bad_argument", "model", reason)
    return Subject(loaded, home, Weights(home), LARGE_EFFORT)


def _made(folder: Path) -> Loaded:
    """A random Llama of 223,000 weights, the same every time."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = AutoConfig.for_model("llama", **SIZES)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    model = model.eval().requires_grad_(False)
    tokenizer = _tokenizer()
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return assemble(model, tokenizer, describe(folder, source="local", name=SMALL), name=SMALL)


def _tokenizer() -> Any:
    """One token per byte, words that no text spells, and three special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    spare = [f"w{i}" for i in range(int(SIZES["vocab_size"]) - len(letters) - 3)]
    core = Tokenizer(models.BPE({c: i for i, c in enumerate([*letters, *spare])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True) for t in ("<|a|>", "<|b|>", "<|end|>")])
    names = {"bos_token": "<|a|>", "eos_token": "<|b|>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)
