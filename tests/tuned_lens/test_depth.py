import pytest

from consistency_lens.tuned_lens.depth import DEPTHS, layer_at_depth


@pytest.mark.parametrize(
    ("num_layers", "layers"),
    [
        (32, [7, 15, 23]),
        (80, [19, 39, 59]),
        (12, [2, 5, 8]),
        (5, [0, 2, 3]),
        (3, [0, 1, 1]),
        (2, [0, 0, 0]),
        (1, [0, 0, 0]),
    ],
)
def test_layers_at_quarters(num_layers, layers):
    assert [layer_at_depth(percent, num_layers) for percent in DEPTHS] == layers


@pytest.mark.parametrize("num_layers", [2, 3, 7, 32, 80])
def test_never_the_last_layer_nor_one_that_is_not_there(num_layers):
    layers = [layer_at_depth(percent, num_layers) for percent in range(101)]
    assert layers == sorted(layers)
    assert layers[0] == 0 and layers[-1] == num_layers - 2
