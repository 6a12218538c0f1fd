"""Where the time and the memory of a training step go: a table, and a trace for chrome://tracing or Perfetto.

The parts are the spans that the code names (`spans.span`). Time and memory are read off the trace that is written, so
both say the same: a part has the time in which it was the innermost span, and on a GPU that of the kernels which were
launched meanwhile, whatever thread launched them.
"""

import json
import logging
from bisect import bisect_right
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..atomic_write import write_json
from ..explanation import printed
from ..spans import PREFIX

logger = logging.getLogger(__name__)

WARMUP_STEPS, DEFAULT_STEPS = 2, 3
TABLE_FILE, TRACE_FILE = "profile.json", "profile_trace.json"
REST = "rest"
# The optimizers of torch name their steps by themselves.
OPTIMIZER = "Optimizer.step"
MEMORY = "[memory]"


def steps_to_profile(setting: str | bool | int) -> int:
    """How many steps the setting `profile` asks for: "true" for 3, "false" for none, or a number.

    Raises:
        ValueError: for anything else.
    """
    text = str(setting).lower()
    if text in ("true", "false"):
        return DEFAULT_STEPS if text == "true" else 0
    if not text.isdigit():
        raise ValueError(f"profile: must be true, false or a number of steps, got {setting!r}")
    return int(text)


@dataclass(frozen=True)
class ProfiledPart:
    """One part of a step, means of the steps that were profiled.

    Attributes:
        part: its name; `rest` is what lies in no span.
        milliseconds: of the CPU's clock in which this was the innermost span.
        device_milliseconds: of the kernels launched meanwhile; None without a GPU.
        share: of the step, by the device's time where there is one.
        peak_bytes: the most memory within, above what was allocated when the profile began.
    """

    part: str
    milliseconds: float
    device_milliseconds: float | None
    share: float
    peak_bytes: int | None


class ProfileSteps(TrainerCallback):
    """Profiles a few steps after two others, and writes `profile.json` and `profile_trace.json`.

    Args:
        steps: how many steps.
        folder: where the files go; process 0 writes them.
    """

    def __init__(self, steps: int, folder: Path) -> None:
        self.steps = steps
        self.folder = folder
        self.seen = 0
        self.profile: torch.profiler.profile | None = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.seen += 1
        # from the end of a step to that of another, so that the loading of rows is in it
        if self.seen == WARMUP_STEPS:
            self.start(args.device)
        elif self.seen == WARMUP_STEPS + self.steps and self.profile is not None:
            self.finish(args.device, is_first=args.process_index == 0, silent=bool(args.disable_tqdm))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.seen < WARMUP_STEPS + self.steps:
            logger.warning(
                "profile: the run has %d steps, a profile needs %d; nothing is written",
                self.seen,
                WARMUP_STEPS + self.steps,
            )
        if self.profile is not None:
            self.profile.stop()
            self.profile = None

    def start(self, device: torch.device) -> None:
        """Begins to record."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.synchronize(device)
        self.profile = torch.profiler.profile(activities=activities, profile_memory=True)
        self.profile.start()

    def finish(self, device: torch.device, is_first: bool, silent: bool) -> None:
        """Ends the recording, writes both files and shows the table."""
        assert self.profile is not None
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.profile.stop()
        profile, self.profile = self.profile, None
        if not is_first:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        trace_file = self.folder / TRACE_FILE
        profile.export_chrome_trace(str(trace_file))
        events = json.loads(trace_file.read_text(encoding="utf-8"))["traceEvents"]
        parts = profiled_parts(events, self.steps, on_gpu=device.type == "cuda")
        write_json(self.folder / TABLE_FILE, {"steps": self.steps, "parts": [asdict(part) for part in parts]})
        logger.info("profile of %d steps: %s", self.steps, self.folder / TABLE_FILE)
        if not silent:
            tqdm.write(printed(profile_table(parts, self.steps)))


def profiled_parts(events: list[dict[str, Any]], steps: int, on_gpu: bool = False) -> list[ProfiledPart]:
    """The parts of a step, in the order of their first spans, `rest` last.

    Args:
        events: of a Chrome trace (`traceEvents`), times in microseconds.
        steps: how many steps it covers.
        on_gpu: whether kernels and the GPU's memory count.
    """
    spans = sorted((s for e in events if (s := span_of(e)) is not None), key=lambda s: (s[0], -s[1]))
    begin, end = bounds_of(events)
    pieces = innermost(spans, begin, end)
    starts = [start for start, _, _ in pieces]

    def part_at(time: float) -> int:
        return max(0, bisect_right(starts, time) - 1)

    seconds: dict[str, float] = defaultdict(float)
    device: dict[str, float] = defaultdict(float)
    peaks: dict[str, int] = {}
    for start, stop, name in pieces:
        seconds[name] += stop - start
    launches = {
        e["args"]["External id"]: e["ts"]
        for e in events
        if e.get("cat") == "cpu_op" and "External id" in e.get("args", {})
    }
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            launched = launches.get(event["args"].get("External id"), event["ts"])
            device[pieces[part_at(launched)][2]] += event["dur"]
    for index, peak in peaks_of(events, part_at, on_gpu).items():
        name = pieces[index][2]
        peaks[name] = max(peak, peaks.get(name, 0))
    times = device if on_gpu else seconds
    total = sum(times.values()) or 1.0
    order = [*dict.fromkeys(name for _, _, name in spans), REST]
    return [
        ProfiledPart(
            part=name,
            milliseconds=seconds[name] / steps / 1e3,
            device_milliseconds=device[name] / steps / 1e3 if on_gpu else None,
            share=times[name] / total,
            peak_bytes=peaks.get(name),
        )
        for name in order
    ]


def span_of(event: dict[str, Any]) -> tuple[float, float, str] | None:
    """Begin, end and part of an event that is a span on the CPU; None for others."""
    name = str(event.get("name", ""))
    if event.get("cat") not in ("user_annotation", "cpu_op") or "dur" not in event:
        return None
    if name.startswith(PREFIX):
        return event["ts"], event["ts"] + event["dur"], name.removeprefix(PREFIX)
    if name.startswith(OPTIMIZER):
        return event["ts"], event["ts"] + event["dur"], "optimizer"
    return None


def bounds_of(events: list[dict[str, Any]]) -> tuple[float, float]:
    """From the first to the last that the CPU did."""
    timed = [e for e in events if "dur" in e and e.get("cat") in ("cpu_op", "user_annotation", "python_function")]
    return min(e["ts"] for e in timed), max(e["ts"] + e["dur"] for e in timed)


def innermost(spans: list[tuple[float, float, str]], begin: float, end: float) -> list[tuple[float, float, str]]:
    """The time from begin to end, cut into pieces that each lie in one innermost span of nested ones, or in none."""
    pieces: list[tuple[float, float, str]] = []
    open_spans: list[tuple[float, str]] = [(end, REST)]
    now = begin

    def advance(to: float) -> None:
        nonlocal now
        while len(open_spans) > 1 and open_spans[-1][0] <= to:
            stop, name = open_spans.pop()
            if stop > now:
                pieces.append((now, stop, name))
                now = stop
        if to > now:
            pieces.append((now, to, open_spans[-1][1]))
            now = to

    for start, stop, name in spans:
        advance(start)
        open_spans.append((stop, name))
    advance(end)
    return pieces


def peaks_of(events: list[dict[str, Any]], part_at: Any, on_gpu: bool) -> dict[int, int]:
    """For pieces (by index) the most bytes that were allocated in them, above those at the beginning of the trace."""
    peaks: dict[int, int] = {}
    now = 0
    wanted = 1 if on_gpu else 0  # c10::DeviceType of CUDA and CPU
    for event in sorted((e for e in events if e.get("name") == MEMORY), key=lambda e: e["ts"]):
        if event["args"].get("Device Type") != wanted:
            continue
        index, before = part_at(event["ts"]), now
        now += event["args"]["Bytes"]
        peaks[index] = max(peaks.get(index, before), before, now)
    return peaks


def profile_table(parts: list[ProfiledPart], steps: int) -> Table:
    """The parts as a rich table."""
    table = Table(title=f"a training step, mean of {steps}")
    on_gpu = any(part.device_milliseconds is not None for part in parts)
    for column in ("part", "ms", *(["device ms"] if on_gpu else []), "share", "peak memory, MB"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part in parts:
        memory = "" if part.peak_bytes is None else f"{part.peak_bytes / 1e6:,.1f}"
        device = [f"{part.device_milliseconds:,.1f}"] if part.device_milliseconds is not None else []
        table.add_row(part.part, f"{part.milliseconds:,.1f}", *device, f"{part.share:.1%}", memory)
    return table
