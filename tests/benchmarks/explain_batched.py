"""Explanations a second of `explain_dataset` at batch 256: against one by one, and against `generate()`.

The rows are random activations, read by a fresh lens of the embedded model; both sides write the same texts.
Run with `python tests/benchmarks/explain_batched.py`. It writes `explain_batched`, seconds of 256 explanations against
batches of one, and `explain_vs_generate`, of 1,024 against `generate(inputs_embeds=...)` alone at batch 256: ours then
also reads rows, decodes tokens to strings and writes the shard.
"""

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from harness import interleaved, prepare, write_result
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from consistency_lens import ConsistencyLensModel
from consistency_lens.evaluation.explaining import explain_dataset

BATCH, ROWS, NUM_TEXT_TOKENS, LAYER, RUNS = 256, 1024, 8, 2, 9
EMBEDDED = Path(__file__).parents[2] / "examples" / "tiny_stories"


class Rows(torch.utils.data.Dataset):
    """Random activations with short contexts."""

    def __init__(self, count: int, width: int) -> None:
        self.activations = torch.randn(count, width, generator=torch.Generator().manual_seed(0)).numpy()

    def __len__(self) -> int:
        return len(self.activations)

    def __getitem__(self, index: int) -> dict:
        known = {"input_ids": [3, 4, 5, 6], "position": 3, "document": index, "row": index}
        return {"activation": self.activations[index], **known}


def make_lens() -> ConsistencyLensModel:
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    return ConsistencyLensModel.from_subject(model, tokenizer, LAYER, num_text_tokens=NUM_TEXT_TOKENS).eval()


@torch.no_grad()
def generated(lens: ConsistencyLensModel, activations: torch.Tensor) -> torch.Tensor:
    """The texts (B, T) by transformers' own generation from the prompt's embeddings."""
    decoder = lens.decoder
    prefix, suffix = (part.expand(len(activations), -1, -1) for part in decoder.prompt())
    embeddings = torch.cat([prefix, decoder.slot_embedding(activations), suffix], dim=1)
    mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
    settings = GenerationConfig(max_new_tokens=NUM_TEXT_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
    return decoder.base.generate(inputs_embeds=embeddings, attention_mask=mask, generation_config=settings)


def main() -> None:
    """Checks that all sides write the same, and times them in turn."""
    device = prepare()
    lens = make_lens().to(device)
    few, many = (Rows(count, len(lens.mean)) for count in (BATCH, ROWS))
    batches = torch.from_numpy(many.activations).to(device).split(BATCH)
    with tempfile.TemporaryDirectory() as folder:
        names = itertools.count()

        def explain(rows: Rows, batch_size: int) -> list[list[int]]:
            target = Path(folder) / str(next(names))
            return explain_dataset(lens, rows, target, batch_size=batch_size, measures=(), progress=False)["text_ids"]

        def compare(name: str, rows: Rows, against: str, other: Callable[[], list[list[int]]]) -> None:
            sides = {"ours": lambda: explain(rows, BATCH), "theirs": other}
            if sides["ours"]() != sides["theirs"]():
                raise RuntimeError("the sides wrote different texts")
            medians = interleaved(sides, device, RUNS, warmup=1)
            what = (
                f"{len(rows):,} explanations of T={NUM_TEXT_TOKENS} tokens by the embedded model, batches of {BATCH}"
            )
            write_result(
                name, f"{what} against {against}", "seconds", medians["ours"], medians["theirs"], RUNS, device
            )

        compare("explain_batched", few, "one by one", lambda: explain(few, 1))
        compare(
            "explain_vs_generate",
            many,
            "generate()",
            lambda: [ids for batch in batches for ids in generated(lens, batch).tolist()],
        )


if __name__ == "__main__":
    main()
