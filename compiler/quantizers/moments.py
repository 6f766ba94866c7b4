"""Second moments on disk: half the bytes of the upper triangle, one file a matrix.

H = X^T X / n spans many orders of magnitude, its correlations C[i, j] = H[i, j] / sqrt(H[i, i] H[j, j]) do not. So the diagonal is kept in
float32 and the strict upper triangle of C in float16: k = 1536 takes 2.4 MB instead of 9.4. What is lost (5e-4 of a correlation) is below any
damping that a quantizer adds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np


def write_moments(directory: Path, moments: Iterable[tuple[str, np.ndarray]]) -> None:
    """One `<matrix>.npz` for each (matrix, H float32 [k, k]); nothing but the H at hand is held."""
    for name, moment in moments:
        diagonal = moment.diagonal().copy()
        spread = np.sqrt(np.maximum(diagonal, np.finfo(np.float32).tiny))
        upper = np.triu_indices(len(moment), 1)
        correlations = (moment[upper] / spread[upper[0]] / spread[upper[1]]).astype(np.float16)
        np.savez(directory / f"{name}.npz", diagonal=diagonal, correlations=correlations)


@dataclass(frozen=True)
class Moments(Mapping[str, np.ndarray]):
    """Matrix name -> H float32 [k, k], read when asked for."""

    directory: Path

    def __getitem__(self, name: str) -> np.ndarray:
        file = self.directory / f"{name}.npz"
        if not file.is_file():
            raise KeyError(name)
        with np.load(file) as stored:
            diagonal, correlations = stored["diagonal"], stored["correlations"].astype(np.float32)
        spread = np.sqrt(np.maximum(diagonal, np.finfo(np.float32).tiny))
        upper = np.triu_indices(len(diagonal), 1)
        moment = np.diag(diagonal).astype(np.float32)
        moment[upper] = correlations * spread[upper[0]] * spread[upper[1]]
        moment.T[upper] = moment[upper]
        return moment

    def __iter__(self) -> Iterator[str]:
        return (file.name.removesuffix(".npz") for file in sorted(self.directory.glob("*.npz")))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def output_error(change: np.ndarray, moment: np.ndarray) -> float:
    """E |dW x|^2 = tr(dW H dW^T) of a change of weights dW [rows, k] under H [k, k]. dW = [[1, 2]], H = diag(3, 4): 3 + 16 = 19."""
    return float(np.einsum("ij,ij->", change @ moment, change, dtype=np.float64))
