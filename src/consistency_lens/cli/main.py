"""The command `consistency-lens`: one small module for each sub-command, imported when it is called."""

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": "train a lens from a recipe (--config examples/recipes/tiny_stories.yaml)",
    "tokenize": "text or chats to tokens, once (--dataset corpus.txt --model gpt2 --output_dir data/corpus)",
    "cache": "a subject's activations on such tokens (--model gpt2 --layer 6 --dataset data/corpus)",
    "describe": "what an activation cache holds (--cache data/.../train)",
    "verify": "checksums, counts and values of an activation cache (--cache data/.../train)",
    "push": "publish a lens or a cache on the Hub (--path outputs/lens --repo me/lens)",
    "pull": "download what was published (--repo me/lens --path outputs/lens)",
    "generate-chat": "complete prompts through an OpenAI-compatible server (--prompts prompts.jsonl)",
    "eval": "evaluate a saved lens on held-out documents (--lens outputs/tiny_stories)",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Dispatches to a sub-command. Exit codes: 0 done, 1 failed while running, 2 the user's mistake."""
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
