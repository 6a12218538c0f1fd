"""The command `consistency-lens`: one small module for each sub-command, imported when it is called."""

import sys
from collections.abc import Sequence

from .dispatch import dispatch

COMMANDS = {
    "train": "train a lens from a recipe (--config examples/recipes/tiny_stories.yaml)",
    "tokenize": "text or chats to tokens, once (--dataset corpus.txt --model gpt2 --output_dir data/corpus)",
    "cache": "a subject's activations on such tokens (--model gpt2 --layer 6 --dataset data/corpus)",
    "describe": "what an activation cache holds (--cache data/.../train)",
    "verify": "lenses and caches against their checksums, provenance and model (--path lenses/name)",
    "push": "publish lenses or an activation cache on the Hub (--path outputs/tiny_stories --repo me/lens)",
    "pull": "fetch published lenses, or a cache (--repo me/lens --path lenses/name)",
    "list": "the lenses of a repository on the Hub (--repo me/lenses)",
    "generate-chat": "complete prompts through an OpenAI-compatible server (--prompts prompts.jsonl)",
    "eval": "evaluate a saved lens on held-out documents (--lens outputs/tiny_stories)",
    "tuned-lens": "fit, judge, plot and publish tuned lenses (tuned-lens fit --model gpt2)",
    "submit": "all of it: tokenize, cache, train, eval, on a Slurm cluster or here (--config recipe.yaml)",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a sub-command; returns its exit code."""
    return dispatch("consistency-lens", COMMANDS, __package__, argv)


if __name__ == "__main__":
    sys.exit(main())
