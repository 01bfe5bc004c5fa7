"""What the parts of a server get of the environment: what is on a list, so that a secret nobody thought of stays out.

Deployments put passwords of databases and keys of clouds there. The gate needs those of its ledger; the worker and
the front need none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from trocar.cli.folder import LEDGER_URL

_NAMES: Final = frozenset(
    {
        # where things are, and how to write
        "PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "TEMP", "TMP", "TERM", "NO_COLOR",
        "COLUMNS", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "TROCAR_CACHE",
        # the interpreter
        "PYTHONPATH", "PYTHONHOME", "PYTHONHASHSEED", "PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED",
        "PYTHONOPTIMIZE", "PYTHONWARNINGS", "PYTHONUTF8", "VIRTUAL_ENV",
        # libraries, also those that are put in place of others
        "LD_LIBRARY_PATH", "LD_PRELOAD",
        # models and tokenizers
        "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_CACHE", "TRANSFORMERS_OFFLINE",
        "TOKENIZERS_PARALLELISM",
    }
)  # fmt: skip
_BEGINNINGS: Final = (
    "LC_",
    # threads and memory
    "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "NUMEXPR_", "MALLOC_",
    # torch and its devices
    "TORCH_", "TORCHINDUCTOR_", "PYTORCH_", "TRITON_", "CUDA_", "CUDNN_", "CUBLAS_", "NVIDIA_", "NCCL_", "HIP_",
    "HSA_", "ROCR_", "ROCM_", "ROCBLAS_", "MIOPEN_",
)  # fmt: skip
_SECRETS: Final = ("TOKEN", "SECRET", "PASS", "CREDENTIAL", "API_KEY", "PRIVATE")
_GATE: Final = ("PG", LEDGER_URL)
"""The ledger's address, and what the client library of PostgreSQL reads: a password may stand in either."""


def environment(part: str, given: Mapping[str, str]) -> dict[str, str]:
    """The environment of a part of the server.

    Args:
        part: `worker`, `gate` or `front`.
        given: the environment of whoever starts it.
    """
    return {name: value for name, value in given.items() if _is_known(name) or _is_of(part, name)}


def _is_known(name: str) -> bool:
    secret = any(word in name for word in _SECRETS)
    return name in _NAMES or (name.startswith(_BEGINNINGS) and not secret)


def _is_of(part: str, name: str) -> bool:
    return part == "gate" and name.startswith(_GATE)
