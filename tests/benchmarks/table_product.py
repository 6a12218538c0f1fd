"""The product of a few rows with a table of the vocabulary, in blocks of the table and whole.

Run with `python tests/benchmarks/table_product.py`. It writes `table_product`.
"""

import torch
from harness import compare, prepare

from consistency_lens.table_product import table_product

ROWS, WIDTH, VOCABULARY = 128, 512, 32_000


def main() -> None:
    """Measures the sizes of a step of `training_step`'s large model."""
    device = prepare()
    rows, table = (torch.randn(n, WIDTH, device=device) for n in (ROWS, VOCABULARY))
    what = f"{ROWS} rows times a table of V={VOCABULARY} d={WIDTH}: in blocks against one product"
    compare("table_product", what, lambda: table_product(rows, table), lambda: rows @ table.T, device, runs=15)


if __name__ == "__main__":
    main()
