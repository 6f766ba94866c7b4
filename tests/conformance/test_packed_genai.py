"""GPTQ and AWQ tensors against onnxruntime-genai's own loaders: the same codes and zero points from the same words."""

import numpy as np
import pytest

from compiler.checkpoints.packed import unpack_interleaved, unpack_stream

torch = pytest.importorskip("torch")
gptq = pytest.importorskip("onnxruntime_genai.models.loaders.gptq")
awq = pytest.importorskip("onnxruntime_genai.models.loaders.awq")


class Module:
    """What the loaders read of a layer: 64 inputs, 48 outputs, groups of 32."""

    def __init__(self, bits: int, qweight: np.ndarray, qzeros: np.ndarray) -> None:
        self.bits, self.group_size, self.in_features, self.out_features = bits, 32, 64, 48
        self.qweight, self.qzeros = (torch.from_numpy(words.view(np.int32)) for words in (qweight, qzeros))


def words(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2**32, shape, dtype=np.uint32)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq(bits: int) -> None:
    weight, zeros = words(64 * bits // 32, 48), words(2, 48 * bits // 32)
    loader, module = gptq.GPTQModel.__new__(gptq.GPTQModel), Module(bits, weight, zeros)
    loader.handle_qzeros(module)  # stored less one
    loader.unpack_qzeros(module)
    loader.unpack_qweight(module)
    assert np.array_equal(unpack_stream(weight, bits, 64), module.qweight.numpy())
    assert np.array_equal((unpack_stream(zeros.T, bits, 48).T.astype(int) + 1) % 2**bits, module.qzeros.numpy())


def test_awq() -> None:
    weight, zeros = words(64, 6), words(2, 6)
    loader, module = awq.AWQModel.__new__(awq.AWQModel), Module(4, weight, zeros)
    loader.unpack_qzeros(module)
    loader.unpack_qweight(module)
    assert np.array_equal(unpack_interleaved(weight), module.qweight.numpy())
    assert np.array_equal(unpack_interleaved(zeros), module.qzeros.numpy())
