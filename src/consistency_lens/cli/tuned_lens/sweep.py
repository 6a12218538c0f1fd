"""`consistency-lens tuned-lens sweep`: norm lens and tuned lens over a suite of prompts, as record files and JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .suite_arguments import SuiteArguments

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class SweepArguments(SuiteArguments):
    """Which model is read, with which lens, on which prompts, and where the records go."""

    model: str = field(default="", metadata={"help": "The model that is read: Hub id or folder."})
    lens: str | None = field(
        default=None, metadata={"help": "Folder of its tuned lens; default: tuned_lenses/<name of the model>."}
    )
    tuned: str = field(
        default="auto",
        metadata={"help": "auto: with the tuned lens if there is one; require: not without it; off: norm lens alone."},
    )
    prompt: list[str] | None = field(default=None, metadata={"help": "Prompts in place of a suite."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder of the files; default: outputs/sweeps/<name of the model>."}
    )
    name: str = field(default="sweep", metadata={"help": "What the names of the files begin with."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model:
            raise ValueError("model: got none; pass a Hub id or folder, e.g. --model gpt2")
        if self.suite != "default" and self.prompt is not None:
            raise ValueError(f"prompt: got prompts and the suite {self.suite!r}; pass one of them")
        if not self.name or Path(self.name).name != self.name:
            raise ValueError(f"name: got {self.name!r}; pass the beginning of a file's name, without a folder")


def main(argv: Sequence[str] | None = None) -> int:
    """Sweeps a suite; prints layers, KPIs and gates. Returns the exit code."""
    from ..command import run_command
    from ..parser import parse_arguments

    def work(console: "Console") -> None:
        (args,) = parse_arguments((SweepArguments,), argv, "tuned-lens sweep")
        sweep_and_show(args, console)

    return run_command(work)


def sweep_and_show(args: SweepArguments, console: "Console") -> None:
    """The work of the command.

    Raises:
        ValueError: for prompts, a model or a lens that are not to be had.
    """
    from ...atomic_write import check_writable, write_json
    from ...evaluation.report import rich_table
    from ...tuned_lens.lens_places import clean_name
    from ...tuned_lens.saved import open_lens
    from ...tuned_lens.suite import read_suite, suite_of_texts
    from ...tuned_lens.sweep import find_lens, sweep
    from ...tuned_lens.tables import LAYER_CAPTION, LAYER_COLUMNS, layer_rows
    from .verdict import gates_shown

    lens_folder = find_lens(args.model, args.tuned, args.lens)
    suite = read_suite(args.suite) if args.prompt is None else suite_of_texts(args.prompt)
    suite_name = args.suite if args.prompt is None else "command line"
    folder = Path(args.output_dir or Path("outputs", "sweeps", clean_name(args.model)))
    opened = open_lens(lens_folder, args.model, args.revision, args.dtype, args.device)
    check_writable(folder, "output_dir")
    run = sweep(
        opened.lens,
        opened.subject,
        opened.tokenizer,
        suite,
        folder,
        args.name,
        suite_name=suite_name,
        model_id=args.model,
        revision=opened.revision,
        num_resamples=args.num_bootstrap,
        seed=args.seed,
        progress=not args.disable_tqdm,
    )
    resolved = {"lens": None if lens_folder is None else str(lens_folder), "output_dir": str(folder)}
    write_json(folder / f"{args.name}-arguments.json", asdict(args) | resolved)
    console.print(rich_table(LAYER_COLUMNS, layer_rows(run["layers"])))
    console.print(LAYER_CAPTION)
    tuned = run["tuned_lens"]
    if tuned["enabled"]:
        console.print(gates_shown(tuned["kpis"], tuned["acceptance"]))
    console.print(f"Run: {folder / args.name}.json; records: {', '.join(run['files'])}", markup=False, soft_wrap=True)
