"""The product of a few rows with a table that is as long as the vocabulary: logits, and gradients of them.

On a CPU, a product of a hundred rows with a whole table runs far below the speed of the cores, for the table passes
through the cache while it is packed. Taken in blocks that stay there, it is faster (`tests/benchmarks`).
Shapes: n rows, V vocabulary, d width.
"""

import torch
from torch import Tensor

from .plain_arithmetic import is_plain

BLOCK_ELEMENTS = 2**18
"""Elements of the table in a block: 1 MiB of float32."""


def table_product(rows: Tensor, table: Tensor, add_to: Tensor | None = None) -> Tensor:
    """`rows @ table.T` for rows (n, d) and a table (V, d) of one dtype: (n, V). It has no gradient.

    Given `add_to` (n, V), the product is added to it in place, and it is what is returned.
    """
    if rows.device.type != "cpu" or rows.dtype != torch.float32 or is_plain():
        return torch.mm(rows, table.T) if add_to is None else torch.addmm(add_to, rows, table.T, out=add_to)
    product = rows.new_empty(len(rows), len(table)) if add_to is None else add_to
    size = max(1, BLOCK_ELEMENTS // table.shape[1])
    for block, columns in zip(table.split(size), product.split(size, dim=1), strict=True):
        if add_to is None:
            torch.mm(rows, block.T, out=columns)
        else:
            torch.addmm(columns, rows, block.T, out=columns)
    return product
