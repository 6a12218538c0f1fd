"""consistency-lens: read one activation of a language model in plain words, and check the words.

Importing the package registers its models with `AutoConfig` and `AutoModel`, so that
`transformers.AutoModel.from_pretrained(<a published lens>)` works.
"""

__version__ = "0.1.0"

from .configuration_consistency_lens import ConsistencyLensConfig, LensDecoderConfig, LensEncoderConfig
from .explanation import Explanation, TokenExplanation
from .modeling_consistency_lens import ConsistencyLensModel, LensDecoder, LensEncoder
from .residual_stream import ResidualStream
from .steering import Steering
from .subject import Subject
from .tuned_lens.configuration_tuned_lens import TunedLensConfig
from .tuned_lens.modeling_tuned_lens import Trajectory, TunedLens

__all__ = [
    "ConsistencyLensConfig",
    "ConsistencyLensModel",
    "Explanation",
    "LensDecoder",
    "LensDecoderConfig",
    "LensEncoder",
    "LensEncoderConfig",
    "ResidualStream",
    "Steering",
    "Subject",
    "TokenExplanation",
    "Trajectory",
    "TunedLens",
    "TunedLensConfig",
]
