"""The spelling of nnsight, recorded onto a native trace. docs/from-nnsight.md has both spellings side by side.

from trocar.nnsight import LanguageModel
lm = LanguageModel(trocar.Client().model("smollm2-135m-instruct"))
with lm.trace("The Eiffel Tower is in"):
    lm.model.layers[10].output[0][:, -1] *= 0.5
    token = lm.lm_head.output[:, -1].argmax(-1).save()
"""

from trocar.nnsight.modules import LanguageModel, save

__all__ = ["LanguageModel", "save"]
