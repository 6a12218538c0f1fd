"""What a run is called, `{dataset}_{model}_L{layer}_{lr}_{time}`, and the folder that it makes for itself."""

import re
import time
from pathlib import Path

from accelerate.utils import broadcast_object_list

from .control_arguments import OUTPUTS, ControlArguments
from .tracking import read_run

SAMPLED = "sampled"  # where the subject writes its own text


def run_name(dataset: str | None, model: str, layer: int, learning_rate: float, started: time.struct_time) -> str:
    """The name of a run, in characters that every file system and tracker takes."""
    mantissa, exponent = f"{learning_rate:e}".split("e")
    rate = f"lr{float(mantissa):g}e{int(exponent)}"
    parts = (short_name(dataset or SAMPLED), short_name(model), f"L{layer}", rate)
    return "_".join([*parts, time.strftime("%Y%m%d-%H%M%S", started)])


def short_name(source: str) -> str:
    """The last part of a path or Hub id, without the suffix of a text file, in letters, digits, `.` and `-`."""
    name = re.sub(r"\.(txt|jsonl?|parquet|csv)$", "", Path(source).name)
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.") or "unnamed"


def name_run(args: ControlArguments, dataset: str | None, model: str, layer: int, resume: str | None) -> None:
    """Gives a run its name and its folder, in place, where the arguments do not say them.

    A resumed run keeps the name that it has, and goes on in the folder of its checkpoint.

    Args:
        args: of all processes; they agree on the time of the first.
        dataset: what is read; None if the subject writes it.
        model: the subject.
        layer: that is read.
        resume: the checkpoint to go on from.
    """
    if resume is not None:
        before = read_run(Path(resume), Path(resume).parent)
        args.run_name = args.run_name or (before.name if before is not None else None)
        if not args.output_dir_given:
            args.output_dir = str(Path(resume).parent)
    if args.run_name is None:
        started = [tuple(time.localtime())]
        if args.world_size > 1:
            broadcast_object_list(started)
        args.run_name = run_name(dataset, model, layer, args.learning_rate, time.struct_time(started[0]))
    if not args.output_dir_given and resume is None:
        args.output_dir = str(Path(OUTPUTS) / args.run_name)
