"""Measure what codecs cost, and draw the curve: bytes, errors of correlations, mIoU of one head.

    python -m benchmarks.compression measure fss --data-root D --splits D/splits --backbone squeezenet1_1 \
        --image-size 112 --bits 32,16,8,4,2,1,0.5 --checkpoint RUN --folder WORK --out OUT.json
    python -m benchmarks.compression draw OUT.json OUT.svg
    python -m benchmarks.compression correlate fss --data-root D --splits D/splits --backbone resnet50 \
        --weights random --image-size 400 --bytes 0,2000000,1000000 --photos 48 --pairs 6 --out OUT.json
    python -m benchmarks.compression round fss --data-root D --splits D/splits --backbone squeezenet1_1 \
        --image-size 388 --photos 8 --out OUT.json

Bits are per feature value: 32 is float32 (what the others are compared against, made first), 16 float16, 8 int8, and
fewer are the budgeted codec. Stores are made in WORK by `hsnet extract`'s own stage and compared by that of
`hsnet store compare`. Points that are in OUT.json already are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import rounding
from commands.terminal import plain
from pipeline.compare import compare, compare_scores
from pipeline.datasets import open_dataset
from pipeline.datasets.index import DatasetIndex
from pipeline.extract.stage import extract
from pipeline.features import fitting
from pipeline.features.backbones import new_recipe, open_backbone
from pipeline.features.budgeted import TransformCodec, fit_layers
from pipeline.features.forward import PhotoNetwork
from pipeline.features.precision import encode
from pipeline.features.recipe import CODED, Coding, Recipe
from pipeline.features.weights import load_weights
from pipeline.loading.source import FeatureSource, OnlineSource, StoreSource
from pipeline.store.feature_store import FeatureStore

WHOLE = {32.0: "float32", 16.0: "float16", 8.0: "int8"}


def open_source(path: Path) -> FeatureSource:
    return StoreSource(FeatureStore.open(path))


def measure(options: argparse.Namespace) -> None:
    out: Path = options.out
    results: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {}
    dataset = open_dataset(options.dataset, options.data_root, options.splits)
    weights = load_weights(options.backbone, options.weights)
    shapes = new_recipe(options.backbone, weights, options.image_size).level_shapes()
    values = sum(math.prod(shape) for shape in shapes)
    results["setting"] = {
        "dataset": options.dataset,
        "images": len(dataset.index.images),
        "backbone": options.backbone,
        "weights": options.weights or "ImageNet",
        "image_size": options.image_size,
        "values_per_image": values,
        "episodes": options.episodes if options.checkpoint else None,
    }
    options.folder.mkdir(parents=True, exist_ok=True)
    exact = options.folder / "32.zarr"
    for bits in sorted({32.0, *options.bits}, reverse=True):
        path = options.folder / f"{bits:g}.zarr"
        started = time.perf_counter()
        summary = extract(
            dataset,
            weights,
            path,
            image_size=options.image_size,
            precision=WHOLE.get(bits, "int8"),
            bytes_per_image=None if bits in WHOLE else int(values * bits / 8),
        )
        seconds = time.perf_counter() - started
        if bits == 32 or f"{bits:g}" in results.get("points", {}):
            continue
        score = None
        if options.checkpoint:
            makers = partial(open_source, path), partial(open_source, exact)
            score = compare_scores(options.checkpoint, *makers, episodes=options.episodes)
        found = compare(open_source(path), open_source(exact), pairs=options.pairs, score=score)
        point = {**plain(found), "extract_s": seconds if summary.written_images else None}
        results.setdefault("points", {})[f"{bits:g}"] = point
        out.write_text(json.dumps(results, indent=1) + "\n")
        print(row(bits, point), flush=True)


class Remembered(OnlineSource):
    """Exact features, made once."""

    def features(self, images: Sequence[int]) -> list[Tensor]:
        kept = self.__dict__.setdefault("kept", {})
        for image in images:
            if image not in kept:
                kept[image] = super().features([image])
        return [torch.cat(level) for level in zip(*(kept[image] for image in images), strict=True)]


@dataclass(frozen=True)
class Coded:
    """The same coded, without a store."""

    exact: Remembered
    codec: TransformCodec | None
    recipe: Recipe

    @property
    def index(self) -> DatasetIndex:
        return self.exact.index

    @property
    def skipped(self) -> Collection[int]:
        """Everything but photos that no codec was fitted to."""
        held_out = sorted({image for image, _ in self.index.split(0, "test").entries})[::4]
        return set(range(len(self.index.images))) - set(held_out)

    def classes_present(self, image: int) -> Sequence[int]:
        return self.exact.classes_present(image)

    def labels(self, images: Sequence[int]) -> Tensor:
        return self.exact.labels(images)

    def features(self, images: Sequence[int]) -> list[Tensor]:
        levels = self.exact.features(images)
        arrays = self.codec.encode(levels) if self.codec else encode(levels, self.recipe.precision)
        return [torch.from_numpy(array) for array in arrays]


def correlate(options: argparse.Namespace) -> None:
    """Bytes and errors of correlations only, on few large photos: fitted to training photos, tried on test photos."""
    dataset = open_dataset(options.dataset, options.data_root, options.splits)
    weights = load_weights(options.backbone, options.weights)
    recipe = new_recipe(options.backbone, weights, options.image_size, "int8")
    exact = Remembered(dataset, open_backbone(recipe, weights), replace(recipe, precision="float32"))
    fitting.IMAGES = options.photos, options.photos
    started = time.perf_counter()
    samples, images = fitting._sample(dataset, weights, recipe, options.photos, "cpu", skip=False)
    print(f"{images} photos sampled in {time.perf_counter() - started:.0f} s", flush=True)
    shapes = recipe.level_shapes()
    results: dict[str, Any] = {}
    for nbytes in options.bytes:
        codec, coded, seconds = None, recipe, 0.0
        if nbytes:
            started = time.perf_counter()
            codec = fit_layers(samples, [shape[1] * shape[2] for shape in shapes], nbytes)
            seconds = time.perf_counter() - started
            sample = Coding(
                bytes_per_image=nbytes, images=images, positions=len(samples[0][0]), seed=0, fit=codec.digest,
                level_bytes=codec.level_bytes,
            )  # fmt: skip
            coded = replace(recipe, precision=CODED, coding=sample)
        size = sum(math.prod(shape) for shape in coded.stored_shapes())
        found = compare(Coded(exact, codec, coded), exact, pairs=options.pairs)
        point = {**plain(found), "bytes_per_image": size, "fit_s": seconds}
        results[str(nbytes or "int8")] = point
        values = sum(math.prod(shape) for shape in shapes)
        print(row(8 * size / values, point), f"fit {seconds:.0f} s", flush=True)
        for layer in found.layers:
            print(layer, flush=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")


def round_floats(options: argparse.Namespace) -> None:
    """BitRound and Quantize before zstd, beside int8, on photos of the first fold's test classes."""
    torch.set_num_threads(1)
    dataset = open_dataset(options.dataset, options.data_root, options.splits)
    weights = load_weights(options.backbone, options.weights)
    recipe = new_recipe(options.backbone, weights, options.image_size)
    network = PhotoNetwork(open_backbone(recipe, weights), options.image_size)
    listed = sorted({image for image, _ in dataset.index.split(0, "test").entries})
    chosen = listed[:: max(1, len(listed) // options.photos)][: options.photos]
    photos = [network([dataset.image(image)]) for image in chosen]
    found = []
    for rounded in rounding.measure(photos):
        found.append(rounded)
        print(rounding.line(rounded), flush=True)
    setting = {"backbone": options.backbone, "image_size": options.image_size, "photos": len(photos)}
    options.out.write_text(json.dumps({"setting": setting, "ways": rounding.facts(found)}, indent=1) + "\n")


def row(bits: float, point: dict[str, Any]) -> str:
    """A line of the table in docs/compression.md."""
    layers = point["layers"]
    mean, p99, largest = (
        sum(layer["mean"] for layer in layers) / len(layers),
        max(layer["p99"] for layer in layers),
        max(layer["largest"] for layer in layers),
    )
    cells = [f"{bits:g}", f"{point['bytes_per_image'] / 1e3:,.0f} KB", f"{mean:.5f}", f"{p99:.4f}", f"{largest:.3f}"]
    if point["score"]:
        score = point["score"]
        cells.append(f"{score['miou']['value']:.2f}")
        difference = score["difference"]
        cells.append(f"{difference['value']:+.2f} [{difference['low']:+.2f}, {difference['high']:+.2f}]")
    cells += [f"{point['encode_per_s']:.0f}", f"{point['decode_per_s']:.0f}"]
    return f"| {' | '.join(cells)} |"


def draw(source: Path, target: Path) -> None:
    """Two panels over the bits per value: mean error of correlations, and difference of mIoU with its interval."""
    results = json.loads(source.read_text())
    points = sorted((float(bits), point) for bits, point in results["points"].items())
    width, height, left, top = 360, 260, 60, 40
    first, last = math.log2(points[0][0]), math.log2(points[-1][0])

    def x(bits: float) -> float:
        return left + width * (math.log2(bits) - first) / (last - first)

    means = [sum(layer["mean"] for layer in p["layers"]) / len(p["layers"]) for _, p in points]
    low, high = math.floor(math.log10(min(means))), math.ceil(math.log10(max(means)))

    def y(error: float) -> float:
        return top + height * (high - math.log10(error)) / (high - low)

    marks = [
        f'<text x="{left}" y="20" class="h">mean error of correlations</text>',
        *(text(left - 6, y(10.0**e) + 4, f"1e{e}", "end") + line(left, y(10.0**e)) for e in range(low, high + 1)),
        *(text(x(bits), top + height + 18, f"{bits:g}") for bits, _ in points),
        curve([(x(bits), y(mean)) for (bits, _), mean in zip(points, means, strict=True)]),
    ]
    panels = [f"<g>{''.join(marks)}</g>"]
    if points[0][1]["score"]:
        changes = [p["score"]["difference"] for _, p in points]
        reach = max(0.5, math.ceil(2 * max(abs(c[end]) for c in changes for end in ("low", "high"))) / 2)

        def z(change: float) -> float:
            return top + height * (reach - change) / (2 * reach)

        ticks = [-reach, -reach / 2, 0, reach / 2, reach]
        marks = [
            f'<text x="{left}" y="20" class="h">mIoU minus that of exact features, points</text>',
            *(text(left - 6, z(tick) + 4, f"{tick:+.2f}", "end") + line(left, z(tick)) for tick in ticks),
            *(text(x(bits), top + height + 18, f"{bits:g}") for bits, _ in points),
            *(
                f'<path d="M{x(bits):.1f} {z(c["low"]):.1f}V{z(c["high"]):.1f}" class="c"/>'
                for (bits, _), c in zip(points, changes, strict=True)
            ),
            curve([(x(bits), z(c["value"])) for (bits, _), c in zip(points, changes, strict=True)]),
        ]
        panels.append(f'<g transform="translate({width + 100} 0)">{"".join(marks)}</g>')
    setting = results["setting"]
    note = f"bits per feature value; {setting['backbone']} at {setting['image_size']} px, {setting['images']} photos"
    full = (width + 100) * len(panels)
    target.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {full} 350" font-family="sans-serif" font-size="12">'
        "<style>.h{font-size:14px}.c{fill:none;stroke:#1668a8;stroke-width:2}.g{stroke:#ddd}.d{fill:#1668a8}</style>"
        f'<rect width="100%" height="100%" fill="white"/>{"".join(panels)}{text(left, 338, note, "start")}</svg>\n'
    )


def text(x: float, y: float, content: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{content}</text>'


def line(left: float, y: float, width: float = 360) -> str:
    return f'<path d="M{left} {y:.1f}h{width}" class="g"/>'


def curve(points: list[tuple[float, float]]) -> str:
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" class="d"/>' for x, y in points)
    return f'<path d="{path}" class="c"/>{dots}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("measure")
    third = commands.add_parser("correlate")
    fourth = commands.add_parser("round")
    for parts in (first, third, fourth):
        parts.add_argument("dataset")
        parts.add_argument("--data-root", type=Path)
        parts.add_argument("--splits", type=Path)
        parts.add_argument("--out", type=Path, required=True)
        parts.add_argument("--backbone", required=True)
        parts.add_argument("--weights")
        parts.add_argument("--image-size", type=int, required=True)
    first.add_argument("--checkpoint", type=Path)
    first.add_argument("--folder", type=Path, required=True)
    third.add_argument("--bytes", type=lambda text: [int(n) for n in text.split(",")], required=True)
    third.add_argument("--photos", type=int, default=48)
    third.add_argument("--pairs", type=int, default=6)
    fourth.add_argument("--photos", type=int, default=8)
    first.add_argument("--bits", type=lambda text: [float(bits) for bits in text.split(",")], required=True)
    first.add_argument("--pairs", type=int, default=32)
    first.add_argument("--episodes", type=int, default=1000)
    second = commands.add_parser("draw")
    second.add_argument("source", type=Path)
    second.add_argument("target", type=Path)
    options = parser.parse_args()
    if options.command == "draw":
        draw(options.source, options.target)
    elif options.command == "correlate":
        correlate(options)
    elif options.command == "round":
        round_floats(options)
    else:
        measure(options)


if __name__ == "__main__":
    main()
