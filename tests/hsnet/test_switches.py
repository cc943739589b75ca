"""The learner's switches: sizes, the plain reading and the fast paths of each, the support's background."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hsnet.contrast import _nearest, contrast_maps
from hsnet.correlation import EPS, build_hypercorrelation, interpolate_mask
from hsnet.errors import ConfigError, ShapeError
from hsnet.fused import FusedHSNet
from hsnet.model import HSNet

RESNET50, RESNET101 = (3, 6, 4), (3, 23, 4)
DEPTH = {
    1: {"channels": (128,), "kernels": ((3,), (5,), (9,)), "strides": ((2,), (4,), (8,))},
    2: {"channels": (64, 128), "kernels": ((5, 3), (5, 5), (9, 5)), "strides": ((4, 2), (4, 4), (8, 4))},
    4: {
        "channels": (16, 64, 128, 128),
        "kernels": ((3, 3, 3, 3), (3, 3, 3, 3), (5, 3, 3, 3)),
        "strides": ((2, 2, 2, 1), (2, 2, 2, 2), (4, 2, 2, 2)),
    },
}
ONE = {"kernels": ((3, 3, 3),), "strides": ((2, 2, 2),)}


@pytest.mark.parametrize(
    ("layers", "switches", "total"),
    [
        (RESNET50, {}, 2_573_794),
        (RESNET101, {}, 2_587_394),
        (RESNET101, {"kernel": "center-pivot"}, 2_587_394),
        # Table 5 (ResNet-101): 2.6, 11.3 and 4.4 million
        (RESNET101, {"kernel": "original"}, 11_296_690),
        (RESNET101, {"kernel": "separable"}, 4_375_314),
        (RESNET50, {"kernel": "original"}, 11_126_690),
        (RESNET50, {"kernel": "separable"}, 4_325_674),
        # one layer of each level: 2 k^2 16 weights less for every other one
        ((1, 1, 1), {"picked": ((2,), (22,), (3,))}, 2_587_394 - 2 * 16 * (2 * 9 + 22 * 25 + 3 * 25)),
        # the deepest level alone: its squeeze block and the decoder
        ((3,), {**ONE, "picked": ((0, 1, 2), (), ())}, 167_584 + 221_376 + 38_082),
        (RESNET50, DEPTH[1], 2_161_794),
        (RESNET50, DEPTH[2], 3_071_234),
        (RESNET50, DEPTH[4], 3_424_226),
        (RESNET50, {"channels": (8, 32, 64)}, 647_410),
        (RESNET50, {"groups": 8}, 2_573_794),
        (RESNET50, {"support_mask": False}, 2_573_794),
        # three contrast maps of 13 layers go into the decoder's first 3 x 3 convolution of 128 channels
        (RESNET50, {"background": True}, 2_573_794 + 3 * 13 * 9 * 128),
        (RESNET101, {"background": True}, 2_587_394 + 3 * 30 * 9 * 128),
    ],
)
def test_parameter_counts(layers, switches, total):
    with torch.device("meta"):
        assert sum(p.numel() for p in HSNet(layers, **switches).parameters()) == total


LAYERS, GRIDS, WIDTH = (2, 3, 2), ((2, 3), (4, 5), (8, 9)), 5  # deepest first
SMALL = {"channels": (4, 4, 4), "mix_convolutions": 1, "groups": 2}
LEVELS_1_AND_3 = {"kernels": ((3, 3, 3), (5, 5, 3)), "strides": ((2, 2, 2), (4, 4, 2))}
SWITCHES = {
    "published": {},
    "original": {"kernel": "original"},
    "separable": {"kernel": "separable"},
    "layers": {"layers": (1, 2, 1), "picked": ((1,), (0, 2), (0,))},
    "levels": {"layers": (2, 2), "picked": ((0, 1), (), (0, 1)), **LEVELS_1_AND_3},
    "depth 1": {"channels": (4,), "kernels": ((3,), (5,), (9,)), "strides": ((2,), (4,), (8,))},
    "depth 4": {**DEPTH[4], "channels": (4, 4, 4, 4)},
    "groups": {"groups": 4},
    "no support mask": {"support_mask": False},
    "background": {"background": True},
    "background of some layers": {
        "background": True,
        "layers": (2, 1),
        "picked": ((0, 1), (2,), ()),
        "kernels": ((3, 3, 3), (5, 3, 3)),
        "strides": ((2, 2, 2), (4, 2, 2)),
    },
    "background, no support mask": {"background": True, "support_mask": False},
    "original and background": {"kernel": "original", "background": True, "support_mask": False},
}


def learner(name, dtype=torch.float64):
    torch.manual_seed(0)
    net = HSNet(**{"layers": LAYERS, **SMALL, **SWITCHES[name]}).to(dtype)
    for parameter in net.parameters():  # biases and scales that matter
        parameter.data += 0.2 * torch.randn_like(parameter)
    return net


def levels(count, seed, dtype=torch.float64):
    """All layers of all levels, finest first."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        torch.randn(count, layers, *grid, WIDTH, generator=generator, dtype=torch.float64)
        for layers, grid in zip(reversed(LAYERS), reversed(GRIDS), strict=True)
    ]
    return [(level * 40).clamp(-127, 127).round().to(dtype) for level in drawn] if dtype == torch.int8 else drawn


MASKS = {
    "block": lambda y, x: (y > 2) & (y < 9) & (x > 4) & (x < 12),
    "nothing": lambda y, x: y < 0,
    "everything": lambda y, x: y >= 0,
    "corner": lambda y, x: (y < 4) & (x > 13),
}


def masks(*names):
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(18), indexing="ij")
    return torch.stack([MASKS[name](rows, columns) for name in names])


def cosines(query, support, unit=False):
    """(L, U V, H W) of one pair, by the definition, negative ones too."""
    if not unit:
        query, support = (side / (side.norm(dim=-1, keepdim=True) + 1e-5) for side in (query, support))
    return torch.einsum("lpc,lqc->lpq", support.flatten(1, 2), query.flatten(1, 2))


def maps_by_hand(query, support, mask, unit=False):
    """Contrast maps of one pair, position by position; levels deepest first, each (L, H, W, C)."""
    finest = query[-1].shape[1:3]
    maps = []
    for scene, objects in zip(query, support, strict=True):
        inside = (interpolate_mask(mask[None], objects.shape[1:3])[0] > 0).flatten().tolist()
        layers = []
        for of_layer in cosines(scene.double(), objects.double(), unit):
            largest = []
            for kind in (True, False):
                rows = [of_layer[place] for place, is_object in enumerate(inside) if is_object == kind]
                rows.append(torch.zeros_like(of_layer[0]))  # a negative cosine counts as 0, and so does none
                largest.append(torch.stack(rows).max(0).values)
            layers += [*largest, largest[0] - largest[1]]
        level = torch.stack(layers).view(1, -1, *scene.shape[1:3])
        maps.append(F.interpolate(level, finest, mode="bilinear", align_corners=True)[0])
    return torch.cat(maps)


def by_hand(name, net, query, support, mask, unit=False):
    """What the switches mean, pair by pair: picked layers, mask or none, then the published learner's own steps."""
    arguments = {"layers": LAYERS, **SWITCHES[name]}
    picked = arguments.get("picked", [range(count) for count in LAYERS])
    shots = len(mask) // len(query[0])
    contexts = []
    for pair in range(len(mask)):
        sides = [
            [level[place][list(chosen)] for level, chosen in zip(reversed(side), picked, strict=True) if len(chosen)]
            for side, place in ((query, pair // shots), (support, pair))
        ]
        seen = mask[pair : pair + 1] if arguments.get("support_mask", True) else torch.ones_like(mask[:1])
        pyramid = [
            build_hypercorrelation(scene[None], objects[None], interpolate_mask(seen, objects.shape[1:3]), unit=unit)
            for scene, objects in zip(*sides, strict=True)
        ]
        context = net.squeezed_mean(pyramid)
        if arguments.get("background"):
            context = torch.cat([context, maps_by_hand(*sides, mask[pair], unit)[None]], 1)
        contexts.append(context)
    return net.decode(torch.cat(contexts))


def gradients(net, logits):
    weights = torch.sin(torch.arange(logits.numel(), dtype=logits.dtype)).view_as(logits)
    return torch.autograd.grad((logits * weights).sum(), list(net.parameters()))


PATHS = {
    "plain": lambda net, query, support, mask, **more: net.answer(
        [level.repeat_interleave(len(mask) // len(level), 0) for level in query], support, mask, **more
    ),
    "rows": lambda net, *arguments, **more: FusedHSNet(net, sparse=True)(*arguments, **more),
    "dense": lambda net, *arguments, **more: FusedHSNet(net, sparse=False)(*arguments, **more),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", SWITCHES)
def test_every_path_equals_the_definition_in_values_and_gradients(name, path):
    """float64; two shots per query, objects everywhere and nowhere."""
    net, mask = learner(name), masks("block", "corner", "nothing", "everything")
    query, support = levels(2, 1), levels(4, 2)
    ours, wanted = PATHS[path](net, query, support, mask), by_hand(name, net, query, support, mask)
    assert wanted.isfinite().all()
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-9)
    for mine, theirs in zip(gradients(net, ours), gradients(net, wanted), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9 * max(1, float(theirs.abs().max())))


@pytest.mark.parametrize("name", ["layers", "no support mask", "background", "separable"])
@settings(max_examples=12, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(sorted(MASKS)), min_size=1, max_size=3),
    shots=st.integers(1, 2),
    unit=st.booleans(),
    sparse=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_any_batch_equals_the_definition(name, kinds, shots, unit, sparse, seed):
    net, mask = learner(name), masks(*kinds * shots)
    query, support = levels(len(kinds), seed), levels(len(mask), seed + 1)
    ours = FusedHSNet(net, sparse=sparse)(query, support, mask, unit=unit)
    torch.testing.assert_close(ours, by_hand(name, net, query, support, mask, unit), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("sparse", [True, False])
def test_codes_and_bfloat16_stay_near(name, sparse):
    net, mask = learner(name, torch.float32), masks("block", "everything")
    query, support = levels(1, 1, torch.int8), levels(2, 2, torch.int8)
    exact = by_hand(name, net.double(), [s.double() for s in query], [s.double() for s in support], mask).detach()
    net = net.float()
    with torch.no_grad():
        codes = FusedHSNet(net, sparse=sparse)(query, support, mask)
        near = FusedHSNet(net, "bfloat16", sparse)(query, support, mask)
    assert codes.dtype == near.dtype == torch.float32
    assert float((codes - exact).abs().max()) < 1e-3
    assert float((near - exact).abs().mean()) < 0.1 * float(exact.std())


def test_a_switch_changes_the_answer():
    """Each one; otherwise equal paths would say little."""
    mask, query, support = masks("block"), levels(1, 1), levels(1, 2)
    published = by_hand("published", learner("published"), query, support, mask)
    for name in SWITCHES.keys() - {"published"}:
        other = FusedHSNet(learner(name))(query, support, mask)
        assert other.shape != published.shape or not torch.allclose(other, published, atol=1e-3), name


def test_a_joint_answer_averages_the_contrast_maps_of_all_supports():
    net, mask = learner("background"), masks("block", "corner", "everything")
    query, support = levels(1, 1), levels(3, 2)
    fused = FusedHSNet(net)
    contexts = fused.encode(query, support, mask)[:, None]
    maps = [maps_by_hand([q[0] for q in query[::-1]], [s[k] for s in support[::-1]], mask[k]) for k in range(3)]
    torch.testing.assert_close(contexts[:, 0, 4:], torch.stack(maps), rtol=0, atol=1e-9)
    torch.testing.assert_close(fused.joint(contexts), net.decode(contexts.mean(0)))


def test_without_object_or_background_a_similarity_is_0():
    query, support = levels(2, 1), levels(2, 2)
    nothing, everything = contrast_maps(query, support, masks("nothing", "everything")).unflatten(1, (7, 3))
    assert torch.equal(nothing[:, 0], torch.zeros_like(nothing[:, 0]))
    assert torch.equal(everything[:, 1], torch.zeros_like(everything[:, 1]))
    torch.testing.assert_close(nothing[:, 2], -nothing[:, 1])
    assert nothing[:, 1].abs().min() > 0
    assert everything[:, 0].abs().min() > 0


@pytest.mark.parametrize("way", ["rows", "one pair at a time", "all pairs at once"])
@pytest.mark.parametrize("unit", [False, True])
def test_every_way_to_the_maps_is_the_same(way, unit, monkeypatch):
    """Also where features have gradients, which the rows cannot give."""
    monkeypatch.setattr("hsnet.contrast._AT_ONCE", 1 if way == "one pair at a time" else 10**9)
    query, support, mask = levels(2, 1), levels(4, 2), masks("block", "nothing", "everything", "corner")
    for level in (*query, *support):
        level.requires_grad_(way != "rows")
    ours = contrast_maps(query, support, mask, unit)
    wanted = torch.stack(
        [
            maps_by_hand([q[pair // 2] for q in query[::-1]], [s[pair] for s in support[::-1]], mask[pair], unit)
            for pair in range(4)
        ]
    )
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-12)
    if way != "rows":
        weights = torch.sin(torch.arange(ours.numel(), dtype=ours.dtype)).view_as(ours)
        features = [*query, *support]
        for mine, theirs in zip(
            torch.autograd.grad((ours * weights).sum(), features),
            torch.autograd.grad((wanted * weights).sum(), features),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("at_once", [1, 10**9])
def test_contrast_of_codes_is_exact_on_a_gpu(at_once, monkeypatch):
    """What a GPU computes, on a CPU, against float64; before, factors were rounded to bfloat16."""
    monkeypatch.setattr("hsnet.contrast._AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    query, support = (
        torch.randint(-127, 128, (count, 2, 5, 6, 300), generator=generator, dtype=torch.int8) for count in (2, 4)
    )
    inside = torch.rand(4, 5, 6, generator=generator) < torch.tensor([0.3, 0.0, 1.0, 0.5])[:, None, None]
    kinds = inside, ~inside
    exact = _nearest(query.double(), support.double(), kinds, False, None, EPS)
    rounded = _nearest(query, support, kinds, False, torch.bfloat16, EPS)
    monkeypatch.setattr("hsnet.contrast.keeps_codes", lambda query, support: query.dtype == torch.int8)
    ours = _nearest(query, support, kinds, False, torch.bfloat16, EPS)
    assert ours.dtype == torch.float32
    assert float((ours - exact).abs().max()) < 1e-6
    assert float((rounded - exact).abs().max()) > 1e-4
    assert torch.equal(ours[1, :, 0], torch.zeros_like(ours[1, :, 0])), "no object"
    assert torch.equal(ours[2, :, 1], torch.zeros_like(ours[2, :, 1])), "no background"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"kernel": "round"}, "Unknown kernel 'round'. Choose one of: center-pivot, original, separable"),
        ({"groups": 3}, "3 groups do not divide"),
        ({"channels": (16, 64)}, r"2 channels cannot have \[2, 3\] kernels"),
        ({"picked": ((0,), (0,), (0, 1))}, r"\[\[0\], \[0\], \[0, 1\]\], are not \[2, 3, 2\] per level"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments, text):
    with pytest.raises(ConfigError, match=text):
        HSNet(LAYERS, **arguments)


@pytest.mark.parametrize("change", ["a level less", "a layer less"])
def test_features_without_the_layers_picked_are_refused(change):
    net, mask = learner("layers"), masks("block")
    query = levels(1, 1)
    query = query[1:] if change == "a level less" else [level[:, :2] for level in query]
    with pytest.raises(ConfigError, match=r"uses layers \[\[1\], \[0, 2\], \[0\]\] of its levels .* but the features"):
        FusedHSNet(net)(query, query, mask)


def test_neighbouring_layers_are_not_copied():
    net, query = learner("background of some layers"), levels(1, 1)
    middle, deepest = net.chosen(query)
    assert middle.data_ptr() == query[1][:, 2].data_ptr()
    assert deepest.data_ptr() == query[2].data_ptr()
    assert [level.shape[1] for level in (middle, deepest)] == [1, 2]


def test_contrast_maps_belong_to_a_learner_that_reads_them():
    pyramid = [torch.rand(1, 2, *grid, *grid) for grid in GRIDS]
    with pytest.raises(ShapeError, match="reads no contrast maps"):
        learner("groups")([level.double() for level in pyramid], torch.rand(1, 21, 8, 9))
    with pytest.raises(ShapeError, match="reads contrast maps beside the pyramid"):
        learner("background")(pyramid)
    with pytest.raises(ShapeError, match="differ in layers: 2 and 1"):
        contrast_maps(levels(1, 1), [level[:, :1] for level in levels(1, 2)], masks("block"))
