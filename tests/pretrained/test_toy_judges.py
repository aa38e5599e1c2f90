"""Judges of the toy's pictures, and the probe's arithmetic."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from experiments.pretrained import emoji_probe, toy_judges
from experiments.pretrained.emoji_probe import Probe
from experiments.pretrained.toy_judges import SUBCATEGORIES, ToyJudges
from experiments.tasks import dreambooth, emoji
from experiments.training.judges import Features


@pytest.fixture
def seen():
    rng = np.random.default_rng(0)
    truth = np.repeat(["fruit", "sport", "tool"], 20)
    centres = np.repeat(rng.normal(size=(3, 6)), 20, 0)
    return 5 + 3 * (centres + 0.1 * rng.normal(size=(60, 6))), truth.tolist()


def test_the_probe_is_a_logistic_regression(seen, tmp_path):
    features, truth = seen
    probe, of_folds = emoji_probe.fit(features, truth)
    rows = (features - features.mean(0)) / features.std(0)
    model = LogisticRegression(C=emoji_probe.STRENGTH, max_iter=1000).fit(rows, truth)
    found = probe.probabilities(features)
    np.testing.assert_allclose(found, model.predict_proba(rows), atol=1e-5)
    assert probe.named(features) == of_folds == truth
    emoji_probe.save(probe, {"fitted": 1.0}, tmp_path / "probe")
    loaded, accuracy = emoji_probe.load(tmp_path / "probe")
    assert (loaded.weight == probe.weight).all() and loaded.names == probe.names
    assert accuracy == {"fitted": 1.0}
    assert emoji_probe.share(["a", "b", "b"], ["a", "b", "c"]) == 0.6667


def test_the_fit_is_the_probability_of_the_right_subcategories():
    weight = np.log([[1.0, 2.0, 5.0], [1.0, 1.0, 2.0]])
    probe = Probe(("animal-mammal", "heart", "cat-face"), weight, np.zeros(3))
    judges = ToyJudges(None, probe, ("animal-mammal", "cat-face"))
    features = np.eye(2)
    found = judges.fits(Features(features, features), ["a cat", "a cat in the snow"])
    np.testing.assert_allclose(found, [6 / 8, 3 / 4])
    assert judges.fit.name == "probe"


def test_every_class_has_its_subcategories():
    classes = {dreambooth.CLASSES.get(name, name) for name in dreambooth.SUBJECTS}
    families = {family.class_name for family in emoji.FAMILIES.values()}
    assert SUBCATEGORIES.keys() == classes | families
    with pytest.raises(ValueError, match="no class is called 'dgo'; did you mean dog"):
        toy_judges.load("dgo")


def test_the_committed_probe_knows_them():
    probe, accuracy = emoji_probe.load()
    assert probe.weight.shape == (384, 98)
    assert {name for own in SUBCATEGORIES.values() for name in own} <= {*probe.names}
    text = " ".join(emoji_probe.__doc__.split())
    for share in accuracy.values():
        assert f"{100 * share:.1f}%" in text
