"""Samplers: what is drawn follows the stated probabilities, and beam search is exact."""

import itertools

import keras_hub
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from references import keras_backbone, ours_like

import phi3_ref

DRAWS = 20_000
PROBABILITIES = np.array([0.03, 0.3, 0.02, 0.25, 0.1, 0.1, 0.15, 0.05], np.float32)
CONFIG = dict(
    vocabulary_size=8, num_layers=2, hidden_dim=16, intermediate_dim=24, num_query_heads=4,
    num_key_value_heads=2,
)


def frequencies(sampler, probabilities=PROBABILITIES, draws=DRAWS):
    """How often each id comes in `draws` independent draws, as fractions."""
    ids = np.asarray(sampler.get_next_token(np.tile(probabilities, (draws, 1))))
    assert ids.shape == (draws,) and ids.dtype.kind == "i"
    return np.bincount(ids, minlength=len(probabilities)) / draws


def assert_distribution(seen, expected):
    """Each frequency lies within 4.5 of its standard deviations (1 in 150,000 does not)."""
    deviation = np.sqrt(expected * (1 - expected) / DRAWS)
    assert np.all(np.abs(seen - expected) <= 4.5 * deviation), (seen, expected)


def keras_rule(probabilities, p, k=None):
    """The ids that KerasHub's TopPSampler can draw, and their renormalized probabilities."""
    order = np.argsort(-probabilities, kind="stable")[:k]
    before = np.cumsum(probabilities[order]) - probabilities[order]
    allowed = order[(before <= p) | (np.arange(len(order)) == 0)]
    result = np.zeros_like(probabilities)
    result[allowed] = probabilities[allowed] / probabilities[allowed].sum()
    return result


@pytest.fixture(scope="module")
def models():
    """A KerasHub causal LM and ours with the same weights."""
    backbone = keras_backbone(CONFIG, "float32", seed=4)
    return keras_hub.models.Phi3CausalLM(backbone), phi3_ref.Phi3CausalLM(
        ours_like(backbone, "float32")
    )


def test_random_sampler_follows_the_probabilities():
    """Every id comes as often as its probability says."""
    seen = frequencies(phi3_ref.RandomSampler(seed=0))
    assert_distribution(seen, PROBABILITIES)


@pytest.mark.parametrize("k", [2, 4, 7, 8])
def test_top_k_sampler_follows_the_renormalized_probabilities(k):
    """Only the k likeliest ids come, in proportion; of equal ones the lower id, as in KerasHub."""
    kept = np.sort(np.argsort(-PROBABILITIES, kind="stable")[:k])
    expected = np.zeros_like(PROBABILITIES)
    expected[kept] = PROBABILITIES[kept] / PROBABILITIES[kept].sum()
    assert_distribution(frequencies(phi3_ref.TopKSampler(k=k, seed=1)), expected)


@pytest.mark.parametrize("p, k", [(0.1, None), (0.3, None), (0.6, None), (0.99, None), (0.9, 3)])
def test_top_p_sampler_follows_the_renormalized_probabilities(p, k):
    """Only the nucleus comes, in proportion, with and without a cutoff at k."""
    seen = frequencies(phi3_ref.TopPSampler(p=p, k=k, seed=2))
    assert_distribution(seen, keras_rule(PROBABILITIES, p, k))


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 9), min_size=2, max_size=7).filter(any), st.floats(0, 1) | st.none(),
    st.integers(0, 6), st.integers(1, 7),
)
@example([6, 6, 7], None, 0, 1)  # 7/19 + 6/19 - 6/19 is not 7/19 in float32
def test_top_k_and_top_p_can_draw_exactly_the_ids_that_keras_can(counts, p, index, k):
    """The sets of drawn ids equal KerasHub's, ties and thresholds hit exactly included."""
    probabilities = (np.array(counts) / sum(counts)).astype(np.float32)
    if p is None:  # exactly a sum of probabilities
        p = float(np.cumsum(np.sort(probabilities)[::-1])[index % len(counts)])
    k, p = min(k, len(counts)), min(p, 1.0)
    rows = np.tile(probabilities, (1000, 1))
    for name, arguments in [
        ("TopKSampler", dict(k=k)), ("TopPSampler", dict(p=p)), ("TopPSampler", dict(p=p, k=k)),
    ]:
        theirs = getattr(keras_hub.samplers, name)(seed=0, **arguments).get_next_token(rows)
        ours = getattr(phi3_ref, name)(seed=0, **arguments).get_next_token(rows)
        assert set(np.asarray(ours)) == set(np.asarray(theirs)), (name, arguments, counts)


def test_greedy_takes_the_likeliest_and_the_first_of_equals():
    """Greedy search is argmax; top-k with k = 1, and top-p with p = 0, are greedy search."""
    rows = np.random.default_rng(0).random((200, 9)).astype(np.float32)
    rows[::3, 4] = rows[::3, 7] = 2.0
    rows /= rows.sum(-1, keepdims=True)
    expected = keras_hub.samplers.GreedySampler().get_next_token(rows)
    for sampler in (
        phi3_ref.GreedySampler(), phi3_ref.TopKSampler(k=1), phi3_ref.TopPSampler(p=0.0)
    ):
        np.testing.assert_array_equal(sampler.get_next_token(rows), expected)


@pytest.mark.parametrize("temperature", [0.5, 2.5])
def test_temperature_divides_the_logits(models, temperature):
    """Generated ids of 20,000 equal prompts follow softmax(logits / temperature)."""
    _, ours = models
    prompt = np.tile(np.array([[1, 0]], np.int32), (DRAWS, 1))
    mask = np.tile(np.array([[1, 0]], np.int32), (DRAWS, 1))
    ours.compile(sampler=phi3_ref.RandomSampler(temperature=temperature, seed=5))
    generated = ours.generate(
        {"token_ids": prompt, "padding_mask": mask}, stop_token_ids=None
    )["token_ids"][:, 1]
    logits = np.asarray(ours({"token_ids": prompt[:1, :1]}))[0, 0].astype(np.float64)
    expected = np.exp((logits - logits.max()) / temperature)
    expected /= expected.sum()
    assert_distribution(np.bincount(generated, minlength=len(expected)) / DRAWS, expected)


@pytest.mark.parametrize("name", ["RandomSampler", "TopKSampler", "TopPSampler"])
def test_a_seed_repeats_and_seeds_differ(name):
    """Equal seeds draw the same sequence, other seeds another, and successive draws differ."""
    def sequence(seed):
        sampler = getattr(phi3_ref, name)(seed=seed, **({"p": 0.9} if "P" in name else {}))
        rows = np.tile(PROBABILITIES, (64, 1))
        return [np.asarray(sampler.get_next_token(rows)).tolist() for _ in range(3)]

    first, again, other, unseeded, unseeded_again = map(sequence, (7, 7, 8, None, None))
    assert first == again
    assert first != other and unseeded != unseeded_again
    assert first[0] != first[1] != first[2]


def test_seeded_generation_repeats(models):
    """Two models compiled with the same seed generate the same ids; another seed, others."""
    _, ours = models
    prompts = {
        "token_ids": np.ones((4, 24), np.int32), "padding_mask": np.eye(24, dtype=np.int32)[[0] * 4]
    }
    def generate(seed):
        ours.compile(sampler=phi3_ref.RandomSampler(seed=seed))
        return ours.generate(prompts, stop_token_ids=None)["token_ids"].tolist()

    assert generate(1) == generate(1) != generate(2)


def test_sampler_names_are_keras_defaults(models):
    """Each name compiles to its class with KerasHub's default arguments; the default is top_k."""
    _, ours = models
    for name, cls in [
        ("greedy", "GreedySampler"), ("random", "RandomSampler"), ("top_k", "TopKSampler"),
        ("top_p", "TopPSampler"), ("beam", "BeamSampler"),
    ]:
        ours.compile(sampler=name)
        assert type(ours.sampler) is getattr(phi3_ref, cls)
        defaults = getattr(keras_hub.samplers, cls)().get_config()
        for argument in defaults.keys() & {"temperature", "k", "p", "num_beams"}:
            assert getattr(ours.sampler, argument) == defaults[argument], (name, argument)
    assert type(phi3_ref.Phi3CausalLM(ours.backbone).sampler) is phi3_ref.TopKSampler


def test_a_sampler_of_ones_own(models):
    """A subclass of Sampler that forbids ids is used: KerasHub's documented extension point."""
    class Forbid(phi3_ref.Sampler):
        def get_next_token(self, probabilities):
            return np.argmax(np.where(np.arange(8) % 2, 0, probabilities), axis=-1)

    _, ours = models
    ours.compile(sampler=Forbid())
    mask = np.eye(12, dtype=np.int32)[:1]
    ids = ours.generate({"token_ids": mask, "padding_mask": mask}, stop_token_ids=None)
    assert ids["token_ids"][0, 0] == 1 and not np.any(ids["token_ids"][0, 1:] % 2)


@pytest.mark.parametrize(
    "num_beams, stop_token_ids", [(1, None), (2, None), (5, None), (3, [5, 6])]
)
def test_beam_search_equals_keras(models, num_beams, stop_token_ids):
    """Ids and masks of a ragged batch equal KerasHub's BeamSampler's, and are not greedy ones."""
    theirs, ours = models
    rng = np.random.default_rng(0)
    token_ids = rng.integers(1, 8, (8, 12)).astype(np.int32)
    mask = (np.arange(12) < rng.integers(2, 5, (8, 1))).astype(np.int32)
    inputs = {"token_ids": token_ids * mask, "padding_mask": mask}
    sampler = keras_hub.samplers.BeamSampler(num_beams=num_beams)
    theirs.compile(sampler=sampler, run_eagerly=True)
    expected = theirs.generate(dict(inputs), stop_token_ids=stop_token_ids)
    ours.compile(sampler=phi3_ref.BeamSampler(num_beams=num_beams))
    result = ours.generate(dict(inputs), stop_token_ids=stop_token_ids)
    np.testing.assert_array_equal(result["token_ids"], expected["token_ids"])
    np.testing.assert_array_equal(result["padding_mask"], expected["padding_mask"])
    ours.compile(sampler="greedy")
    greedy = ours.generate(dict(inputs), stop_token_ids=stop_token_ids)["token_ids"]
    assert np.array_equal(result["token_ids"], greedy) == (num_beams == 1)


def test_beam_search_with_enough_beams_finds_the_likeliest_sequence(models):
    """With a beam for every prefix, the answer is the best of all 8 ** 3 continuations."""
    _, ours = models
    ours.compile(sampler=phi3_ref.BeamSampler(num_beams=64))
    for start in range(1, 8):
        continuations = np.array(list(itertools.product(range(8), repeat=3)))
        sequences = np.insert(continuations, 0, start, axis=1).astype(np.int32)
        logits = np.asarray(ours({"token_ids": sequences[:, :3]})).astype(np.float64)
        log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        scores = np.take_along_axis(log_probabilities, continuations[..., None], -1).sum((1, 2))
        mask = np.array([[1, 0, 0, 0]], np.int32)
        result = ours.generate(
            {"token_ids": mask * start, "padding_mask": mask}, stop_token_ids=None
        )["token_ids"]
        assert result[0].tolist() == sequences[np.argmax(scores)].tolist()


@pytest.mark.parametrize(
    "make, name",
    [
        (lambda: phi3_ref.RandomSampler(temperature=0.0), "temperature"),
        (lambda: phi3_ref.RandomSampler(temperature=-1.0), "temperature"),
        (lambda: phi3_ref.RandomSampler(temperature=float("nan")), "temperature"),
        (lambda: phi3_ref.TopKSampler(k=0), "k"),
        (lambda: phi3_ref.TopPSampler(p=-0.1), "p"),
        (lambda: phi3_ref.TopPSampler(p=1.5), "p"),
        (lambda: phi3_ref.TopPSampler(k=0), "k"),
        (lambda: phi3_ref.BeamSampler(num_beams=0), "num_beams"),
    ],
)
def test_a_bad_argument_is_an_error_that_names_it(make, name):
    """Impossible settings are refused when the sampler is made."""
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        make()


def test_an_unknown_sampler_is_an_error(models):
    """The error of an unknown name repeats it."""
    with pytest.raises(ValueError, match="nucleus"):
        models[1].compile(sampler="nucleus")
    with pytest.raises(TypeError):
        phi3_ref.TopKSampler(p=0.5)
