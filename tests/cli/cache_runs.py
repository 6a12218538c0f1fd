"""Calls of `consistency-lens cache` on a tiny subject: its flags, and what the caches hold in the end."""

import os
import sys
from pathlib import Path

from tiny_lenses import tiny_tokenizer
from tiny_models import tiny_model

ROOT = Path(__file__).parents[2]
# of a process that runs the command
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def text(num_documents=30):
    documents = (" ".join(f"w{3 + (i * 7 + j * j) % 90}" for j in range(14)) for i in range(num_documents))
    return "\n<|endoftext|>\n".join(documents)


def write_subject(folder):
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def flags(subject_folder, corpus, output_dir, *layers, **changes):
    settings = {
        "model": subject_folder, "dataset": corpus, "output_dir": output_dir, "min_position": 4,
        "positions_per_sequence": 3, "rows_per_shard": 12, "device": "cpu", "disable_tqdm": True,
    } | changes  # fmt: skip
    arguments = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    return arguments + (["--layer", *map(str, layers)] if layers else [])


def content(folder):
    """Bytes of every file of every cache under a folder, but for the arguments, which name the folder."""
    files = [file for file in Path(folder).rglob("*") if file.is_file() and file.name != "arguments.json"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}
