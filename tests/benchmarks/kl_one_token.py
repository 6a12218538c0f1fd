"""KL after replacement, with its gradient: the one-token pass against passes over the whole sequence.

Both sides include the pass without gradient that gives the activations and the original logits, and both compute
logits at the positions alone. Run with `python tests/benchmarks/kl_one_token.py`; it writes `kl_one_token` (K = 1) and
`kl_multi_position` (K = 8), and `kl_context_attention` (K = 1): one token against another, whose keys and values are
appended to those of the context; there the context has been read before.
"""

import torch
import torch.nn.functional as F
from harness import compare, prepare
from transformers import LlamaConfig, LlamaForCausalLM

from consistency_lens.subject import Subject, SubjectContext

BATCH, LENGTH, LAYER, NUM_LAYERS, WIDTH, VOCAB_SIZE = 16, 128, 3, 8, 256, 8192


def kl_step(subject: Subject, input_ids: torch.Tensor, positions: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The gradient of KL(p(.|A) || p(.|A + noise)) with respect to the replacement."""
    return kl_gradient(subject, subject.context(input_ids, torch.ones_like(input_ids), positions), noise)


def kl_gradient(subject: Subject, context: SubjectContext, noise: torch.Tensor) -> torch.Tensor:
    """The same, of a context that has been read."""
    activations = (context.activations + noise).requires_grad_()
    logits = subject.replaced_logits(context, activations)
    target = context.logits.log_softmax(-1)
    kl = F.kl_div(logits.log_softmax(-1), target, reduction="sum", log_target=True)
    return torch.autograd.grad(kl, activations)[0]


def main() -> None:
    """Times both sides, after checking that they agree."""
    device = prepare()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    model = LlamaForCausalLM(config).to(device)
    ours, theirs = Subject(model, LAYER), Subject(model, LAYER, one_token=False)
    input_ids = torch.randint(VOCAB_SIZE, (BATCH, LENGTH), device=device)
    for name, num_positions in (("kl_one_token", 1), ("kl_multi_position", 8)):
        positions = torch.rand(BATCH, LENGTH - 1, device=device).argsort(-1)[:, :num_positions] + 1
        noise = torch.randn(BATCH, num_positions, WIDTH, device=device)
        arguments = (input_ids, positions, noise)
        torch.testing.assert_close(kl_step(ours, *arguments), kl_step(theirs, *arguments), rtol=1e-3, atol=1e-5)
        compare(
            name,
            f"KL and gradient, one-token pass against whole sequences, B={BATCH} S={LENGTH} K={num_positions}",
            lambda arguments=arguments: kl_step(ours, *arguments),
            lambda arguments=arguments: kl_step(theirs, *arguments),
            device,
        )

    many = 8 * BATCH
    input_ids = torch.randint(VOCAB_SIZE, (many, LENGTH), device=device)
    positions, noise = torch.full((many, 1), LENGTH - 1, device=device), torch.randn(many, 1, WIDTH, device=device)
    appended = Subject(model, LAYER, context_attention=False)
    read = {side: side.context(input_ids, torch.ones_like(input_ids), positions) for side in (ours, appended)}
    torch.testing.assert_close(*(kl_gradient(*side, noise) for side in read.items()), rtol=1e-3, atol=1e-5)
    compare(
        "kl_context_attention",
        f"KL and gradient of one token, attention to a context in its place against an appended one, B={many} "
        f"S={LENGTH}",
        lambda: kl_gradient(ours, read[ours], noise),
        lambda: kl_gradient(appended, read[appended], noise),
        device,
    )


if __name__ == "__main__":
    main()
