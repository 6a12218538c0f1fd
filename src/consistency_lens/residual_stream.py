"""The residual stream of a causal language model, found in any architecture: read it, replace it, stop early, cut it.

Layer k is the output of block k, counted from 0. It equals `hidden_states[k + 1]` of transformers, but for the last
block, where transformers reports the stream after the final norm.
Shapes: B batch, S sequence, K positions a sequence, d width, V vocabulary, L layers.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedConfig, PreTrainedModel

from .quantised import copy_marks

# Config fields that hold one entry per block, and so must be cut together with the blocks.
PER_LAYER_FIELDS = ("layer_types", "mlp_layer_types", "no_rope_layers", "attention_layers")


class _StopForward(Exception):
    """Ends a forward pass from inside a hook; never leaves this module."""

    def __init__(self, capture: "Capture") -> None:
        super().__init__("forward pass ended after the captured block")
        self.capture = capture


class Capture:
    """What `ResidualStream.capture` saw, to be read once the model has run."""

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self._activations: Tensor | None = None

    @property
    def activations(self) -> Tensor:
        """Output of the captured block in the last forward pass, (B, S, d).

        Raises:
            ValueError: if the model has not run yet.
        """
        if self._activations is None:
            raise ValueError(f"capture: block {self.layer} has not run; call the model inside the `with` block first")
        return self._activations


class ResidualStream:
    """The blocks, final norm, unembedding and input embedding of a causal language model, found in any architecture.

    Args:
        model: a causal language model, or its headless base model.
        blocks: dotted path of the `ModuleList` of blocks in `model`; only for layouts that are not found unaided.
        final_norm: dotted path of the norm after the last block; likewise.

    Attributes:
        model: the model, unchanged.
        blocks: its L blocks.
        final_norm: the norm between the last block and the unembedding; None where the architecture has none.
        unembedding: the output embedding; None for a headless model.
        input_embedding: the token embedding.
        num_layers: L.
        width: d, the size of the residual stream.
        may_stop: whether a pass may be ended inside the model; where not, `capture` lets it run to its end.

    Raises:
        ValueError: if the blocks or the given paths are not found.
    """

    def __init__(self, model: PreTrainedModel, blocks: str | None = None, final_norm: str | None = None) -> None:
        self.model = model
        self.decoder = headless(model)
        config = self.decoder.config.get_text_config()
        if blocks is None:
            self.blocks, self._parent = _find_blocks(self.decoder, config.num_hidden_layers)
        else:
            self.blocks = _submodule(model, "blocks", blocks)
            self._parent = model.get_submodule(blocks.rpartition(".")[0])
        self.final_norm = (
            _last_norm(self._parent, self.blocks)
            if final_norm is None
            else _submodule(model, "final_norm", final_norm)
        )
        self.unembedding: nn.Module | None = model.get_output_embeddings()
        self.input_embedding: nn.Module = model.get_input_embeddings()
        self.num_layers = len(self.blocks)
        self.width: int = config.hidden_size
        self.may_stop = True

    @cached_property
    def embedding_scale(self) -> float:
        """The factor by which the embedding *layer* multiplies its rows: sqrt(d) in Gemma, else 1.

        An embedding looked up in the weight by hand has to be multiplied by it before it is fed as `inputs_embeds`.
        """
        weight = self.input_embedding.get_parameter("weight")
        # Measured on a table of ones, as every family has its own name for the factor. `expand` allocates no table.
        device = token_device(self.model)
        ones = torch.ones(1, 1, dtype=weight.dtype, device=device).expand(weight.shape)
        first_id = torch.zeros(1, dtype=torch.long, device=device)
        with torch.no_grad():
            return functional_call(self.input_embedding, {"weight": ones}, (first_id,))[0, 0].item()

    def narrowing(self, size: int) -> Tensor:
        """A matrix (e, d) from the stream to embeddings of e = `size` numbers, where these are widened (OPT-350M).

        It is the pseudo-inverse of what the model does: it gives the embedding that comes closest when it is widened.
        """
        sizes = (size, self.width)  # of a linear map, with an adapter or without
        inputs = [
            c for c in self.siblings() if sizes == tuple(getattr(c, f"{way}_features", 0) for way in ("in", "out"))
        ]
        if not inputs:
            raise ValueError(
                f"model: {type(self.model).__name__} has embeddings of {size} numbers, a stream of {self.width} and "
                "no linear map from one to the other; pass a model of another architecture"
            )
        weight = inputs[0].get_parameter("weight")
        rows = torch.eye(size, dtype=weight.dtype if weight.is_floating_point() else None, device=weight.device)
        return torch.linalg.pinv((inputs[0](rows) - inputs[0](0 * rows)).float()).T

    def siblings(self) -> list[nn.Module]:
        """The modules that stand beside the blocks: embeddings, norms, projections."""
        return [child for child in self._parent.children() if child is not self.blocks]

    def check_layer(self, layer: int) -> None:
        """Checks that `layer` names a block.

        Raises:
            ValueError: if it does not.
        """
        if not 0 <= layer < self.num_layers:
            raise ValueError(
                f"layer must lie in 0..{self.num_layers - 1} (the model has {self.num_layers} blocks), got {layer}; "
                "layer k is the output of block k, counted from 0"
            )

    @contextmanager
    def capture(self, layer: int, stop: bool = False) -> Iterator[Capture]:
        """Records the output of block `layer` while the model runs inside the `with` block.

        Args:
            layer: the block, 0-based.
            stop: end the forward pass after that block, if it may be. The `with` block then ends at the call of the
                model, so read the activations after it.

        Yields:
            A `Capture`, whose `activations` (B, S, d) are there once the model has run.
        """
        self.check_layer(layer)
        captured = Capture(layer)

        def record(_module: nn.Module, _inputs: Any, output: Any) -> None:
            captured._activations = self._residual(output)
            if stop and self.may_stop:
                raise _StopForward(captured)

        with _forward_hook(self.blocks[layer], record):
            try:
                yield captured
            except _StopForward as stopped:
                # An outer capture of the same model may be the one that asked to stop.
                if stopped.capture is not captured:
                    raise

    @contextmanager
    def replace(self, layer: int, positions: Tensor, activations: Tensor) -> Iterator[None]:
        """Replaces the output of block `layer` at `positions` while the model runs inside the `with` block.

        Differentiable in `activations`, out of place. A residual replaced by itself leaves the logits bit-identical.

        Args:
            layer: the block, 0-based.
            positions: token indices, (B, K) int64.
            activations: their new residuals, (B, K, d); cast to the model's dtype.

        Raises:
            ValueError: if the layer or the shapes do not fit.
        """
        self.check_layer(layer)
        expected = (*positions.shape, self.width)
        if positions.ndim != 2 or activations.shape != expected:
            raise ValueError(
                f"replace: positions must be (B, K) and activations (B, K, {self.width}), "
                f"got {tuple(positions.shape)} and {tuple(activations.shape)}"
            )

        def substitute(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            hidden = self._residual(output)
            index = positions.to(hidden.device)[..., None].expand(expected)
            return _with_hidden(output, hidden.scatter(1, index, activations.to(hidden)))

        with _forward_hook(self.blocks[layer], substitute):
            yield

    def _residual(self, output: Any) -> Tensor:
        """The residual (B, S, d) in the output of a block; ValueError where there is none of this shape."""
        hidden = _hidden(output)
        if hidden.ndim != 3 or hidden.shape[-1] != self.width:
            raise ValueError(
                f"model: the blocks of {type(self.model).__name__} hand on {tuple(hidden.shape)}, not one residual "
                f"stream (batch, tokens, {self.width}); pass a model of another architecture"
            )
        return hidden

    @contextmanager
    def select_positions(self, positions: Tensor) -> Iterator[None]:
        """Makes the head compute logits only at `positions` (B, K): inside, `model(...).logits` is (B, K, V).

        The model's own head runs on them, so its bias and final soft-cap are included.
        """

        def gather(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            return _with_hidden(output, gather_positions(_hidden(output), positions))

        with _forward_hook(self.decoder, gather):
            yield

    @contextmanager
    def capture_last_states(self) -> Iterator[Capture]:
        """Records what the head would read, while the model runs inside the `with` block: the final norm's output, at
        the selected positions if inside `select_positions`. The head runs on one token alone meanwhile."""
        captured = Capture(self.num_layers)

        def record(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            captured._activations = _hidden(output)
            return _with_hidden(output, captured._activations[:1, :1])

        with _forward_hook(self.decoder, record):
            yield captured


def headless(model: PreTrainedModel) -> PreTrainedModel:
    """The model below its head: embeddings, blocks and final norm; the model itself where it has no head.

    `get_decoder` of transformers gives the head of ModernBERT, which is called `decoder`, and Llama 4 with its head.
    """
    found = model.get_decoder()
    if isinstance(found, PreTrainedModel) and (found is not model or model.get_output_embeddings() is None):
        return found
    return next((child for child in model.children() if isinstance(child, PreTrainedModel)), model)


def token_device(model: PreTrainedModel) -> torch.device:
    """Where a model takes its tokens: with its table, or on the CPU where accelerate keeps that elsewhere and brings
    tokens to it."""
    weight = model.get_input_embeddings().get_parameter("weight")
    return torch.device("cpu") if weight.is_meta else weight.device


def gather_positions(hidden: Tensor, positions: Tensor) -> Tensor:
    """Rows of `hidden` (B, S, d) at `positions` (B, K), as (B, K, d)."""
    return hidden.gather(1, positions.to(hidden.device)[..., None].expand(-1, -1, hidden.shape[-1]))


def truncated(
    model: PreTrainedModel, num_blocks: int, blocks: str | None = None, final_norm: str | None = None
) -> PreTrainedModel:
    """Cuts a model down, in place, to its embeddings and first `num_blocks` blocks, without final norm and head.

    The config is copied before it is changed, so a model that shared it keeps its own.

    Args:
        model: the model to cut, usually a clone.
        num_blocks: how many blocks stay; 0 leaves the embeddings.
        blocks: see `ResidualStream`.
        final_norm: see `ResidualStream`.

    Returns:
        The headless base model. Its `last_hidden_state` is the raw output of the last kept block, (B, S, d).

    Raises:
        ValueError: if the model has fewer blocks.
    """
    stream = ResidualStream(model, blocks=blocks, final_norm=final_norm)
    if not 0 <= num_blocks <= stream.num_layers:
        raise ValueError(
            f"num_blocks must lie in 0..{stream.num_layers} (the blocks of the model), got {num_blocks}; "
            "0 keeps the embeddings alone"
        )
    del stream.blocks[num_blocks:]
    for name, child in list(stream._parent.named_children()):
        if child is stream.final_norm or leaves_stream(child, stream.width):
            setattr(stream._parent, name, nn.Identity())
    _replace_config(stream.decoder, _shortened(stream.decoder.config, num_blocks))
    copy_marks(model, stream.decoder)
    return stream.decoder


def _hidden(output: Any) -> Tensor:
    """The residual in the output of a block or decoder, which may be a tensor, a tuple or a `ModelOutput`."""
    return output if isinstance(output, Tensor) else output[0]


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    """The output of a block or decoder with another residual, in the form it came in."""
    if isinstance(output, Tensor):
        return hidden
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    if isinstance(output, list):  # GPT-1
        return [hidden, *output[1:]]
    output.last_hidden_state = hidden
    return output


@contextmanager
def _forward_hook(module: nn.Module, hook: Callable[[nn.Module, Any, Any], Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _find_blocks(decoder: PreTrainedModel, num_layers: int) -> tuple[nn.ModuleList, nn.Module]:
    """The shallowest `ModuleList` of `num_layers` modules under `decoder`, and the module that holds it."""
    lists = {
        name: module
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    }
    if not lists:
        raise ValueError(
            f"no ModuleList of num_hidden_layers={num_layers} blocks under {type(decoder).__name__}; "
            "pass its dotted path in the model as blocks='...'"
        )
    name = min(lists, key=lambda path: path.count("."))
    return lists[name], decoder.get_submodule(name.rpartition(".")[0])


def _last_norm(parent: nn.Module, blocks: nn.ModuleList) -> nn.Module | None:
    """The last norm child of the module that holds the blocks, norms of the embeddings (Bloom) aside.

    Those stand before the blocks; the final norm of LFM2 is named after the embeddings too, but stands behind them.
    """
    norms, behind = [], False
    for name, child in parent.named_children():
        behind = behind or child is blocks
        if "norm" in type(child).__name__.lower() and (behind or "embed" not in name):
            norms.append(child)
    return norms[-1] if norms else None


def _submodule(model: nn.Module, argument: str, path: str) -> Any:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise ValueError(
            f"{argument}={path!r} names no module of {type(model).__name__}; "
            f"its children are {[name for name, _ in model.named_children()]}"
        ) from error


def leaves_stream(child: nn.Module, width: int) -> bool:
    """Whether a child projects the stream down to narrower embeddings (OPT-350M): that belongs to the head."""
    return isinstance(child, nn.Linear) and child.in_features == width != child.out_features


def _shortened(config: PreTrainedConfig, num_blocks: int) -> PreTrainedConfig:
    """A copy of the config for a model of the first `num_blocks` blocks."""
    config = copy.deepcopy(config)
    text_config = config.get_text_config()
    text_config.num_hidden_layers = num_blocks
    fields = vars(text_config)
    for field in PER_LAYER_FIELDS:
        if isinstance(fields.get(field), list):
            setattr(text_config, field, fields[field][:num_blocks])
    if "attention_types" in fields and "attention_layers" in fields:
        # GPT-Neo rebuilds `attention_layers` from this run-length form when the config is read back.
        text_config.attention_types = [[text_config.attention_layers, 1]]
    return config


def _replace_config(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Points every module that shares the model's config to another."""
    old = model.config
    for module in model.modules():
        if vars(module).get("config") is old:
            setattr(module, "config", config)  # noqa: B010 (a module of any type)
