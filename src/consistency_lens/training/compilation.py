"""`torch.compile` of the clones: their bases alone, in place, so that names, artifacts and hooks stay as they are."""

import logging

import torch
from accelerate.utils import DynamoBackend, TorchDynamoPlugin

from ..modeling_consistency_lens import ConsistencyLensModel
from ..residual_stream import headless

logger = logging.getLogger(__name__)

# Graphs of one function: chunks and single tokens, with and without gradients and masks, in training and evaluation,
# and all of them again for a batch of one row. Beyond its limit (8 by default) torch runs the rest as it is.
GRAPHS = 64


def compile_clones(lens: ConsistencyLensModel, plugin: TorchDynamoPlugin, with_heads: bool = True) -> None:
    """Compiles the bases of decoder and encoder as the plugin says, and leaves nothing for accelerate to compile.

    Accelerate would compile the lens around them, whose loop over tokens it would unroll. Lengths are dynamic: a cache
    that grows by a token needs no new graph. What is sampled and embedded between the passes is not compiled; nor is
    the decoder's head, if it runs apart (`with_heads` is False).
    """
    if plugin.backend == DynamoBackend.NO:
        return
    settings = {name: value for name, value in plugin.to_kwargs().items() if name != "use_regional_compilation"}
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    for clone in (lens.decoder, lens.encoder):
        compiled = clone.base if with_heads else headless(clone.base)
        compiled.compile(**(settings | {"dynamic": True}))
    logger.info("decoder and encoder are compiled by %s at their first steps", plugin.backend.value.lower())
    plugin.backend = DynamoBackend.NO
