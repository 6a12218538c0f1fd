"""Fits a tuned lens of a model: one affine translator for each layer, decoded by the model's own head.

python examples/fit_tuned_lens.py --config examples/recipes/tuned_lens/tiny_stories.yaml
accelerate launch examples/fit_tuned_lens.py --model gpt2 --tokens 16000000
"""

import sys

from consistency_lens.cli.tuned_lens.fit import main

if __name__ == "__main__":
    sys.exit(main())
