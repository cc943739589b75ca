"""Hypercorrelations: published values, and the algebra the pipeline relies on."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hsnet.correlation import (
    EPS,
    build_hypercorrelation,
    build_pyramid,
    correlate_all,
    correlate_codes,
    correlate_rows,
    interpolate_mask,
    prepare_query,
)
from hsnet.errors import ShapeError
from hsnet.numerics import EXACT_CHANNELS, LARGEST_CODE, code_products, sums_in_float32

SIDES = {"res": (9, 5, 3), "vgg": (8, 4, 2), "tiny": (6, 3, 2)}


def correlate_objects(query, support, mask, eps=EPS, unit=False):
    """`correlate_rows` of every episode, with the positions it leaves out as zeros: (B, L, U, V, H, W)."""
    batch = []
    for episode in range(len(mask)):
        prepared = prepare_query(query[episode], eps, unit)
        values, inside = correlate_rows(prepared, support[episode], mask[episode], eps)
        whole = values.new_zeros(values.shape[1], mask[episode].numel(), *values.shape[2:])
        batch.append(whole.index_copy(1, inside, values.transpose(0, 1)).unflatten(1, mask.shape[1:]))
    return torch.stack(batch)


def load(golden, case):
    stored = np.load(golden / "b_correlation.npz")
    get = lambda name: torch.from_numpy(stored[f"{case}/{name}"])  # noqa: E731
    counts = [4, 6, 3] if case != "vgg" else [3, 3, 1]
    names = iter(range(sum(counts)))
    query, support = [], []
    for count in counts:  # stored per layer as (B, C, H, W), shallow to deep
        layers = [next(names) for _ in range(count)]
        for side, levels in (("q", query), ("s", support)):
            levels.append(torch.stack([get(f"{side}{n:02d}").permute(0, 2, 3, 1) for n in layers], 1))
    return query, support, get


@pytest.mark.parametrize("case", SIDES)
def test_pyramid_equals_the_published_one(golden, case):
    """Masking, eps, ReLU, layer order and level order; `tiny` has features of 1e-5, where eps decides."""
    query, support, get = load(golden, case)
    pyramid = build_pyramid(query, support, get("mask"))
    for name, level in zip(("corr_l4", "corr_l3", "corr_l2"), pyramid, strict=True):
        # 1e-6: float32 sums in another order. eps on the squared norm, or max instead of plus, moves `tiny` by > 0.1.
        torch.testing.assert_close(level.permute(0, 1, 4, 5, 2, 3), get(name), rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", SIDES)
def test_interpolated_mask_equals_the_published_one(golden, case):
    _, _, get = load(golden, case)
    for side in SIDES[case]:
        assert torch.equal(interpolate_mask(get("mask"), (side, side)), get(f"mask_interp_{side}"))


episodes = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "layers": st.integers(1, 3),
        "query": st.tuples(st.integers(1, 4), st.integers(1, 4)),
        "support": st.tuples(st.integers(1, 4), st.integers(1, 4)),
        "seed": st.integers(0, 2**31),
    }
)


def draw(batch, layers, query, support, seed, dtype=torch.float64):
    torch.manual_seed(seed)
    mask = (torch.rand(batch, *support) * (torch.rand(batch, *support) < 0.6)).to(dtype)
    return (
        torch.randn(batch, layers, *query, 5, dtype=dtype),
        torch.randn(batch, layers, *support, 5, dtype=dtype),
        mask,
    )


@settings(max_examples=50, deadline=None)
@given(episodes)
def test_object_positions_alone_give_the_plain_result(episode):
    query, support, mask = draw(**episode)
    plain = build_hypercorrelation(query, support, mask)
    torch.testing.assert_close(correlate_objects(query, support, mask), plain, rtol=0, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(episodes)
def test_masking_commutes_with_correlation(episode):
    """Masking the features before (Eq. 1) equals cutting the correlation after, where the mask is not minute."""
    query, support, mask = draw(**episode)
    before = build_hypercorrelation(query, support, mask, eps=0.0).nan_to_num(0.0)
    unmasked = build_hypercorrelation(query, support, torch.ones_like(mask), eps=0.0)
    after = unmasked * (mask > 0)[:, None, :, :, None, None]
    torch.testing.assert_close(before, after, rtol=0, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(episodes)
def test_a_batch_is_its_single_episodes(episode):
    query, support, mask = draw(**episode)
    batch = correlate_objects(query, support, mask)
    for i in range(len(mask)):
        one = correlate_objects(query[i : i + 1], support[i : i + 1], mask[i : i + 1])
        torch.testing.assert_close(batch[i : i + 1], one, rtol=0, atol=1e-6)


def test_scale_of_a_position_does_not_matter():
    """Why a store may keep int8 codes and throw the scale away."""
    query, support, mask = draw(1, 2, (3, 3), (3, 3), seed=1)
    mask = (mask > 0).double()  # a mask of 0.01 makes the norm so small that eps shows
    scaled = correlate_objects(query * 100, support * (1 + torch.rand(1, 2, 3, 3, 1)) * 50, mask)
    torch.testing.assert_close(scaled, build_hypercorrelation(query, support, mask), rtol=0, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(episodes)
def test_unit_features_are_not_normalised_again(episode):
    query, support, mask = draw(**episode)
    query, support = query / query.norm(dim=-1, keepdim=True), support / support.norm(dim=-1, keepdim=True)
    shorter = query[..., :3], support[..., :3]  # what a projection leaves
    expected = torch.einsum("blhwc,bluvc->bluvhw", *shorter).clamp(min=0) * (mask > 0)[:, None, :, :, None, None]
    for correlate in (build_hypercorrelation, correlate_objects):
        torch.testing.assert_close(correlate(*shorter, mask, unit=True), expected, rtol=0, atol=1e-12)
    batch = correlate_all(*shorter, mask, torch.float64, unit=True)
    torch.testing.assert_close(batch, expected, rtol=0, atol=1e-12)


def test_an_empty_mask_correlates_nowhere():
    query, support, mask = draw(2, 1, (3, 3), (3, 3), seed=2)
    assert correlate_objects(query, support, torch.zeros_like(mask)).count_nonzero() == 0
    assert build_hypercorrelation(query, support, torch.zeros_like(mask)).count_nonzero() == 0


def test_integer_codes_are_accepted():
    query, support, mask = draw(1, 2, (3, 3), (3, 3), seed=3)
    codes = [(x / x.abs().amax(-1, keepdim=True) * 127).round().to(torch.int8) for x in (query, support)]
    exact = build_hypercorrelation(query, support, (mask > 0).double()).float()
    torch.testing.assert_close(correlate_objects(*codes, (mask > 0).float()), exact, rtol=0, atol=0.02)


def draw_codes(queries, shots, layers, query, support, seed, channels=5):
    """Codes as a store has them, the largest of every vector 127; all shots of the first query first."""
    generator = torch.Generator().manual_seed(seed)

    def codes(count, grid):
        values = torch.randn(count, layers, *grid, channels, generator=generator)
        return (values / values.abs().amax(-1, keepdim=True) * 127).round().to(torch.int8)

    mask = torch.rand(queries * shots, *support, generator=generator)
    mask = mask * (torch.rand(mask.shape, generator=generator) < 0.6)
    return codes(queries, query), codes(queries * shots, support), mask


def in_float64(query, support, mask):
    shots = len(support) // len(query)
    return build_hypercorrelation(query.repeat_interleave(shots, 0).double(), support.double(), mask.double())


@pytest.fixture(params=["float32 products", "bfloat16 products"])
def products(request, monkeypatch):
    """Both ways to multiply codes. A CPU has one of them: the other's operands are what is special about it."""
    plain = torch.bmm

    def bmm(left, right, out_dtype=None):
        assert out_dtype is None or left.dtype == right.dtype == torch.bfloat16
        return plain(left, right) if out_dtype is None else plain(left.to(out_dtype), right.to(out_dtype))

    if request.param == "bfloat16 products":
        monkeypatch.setattr("hsnet.numerics.sums_in_float32", lambda device: True)
        monkeypatch.setattr("torch.bmm", bmm)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 3), episodes)
def test_codes_of_every_position_give_the_plain_result(products, shots, episode):
    episode = {**episode, "queries": episode["batch"], "shots": shots}
    del episode["batch"]
    query, support, mask = draw_codes(**episode)
    ours = correlate_codes(query, support, mask, torch.float32)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), in_float64(query, support, mask), rtol=0, atol=1e-6)


def test_products_of_codes_are_exact_and_only_the_cosine_is_rounded(products):
    """Errors against float64 at 1,024 channels, beside those of normalising first and rounding each factor."""
    query, support, mask = draw_codes(2, 2, 2, (5, 5), (4, 4), seed=4, channels=1024)
    exact = in_float64(query, support, mask)
    in_float32 = correlate_codes(query, support, mask, torch.float32).double()
    in_bfloat16 = correlate_codes(query, support, mask, torch.bfloat16)
    rounded_first = correlate_all(query, support, mask, torch.bfloat16).double()
    assert in_bfloat16.dtype == torch.bfloat16
    error, error_first = float((in_float32 - exact).abs().max()), float((rounded_first - exact).abs().max())
    assert error < 1e-6
    assert error_first > 1e-4, "what there is to gain"
    # Half a unit in the last of eight binary digits, of a value that was exact before.
    assert bool(((in_bfloat16.double() - exact).abs() <= 2**-8 * exact + 1e-6).all())
    assert float((in_bfloat16.double() - exact).abs().mean()) < 0.5 * float((rounded_first - exact).abs().mean())


def test_codes_are_whole_numbers_up_to_the_bound():
    """The largest sum there can be; one channel more and float32 may lose a bit."""
    assert EXACT_CHANNELS * LARGEST_CODE**2 <= 2**24 < (EXACT_CHANNELS + 1) * LARGEST_CODE**2
    largest = torch.full((1, 1, EXACT_CHANNELS), LARGEST_CODE, dtype=torch.int8)
    assert int(code_products(largest, largest.transpose(1, 2))) == EXACT_CHANNELS * LARGEST_CODE**2


def test_codes_are_multiplied_in_parts_that_change_nothing(monkeypatch):
    query, support, mask = draw_codes(5, 3, 2, (3, 4), (2, 3), seed=5)
    whole = correlate_codes(query, support, mask, torch.bfloat16)
    monkeypatch.setattr("hsnet.correlation._AT_ONCE", 2 * 3 * 2 * 12 * 6)  # two queries with three supports each
    assert torch.equal(correlate_codes(query, support, mask, torch.bfloat16), whole)
    monkeypatch.setattr("hsnet.correlation._AT_ONCE", 1)
    assert torch.equal(correlate_codes(query, support, mask, torch.bfloat16), whole)
    alone = correlate_codes(query[1:2], support[3:6], mask[3:6], torch.bfloat16)
    assert torch.equal(alone, whole[3:6])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", [torch.float32, torch.int8])
def test_a_query_of_several_supports_is_that_query_again(dtype, kind):
    """To the bit: it is normalised once now."""
    query, support, mask = draw_codes(2, 3, 2, (3, 3), (2, 4), seed=6)
    query, support = query.to(kind), support.to(kind)
    for unit in (False, True):
        shared = correlate_all(query, support, mask, dtype, unit=unit)
        assert torch.equal(shared, correlate_all(query.repeat_interleave(3, 0), support, mask, dtype, unit=unit))


def test_a_gpu_multiplies_codes_and_a_cpu_what_it_did(monkeypatch):
    query, support, mask = draw_codes(1, 1, 1, (3, 3), (3, 3), seed=7)
    called = []
    monkeypatch.setattr("hsnet.correlation.correlate_codes", lambda *given: called.append(given[0].device.type))
    correlate_all(query, support, mask, torch.float32)
    assert called == []
    on_device = [tensor.to("meta") for tensor in (query, support, mask)]
    correlate_all(*on_device, torch.bfloat16)
    assert called == ["meta"]
    assert correlate_all(*on_device, torch.bfloat16, unit=True).shape == (1, 1, 3, 3, 3, 3)
    assert correlate_all(on_device[0].float(), on_device[1].float(), on_device[2], torch.float32).is_meta
    assert called == ["meta"], "unit features and floats are no codes"


def test_an_empty_mask_has_no_codes(products):
    query, support, mask = draw_codes(2, 1, 1, (3, 3), (3, 3), seed=2)
    assert correlate_codes(query, support, torch.zeros_like(mask), torch.bfloat16).count_nonzero() == 0


def test_float32_sums_are_found_by_trying(monkeypatch):
    """A probe, not a version: torch without the product, a device without it, and one that rounds the sums."""
    cpu, plain = torch.device("cpu"), torch.bmm
    probe = sums_in_float32.__wrapped__
    assert not probe(torch.device("meta")), "nothing can be seen of its numbers"

    def missing(left, right):
        return plain(left, right)

    def wide(left, right, out_dtype):
        return plain(left.to(out_dtype), right.to(out_dtype))

    def rounding(left, right, out_dtype):
        return plain(left.float(), right.float()).bfloat16().to(out_dtype)

    for bmm, answer in ((missing, False), (wide, True), (rounding, False)):
        monkeypatch.setattr("torch.bmm", bmm)
        assert probe(cpu) is answer


@pytest.mark.parametrize(
    ("query", "support", "mask", "message"),
    [
        ((1, 2, 3, 3, 4), (1, 3, 3, 3, 4), (1, 3, 3), "differ in layers: 2 and 3"),
        ((1, 2, 3, 3, 4), (1, 2, 3, 3, 5), (1, 3, 3), "differ in channels: 4 and 5"),
        ((2, 2, 3, 3, 4), (1, 2, 3, 3, 4), (1, 3, 3), "differ in batch size: 2 and 1"),
        ((1, 2, 3, 3, 4), (1, 2, 3, 3, 4), (1, 4, 4), r"must be \(1, 3, 3\) like the support grid, got \(1, 4, 4\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(query, support, mask, message):
    with pytest.raises(ShapeError, match=message):
        build_hypercorrelation(torch.ones(query), torch.ones(support), torch.ones(mask))
