"""Reading at scale: every row of a cache in the lens's words, in large batches, written shard by shard.

A shard is an Arrow file that takes its name when it is whole, so a run that is killed goes on with the shards that
are not there, and any number of processes share the work, each with shards of its own. One shard of rows is in memory
at a time.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from accelerate import PartialState
from accelerate.utils import send_to_device
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..atomic_write import atomic_file, write_json, write_text
from ..cached_passes import cost_on, evaluating
from ..data.activation_source import Rows
from ..data.passes_by_length import PassesByLength
from ..data.shared_contexts import ReadPlaces, SharedContexts
from ..fingerprints import tensors_hash
from ..losses import kl_divergence
from ..modeling_consistency_lens import ConsistencyLensModel
from .evaluated import judge_places
from .metrics import squared_error
from .saved_lens import collator_for
from .vllm_engine import VllmEngine

SETTINGS_FILE = "explanations.json"
# column -> what the collator calls it
COLUMNS = {"row": "rows", "document": "document", "position": "positions"}
README = """---
configs:
- config_name: default
  data_files: data/*.arrow
---
# Explanations of activations

{rows:,} rows, one for each activation: `row`, `document` and `position` say which, `token` is the token there, `text`
and `text_ids` are the words of the lens{measures}. Written by consistency-lens; `{settings}` has the settings.
"""


@torch.no_grad()
def explain_dataset(
    lens: ConsistencyLensModel,
    rows: Rows,
    output_dir: str | Path,
    *,
    batch_size: int = 256,
    rows_per_shard: int = 8192,
    measures: Sequence[str] = ("fve",),
    num_workers: int = 0,
    share_contexts: bool = True,
    passes_by_length: bool = True,
    engine: VllmEngine | None = None,
    state: PartialState | None = None,
    progress: bool = True,
) -> Dataset | None:
    """Writes the greedy text of every row to `output_dir`, a folder that `datasets.load_dataset` opens.

    Args:
        lens: with its tokenizer, and with its subject where the KL is asked for.
        rows: of a cache: `data.activation_source.ActivationRows(ActivationCache.open(folder))`.
        output_dir: goes on where an earlier call with the same settings stopped.
        batch_size: rows that are decoded together. It changes the speed, and not the texts but for rounding.
        rows_per_shard: rows in a file, and in memory.
        measures: columns beside the text: `fve`, 1 - |A - Â|² / |A - mean|² of the row; `kl`, KL(p(.|A) || p(.|Â)) in
            nats, for which the subject reads the contexts.
        num_workers: processes that load rows meanwhile.
        share_contexts: for the KL, run a context once for all rows of a batch that are read in it.
        passes_by_length: for the KL, run contexts of similar length in a pass of their own.
        engine: decodes in place of the lens, which still reads the texts for the measures; it takes one process.
        state: its processes share the shards; all of them call this function.
        progress: show a progress bar on the first process.

    Returns:
        The explanations, in the order of the rows; None on all processes but the first.

    Raises:
        ValueError: for unknown measures, sizes below 1, no rows, an engine of other weights or of several processes,
            or a folder with explanations of another lens, other rows or other settings.
    """
    check_arguments(rows, batch_size, rows_per_shard, measures)
    folder, num_shards = Path(output_dir), -(-len(rows) // rows_per_shard)
    rank, num_ranks = (0, 1) if state is None else (state.process_index, state.num_processes)
    settings = {
        "lens": tensors_hash(lens.trained_tensors()),
        "num_text_tokens": lens.config.num_text_tokens,
        "rows": len(rows),
        "rows_per_shard": rows_per_shard,
        "measures": list(measures),
        "engine": None if engine is None else engine.name,
        "source": facts_of(rows),
    }
    check_engine(engine, settings["lens"], num_ranks)
    claim(folder, settings, write=rank == 0)
    collate: Any = collator_for(lens)
    # only the subject reads contexts
    if share_contexts and "kl" in measures:
        collate = SharedContexts(collate)
    if passes_by_length and "kl" in measures:
        collate = PassesByLength(collate, cost_on(lens.device))
    left = [index for index in range(rank, num_shards, num_ranks) if not shard_file(folder, index).is_file()]
    chosen = {index: range(len(rows))[index * rows_per_shard :][:rows_per_shard] for index in left}
    count, silent = sum(map(len, chosen.values())), rank > 0 or not progress
    with evaluating(lens), tqdm(total=count, unit="row", desc="explanations", disable=silent) as bar:
        for index, indices in chosen.items():
            tables = []
            for batch in loader_of(rows, indices, batch_size, collate, num_workers, lens.device):
                tables.append(explained(lens, batch, measures, engine))
                bar.update(len(batch["rows"]))
            write_shard(shard_file(folder, index), pa.concat_tables(tables))
    if state is not None:
        state.wait_for_everyone()
    return finish(folder, settings, num_shards) if rank == 0 else None


def loader_of(
    rows: Rows, indices: Sequence[int], batch_size: int, collate: Any, num_workers: int, device: torch.device
) -> Any:
    """The batches of some of the rows; they are loaded ahead by `num_workers` processes."""
    return DataLoader(
        rows,  # type: ignore[arg-type]
        batch_size,
        sampler=indices,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # the loader draws a seed for its workers, here not from the global state
    )


def explained(
    lens: ConsistencyLensModel, batch: dict[str, Any], measures: Sequence[str], engine: VllmEngine | None
) -> pa.Table:
    """The explanations of one collated batch."""
    batch = send_to_device(batch, lens.device, non_blocking=True)
    decoded = (lens if engine is None else engine).decode(batch["activations"])
    tokenizer = lens.require_tokenizer()
    places = ReadPlaces.of(batch)
    tokens = places.of_rows(batch["input_ids"].gather(1, places.positions))
    ids = decoded.token_ids.int().cpu().numpy()
    columns = {
        **{name: pa.array(batch[key].cpu().numpy()) for name, key in COLUMNS.items()},
        "token": pa.array(tokenizer.batch_decode(tokens[:, None])),
        "text": pa.array(decoded.texts),
        "text_ids": pa.FixedSizeListArray.from_arrays(pa.array(ids.reshape(-1)), ids.shape[1]),
    }
    if measures:
        reconstructions = lens.read_ids(decoded.token_ids)
        for name in measures:
            values = MEASURES[name](lens, batch, reconstructions)
            columns[name] = pa.array(values.float().cpu().numpy())
    return pa.table(columns)


def row_fve(lens: ConsistencyLensModel, batch: dict[str, Any], reconstructions: Tensor) -> Tensor:
    """1 - |A - Â|² / |A - mean|² of each row, (B,), on the CPU: not every device has float64."""
    activations = batch["activations"].cpu()
    error = squared_error(activations, reconstructions.cpu())
    return 1 - error / squared_error(activations, lens.mean.cpu())


def row_kl(lens: ConsistencyLensModel, batch: dict[str, Any], reconstructions: Tensor) -> Tensor:
    """KL(p(.|A) || p(.|Â)) of each row, (B,), in nats."""
    places, before, after = judge_places(lens.subject, batch, reconstructions[:, None])
    return places.of_rows(kl_divergence(before, after[:, :, 0]))


MEASURES = {"fve": row_fve, "kl": row_kl}


def check_arguments(rows: Rows, batch_size: int, rows_per_shard: int, measures: Sequence[str]) -> None:
    """ValueError for arguments of `explain_dataset` that are none."""
    unknown = set(measures) - set(MEASURES)
    if unknown:
        raise ValueError(f"measures: any of {', '.join(MEASURES)}, got {sorted(unknown)[0]!r}")
    for name, size in (("batch_size", batch_size), ("rows_per_shard", rows_per_shard)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if len(rows) == 0:
        raise ValueError("explain_dataset: got no rows")


def check_engine(engine: VllmEngine | None, lens_hash: str, num_ranks: int) -> None:
    """ValueError for an engine that does not decode as the lens does now, or one in each of several processes."""
    if engine is None:
        return
    if engine.weights != lens_hash:
        raise ValueError("engine: got one that was started with other weights than the lens has; start another")
    if num_ranks > 1:
        raise ValueError(
            f"engine: vLLM takes all devices from one process, got {num_ranks} processes; start one, with e.g. "
            "tensor_parallel_size for the engine"
        )


def facts_of(rows: Rows) -> dict[str, Any]:
    """What tells rows of one source from those of another, as far as they know it."""
    source = getattr(rows, "source", None)
    known = {} if source is None else source.provenance
    names = (
        "subject",
        "subject_revision",
        "weights_hash",
        "layer",
        "dataset",
        "dataset_revision",
        "dataset_hash",
        "seed",
    )
    facts = {name: known[name] for name in names if name in known}
    if source is not None:
        facts["first_and_last_row"] = [int(source.rows[0]), int(source.rows[-1])]
    return facts


def claim(folder: Path, settings: dict[str, Any], write: bool) -> None:
    """Makes the folder that of these settings.

    Raises:
        ValueError: if it holds explanations of others.
    """
    file = folder / SETTINGS_FILE
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        key = next((key for key, value in settings.items() if found.get(key) != value), None)
        if key is not None:
            raise ValueError(
                f"output_dir: {str(folder)!r} has explanations with {key} {found.get(key)!r}, now it is "
                f"{settings[key]!r}; choose another folder or delete that one"
            )
    elif write:
        write_json(file, settings)


def shard_file(folder: Path, index: int) -> Path:
    """The file of a shard."""
    return folder / "data" / f"shard-{index:05d}.arrow"


def write_shard(file: Path, table: pa.Table) -> None:
    """Writes a shard whole or not at all."""
    with atomic_file(file) as stream, pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)


def finish(folder: Path, settings: dict[str, Any], num_shards: int) -> Dataset:
    """Writes what says how to open the folder, and opens it."""
    measures = "".join(f", `{name}`" for name in settings["measures"])
    readme = README.format(rows=settings["rows"], measures=measures, settings=SETTINGS_FILE)
    write_text(folder / "README.md", readme)
    return concatenate_datasets([Dataset.from_file(str(shard_file(folder, index))) for index in range(num_shards)])
