import numpy as np
import pytest
import torch

from hsnet.errors import StoreError
from pipeline.features.budgeted import LayerCode, TransformCodec, fit_layers, place_levels, unit_vectors

GRIDS = ((5, 5), (3, 3))
LAYERS = (2, 3)
CHANNELS = 32


def features(images: int, seed: int = 0) -> list[torch.Tensor]:
    """Levels whose channels are correlated, with a mean, as features are. Two seeds: the same kind of features."""
    mixing = torch.Generator().manual_seed(7)
    generator = torch.Generator().manual_seed(seed)
    levels = []
    for (rows, columns), layers in zip(GRIDS, LAYERS, strict=True):
        mix = torch.randn(layers, CHANNELS, CHANNELS, generator=mixing) * torch.arange(1, CHANNELS + 1.0) ** -1
        raw = torch.randn(images, layers, rows * columns, CHANNELS, generator=generator)
        levels.append((raw @ mix.transpose(1, 2) + 1.0).unflatten(2, (rows, columns)))
    return levels


def samples(levels: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    return [[unit_vectors(level[:, row]) for row in range(level.shape[1])] for level in levels]


@pytest.fixture(scope="module")
def fitted() -> TransformCodec:
    return fit(60)


def fit(share: int) -> TransformCodec:
    """With a budget of so many hundredths of int8's."""
    positions = [rows * columns for rows, columns in GRIDS]
    values = sum(p * layers * CHANNELS for p, layers in zip(positions, LAYERS, strict=True))
    return fit_layers(samples(features(80)), positions, values * share // 100)


def decoded(codec: TransformCodec, levels: list[torch.Tensor]) -> list[torch.Tensor]:
    return codec.decode([torch.from_numpy(codes) for codes in codec.encode(levels)])


def correlation_error(codec: TransformCodec, levels: list[torch.Tensor]) -> float:
    errors = []
    for exact, found in zip(levels, decoded(codec, levels), strict=True):
        for row in range(exact.shape[1]):
            x, y = unit_vectors(exact[:, row]), found[:, row].flatten(0, 2)
            errors.append((x @ x.t() - y @ y.t()).fill_diagonal_(0).abs().mean())
    return float(torch.stack(errors).mean())


def test_shapes_and_bytes(fitted):
    levels = features(4, seed=1)
    codes = fitted.encode(levels)
    assert [c.shape for c in codes] == [
        (4, 1, *grid, nbytes) for grid, nbytes in zip(GRIDS, fitted.level_bytes, strict=True)
    ]
    assert all(c.dtype == np.uint8 for c in codes)
    for level, out, layers in zip(levels, decoded(fitted, levels), LAYERS, strict=True):
        assert out.shape[:4] == (4, layers, *level.shape[2:4])
        assert out.dtype == torch.float32
        # Nothing is normalised again, so what is dropped is gone; quantising alone can make a vector a little longer.
        assert 0.8 < out.norm(dim=-1).mean() <= 1.0


def test_more_bytes_less_error():
    held_out = features(20, seed=1)
    errors = [correlation_error(fit(share), held_out) for share in (6, 12, 25, 50)]
    assert errors[0] > 1.5 * errors[1] > 2.25 * errors[2] > 3.4 * errors[3]
    assert errors[3] < 0.01


def test_correlations_are_not_shifted(fitted):
    """Levels are means of what they stand for: an inner product is right on average, without any correction."""
    codec = fit(12)
    (exact, *_), (found, *_) = features(20, seed=1), decoded(codec, features(20, seed=1))
    x, y = unit_vectors(exact[:, 0]), found[:, 0].flatten(0, 2)
    difference = (y @ y.t() - x @ x.t()).fill_diagonal_(0)
    assert abs(float(difference.mean())) < 0.1 * float(difference.abs().mean())


def test_decoding_is_the_levels_of_the_digits(fitted):
    """Against the plain reading of the format, as docs/compression.md gives it."""
    layer = fitted.levels[0][1]
    vectors = unit_vectors(features(2, seed=3)[0][:, 1])
    codes = layer.encode(vectors).numpy()
    counts, places, levels = layer.counts.numpy(), layer.places.numpy(), layer.levels.numpy()
    wanted = np.zeros((len(codes), layer.rank), np.float32)
    for position, code in enumerate(codes):
        rest = code.astype(int)
        for direction in range(layer.rank):
            place = places[direction]
            wanted[position, direction] = levels[direction, rest[place] % counts[direction]]
            rest[place] //= counts[direction]
        assert (rest == 0).all()
    assert np.array_equal(layer.decode(torch.from_numpy(codes)).numpy(), wanted)


def test_every_coordinate_gets_the_nearest_level(fitted):
    for layer in (layer for level in fitted.levels for layer in level):
        vectors = unit_vectors(torch.randn(50, CHANNELS, generator=torch.Generator().manual_seed(2)))
        turned = vectors @ layer.basis
        nearest = (turned[:, :, None] - layer.levels[None]).abs().amin(-1)
        assert torch.allclose((turned - layer.decode(layer.encode(vectors))).abs(), nearest, atol=1e-5)


def test_the_first_byte_is_never_the_fill_value(fitted):
    wild = torch.cat([100 * torch.eye(CHANNELS), -100 * torch.eye(CHANNELS)]).view(-1, 1, 1, 1, CHANNELS)
    levels = [wild.expand(-1, layers, *grid, -1).contiguous() for layers, grid in zip(LAYERS, GRIDS, strict=True)]
    assert all(codes[..., 0].max() < 255 for codes in fitted.encode(levels))
    for share in (6, 12, 25, 50):
        assert all(np.prod(level[0].runs[0]) < 256 for level in fit(share).levels)


def test_the_same_sample_gives_the_same_fit():
    assert fit(25).digest == fit(25).digest
    assert fit(25).digest != fit(26).digest


def test_arrays_give_the_fit_back(fitted):
    again = TransformCodec.from_arrays(fitted.arrays(), LAYERS)
    assert again.digest == fitted.digest
    levels = features(3, seed=4)
    assert all(np.array_equal(a, b) for a, b in zip(fitted.encode(levels), again.encode(levels), strict=True))


@pytest.mark.parametrize(
    "damage",
    [
        lambda arrays: arrays.pop("level0.layer0.basis"),
        lambda arrays: arrays.update({"level0.layer0.counts": arrays["level0.layer0.counts"] * 3}),
        lambda arrays: arrays.update({"level0.layer0.places": arrays["level0.layer0.places"] * 2}),
        lambda arrays: arrays.update({"level0.layer0.levels": arrays["level0.layer0.levels"] * np.nan}),
        lambda arrays: arrays.update({"level0.layer0.basis": arrays["level0.layer0.basis"][:, :-1]}),
        lambda arrays: arrays.update({"level0.layer0.basis": np.zeros((0, 0), np.float32)}),
    ],
)
def test_a_damaged_fit_is_refused(fitted, damage):
    arrays = dict(fitted.arrays())
    damage(arrays)
    with pytest.raises(StoreError, match="fit of a coded store is damaged"):
        TransformCodec.from_arrays(arrays, LAYERS)


def test_nan_is_named(fitted):
    levels = features(3, seed=4)
    levels[1][2, 1, 0, 0, 3] = torch.nan
    with pytest.raises(StoreError, match=r"image 'c' hold NaN or infinity at level 1"):
        fitted.encode(levels, ["a", "b", "c"])


@pytest.mark.parametrize("count", [1, 2, 3, 7, 256])
def test_levels_are_lloyds(count):
    """Each is the mean of what is nearest to it, and the error is the known one of a normal variable."""
    values = torch.randn(1, 20000, generator=torch.Generator().manual_seed(0)).double()
    levels = place_levels(values.float(), torch.tensor([count]))[0]
    kept = levels[:count]
    assert torch.isinf(levels[count:]).all()
    assert (kept.diff() > 0).all()
    nearest = (values[0][:, None] - kept.double()).abs().argmin(1)
    left = float((values[0] - kept.double()[nearest]).pow(2).mean())
    known = {1: 1.0, 2: 0.3634, 3: 0.1902, 7: 0.0440, 256: 2.72 / 256**2}[count]
    assert left == pytest.approx(known, rel=0.05 if count < 256 else 0.6)


def test_constant_values_have_levels_too():
    levels = place_levels(torch.ones(2, 100), torch.tensor([1, 4]))
    assert torch.isfinite(levels[0, 0])
    assert float(levels[0, 0]) == pytest.approx(1.0)
    assert torch.isfinite(levels[1, :4]).all()


def test_zero_vectors_can_be_coded(fitted):
    levels = [torch.zeros(1, layers, *grid, CHANNELS) for layers, grid in zip(LAYERS, GRIDS, strict=True)]
    assert all(torch.isfinite(level).all() for level in decoded(fitted, levels))


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(StoreError, match="do not fit"):
        LayerCode(torch.eye(3), torch.tensor([300, 2, 2]), torch.tensor([0, 1, 1]), torch.zeros(3, 256))
