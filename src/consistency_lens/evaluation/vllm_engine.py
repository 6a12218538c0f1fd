"""vLLM in place of the lens's own decoding: greedy texts for many activations at once.

vLLM gets the decoder's base as a plain model, adapters merged into its weights, and reads the prompts as embeddings,
which the decoder makes itself: prefix, projected activation, suffix. So it needs to know nothing of lenses.
"""

import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from ..cached_passes import evaluating
from ..fingerprints import tensors_hash
from ..lens_clone import clone_subject
from ..lens_decoder import LensDecoder
from ..modeling_consistency_lens import ConsistencyLensModel, DecodedText
from ..optional_packages import require
from ..quantised import is_quantised

# Nats a token by which vLLM and the lens may differ about one text: more than bfloat16 does to a model's logits, less
# than what another architecture, a factor at the embeddings or wrong weights do.
TOLERANCE = 0.2
# what else of its settings changes its texts
RECORDED = ("dtype", "quantization", "kv_cache_dtype")


class VllmEngine:
    """Decodes activations by vLLM, for `explain_dataset(..., engine=VllmEngine(lens))`.

    vLLM starts here, in processes of its own: with the weights that the decoder has now, which it keeps.

    Args:
        lens: with its tokenizer; it stays where it is, beside vLLM.
        settings: arguments of `vllm.LLM`, such as `gpu_memory_utilization` or `tensor_parallel_size`. vLLM computes in
            the precision of the decoder's weights unless `dtype` says otherwise.

    Attributes:
        name: what `explain_dataset` writes down of it.
        weights: hash of the lens's trained tensors when it started.
        difference: by how many nats a token it and the lens differ about the probability of one text.

    Raises:
        ValueError: if vLLM is not installed, cannot run this decoder (with injections, quantised, offloaded, of an
            architecture that it lacks) or makes something else of it than the lens does.
    """

    def __init__(self, lens: ConsistencyLensModel, **settings: Any):
        check_decoder(lens.decoder)
        vllm = require("vllm", extra="vllm", needed_for="VllmEngine")
        config, length = lens.config.decoder, lens.config.num_text_tokens
        self.lens = lens
        self.weights = tensors_hash(lens.trained_tensors())
        settings = {
            "dtype": str(lens.decoder.base.dtype).removeprefix("torch."),
            "max_model_len": len(config.prefix_ids) + 1 + len(config.suffix_ids) + length,
            "disable_log_stats": True,
            **settings,
        }
        self.name = " ".join(["vllm", *(str(settings[key]) for key in RECORDED if key in settings)])
        stops = [] if config.stop_token_id is None else [config.stop_token_id]
        greedy = {"temperature": 0.0, "max_tokens": length, "ignore_eos": True, "stop_token_ids": stops}
        with tempfile.TemporaryDirectory() as folder:
            merged_base(lens.decoder).save_pretrained(folder)
            try:
                self.sampling = vllm.SamplingParams(**greedy, detokenize=False)
                self.llm = vllm.LLM(model=folder, enable_prompt_embeds=True, skip_tokenizer_init=True, **settings)
                self.difference = self.compared(vllm.SamplingParams(**greedy, detokenize=False, logprobs=1))
            except Exception as error:  # of many kinds: vLLM's own, and those of the processes that it starts
                reason = " ".join(str(error).split())
                raise ValueError(
                    f"VllmEngine: vLLM cannot run this decoder with these settings, {type(error).__name__}: {reason}; "
                    "change the settings, or explain without an engine"
                ) from error
        if not self.difference <= TOLERANCE:
            raise ValueError(
                f"VllmEngine: vLLM finds a text {self.difference:.2f} nats a token more or less likely than the lens "
                f"does: it computes {type(lens.decoder.base).__name__} otherwise; explain without an engine"
            )

    def decode(self, activations: Tensor) -> DecodedText:
        """Reads activations (B, d) as greedy texts, like `lens.decode` but for rounding.

        After a text's stop token there are only stop tokens, where `lens.decode` goes on with what nobody reads.
        """
        outputs = self.outputs(activations.to(self.lens.device), self.sampling)
        ids = torch.full((len(outputs), self.lens.config.num_text_tokens), self.lens.stop_token_id)
        for row, output in zip(ids, outputs, strict=True):
            row[: len(output.token_ids)] = torch.tensor(output.token_ids)
        return self.lens.decoded(ids.to(self.lens.device))

    @torch.no_grad()
    def outputs(self, activations: Tensor, sampling: Any) -> list[Any]:
        """What vLLM generates from each of the activations (B, d)."""
        prompts = self.lens.decoder.filled_prompt(activations).cpu()
        requests = [{"prompt_embeds": prompt} for prompt in prompts]
        return [done.outputs[0] for done in self.llm.generate(requests, sampling, use_tqdm=False)]

    @torch.no_grad()
    def compared(self, sampling: Any) -> float:
        """By how many nats a token vLLM and the lens's own decoder differ about a text; `sampling` asks for them."""
        activation = (self.lens.mean + self.lens.rms)[None]  # not the mean, of which the slot has the bias alone
        output = self.outputs(activation, sampling)[0]
        theirs = [found[token].logprob for token, found in zip(output.token_ids, output.logprobs, strict=True)]
        ids = torch.tensor([list(output.token_ids)], device=activation.device)
        with evaluating(self.lens.decoder):
            ours = self.lens.decoder(activation, ids).float().log_softmax(dim=-1).gather(2, ids[..., None])[0, :, 0]
        return (ours.cpu() - torch.tensor(theirs)).abs().mean().item()


def check_decoder(decoder: LensDecoder) -> None:
    """ValueError for a decoder that no plain model stands for."""
    if decoder.config.injection_layers > 0:
        raise ValueError(
            f"VllmEngine: the decoder has injection_layers={decoder.config.injection_layers}, and vLLM lets nobody "
            "overwrite the inputs of its blocks; explain without an engine"
        )
    if is_quantised(decoder.base):
        raise ValueError("VllmEngine: the lens was loaded with quantization_config; load it without, or use no engine")
    if any(parameter.is_meta for parameter in decoder.base.parameters()):
        raise ValueError("VllmEngine: weights of the lens are offloaded by its device_map; load it without one")


def merged_base(decoder: LensDecoder) -> PreTrainedModel:
    """The decoder's base as a plain model that computes the same, its adapters merged into copies of the weights that
    they change; the other tensors are the decoder's own."""
    base = clone_subject(decoder.base, share_weights=True)
    if decoder.config.training == "lora":
        lora = require("peft", extra="lora", needed_for="training='lora'").tuners.lora
        for name, layer in list(base.named_modules()):
            if isinstance(layer, lora.LoraLayer):
                plain = layer.get_base_layer()
                for key, weight in list(plain.named_parameters(recurse=False)):  # merging adds to them in place
                    setattr(plain, key, nn.Parameter(weight.detach().clone(), requires_grad=False))
                layer.merge()
                base.set_submodule(name, plain)
    # never read, and transformers does not write all that it reads
    base.generation_config = GenerationConfig()
    return base
