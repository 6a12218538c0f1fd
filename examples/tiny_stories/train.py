"""Trains the embedded story model: a byte-level BPE tokenizer and a small Llama, on a file of stories.

    python examples/tiny_stories/train.py --stories stories.txt

writes config.json, model.safetensors, the tokenizer and README.md (the model's card, with what was measured) beside
this file. One document in fifty, chosen by its hash, is held out and never trained on. A larger one, of about 7
million parameters, which the benchmark of the tuned lens reads:

    python examples/tiny_stories/train.py --stories stories.txt --vocab_size 8192 --hidden_size 256 --num_blocks 6 \
        --epochs 0.7 --output_dir outputs/story_model_7m
"""

import argparse
import math
import time
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments, set_seed

from consistency_lens.data.corpus import (
    document_hash,
    is_validation_document,
    pack,
    read_documents,
    tokenize_documents,
)

HELD_OUT_FRACTION = 0.02
BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with BOS, EOS and a padding token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def make_model(tokenizer: PreTrainedTokenizerFast, context: int, width: int, blocks: int) -> LlamaForCausalLM:
    """The untrained model: about 1.1 million parameters with a vocabulary of 2048, width 128 and 4 blocks."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=blocks,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def has_fast_bfloat16() -> bool:
    """Whether bfloat16 is quicker than float32 here: a CPU without instructions for it takes many times as long."""
    return torch.cuda.is_available() or bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def collate(blocks: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Blocks (context,) to a batch (B, context) that is its own label."""
    input_ids = torch.stack(blocks).long()
    return {"input_ids": input_ids, "labels": input_ids}


@torch.no_grad()
def sample(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int, seed: int) -> list[str]:
    """The first `count` stories drawn at temperature 0.8."""
    set_seed(seed)
    prompt = torch.full((count, 1), tokenizer.bos_token_id)
    ids = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=True, temperature=0.8, max_new_tokens=200
    )
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


CARD = """---
license: mit
library_name: transformers
pipeline_tag: text-generation
tags: [tiny-stories, consistency-lens]
---
# tiny_stories

A Llama-architecture model of {parameters:,} parameters ({layers} blocks, width {width}, byte-level BPE of {vocab:,}
entries, context {context}) that writes children's stories.
It ships with consistency-lens as a small subject for `make demo`.

Written by `python examples/tiny_stories/train.py` (seed {seed}):

| what | measured |
|---|---|
| data | {documents:,} stories, {tokens:,} tokens; synthetic, sampled from a public 15M-parameter story model (MIT) |
| held out | {held_out:,} other stories, {held_out_tokens:,} tokens |
| training | {epochs:g} epochs, {steps:,} steps of {tokens_per_step:,} tokens, {minutes:.0f} min, {threads} threads |
| held-out loss | {loss:.3f} nats a token (perplexity {perplexity:.2f}) |
| versions | torch {torch}, transformers {transformers} |

Two samples at temperature 0.8, the first two drawn:

> {first}

> {second}

Limits: it knows a child's vocabulary and nothing else, it forgets what it said a few sentences before, and its text is
fiction written by a machine that learned from another machine's fiction.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", required=True, help="text file, stories divided by lines of <|endoftext|>")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent)
    parser.add_argument("--vocab_size", type=int, default=2048)
    parser.add_argument("--hidden_size", type=int, default=128, help="width, a multiple of 8")
    parser.add_argument("--num_blocks", type=int, default=4)
    parser.add_argument("--context", type=int, default=256, help="tokens a block; the longest story has about 255")
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--max_steps", type=int, default=-1, help="for a trial run")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    set_seed(args.seed)
    stories = read_documents(args.stories)
    held_out = [text for text in stories if is_validation_document(document_hash(text), HELD_OUT_FRACTION)]
    train = [text for text in stories if not is_validation_document(document_hash(text), HELD_OUT_FRACTION)]
    tokenizer = train_tokenizer(train, args.vocab_size)
    train_blocks = torch.from_numpy(pack(tokenize_documents(train, tokenizer), args.context))
    held_out_blocks = torch.from_numpy(pack(tokenize_documents(held_out, tokenizer), args.context))
    model = make_model(tokenizer, args.context, args.hidden_size, args.num_blocks)

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.output_dir / "run"),
            num_train_epochs=args.epochs,
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=200,
            weight_decay=0.1,
            adam_beta2=0.99,
            bf16=has_fast_bfloat16(),
            use_cpu=not torch.cuda.is_available(),
            logging_steps=50,
            save_strategy="no",
            seed=args.seed,
            remove_unused_columns=False,
        ),
        train_dataset=list(train_blocks),
        eval_dataset=list(held_out_blocks),
        data_collator=collate,
    )
    start = time.perf_counter()
    trainer.train()
    minutes = (time.perf_counter() - start) / 60
    loss = trainer.evaluate()["eval_loss"]

    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    first, second = (text.strip().replace("\n", "\n> ") for text in sample(model.eval(), tokenizer, 2, args.seed))
    card = CARD.format(
        parameters=model.num_parameters(), layers=model.config.num_hidden_layers, width=model.config.hidden_size,
        vocab=len(tokenizer), context=args.context, seed=args.seed, documents=len(train), tokens=train_blocks.numel(),
        held_out=len(held_out), held_out_tokens=held_out_blocks.numel(), epochs=trainer.state.epoch,
        steps=trainer.state.global_step, tokens_per_step=args.batch_size * args.context, minutes=minutes,
        threads=torch.get_num_threads(), loss=loss, perplexity=math.exp(loss), torch=torch.__version__,
        transformers=transformers.__version__, first=first, second=second,
    )  # fmt: skip
    (args.output_dir / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
