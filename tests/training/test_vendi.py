"""The Vendi score against closed forms and the published package; the judges' means."""

import numpy as np
import pytest

from experiments.training import judges
from experiments.training.judges import Features
from experiments.training.objective import Metric
from experiments.training.vendi import vendi

RNG = np.random.default_rng


def test_vendi_of_embeddings_whose_kinds_can_be_counted():
    """n kinds, equally often: n. Kinds of unequal sizes: exp of the entropy."""
    kinds = 3.0 * np.eye(5)
    assert vendi(kinds) == pytest.approx(5)
    assert vendi(np.repeat(kinds[:2], 10, 0)) == pytest.approx(2)
    assert vendi(kinds[[0, 0, 0, 1]]) == pytest.approx(4 / 3**0.75)
    # Two unit vectors at an angle: eigenvalues (1 +- cos) / 2.
    angle = 0.7
    pair = np.array([[1, 0], [np.cos(angle), np.sin(angle)]])
    shares = (1 + np.cos(angle)) / 2, (1 - np.cos(angle)) / 2
    entropy = -sum(share * np.log(share) for share in shares)
    assert vendi(pair) == pytest.approx(np.exp(entropy))
    assert vendi(np.repeat(pair, 4, 0)) == pytest.approx(np.exp(entropy))


def test_embeddings_without_a_direction_are_refused():
    for bad in (np.zeros((2, 3)), np.full((1, 2), np.nan), np.zeros((0, 3))):
        with pytest.raises(ValueError, match="expected at least one, finite and not 0"):
            vendi(bad)


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore:Please import")  # of its imports from SciPy
@pytest.mark.parametrize("shape", [(4, 9), (25, 6)])
def test_vendi_is_that_of_its_authors_package(shape):
    from sklearn.preprocessing import normalize
    from vendi_score import vendi as published

    x = RNG(0).normal(size=shape).astype(np.float32)
    unit = normalize(np.float64(x))
    assert vendi(x) == pytest.approx(published.score_K(unit @ unit.T), rel=1e-6)
    assert vendi(x) == pytest.approx(published.score_dual(unit), rel=1e-6)


class Means:
    """A judge whose features are a picture's mean colour."""

    fit = Metric("redness")

    def features(self, pictures):
        colours = pictures.reshape(len(pictures), -1, 3).mean(1)
        return Features(colours, colours)

    def fits(self, features, prompts):
        red = features.likeness[:, 0] / 255
        return np.where([p.startswith("a red") for p in prompts], red, 1 - red)


def test_measures_are_means_over_pictures_prompts_and_photographs():
    red, green = (np.zeros((2, 2, 3), np.uint8) for _ in range(2))
    red[..., 0], green[..., 1] = 255, 255
    pictures = np.stack([np.stack([red, red]), np.stack([red, green])])
    found = judges.measured(
        Means(), pictures, ["a red dog", "a dog"], np.stack([red, green, green])
    )
    # Cosines are 1 for the same colour: 3 red pictures and 1 green one.
    assert found["image_alignment"] == pytest.approx((3 * 1 + 1 * 2) / 12)
    assert found["redness"] == pytest.approx((1 + 1 + 0 + 1) / 4)
    assert found["vendi_prompt"] == pytest.approx((1 + 2) / 2)
    assert found["vendi_concept"] == pytest.approx(4 / 3**0.75)
    assert [m.name for m in judges.metrics(Means())] == list(found)
