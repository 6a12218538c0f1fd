import numpy as np
import pytest

from consistency_lens.data.moments import streaming_moments


def test_moments_survive_a_mean_far_larger_than_the_spread():
    activations = np.random.default_rng(0).normal(size=(1000, 5)) + 1e6
    moments = streaming_moments(np.split(activations, [1, 300, 900]))
    np.testing.assert_allclose(moments.mean, activations.mean(axis=0), rtol=1e-12)
    assert moments.rms == pytest.approx((activations - activations.mean(axis=0)).std(), rel=1e-6)


def test_blocks_without_rows_leave_the_moments_alone():
    activations = np.random.default_rng(0).normal(size=(20, 3))
    moments = streaming_moments([activations[:0], activations[:9], activations[:0], activations[9:]])
    np.testing.assert_allclose(moments.mean, activations.mean(axis=0))
    assert moments.rms == pytest.approx((activations - activations.mean(axis=0)).std())
