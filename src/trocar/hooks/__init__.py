"""The spelling of TransformerLens, recorded onto a native trace. docs/from-transformerlens.md has both spellings.

from trocar.hooks import HookedModel
model = HookedModel(trocar.Client().model("smollm2-135m-instruct"))
logits, cache = model.run_with_cache(prompts, names_filter="blocks.12.hook_resid_post")
logits = model.run_with_hooks(prompts, fwd_hooks=[("blocks.12.hook_resid_post", hook)])
logits.logit_diff(" Paris", " Rome")
"""

from trocar.hooks.answers import Logits, logit_diff, logprobs, loss, top
from trocar.hooks.cache import Cache
from trocar.hooks.model import HookedModel

__all__ = ["Cache", "HookedModel", "Logits", "logit_diff", "logprobs", "loss", "top"]
