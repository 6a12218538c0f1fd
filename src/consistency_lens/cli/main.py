"""The command `consistency-lens`: one small module for each sub-command, imported when it is called."""

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": "train a lens from a recipe (--config examples/recipes/tiny_stories.yaml)",
    "tokenize": "text or chats to tokens, once (--dataset corpus.txt --model gpt2 --output_dir data/corpus)",
    "cache": "a subject's activations on such tokens (--model gpt2 --layer 6 --dataset data/corpus)",
    "describe": "what an activation cache holds (--cache data/.../train)",
    "verify": "an activation cache against its provenance and its subject (--cache data/.../train)",
    "push": "publish an activation cache on the Hub (--path data/.../layer_6 --repo me/cache)",
    "pull": "fetch a published activation cache (--repo me/cache --path data/cache)",
    "generate-chat": "complete prompts through an OpenAI-compatible server (--prompts prompts.jsonl)",
    "eval": "evaluate a saved lens on held-out documents (--lens outputs/tiny_stories)",
    "submit": "all of it: tokenize, cache, train, eval, on a Slurm cluster or here (--config recipe.yaml)",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Dispatches to a sub-command.

    Exit codes: 0 done, 1 failed while running, 2 the user's mistake, 3 a verification did not pass.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: consistency-lens COMMAND [--config FILE] [flags]\n\ncommands:")
        for name, text in COMMANDS.items():
            print(f"  {name:<14} {text}")
        return 0
    if argv[0] not in COMMANDS:
        print(f"error: unknown command {argv[0]!r}; one of: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return importlib.import_module(f".{argv[0].replace('-', '_')}", __package__).main(argv[1:])


if __name__ == "__main__":
    sys.exit(main())
