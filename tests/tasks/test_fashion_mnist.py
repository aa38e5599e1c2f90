"""Fashion-MNIST's files."""

import gzip

import numpy as np
import pytest

from experiments.tasks import fashion_mnist


def write_idx(path, array):
    header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


def test_fashion_mnist_reads_idx_files_and_refuses_others(tmp_path):
    images = np.arange(2 * 28 * 28).reshape(2, 28, 28) % 256
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.array([3, 9]))
    found, labels = fashion_mnist.read("test", tmp_path)
    np.testing.assert_array_equal(found[..., 0], images)
    assert labels.tolist() == [3, 9]
    with pytest.raises(
        FileNotFoundError, match="apt-get install dataset-fashion-mnist"
    ):
        fashion_mnist.read("train", tmp_path)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", images)
    with pytest.raises(ValueError, match="not an IDX file of bytes with 1 axes"):
        fashion_mnist.read("test", tmp_path)
    with pytest.raises(ValueError, match="has train, test"):
        fashion_mnist.read("validation", tmp_path)
