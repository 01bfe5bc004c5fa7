"""The peer of `bench.tenants`: nnsight running requests one after another.

A script for a Python that has nnsight; it imports nothing of this project. It reads one JSON object per line,
`{"requests": [{"prompt": [id, ...], "layer": n, "vector": [number, ...]}, ...], "new_tokens": n}`, serves the
requests in turn, and answers with one line: `{"cpu_s": seconds, "tokens": [[id, ...], ...]}`. The first line it
prints tells its versions. Each request adds its vector to the output of its layer at every step.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from typing import Any

import torch


def serve(model: Any, request: dict[str, Any], vector: torch.Tensor, new_tokens: int) -> list[int]:
    prompt = torch.tensor([request["prompt"]])
    layer = model.model.layers[request["layer"]]
    with model.generate(prompt, max_new_tokens=new_tokens, do_sample=False) as tracer:
        for _ in tracer.iter[:new_tokens]:
            layer.output = layer.output + vector
        ids = tracer.result.save()
    return ids[0, prompt.shape[1] :].tolist()


def main() -> None:
    warnings.simplefilter("ignore")
    lines = sys.stdout
    sys.stdout = sys.stderr  # whatever is printed on the way is no answer
    import nnsight
    import transformers
    from nnsight import LanguageModel

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    options = {"dtype": torch.float32, "attn_implementation": "sdpa", "dispatch": True}
    model = LanguageModel(sys.argv[1], **options)
    config = model._module.generation_config
    config.pad_token_id, config.eos_token_id = 0, None  # every text has the same length
    versions = {
        "nnsight": nnsight.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    print(json.dumps(versions), file=lines, flush=True)
    for line in sys.stdin:
        turn = json.loads(line)
        vectors = [torch.tensor(r["vector"], dtype=torch.float32) for r in turn["requests"]]
        started_s = time.process_time()
        tokens = [
            serve(model, r, v, turn["new_tokens"]) for r, v in zip(turn["requests"], vectors, strict=True)
        ]
        cpu_s = time.process_time() - started_s
        print(json.dumps({"cpu_s": cpu_s, "tokens": tokens}), file=lines, flush=True)


if __name__ == "__main__":
    main()
