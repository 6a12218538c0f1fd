"""`consistency-lens train` under a strategy of `sharded_on_cpu`: torchrun recipe_under.py STRATEGY FOLDER FLAGS."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from sharded_on_cpu import pretend_gpus, use

from consistency_lens.cli.train import main

if __name__ == "__main__":
    strategy, folder, *flags = sys.argv[1:]
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    pretend_gpus()
    settings = use(strategy, Path(folder))
    sys.exit(main([*flags, *(part for name, value in settings.items() for part in (f"--{name}", str(value)))]))
