"""The commands of `consistency-lens`, in the groups and the order in which they are listed."""

from collections.abc import Mapping
from typing import NamedTuple

PROGRAM = "consistency-lens"
TUNED_LENS = "tuned-lens"


class Command(NamedTuple):
    """A command as its help tells it."""

    group: str
    """The heading that it is listed under."""
    summary: str
    example: str
    """Flags that a user may begin with."""


LENS, DATA, HUB, JOBS = "lenses", "activations", "the Hub", "jobs and machine"
COMMANDS = {
    "train": Command(LENS, "train a lens from a recipe", "--config examples/recipes/tiny_stories.yaml"),
    "eval": Command(LENS, "evaluate a saved lens on held-out documents", "--lens outputs/tiny_stories"),
    "explain": Command(
        LENS,
        "what a lens says about a text, token by token",
        '"Once upon a time there was a little dog" --lens outputs/tiny_stories',
    ),
    "report": Command(
        LENS, "one HTML page of a run: its figures, its curves, and texts to walk through", "outputs/tiny_stories"
    ),
    "plot": Command(LENS, "plots of a run: curves, controls, FVE against tokens", "outputs/tiny_stories"),
    "serve": Command(LENS, "a page at which any text is read by a lens, on this machine", "outputs/tiny_stories"),
    TUNED_LENS: Command(LENS, "fit, judge, plot and publish tuned lenses", "fit --model gpt2"),
    "tokenize": Command(
        DATA, "text or chats to tokens, once", "--dataset corpus.txt --model gpt2 --output_dir data/corpus"
    ),
    "cache": Command(DATA, "a subject's activations on such tokens", "--model gpt2 --layer 6 --dataset data/corpus"),
    "describe": Command(DATA, "what an activation cache holds", "--cache data/activations/corpus/gpt2/layer_6/train"),
    "generate-chat": Command(
        DATA,
        "complete prompts through an OpenAI-compatible server",
        "--prompts prompts.jsonl --model Qwen/Qwen3-8B --output_dir data/answers",
    ),
    "push": Command(HUB, "publish lenses, or an activation cache", "--path outputs/tiny_stories --repo me/lens"),
    "pull": Command(HUB, "fetch published lenses, or a cache", "--repo me/lens --path lenses/lens"),
    "list": Command(HUB, "the lenses of a repository", "--repo me/lenses"),
    "verify": Command(
        HUB,
        "lenses and caches against their checksums, their provenance and their model",
        "--path outputs/tiny_stories",
    ),
    "submit": Command(
        JOBS,
        "a recipe from text to evaluation, on a Slurm cluster or here",
        "--config examples/recipes/tiny_stories.yaml --dry_run",
    ),
    "doctor": Command(JOBS, "what is installed, which devices there are, and what is missing for what", ""),
    "completion": Command(JOBS, "completion of commands and flags for a shell", "--shell bash"),
}

TUNED_LENS_COMMANDS = {
    "fit": Command(LENS, "fit the translators of a model", "--model gpt2"),
    "eval": Command(LENS, "KL of every layer on held-out text", "--lens tuned_lenses/gpt2"),
    "sweep": Command(LENS, "records of both lenses on prompts, as CSV and JSON", "--model gpt2 --tuned auto"),
    "gates": Command(LENS, "judge a lens by gates A to D on a prompt suite", "--lens tuned_lenses/gpt2"),
    "plot": Command(LENS, "figures and a page of a sweep", "--records outputs/sweeps/gpt2"),
    "publish": Command(
        HUB,
        "publish a lens in a data set of lenses on the Hub",
        "--lens tuned_lenses/gpt2 --repo me/tuned-lenses",
    ),
    "list": Command(HUB, "the lenses of such a data set", "--repo me/tuned-lenses"),
    "download": Command(
        HUB, "fetch lenses of such a data set", "--repo me/tuned-lenses --model gpt2 --revision v2026.01.31"
    ),
    "verify": Command(
        HUB, "a lens against its checksums, its provenance and its model", "--lens tuned_lenses/gpt2 --model gpt2"
    ),
}


def all_commands() -> Mapping[str, Command]:
    """Every command by what is typed after `consistency-lens`, those of tuned lenses too."""
    alone = {name: command for name, command in COMMANDS.items() if name != TUNED_LENS}
    return alone | {f"{TUNED_LENS} {name}": command for name, command in TUNED_LENS_COMMANDS.items()}
