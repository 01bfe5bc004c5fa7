"""Fixtures for every room: a tiny random model, SmolLM2 from the cache, and a whole server in this process.

The tiny model needs no download: grouped-query attention, byte-level tokens, weights large enough that every
part matters. Tests that ask for SmolLM2 carry the marker `model`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

TEMPLATE = (
    "{% for m in messages %}{{ '<|a|>' + m['role'] + '\\n' + m['content'] + '<|b|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|a|>assistant\\n' }}{% endif %}"
)
SMOLLM2 = "smollm2-135m-instruct"
GEMMA3 = "gemma3-270m"


_SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "tie_word_embeddings": True,
    "bos_token_id": 256,
    "eos_token_id": [257, 258],
    "attn_implementation": "sdpa",
}
_OWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 12},
    "gemma3": {"head_dim": 12, "sliding_window": 8, "query_pre_attn_scalar": 12},
    "gpt2": {"n_inner": None, "num_key_value_heads": None},
}
FAMILIES = tuple(_OWN)


def random_model(family: str = "llama", seed: int = 7, layers: int = 4) -> Any:
    """A small random model of a family in float32, with weights, biases and norms large enough to matter.

    Two key/value heads and four query heads where the family groups them; heads of Gemma and Qwen 3 are wider than
    their share. Every third layer of Gemma, and its last, sees everything, the others eight tokens.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(_MODEL_TYPES.get(family, family), **(_SIZES | _OWN[family]))
    config.num_hidden_layers = layers
    if family == "gemma3":
        config.layer_types = [
            "full_attention" if i % 3 == 2 or i == layers - 1 else "sliding_attention" for i in range(layers)
        ]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        if family != "llama":
            _shake(model)
        return model.eval().requires_grad_(False)


_MODEL_TYPES = {"gemma3": "gemma3_text"}


def _shake(model: Any) -> None:
    """Random biases and norm weights: freshly made ones are 0 and 1, and would hide a mistake."""
    for name, value in model.named_parameters():
        if value.ndim == 1:
            value.data += 0.2 * value.data.new_empty(value.shape).normal_()
            assert "norm" in name or "ln_" in name or name.endswith("bias")


def random_llama(seed: int = 7, layers: int = 4) -> Any:
    """A LlamaForCausalLM of two key/value heads and four query heads, in float32."""
    return random_model("llama", seed, layers)


def byte_tokenizer() -> Any:
    """One token per byte, three special tokens, and a chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True) for t in ("<|a|>", "<|b|>", "<|end|>")])
    fast = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<|a|>", eos_token="<|b|>")
    fast.chat_template = TEMPLATE
    return fast


def make_tiny(
    name: str = "tiny", *, open_weights: bool = True, weight_bits: int | None = None, family: str = "llama"
) -> Any:
    """A validated tiny model that can be served."""
    from trocar.models.cache import Manifest
    from trocar.models.load import assemble

    model = random_model(family)
    parameters = sum(p.numel() for p in model.parameters())
    manifest = Manifest(
        source="local",
        name=name,
        package=None,
        version=None,
        sha256=None,
        revision=None,
        fingerprint="sha256:" + name.encode().hex().ljust(64, "0"),
        stamp="",
        license="unknown",
        lineage=name,
        open_weights=open_weights,
        parameters=parameters,
        weight_bits=weight_bits or 32 * parameters,
    )
    return assemble(model, byte_tokenizer(), manifest, name=name)


@pytest.fixture(scope="session")
def tiny() -> Any:
    return make_tiny()


@pytest.fixture(scope="session")
def tiny_of() -> Callable[..., Any]:
    """Makes tiny models: `tiny_of("name", family="gemma3")`."""
    return make_tiny


@pytest.fixture(scope="session")
def postgres() -> Iterator[Any]:
    """A real PostgreSQL server, the same for all tests; each asks it for a schema of its own."""
    from postgres_server import running

    with running() as server:
        yield server


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, tiny: Any) -> Iterator[Server]:
    """A server with an airlock that people stand at: `tiny` is open, `shut` a secret of 20 Gbit.

    In the lab: ada, ann and the agent bot. On the board: the checkers bea and cid, the owner boss and the auditor
    dot. Elsewhere: mal. Free has a key for what is open.
    """
    from trocar.gate.policy import Role, Tier

    shut = make_tiny("shut", open_weights=False, weight_bits=20_000_000_000)
    made = make_server(tmp_path_factory.mktemp("house"), [tiny, shut])
    people = {
        "ada": ("lab", Tier.trusted, Role.researcher),
        "ann": ("lab", Tier.trusted, Role.researcher),
        "bot": ("lab", Tier.agent, Role.agent),
        "bea": ("board", Tier.external, Role.checker),
        "cid": ("board", Tier.external, Role.checker),
        "boss": ("board", Tier.external, Role.owner),
        "dot": ("board", Tier.external, Role.auditor),
        "mal": ("elsewhere", Tier.trusted, Role.researcher),
        "free": ("street", Tier.open, Role.researcher),
    }
    for name, (tenant, tier, role) in people.items():
        key = made.service.gate.keys.create(tenant, tier, role, holder=name)
        made.keys[name], made.principals[name] = key.secret, key.principal
    yield made
    assert made.service.check() == []
    made.service.close()


@pytest.fixture(scope="session")
def smollm2() -> Any:
    from trocar.models.load import load
    from trocar.models.pull import pull

    pull(SMOLLM2)
    return load(SMOLLM2)


@pytest.fixture(scope="session")
def gemma3_270m() -> Any:
    from trocar.models.load import load
    from trocar.models.pull import pull

    pull(GEMMA3)
    return load(GEMMA3)


@pytest.fixture(scope="session")
def true_weights() -> Any:
    """The model that `tiny` was made of, with its weights as they were before packing."""
    return random_model()


@dataclass(frozen=True)
class Server:
    """A whole server in this process, driven over ASGI.

    Attributes:
        engines: by model name.
        keys: secrets by a short name: `alice` (operator), `bob`, and the capped `eve`.
    """

    service: Any
    app: Any
    store: Any
    engines: dict[str, Any]
    keys: dict[str, str]
    principals: dict[str, Any]

    def transport(self) -> httpx.ASGITransport:
        return httpx.ASGITransport(self.app)

    def forwards(self) -> int:
        return sum(e.stats().forwards for e in self.engines.values())


def agent_spends_in_a_day() -> Any:
    """The default policy, but an agent's budget for life may be spent on one day."""
    from trocar.gate.policy import People, Policy, Tier, Tiers

    terms = Policy().terms(Tier.agent)
    return Policy(people=People(tiers=Tiers(agent=terms.model_copy(update={"day_ppm": terms.life_ppm}))))


def make_server(root: Path, loaded: list[Any], **limits: Any) -> Server:
    """Gate, store, engines and application around loaded models."""
    from trocar.api.app import create_app
    from trocar.engine.hf.engine import HFEngine, Limits
    from trocar.gate.gate import Gate
    from trocar.gate.policy import Role, Tier
    from trocar.service.compose import local_service
    from trocar.store import Store

    gate = Gate(f"sqlite:///{root}/ledger.db", agent_spends_in_a_day(), secrets=root)
    made = {
        "alice": gate.keys.create("alice", Tier.open, Role.operator),
        "bob": gate.keys.create("bob", Tier.open, Role.researcher),
        "eve": gate.keys.create("eve", Tier.agent, Role.researcher),
    }
    engines = {m.facts.name: HFEngine(m, Limits(**limits)) for m in loaded}
    store = Store(root / "store")
    service = local_service([(m, engines[m.facts.name]) for m in loaded], store, gate)
    return Server(
        service,
        create_app(service),
        store,
        engines,
        {name: key.secret for name, key in made.items()},
        {name: key.principal for name, key in made.items()},
    )


@pytest.fixture(scope="session")
def serve() -> Callable[..., Server]:
    return make_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny: Any) -> Iterator[Server]:
    """`tiny` with open weights, and `shut`, the same model with a secret so small that budgets run out."""
    shut = make_tiny("shut", open_weights=False, weight_bits=20_000_000)
    made = make_server(tmp_path_factory.mktemp("server"), [tiny, shut])
    yield made
    assert made.service.check() == []
    assert [e.stats().live_requests for e in made.engines.values()] == [0, 0]
    made.service.close()
