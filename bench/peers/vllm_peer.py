"""A peer of `bench.tenants`: vLLM serving all prompts in one batch, without any program.

A script for a Python that has vLLM for the CPU; it imports nothing of this project. It speaks the lines of
`nnsight_peer`, leaves layers and vectors alone, and answers `{"cpu_s": seconds, "tokens": [[id, ...], ...]}`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, where its CPU seconds are counted
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def engine(home: str) -> Any:
    from vllm import LLM

    return LLM(
        home, dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=96,
        distributed_executor_backend="uni", enable_prefix_caching=False, disable_log_stats=True,
    )  # fmt: skip


def main() -> None:
    os.environ.update(SETTINGS)
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever is printed on the way is no answer
    import torch
    import vllm

    torch.set_num_threads(1)
    model = engine(sys.argv[1])
    print(json.dumps({"vllm": vllm.__version__, "torch": torch.__version__}), file=lines, flush=True)
    for line in sys.stdin:
        turn = json.loads(line)
        prompts = [{"prompt_token_ids": r["prompt"]} for r in turn["requests"]]
        asked = vllm.SamplingParams(temperature=0, max_tokens=turn["new_tokens"], ignore_eos=True)
        started_s = time.process_time()
        made = model.generate(prompts, asked, use_tqdm=False)
        cpu_s = time.process_time() - started_s
        tokens = [list(m.outputs[0].token_ids) for m in made]
        print(json.dumps({"cpu_s": cpu_s, "tokens": tokens}), file=lines, flush=True)


if __name__ == "__main__":
    main()
