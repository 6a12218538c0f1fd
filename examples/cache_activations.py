"""Caches a subject's activations on a corpus: any number of processes, each on its own GPU if there are any.

accelerate launch examples/cache_activations.py --model gpt2 --layer 6 --dataset data/corpus
accelerate launch --num_processes 8 examples/cache_activations.py --model google/gemma-2-9b --layer 14 21 28 \
    --dataset data/corpus --dtype bfloat16 --cache_dtype float32 --max_norm 20
"""

import sys

from consistency_lens.cli.cache import main

if __name__ == "__main__":
    sys.exit(main())
