"""consistency-lens: read one activation of a language model in plain words, and check the words.

Importing the package registers its models with `AutoConfig` and `AutoModel`, so that
`transformers.AutoModel.from_pretrained(<a published lens>)` works.
"""

from transformers import AutoConfig, AutoModel
from transformers.pipelines import PIPELINE_REGISTRY

from .activation_to_text_pipeline import ActivationToTextPipeline
from .configuration_consistency_lens import ConsistencyLensConfig, LensDecoderConfig, LensEncoderConfig
from .explanation import Explanation, TokenExplanation
from .modeling_consistency_lens import ConsistencyLensModel, DecodedText, LensDecoder, LensEncoder, LensOutput
from .residual_stream import ResidualStream
from .steering import Steering
from .subject import Subject
from .tuned_lens.configuration_tuned_lens import TunedLensConfig
from .tuned_lens.modeling_tuned_lens import Trajectory, TunedLens
from .version import __version__

__all__ = [
    "ActivationToTextPipeline",
    "ConsistencyLensConfig",
    "ConsistencyLensModel",
    "DecodedText",
    "Explanation",
    "LensDecoder",
    "LensDecoderConfig",
    "LensEncoder",
    "LensEncoderConfig",
    "LensOutput",
    "ResidualStream",
    "Steering",
    "Subject",
    "TokenExplanation",
    "Trajectory",
    "TunedLens",
    "TunedLensConfig",
    "__version__",
]

# Here and not beside the classes: code that comes with an artifact must not take the place of an installed package.
for _model_class in (LensDecoder, LensEncoder, ConsistencyLensModel, TunedLens):
    AutoConfig.register(_model_class.config_class.model_type, _model_class.config_class, exist_ok=True)
    AutoModel.register(_model_class.config_class, _model_class, exist_ok=True)

if ActivationToTextPipeline.task_name not in PIPELINE_REGISTRY.get_supported_tasks():
    PIPELINE_REGISTRY.register_pipeline(
        ActivationToTextPipeline.task_name, pipeline_class=ActivationToTextPipeline, pt_model=AutoModel, type="text"
    )
