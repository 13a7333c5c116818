"""The Llama model on Transformer Engine layers.

Importing this package tells transformers of the model: `AutoConfig` and the `AutoModel` classes know `nvllama`.
"""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from converters.te.config import NVLlamaConfig
from converters.te.modeling import (
    NVLlamaForCausalLM,
    NVLlamaForQuestionAnswering,
    NVLlamaForSequenceClassification,
    NVLlamaForTokenClassification,
    NVLlamaModel,
)
from converters.te.pretrained import NVLlamaPreTrainedModel

__all__ = [
    "NVLlamaConfig",
    "NVLlamaForCausalLM",
    "NVLlamaForQuestionAnswering",
    "NVLlamaForSequenceClassification",
    "NVLlamaForTokenClassification",
    "NVLlamaModel",
    "NVLlamaPreTrainedModel",
]

AutoConfig.register(NVLlamaConfig.model_type, NVLlamaConfig)
AutoModel.register(NVLlamaConfig, NVLlamaModel)
AutoModelForCausalLM.register(NVLlamaConfig, NVLlamaForCausalLM)
AutoModelForSequenceClassification.register(NVLlamaConfig, NVLlamaForSequenceClassification)
AutoModelForQuestionAnswering.register(NVLlamaConfig, NVLlamaForQuestionAnswering)
AutoModelForTokenClassification.register(NVLlamaConfig, NVLlamaForTokenClassification)
