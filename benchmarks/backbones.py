"""Compare backbones and their layers without training, and time them.

    python -m benchmarks.backbones score S.zarr --fold 0 --episodes 300 --shots 1,5 --out score.json
    python -m benchmarks.backbones rate --backbone timm:vit_small_patch14_dinov2 --weights FILE --image-size 224

`score` asks a store: background contrast, which learns nothing. A query position's score is its largest cosine to the
support's object minus its largest to the support's background; cosines are averaged over the chosen layers of a level
first, over levels their maps afterwards, over supports last. A position above 0 is object. It is done with every layer
alone, with neighbouring layers together, with each level, and with all. To compare all layers of a transformer, extract
with `--taps 0,1,...,11`. The episodes are those of `hsnet evaluate` with the same fold, seed and number.

`rate` times generated photos on one thread: the bare network, extraction, and bytes per photo.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hsnet.metrics import count, mean_iou, sum_by_class
from hsnet.model import resize_logits
from pipeline.common.runner import one_torch_thread
from pipeline.datasets.shapes import Shapes
from pipeline.episodes.stream import EpisodeStream
from pipeline.extract.stage import extract
from pipeline.features.backbones import Reading, new_recipe, open_backbone
from pipeline.features.forward import PhotoNetwork
from pipeline.features.weights import load_weights
from pipeline.loading.batch import load_batch
from pipeline.loading.source import StoreSource
from pipeline.store.feature_store import FeatureStore

Group = tuple[tuple[int, ...], ...]
"""For every level the layers that are averaged; an empty tuple leaves the level out."""


def object_positions(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """(S, S) mask -> (U V,) bool: positions that the object covers by half, or the one it covers most."""
    share = F.adaptive_avg_pool2d(mask[None, None].float(), grid).flatten()
    return share >= min(0.5, float(share.max()))


def contrast(cosines: Tensor, inside: Tensor) -> Tensor:
    """(H W, U V) cosines -> (H W,): largest to the object less largest to the background.

    A support that is all object has no background to be told from: then the cosine to the object decides.
    """
    near = cosines[:, inside].amax(1)
    return near if inside.all() else near - cosines[:, ~inside].amax(1)


def groups(layers: Sequence[int], widest: int) -> list[Group]:
    """Every layer alone, runs of up to `widest` neighbours of a level, every level, and all.

    >>> groups([3], 2)
    [((0,),), ((1,),), ((2,),), ((0, 1),), ((1, 2),), ((0, 1, 2),)]
    """
    found: list[Group] = []
    for width in (*range(1, widest + 1), max(layers)):
        for level, number in enumerate(layers):
            for first in range(number - width + 1):
                run = tuple(range(first, first + width))
                found.append(tuple(run if at == level else () for at in range(len(layers))))
    found += [
        tuple(tuple(range(number)) if at == level else () for at, number in enumerate(layers))
        for level in range(len(layers))
    ]
    found.append(tuple(tuple(range(number)) for number in layers))
    return list(dict.fromkeys(found))


def contrast_maps(query: Sequence[Tensor], support: Sequence[Tensor], mask: Tensor, chosen: Sequence[Group]) -> Tensor:
    """Contrast of one query and one support: (groups, S, S).

    Args:
        query, support: levels, (L, H, W, C) unit vectors each.
        mask: (S, S) object of the support.
    """
    size = (mask.shape[0], mask.shape[1])
    cosines = [
        torch.einsum("lpc,lqc->lpq", q.flatten(1, 2), s.flatten(1, 2)) for q, s in zip(query, support, strict=True)
    ]
    inside = [object_positions(mask, (s.shape[1], s.shape[2])) for s in support]
    maps = []
    for group in chosen:
        parts = [
            resize_logits(
                contrast(cosines[level][list(run)].mean(0), inside[level]).view(1, 1, *query[level].shape[1:3]), size
            )
            for level, run in enumerate(group)
            if run
        ]
        maps.append(torch.stack(parts).mean(0)[0, 0])
    return torch.stack(maps)


def score(path: Path, fold: int, episodes: int, shots: Sequence[int], seed: int, widest: int) -> dict[str, object]:
    """mIoU of background contrast on test episodes of a store, for every group of layers and number of supports."""
    source = StoreSource(FeatureStore.open(path))
    recipe, most = source.recipe, max(shots)
    chosen = groups(recipe.layout.layers, widest)
    stream = EpisodeStream(source.index, fold, "test", most, seed, exclude=source.skipped)
    drawn = [stream[number] for number in range(episodes)]
    counts: dict[int, list[Tensor]] = {k: [] for k in shots}
    for episode in drawn:
        batch = load_batch(source, [episode]).to("cpu")
        query = [F.normalize(level[0].float(), dim=-1) for level in batch.query]
        supports = [[F.normalize(level[k].float(), dim=-1) for level in batch.support] for k in range(most)]
        maps = torch.stack(
            [contrast_maps(query, s, m, chosen) for s, m in zip(supports, batch.support_mask, strict=True)]
        )
        for k in shots:
            said = maps[:k].mean(0) > 0
            ignore = None if batch.ignore is None else batch.ignore.expand(len(chosen), -1, -1)
            counts[k].append(count(said, batch.target.expand(len(chosen), -1, -1), ignore))
    classes = [episode.class_id for episode in drawn]
    ids = list(source.index.split(fold, "test").class_ids)
    rows = []
    for place, group in enumerate(chosen):
        scores = {
            str(k): mean_iou(sum_by_class(torch.stack([c[place] for c in counts[k]]), classes, ids)) for k in shots
        }
        rows.append({"layers": named(group, recipe.taps, recipe.layout.layers), "miou": scores})
    return {
        "store": path.name,
        "backbone": recipe.backbone,
        "image_size": recipe.image_size,
        "precision": recipe.precision,
        "fold": fold,
        "episodes": episodes,
        "seed": seed,
        "bytes_per_photo": sum(level[0].nbytes for level in source.store.features([0])),
        "scores": rows,
    }


def named(group: Group, taps: Sequence[str], layers: Sequence[int]) -> list[str]:
    """Names of the layers of a group."""
    starts = [sum(layers[:level]) for level in range(len(layers))]
    return [taps[start + layer] for start, run in zip(starts, group, strict=True) for layer in run]


def rate(backbone: str, weights: str | None, image_size: int, reading: Reading) -> dict[str, object]:
    """Photos per second of the bare network and of extraction, one thread, generated photos."""
    loaded = load_weights(backbone, weights)
    recipe = new_recipe(backbone, loaded, image_size, reading=reading)
    data = Shapes(size=400, trn_per_class=2, val_per_class=2)
    with one_torch_thread(), tempfile.TemporaryDirectory() as folder:
        network = PhotoNetwork(open_backbone(recipe, loaded), image_size)
        inputs = [network.pixels(data.image(number)) for number in range(8)]
        network.taps(inputs[:1])
        start = time.perf_counter()
        for pixels in inputs:
            network.taps([pixels])
        bare = len(inputs) / (time.perf_counter() - start)
        made = extract(data, loaded, Path(folder) / "s.zarr", image_size=image_size, precision="int8", reading=reading)
    return {
        "backbone": backbone,
        "image_size": image_size,
        "layers": list(recipe.taps),
        "bare_photos_per_s": bare,
        "extract_photos_per_s": made.images_per_s,
        "photos": made.images,
        "share": made.images_per_s / bare,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    one = parts.add_parser("score", help="background contrast on test episodes of a store")
    one.add_argument("store", type=Path)
    one.add_argument("--fold", type=int, default=0)
    one.add_argument("--episodes", type=int, default=300)
    one.add_argument("--shots", default="1,5", help="commas between them")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--widest", type=int, default=4, help="neighbouring layers together, at most")
    two = parts.add_parser("rate", help="seconds per photo")
    two.add_argument("--backbone", required=True)
    two.add_argument("--weights")
    two.add_argument("--image-size", type=int, default=224)
    two.add_argument("--taps")
    for each in (one, two):
        each.add_argument("--out", type=Path, help="also write the JSON there")
    options = parser.parse_args()
    if options.part == "score":
        shots = [int(k) for k in options.shots.split(",")]
        result = score(options.store, options.fold, options.episodes, shots, options.seed, options.widest)
    else:
        reading = Reading(options.taps)
        result = rate(options.backbone, options.weights, options.image_size, reading)
    text = json.dumps(result, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
