"""Turns one GGUF file into a Hugging Face directory: safetensors weights in float32, config, tokenizer.

Done once per pull, so that loading later is a memory map. The quantised weights are expanded by the
transformers library; what it leaves wrong (a quantisation config that blocks saving, a pre-tokenizer that
forgets to split digits) is put right here, and the result is read back and compared before it counts. This
module knows nothing about where the file came from.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, Final, Protocol

from trocar import errors


class Progress(Protocol):
    """Called with the name of a stage and the part of it that is done, None when that is not known."""

    def __call__(self, stage: str, fraction: float | None, /) -> None: ...


_PROBE: Final = "In 1969,  7 men\n\n12 naïve <|im_end|>\ttests"
_PLAIN: Final = " In 1969,  7 men\n\n12 naïve \U0001f642 日本語\ttests"
_NOT_OURS: Final = ("transformers_version", "_model_name_or_path", "_name_or_path")


def convert(gguf: Path, out: Path, progress: Progress) -> None:
    """Converts `gguf` into the existing empty directory `out`.

    Raises:
        RunFailed: `pull_failed` when the file cannot be expanded, or when what was written reads back
            differently.
    """
    with _quiet():
        progress("convert weights", None)
        model = _expand(gguf)
        model.save_pretrained(out)
        _tidy_config(out / "config.json")
        progress("convert weights", 1.0)
        progress("convert tokenizer", None)
        tokenizer = _tokenizer(gguf, context_tokens=model.config.max_position_embeddings)
        tokenizer.save_pretrained(out)
        progress("convert tokenizer", 1.0)
        progress("validate", None)
        _read_back(out, model, tokenizer)
        progress("validate", 1.0)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the library's own progress bars off a terminal where ours are shown."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _expand(gguf: Path) -> Any:
    """The model in float32, free of every trace of quantisation (save_pretrained refuses those)."""
    import torch
    from transformers import AutoModelForCausalLM

    with redirect_stderr(io.StringIO()):  # the GGUF reader draws a progress bar that no setting turns off
        expanded = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32, local_files_only=True
        )
    config = type(expanded.config).from_dict(
        {k: v for k, v in expanded.config.to_dict().items() if k != "quantization_config"}
    )
    clean = type(expanded)(config)
    clean.load_state_dict(expanded.state_dict(), strict=True)
    clean.generation_config = expanded.generation_config
    return clean.eval()


def _tidy_config(path: Path) -> None:
    """Drops fields that name the converter, so that one wheel gives one fingerprint."""
    for file in (path, path.with_name("generation_config.json")):
        config = {k: v for k, v in json.loads(file.read_text("utf-8")).items() if k not in _NOT_OURS}
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _tokenizer(gguf: Path, *, context_tokens: int) -> Any:
    """The tokenizer, as in training: only kinds whose splitting we know are taken.

    Raises:
        RunFailed: `pull_failed` for a kind that we could not rebuild.
    """
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    fields = GGUFReader(gguf).fields
    kind = tuple(fields[f"tokenizer.ggml.{name}"].contents() for name in ("model", "pre"))
    if kind not in _SPLITS:
        raise errors.refuse(
            "pull_failed", "model", f"its pre-tokenizer {kind[1]!r} is not one we can rebuild"
        )
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name, local_files_only=True)
    _SPLITS[kind](tokenizer.backend_tokenizer)
    tokenizer.model_max_length = context_tokens
    return tokenizer


def _split_digits(core: Any) -> None:
    """`smollm` splits every digit off before anything else (llama.cpp, llama-vocab.cpp, PRE_TYPE_SMOLLM).

    The library's GGUF reader ignores `tokenizer.ggml.pre`; without this, the spaces or line breaks before a
    number come out as other tokens than in training.
    """
    from tokenizers import pre_tokenizers

    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def _keep_pieces(core: Any) -> None:
    """SentencePiece has no pre-tokenizer: spaces become `▁`, and no space may be put before the text."""
    if core.normalizer.normalize_str(" a  b") != "▁a▁▁b":
        raise errors.refuse("pull_failed", "model", "its spaces are not kept as SentencePiece keeps them")


_SPLITS: Final[dict[tuple[str, ...], Callable[[Any], None]]] = {
    ("gpt2", "smollm"): _split_digits,
    ("llama", "default"): _keep_pieces,
}


def _read_back(out: Path, model: Any, tokenizer: Any) -> None:
    import torch
    from safetensors import safe_open
    from transformers import AutoTokenizer

    state = model.state_dict()
    for path in sorted(out.glob("*.safetensors")):
        with safe_open(path, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
                if not torch.equal(stored.get_tensor(name), state[name]):
                    raise errors.refuse("pull_failed", "model", f"{name!r} reads back differently")
    again = AutoTokenizer.from_pretrained(str(out), local_files_only=True)
    kept = ("chat_template", "bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id", "vocab_size")
    for field in kept:
        if getattr(again, field) != getattr(tokenizer, field):
            raise errors.refuse("pull_failed", "model", f"the tokenizer's {field} does not survive saving")
    for probe in (_PROBE, _PLAIN):
        if again(probe).input_ids != tokenizer(probe).input_ids:
            raise errors.refuse("pull_failed", "model", "the tokenizer encodes differently after saving")
    if again.decode(again(_PLAIN, add_special_tokens=False).input_ids) != _PLAIN:
        raise errors.refuse(
            "pull_failed", "model", "the tokenizer does not give back a text that it has read"
        )
