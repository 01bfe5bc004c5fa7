"""The models under test, each twice: as the product loads it, and as a plain copy for the reference.

Random models come from the fixtures of the whole test tree, real ones from the cache. An engine is made by its
name, so that a second one passes the same suite.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from bench_room import Bench
from reference import Plain
from transformers import AutoModelForCausalLM

from trocar.engine.hf.engine import HFEngine, Limits
from trocar.models.pull import locate

RANDOM = ("llama", "gemma3", "gpt2", "qwen2", "qwen3")
# The fixture of the test tree that loads each.
REAL = {"smollm2": "smollm2", "gemma3-270m": "gemma3_270m"}
ENGINES: dict[str, Callable[..., Any]] = {"hf": HFEngine}
TEXTS = (
    "The Eiffel Tower is in the city of",
    "In 1969 the first person",
    "two words",
    "A list: red, green, blue and",
)
LENGTHS = (9, 6, 2, 13)
MOST = 1e-4
# After 18 and 30 layers, edits that push logits into the hundreds: the hooks' own float32 is up to 1.5e-4 from
# their float64 there. Without edits MOST holds.
MOST_REAL = 5e-4


@cache
def tree() -> ModuleType:
    """`tests/conftest.py` as a module: its name is taken by the conftest beside this file."""
    spec = importlib.util.spec_from_file_location("tests_conftest", Path(__file__).parents[1] / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def random_prompts(lengths: tuple[int, ...] = LENGTHS, seed: int = 3) -> tuple[tuple[int, ...], ...]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(tuple(torch.randint(0, 256, (n,), generator=draw).tolist()) for n in lengths)


def random_bench(family: str, engine: str = "hf", **limits: Any) -> Bench:
    """A small random model of a family, an engine with these limits, and the reference."""
    loaded = tree().make_tiny(f"tiny-{family}", family=family)
    made = ENGINES[engine](loaded, Limits(**limits))
    plain = Plain.of(tree().random_model(family), norms_of(made))
    return Bench(family, loaded, made, plain, random_prompts(), MOST)


def real_bench(name: str, loaded: Any, engine: str = "hf") -> Bench:
    """A model from the cache; the reference reads the same files for itself."""
    home, _ = locate(loaded.manifest.name)
    model = AutoModelForCausalLM.from_pretrained(
        str(home), dtype=torch.float32, use_safetensors=True, local_files_only=True
    )
    made = ENGINES[engine](loaded)
    prompts = tuple(tuple(loaded.encode_prompt(t)) for t in TEXTS)
    plain = Plain.of(model.requires_grad_(False), norms_of(made))
    return Bench(name, loaded, made, plain, prompts, MOST_REAL)


def norms_of(engine: Any) -> dict[str, tuple[float, ...]]:
    """Mean row norms as the facts give them: the reference takes them as given."""
    return {name: tuple(norms) for name, norms in getattr(engine.facts, "norms", {}).items()}
