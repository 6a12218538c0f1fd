"""A report from a run's folder: what it left, its lens on some texts, and the tuned lens of the same subject."""

import logging
from dataclasses import dataclass, field
from pathlib import Path

from ..atomic_write import check_writable, write_text
from ..evaluation.saved_lens import SavedLensArguments, check_subject, load_lens
from ..own_subject import UnknownSubjectError
from ..tuned_lens.lens_places import CONFIG_FILE
from .document import ReportDocument, report_document
from .explorer import Explorer, read_texts
from .explorer_file import EXPLORER_FILE, read_explorer, weights_sha256, write_explorer
from .layers import layers_of
from .page import render_page
from .run_folder import RunFolder, read_run
from .texts import held_out_texts, texts_of_file

logger = logging.getLogger(__name__)

REPORT_FILE = "report.html"
MAX_TOKENS = 3000
LARGEST_PAGE = 5_000_000  # bytes


@dataclass
class ReportArguments:
    """Which run is shown, with which texts, and where the page goes."""

    run: str = field(default="", metadata={"help": "Folder of the run: the output_dir of a training or evaluation."})
    output: str | None = field(
        default=None, metadata={"help": "Where the page goes; default: report.html in the run's folder."}
    )
    lens: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the lens that reads the texts; default: the run's own."}
    )
    model: str | None = field(
        default=None, metadata={"help": "The subject, where it is not to be found at the place that the lens names."}
    )
    texts: str | None = field(
        default=None,
        metadata={
            "help": "Texts of the explorer: a text file (documents divided by <|endoftext|> on a line of its own), or "
            "JSONL with a 'text' in each line; default: documents that the training held out."
        },
    )
    max_tokens: int | None = field(
        default=None, metadata={"help": f"Tokens of all texts together that the lens reads; default: {MAX_TOKENS}."}
    )
    ablation: bool = field(
        default=True,
        metadata={
            "help": "Shade the words of explanations by what is lost without each; the lens reads once for each."
        },
    )
    tuned_lens: str | None = field(
        default=None,
        metadata={"help": "Folder of a tuned lens of the subject; default: the one in tuned_lenses, if there is one."},
    )
    disable_tqdm: bool = field(default=False, metadata={"help": "Show no progress bar."})
    seed: int | None = field(
        default=None,
        metadata={"help": "Of the choice of held-out documents; default: that of what was read before, or 0."},
    )
    device: str | None = field(
        default=None, metadata={"help": "Such as cpu or cuda:1; default: a GPU if there is one."}
    )
    dtype: str | None = field(default=None, metadata={"help": "Precision of the weights; default: as in training."})

    def __post_init__(self) -> None:
        if not self.run:
            raise ValueError("run: got none; pass the folder of a run, e.g. report outputs/tiny_stories")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if self.output is not None and Path(self.output).is_dir():
            raise ValueError(f"output: {self.output!r} is a folder; pass the path of the page, such as report.html")

    @property
    def place_of_lens(self) -> str:
        return self.lens or self.run

    @property
    def is_for_the_run(self) -> bool:
        """Whether what is read by the run's own lens stays in the run's folder, as an explorer or on its page."""
        is_own = Path(self.place_of_lens).resolve() == Path(self.run).resolve()
        return is_own and (not self.is_asked_to_read or self.output is None)

    @property
    def is_asked_to_read(self) -> bool:
        """Whether it is said what is to be read, so that it is an error if it cannot be."""
        return self.lens is not None or self.texts is not None


def build_report(args: ReportArguments) -> tuple[Path, ReportDocument]:
    """Writes the page of a run.

    Returns:
        Where it lies, and what it shows.

    Raises:
        ValueError: if there is no run, or what was asked for is not to be had.
    """
    run = read_run(args.run)
    path = Path(args.output) if args.output else run.path / REPORT_FILE
    check_writable(path.parent, "output")
    explorer, notes = explorer_of(args, run)
    heatmap, more = layers_of(args.tuned_lens, run, explorer, args.device)
    document = report_document(run, explorer, heatmap, [*notes, *more])
    page = render_page(document)
    write_text(path, page)
    if len(page.encode()) > LARGEST_PAGE:
        logger.warning("report: the page has %.1f MB; pass a smaller --max_tokens", len(page.encode()) / 1e6)
    return path, document


def explorer_of(args: ReportArguments, run: RunFolder) -> tuple[Explorer | None, list[str]]:
    """The texts of a report as the lens reads them; what was read before of the same lens is used again.

    Returns:
        None where there is nothing to read with, and then why.

    Raises:
        ValueError: if what was asked for cannot be read, what was kept is broken, or what would be read for the run's
            folder may be of another subject.
    """
    kept = run.path / EXPLORER_FILE
    if not args.is_asked_to_read and kept.is_file():
        explorer = read_explorer(kept)
        if is_current(explorer, args):
            logger.info("report: the texts of %s, read before", kept)
            return explorer, []
    if not args.is_asked_to_read and not (run.path / CONFIG_FILE).is_file():
        return None, ["No explorer: this folder holds no lens. Pass --lens with the folder or Hub id of one."]
    try:
        explorer = read_with_lens(args, run)
    except UnknownSubjectError:
        raise
    except ValueError as error:
        if args.is_asked_to_read:
            raise
        return None, [f"No explorer: {error}"]
    if not args.is_asked_to_read:
        write_explorer(kept, explorer)
    return explorer, []


def is_current(explorer: Explorer, args: ReportArguments) -> bool:
    """Whether what was kept is what would be read now: of the same weights, as far as asked for."""
    now = weights_sha256(args.place_of_lens)
    is_of_this_lens = now is None or explorer["lens"] == now
    is_long_enough = args.max_tokens in (None, explorer["max_tokens"])
    return is_of_this_lens and is_long_enough and (explorer["ablation"] or not args.ablation) and args.seed is None


def read_with_lens(args: ReportArguments, run: RunFolder) -> Explorer:
    """Loads the lens and reads the texts."""
    saved = SavedLensArguments(
        lens=args.place_of_lens, model=args.model, output_dir=str(run.path), device=args.device, dtype=args.dtype
    )
    lens = load_lens(saved).eval()
    if args.is_for_the_run:
        check_subject(saved, lens, "pass --texts and --output")
    if args.texts is None:
        source, texts = "Documents that the training held out", held_out_texts(lens, saved, args.seed or 0)
    else:
        source, texts = f"Texts of {Path(args.texts).name}", texts_of_file(lens, args.texts)
    return read_texts(
        lens,
        texts,
        source=source,
        max_tokens=args.max_tokens or MAX_TOKENS,
        lens_hash=weights_sha256(args.place_of_lens),
        ablation=args.ablation,
        progress=not args.disable_tqdm,
    )
