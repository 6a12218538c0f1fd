"""Trains a consistency lens from a recipe and evaluates it on held-out documents.

accelerate launch examples/train_lens.py --config examples/recipes/tiny_stories.yaml
accelerate launch examples/train_lens.py --config examples/recipes/tiny_stories.yaml --seed 1 --output_dir outputs/s1
"""

import sys

from consistency_lens.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
