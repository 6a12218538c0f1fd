"""What building a cache takes of memory, and a device without room."""

import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from cache_builds import build, corpus, make_corpus, make_subject, subject

__all__ = ["build", "corpus", "subject"]


def test_batches_that_do_not_fit_the_device_are_named(build, monkeypatch):
    subject = make_subject()

    def full(*_arguments, **_keywords):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")

    monkeypatch.setattr(subject.model, "forward", full)
    with pytest.raises(ValueError, match="no room for 6 sequences of .* lower batch_size from 32"):
        build(subject=subject)


def test_memory_does_not_grow_with_the_rows(build):
    def peak(num_sequences):
        corpus = make_corpus(num_sequences)
        tracemalloc.start()
        try:
            # shards so large that what each takes by itself, whatever ran before, does not show
            build(f"{num_sequences}", corpus=corpus, rows_per_shard=288)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(64)  # what is imported and kept once
    assert peak(1920) < 1.5 * peak(192)


# Prints the peak of memory, in KiB, of building caches of N and of 8 N rows, each in a process of its own.
PEAKS = """
import multiprocessing, sys
from pathlib import Path
import numpy as np
import torch
torch.set_num_threads(1)
from cache_builds import ARGUMENTS, make_tokenizer
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from consistency_lens.data.cache_building import build_activation_cache
from consistency_lens.data.corpus import CORPUS_FEATURES
from consistency_lens.subject import Subject

config = LlamaConfig(
    vocab_size=30, hidden_size=1024, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
)
SUBJECT = Subject(LlamaForCausalLM(config), 0)

def build(sequences, folder, result):
    tokens = np.random.default_rng(0).integers(0, 30, (sequences, 16)).tolist()
    rows = {"input_ids": tokens, "document": list(range(sequences))}
    Dataset.from_dict(rows, features=CORPUS_FEATURES).save_to_disk(folder / "corpus")
    del tokens, rows
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    corpus = Dataset.load_from_disk(folder / "corpus")
    arguments = ARGUMENTS | {"positions_per_sequence": 8, "rows_per_shard": 512}
    build_activation_cache(SUBJECT, corpus, folder / "cache", tokenizer=make_tokenizer(), **arguments)
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    result.put(int(status["VmHWM"].split()[0]))

fork = multiprocessing.get_context("fork")
for sequences in (512, 4096):
    result = fork.Queue()
    process = fork.Process(target=build, args=(sequences, Path(sys.argv[1]) / str(sequences), result))
    process.start()
    print(result.get(timeout=300))
    process.join()
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of memory from /proc")
def test_the_peak_of_memory_does_not_grow_with_the_rows(tmp_path):
    here = Path(__file__).parent
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent), *sys.path]),
        "OMP_NUM_THREADS": "1",
    }
    finished = subprocess.run(
        [sys.executable, "-c", PEAKS, str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    few, many = (int(line) * 1024 for line in finished.stdout.splitlines()[-2:])
    more_activations = (4096 - 512) * 8 * 1024 * 4  # bytes, were they all held
    assert many - few < more_activations / 3
