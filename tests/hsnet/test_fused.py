"""The fast path against the plain one that explains the model: logits and gradients."""

import copy
from functools import partial

import pytest
import torch

from hsnet.correlation import build_hypercorrelation, build_pyramid, interpolate_mask, prepare_query
from hsnet.errors import ConfigError, ShapeError
from hsnet.fused import FusedHSNet
from hsnet.model import HSNet

GRIDS, LAYERS, CHANNELS = ((4, 4), (7, 7), (13, 13)), (2, 3, 2), 6  # deepest first
SHAPES = {
    "disc": lambda y, x: (y - 20) ** 2 + (x - 25) ** 2 < 150,
    "empty": lambda y, x: y < 0,
    "everything": lambda y, x: y >= 0,
    "thin": lambda y, x: (y == 7) & (x > 3),
    "corner": lambda y, x: (y < 9) & (x > 41),
}


def learner(dtype=torch.float64, **arguments):
    torch.manual_seed(0)
    net = HSNet(LAYERS, channels=(4, 8, 8), **arguments).to(dtype)
    for parameter in net.parameters():  # biases and scales that matter
        parameter.data += 0.2 * torch.randn_like(parameter)
    return net


def levels(count, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        torch.randn(count, layers, *grid, CHANNELS, generator=generator, dtype=torch.float64)
        for layers, grid in zip(reversed(LAYERS), reversed(GRIDS), strict=True)
    ]
    if dtype == torch.int8:
        return [(level * 40).clamp(-127, 127).round().to(dtype) for level in drawn]
    return [level.to(dtype) for level in drawn]


def masks(*names):
    rows, columns = torch.meshgrid(torch.arange(48), torch.arange(50), indexing="ij")
    return torch.stack([SHAPES[name](rows, columns) for name in names])


def plain(net, query, support, mask, build=build_hypercorrelation):
    shots = len(mask) // len(query[0])
    pyramid = [
        build(q.repeat_interleave(shots, 0), s, interpolate_mask(mask, s.shape[2:4]))
        for q, s in zip(reversed(query), reversed(support), strict=True)
    ]
    return net(pyramid)


def gradients(net, logits):
    weights = torch.sin(torch.arange(logits.numel(), dtype=logits.dtype)).view_as(logits)
    return torch.autograd.grad((logits * weights).sum(), list(net.parameters()))


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("names", [("disc", "thin", "corner", "disc"), ("empty", "everything")])
def test_logits_and_gradients_equal_the_plain_path(names, sparse):
    """float64; two shots per query, so that sharing the query is seen too."""
    net, mask = learner(), masks(*names)
    query, support = levels(len(names) // 2, 1), levels(len(names), 2)
    fast = FusedHSNet(net, sparse=sparse)(query, support, mask)
    wanted = plain(net, query, support, mask)
    # Every position at once: masks in float32.
    tolerance = 1e-9 if sparse else 1e-4
    torch.testing.assert_close(fast, wanted, rtol=0, atol=tolerance)
    for ours, theirs in zip(gradients(net, fast), gradients(net, wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * max(1, float(theirs.abs().max())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
def test_stored_precisions_equal_the_plain_path_on_the_same_codes(dtype):
    """As near to float64 as the plain path in float32 is."""
    net = learner(torch.float32)
    query, support, mask = levels(1, 1, dtype), levels(2, 2, dtype), masks("disc", "thin")
    with torch.no_grad():
        fast, slow = FusedHSNet(net)(query, support, mask), plain(net, query, support, mask)
        exact = plain(net.double(), *([level.double() for level in side] for side in (query, support)), mask)
    assert float((fast - exact).abs().max()) < 3 * float((slow - exact).abs().max()) < 1e-3


@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16"])
def test_codes_of_all_positions_as_a_gpu_multiplies_them(arithmetic, monkeypatch):
    """Two shots per query: as near to float64 as the plain path; in bfloat16 nearer than what is rounded first."""
    net = learner(torch.float32)
    arguments = levels(2, 1, torch.int8), levels(4, 2, torch.int8), masks("disc", "thin", "corner", "disc")
    with torch.no_grad():
        before = FusedHSNet(net, arithmetic, sparse=False)(*arguments)
    monkeypatch.setattr("hsnet.correlation.keeps_codes", lambda query, support: query.dtype == torch.int8)
    fast = FusedHSNet(net, arithmetic, sparse=False)(*arguments)
    slow = plain(net, *arguments)
    with torch.no_grad():
        precise = [[level.double() for level in side] for side in arguments[:2]]
        exact = plain(copy.deepcopy(net).double(), *precise, arguments[2])
    off = float((fast - exact).detach().abs().max())
    if arithmetic == "float32":
        assert off < 3 * float((slow - exact).detach().abs().max()) < 1e-3
        ours, theirs = (torch.cat([part.flatten() for part in gradients(net, logits)]) for logits in (fast, slow))
        assert float((ours - theirs).norm()) < 1e-4 * float(theirs.norm())
    else:
        # What is left is the learner's own rounding, of every layer.
        assert 0 < float((fast - exact).detach().abs().mean()) < 1.1 * float((before - exact).abs().mean())
        assert fast.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_codes_are_multiplied_as_floats_where_the_processor_has_no_exact_products(dtype, monkeypatch):
    net = learner(torch.float32)
    arguments = levels(1, 1, dtype), levels(1, 2, dtype), masks("disc")
    with torch.no_grad():
        with_codes = FusedHSNet(net)(*arguments)
        monkeypatch.setattr("torch.cpu._is_vnni_supported", lambda: False)
        assert prepare_query(arguments[0][0][0]).values.is_floating_point()
        torch.testing.assert_close(FusedHSNet(net)(*arguments), with_codes, rtol=0, atol=2e-4)


def test_a_batch_is_its_single_episodes():
    net = learner(torch.float32)
    query, support, mask = levels(3, 1, torch.float32), levels(3, 2, torch.float32), masks("disc", "thin", "corner")
    with torch.no_grad():
        together = FusedHSNet(net)(query, support, mask)
        for i in range(3):
            one = [[level[i : i + 1] for level in side] for side in (query, support)]
            torch.testing.assert_close(FusedHSNet(net)(*one, mask[i : i + 1])[0], together[i], rtol=0, atol=1e-4)


def test_other_learners_run_too():
    """One convolution in a squeeze block, none in a mix block, another width."""
    torch.manual_seed(0)
    net = HSNet(LAYERS, channels=(8,), kernels=((3,), (3,), (5,)), strides=((2,), (4,), (8,)), mix_convolutions=1)
    query, support, mask = levels(1, 1, torch.float32), levels(1, 2, torch.float32), masks("disc")
    with torch.no_grad():
        wanted = plain(net, query, support, mask)
        torch.testing.assert_close(FusedHSNet(net)(query, support, mask), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sparse", [True, False])
def test_bfloat16_stays_near_and_gives_float32_logits_and_gradients(sparse):
    net = learner(torch.float32)
    query, support, mask = levels(1, 1, torch.int8), levels(2, 2, torch.int8), masks("disc", "corner")
    near = FusedHSNet(net, "bfloat16", sparse)(query, support, mask)
    exact = FusedHSNet(net)(query, support, mask)
    assert near.dtype == torch.float32
    assert float((near - exact).detach().abs().mean()) < 0.05 * float(exact.detach().std())
    ours, theirs = (torch.cat([part.flatten() for part in gradients(net, logits)]) for logits in (near, exact))
    assert ours.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.95


@pytest.mark.parametrize("sparse", [True, False])
def test_unit_features_go_through_as_they_are(sparse):
    net, mask = learner(), masks("disc", "corner")
    query, support = ([level / 4 for level in levels(*seeded)] for seeded in ((1, 1), (2, 2)))
    wanted = plain(net, query, support, mask, partial(build_hypercorrelation, unit=True))
    fast = FusedHSNet(net, sparse=sparse)(query, support, mask, unit=True)
    torch.testing.assert_close(fast, wanted, rtol=0, atol=1e-9)
    assert not torch.allclose(FusedHSNet(net)(query, support, mask), wanted, atol=1e-3)


def test_it_trains_the_learner_it_was_given():
    net = learner(torch.float32)
    query, support = levels(1, 1, torch.float32), levels(1, 2, torch.float32)
    FusedHSNet(net)(query, support, masks("disc")).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_build_pyramid_and_the_plain_correlation_agree():
    query, support, mask = levels(2, 1), levels(2, 2), masks("disc", "empty")
    for level, (q, s) in zip(
        build_pyramid(query, support, mask), zip(reversed(query), reversed(support), strict=True), strict=True
    ):
        expected = build_hypercorrelation(q, s, interpolate_mask(mask, s.shape[2:4]))
        torch.testing.assert_close(level, expected, rtol=0, atol=1e-12)


def test_unknown_arithmetic_is_named():
    with pytest.raises(ConfigError, match=r"Unknown arithmetic 'float8'\. Choose one of: float32, bfloat16"):
        FusedHSNet(learner(), arithmetic="float8")


def test_grids_that_do_not_meet_are_named():
    """4x4, 4x4 and 3x3 after squeezing, where broadcasting could go on in silence elsewhere."""
    net = HSNet((1, 1, 1), channels=(4, 4, 4))
    query = [torch.randn(1, 1, side, side, 4) for side in (96, 49, 25)]
    with pytest.raises(ShapeError, match=r"differ after squeezing: \(4, 4\) and \(3, 3\)"):
        FusedHSNet(net)(query, query, masks("corner"))


@pytest.mark.parametrize("sparse", [True, False])
def test_levels_of_another_network_are_named(sparse):
    query, support = levels(1, 1), levels(1, 2)
    support[0] = support[0][:, :1]
    with pytest.raises(ShapeError, match="differ in layers: 2 and 1"):
        FusedHSNet(learner(), sparse=sparse)(query, support, masks("disc"))


def test_supports_that_cannot_be_shared_evenly_are_named():
    with pytest.raises(ShapeError, match="3 supports with 3 masks cannot be shared evenly by 2 queries"):
        FusedHSNet(learner())(levels(2, 1), levels(3, 2), masks("disc", "disc", "disc"))


@pytest.mark.parametrize("sparse", [True, False])
def test_a_joint_answer_is_the_mean_over_all_support_positions(sparse):
    """By the plain path: the decoder gets the mean of what is left of each support, whatever their order."""
    net, mask = learner(), masks("disc", "thin", "corner", "disc", "empty", "everything")
    query, support = levels(2, 1), levels(6, 2)
    fused = FusedHSNet(net, sparse=sparse)
    contexts = fused.encode(query, support, mask).unflatten(0, (2, 3)).transpose(0, 1)
    pyramid = build_pyramid([level.repeat_interleave(3, 0) for level in query], support, mask)
    wanted = net.decode(net.encode(pyramid).unflatten(0, (2, 3)).mean(1))
    tolerance = 1e-9 if sparse else 1e-4
    torch.testing.assert_close(fused.joint(contexts), wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(fused.joint(contexts.flip(0)), wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(fused.joint(contexts[:1]), fused(query, [s[::3] for s in support], mask[::3]))
    answers = fused(query, support, mask).unflatten(0, (2, 3)).mean(1)
    assert not torch.allclose(fused.joint(contexts), answers, atol=1e-3), "the decoder is not linear"
