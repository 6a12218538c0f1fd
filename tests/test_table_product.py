import pytest
import torch
from flop_count import flops

from consistency_lens.table_product import BLOCK_ELEMENTS, table_product


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("count", "vocab_size", "width"), [(3, 7, 5), (1, 2 * BLOCK_ELEMENTS // 64 + 9, 64), (0, 8, 2)]
)
def test_it_is_the_product_with_the_whole_table(count, vocab_size, width, dtype):
    generator = torch.Generator().manual_seed(0)
    rows, table = (torch.randn(n, width, generator=generator).to(dtype) for n in (count, vocab_size))
    expected = rows @ table.T
    found = table_product(rows, table)
    assert found.dtype == dtype and found.is_contiguous()
    torch.testing.assert_close(found, expected)
    assert flops(lambda: table_product(rows, table)) == 2 * count * vocab_size * width
    other = torch.randn(expected.shape, generator=generator).to(dtype)
    total = other.clone()
    assert table_product(rows, table, add_to=total) is total
    torch.testing.assert_close(total, torch.addmm(other, rows, table.T))


def test_a_width_beyond_a_block_takes_row_by_row():
    table = torch.randn(3, BLOCK_ELEMENTS + 1)
    rows = torch.randn(2, BLOCK_ELEMENTS + 1)
    torch.testing.assert_close(table_product(rows, table), rows @ table.T, rtol=1e-4, atol=1e-2)
