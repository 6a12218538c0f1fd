"""Evaluates a saved lens on the documents that its training held out: figures, controls and every check.

python examples/evaluate_lens.py --lens outputs/tiny_stories
python examples/evaluate_lens.py --lens outputs/tiny_stories --rows 256 --checks best_of_n steering
"""

import sys

from consistency_lens.cli.eval import main

if __name__ == "__main__":
    sys.exit(main())
