"""The training step as the method's plan describes it, written plainly: the opponent of the speed benchmarks.

Three whole copies of the model: the frozen original, a decoder and an encoder, both fully trained. The decoder draws
T tokens by `F.gumbel_softmax(hard=True)`, whose one-hots (B, V) are multiplied with the embedding tables; the encoder
runs all its blocks and reads the hidden state of the last token after the block that it has to reproduce. The
original judges by two passes over the whole sequence, one with A put in its place, one with Â + (A' - Â'), and its
logits are computed at every token and then read at P. A' goes the same way as A, and the KL's gradient does not.

What the plan leaves open is as the lens has it, so that both give the same losses and gradients: the prompt around the
activation, the scaling of activations to unit size, KL(p(.|A) || p(.|Â)), and an LM term KL(original || decoder) in
which the original reads the text after BOS. The plan's generation runs the whole text anew for every token;
`cached=True` gives it a key-value cache, which the plan does not mention and a careful author would add.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from consistency_lens import ConsistencyLensModel
from consistency_lens.adapters import add_adapter
from consistency_lens.evaluation.metrics import start_token

# (step, logits (B, V)) -> Gumbel noise (B, V)
Noise = Callable[[int, Tensor], Tensor]


def fresh_noise(step: int, logits: Tensor) -> Tensor:
    """Gumbel noise as `F.gumbel_softmax` makes it."""
    return -torch.empty_like(logits).exponential_().log()


class SpecStep(nn.Module):
    """Original, decoder and encoder, each a whole copy of the subject, and the loss of one batch.

    Args:
        lens: where the step starts from: its prompts, projections and statistics are copied.
        cached: whether the decoder keeps keys and values between tokens.
        training: what of decoder and encoder is trained, as in a lens: "full", "lora" or "frozen", which leaves the
            projections.
        lora: the adapters.
    """

    def __init__(
        self,
        lens: ConsistencyLensModel,
        cached: bool = False,
        training: str = "full",
        lora: dict[str, Any] | None = None,
    ):
        super().__init__()
        subject = lens.subject.model
        self.layer, self.length, self.cached = lens.config.layer, lens.config.num_text_tokens, cached
        self.original = copy.deepcopy(subject).requires_grad_(False).eval()
        self.decoder = copy.deepcopy(subject).requires_grad_(training == "full").eval()
        self.encoder = copy.deepcopy(subject).requires_grad_(training == "full").eval()
        if lora is not None:
            add_adapter(self.decoder, lora)
            add_adapter(self.encoder, lora)
        self.projection = copy.deepcopy(lens.decoder.projection)
        self.output_map = copy.deepcopy(lens.encoder.output_map)
        self.decoder_prompt = nn.ParameterList(part.detach().clone() for part in lens.decoder.prompt())
        self.encoder_prompt = nn.ParameterList(part.detach().clone() for part in lens.encoder.prompt())
        self.register_buffer("mean", lens.mean.clone())
        self.register_buffer("rms", lens.rms.clone())

    def generate_soft(self, activations: Tensor, tau: float, noise: Noise) -> tuple[Tensor, Tensor]:
        """One-hots (B, T, V) with straight-through gradients, and the logits (B, T, V) that they were drawn from."""
        batch, table = len(activations), self.decoder.get_input_embeddings().weight
        slot = self.projection((activations - self.mean) / self.rms)[:, None]
        prefix, suffix = (part.expand(batch, -1, -1) for part in self.decoder_prompt)
        embeddings = torch.cat([prefix, slot, suffix], dim=1).to(table.dtype)
        one_hots, logits, past = [], [], None
        for step in range(self.length):
            output = self.decoder(inputs_embeds=embeddings, past_key_values=past, use_cache=self.cached)
            last = output.logits[:, -1]
            # F.gumbel_softmax(last, tau, hard=True), with the noise given
            soft = ((last + noise(step, last)) / tau).softmax(-1)
            hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
            one_hots.append(hard - soft.detach() + soft)
            logits.append(last)
            token = (one_hots[-1] @ table)[:, None].to(table.dtype)
            embeddings, past = (
                (token, output.past_key_values) if self.cached else (torch.cat([embeddings, token], 1), None)
            )
        return torch.stack(one_hots, dim=1), torch.stack(logits, dim=1)

    def reconstruct(self, one_hots: Tensor) -> Tensor:
        """Â (B, d), from one-hots (B, T, V)."""
        table = self.encoder.get_input_embeddings().weight
        prefix, suffix = (part.expand(len(one_hots), -1, -1) for part in self.encoder_prompt)
        embeddings = torch.cat([prefix, one_hots @ table, suffix], dim=1).to(table.dtype)
        blocks = self.encoder.get_decoder()
        hidden = blocks(inputs_embeds=embeddings, use_cache=False, output_hidden_states=True).hidden_states
        return self.output_map((hidden[self.layer + 1][:, -1] - self.mean) / self.rms) * self.rms + self.mean

    def forward_with_replacement(self, batch: dict[str, Tensor], activations: Tensor) -> Tensor:
        """The original's logits (B, V) at P, with `activations` (B, d) in the place of the residual there."""
        rows = torch.arange(len(activations), device=activations.device)

        def replace(_module: nn.Module, _inputs: tuple, output: Tensor) -> Tensor:
            hidden = output.clone()
            hidden[rows, batch["positions"]] = activations.to(hidden.dtype)
            return hidden

        handle = self.original.get_decoder().layers[self.layer].register_forward_hook(replace)
        try:
            output = self.original(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
            )
        finally:
            handle.remove()
        return output.logits[rows, batch["positions"]]

    def lm_loss(self, token_ids: Tensor, logits: Tensor) -> Tensor:
        """KL(original || decoder) a token, of next-token distributions along a text (B, T)."""
        start = torch.full_like(token_ids[:, :1], start_token(self.original.config))
        with torch.no_grad():
            reference = self.original(input_ids=torch.cat([start, token_ids[:, :-1]], dim=1), use_cache=False).logits
        return kl_loss(reference.flatten(0, 1), logits.flatten(0, 1))

    def forward(
        self,
        batch: dict[str, Tensor],
        tau: float = 1.0,
        noise: Noise = fresh_noise,
        other_noise: Noise = fresh_noise,
        judged: bool = True,
    ) -> dict[str, Tensor]:
        """The two losses of a batch with rows (B, S) whose activation is read at `positions` (B,).

        Without `judged` the original does not run for the KL, which shows what that costs; a squared error, `mse`,
        takes its place.
        """
        one_hots, logits = self.generate_soft(batch["activations"], tau, noise)
        reconstruction = self.reconstruct(one_hots)
        other = self.reconstruct(self.generate_soft(batch["other_activations"], tau, other_noise)[0])
        with torch.no_grad():
            delta_residual = batch["other_activations"] - other
        lm = self.lm_loss(one_hots.argmax(-1), logits)
        if not judged:
            return {"mse": F.mse_loss(reconstruction, batch["activations"]), "lm": lm}
        original = self.forward_with_replacement(batch, batch["activations"])
        replaced = self.forward_with_replacement(batch, reconstruction + delta_residual)
        return {"kl": kl_loss(original, replaced), "lm": lm}


def kl_loss(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q) in nats, the mean over rows (N, V)."""
    return F.kl_div(q_logits.log_softmax(-1), p_logits.softmax(-1), reduction="batchmean")
