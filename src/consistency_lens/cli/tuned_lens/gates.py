"""`consistency-lens tuned-lens gates`: the acceptance gates of a lens, judged and written into its provenance."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .suite_arguments import SuiteArguments

if TYPE_CHECKING:
    from rich.console import Console

GATES_FILE = "gates.json"


@dataclass
class GatesArguments(SuiteArguments):
    """Which lens is judged, on which prompts, and which gates have to pass."""

    lens: str = field(default="", metadata={"help": "Folder of the tuned lens."})
    model: str | None = field(
        default=None, metadata={"help": "The model, where it is not to be found at the place that the lens names."}
    )
    gates: list[str] = field(
        default_factory=lambda: ["A", "B", "C", "D"],
        metadata={"help": "Those that have to pass, or the exit code is 3; all are judged and written."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lens:
            raise ValueError("lens: got none; pass the folder of a lens, e.g. --lens tuned_lenses/gpt2")


def main(argv: Sequence[str] | None = None) -> int:
    """Judges a lens; prints KPIs and gates. Returns 3 if a gate that has to pass does not."""
    from ..command import run_command
    from ..parser import parse_arguments

    def work(console: "Console") -> int:
        (args,) = parse_arguments((GatesArguments,), argv, "tuned-lens gates")
        return judge_and_show(args, console)

    return run_command(work)


def judge_and_show(args: GatesArguments, console: "Console") -> int:
    """The work of the command; the exit code.

    Raises:
        ValueError: for prompts, a model or a lens that are not to be had, or a model that may be another than the lens
            was fitted to.
    """
    from ...atomic_write import write_json
    from ...tuned_lens.gates import apply_to_provenance, check_letters, read_provenance
    from ...tuned_lens.lens_places import is_foreign
    from ...tuned_lens.saved import check_opened, open_lens
    from ...tuned_lens.suite import read_suite
    from ...tuned_lens.sweep import judge_lens
    from ..command import DONE, NOT_VERIFIED
    from .verdict import gates_shown

    check_letters(args.gates)
    folder, suite = Path(args.lens), read_suite(args.suite)
    # lenses that others have published have none; of ours it is read before anything is measured
    has_provenance = not is_foreign(folder)
    if has_provenance:
        read_provenance(folder)
    opened = open_lens(folder, args.model, args.revision, args.dtype, args.device)
    assert opened.lens is not None
    if has_provenance:
        check_opened(opened, args.model is not None)
    judgement, beside = judge_lens(
        opened.lens, suite, args.suite, args.num_bootstrap, args.seed, progress=not args.disable_tqdm
    )
    blocks = judgement.as_dict()
    write_json(folder / GATES_FILE, {"arguments": asdict(args), **blocks, **beside})
    if has_provenance:
        apply_to_provenance(folder, judgement)
    console.print(gates_shown(blocks["kpis"], blocks["acceptance"]))
    failed = judgement.gates.failed(args.gates)
    verdict = f"not passed: {', '.join(failed)}" if failed else f"passed: {', '.join(args.gates)}"
    written = folder / ("provenance.json" if has_provenance else GATES_FILE)
    console.print(f"Written to {written}; {verdict}", markup=False, soft_wrap=True)
    return NOT_VERIFIED if failed else DONE
