"""Draw support, query, truth and prediction of one class of an FSS-1000 tree as one sheet.

    python -m benchmarks.results_picture RUN FSS-1000/shorts,FSS-1000/boots OUT.png

The first photo of each class is the support, the next three are queries. Uses `pipeline.predict` as a user would.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.bank.heads import Trained
from pipeline.common import render
from pipeline.datasets.images import read_binary_mask, read_photo
from pipeline.datasets.own_support import read_support
from pipeline.heads.checkpoint import load_checkpoint
from pipeline.predict.model import PhotoModel


def main(run: str, classes: str, out: str) -> None:
    support, queries = 1, 3
    checkpoint = load_checkpoint(Path(run))
    size = checkpoint.recipe.image_size
    trained = Trained.of(checkpoint.learner(), size)
    rows = []
    for folder in map(Path, classes.split(",")):
        example = read_support(folder / f"{support}.jpg", folder / f"{support}.png")
        pairs = {folder.name: [(example.photo, example.mask)]}
        model = PhotoModel.of_photos(
            pairs, head="hsnet", backbone=checkpoint.recipe.backbone, image_size=size, trained=trained
        )
        for number in range(support + 1, support + 1 + queries):
            photo, truth = read_photo(folder / f"{number}.jpg"), read_binary_mask(folder / f"{number}.png")
            said = model(photo)[folder.name].mask
            iou = 100 * np.sum(said & truth) / max(1, np.sum(said | truth))
            captions = (f"support: {folder.name}", "query", "truth", f"prediction, IoU {iou:.0f} %")
            rows.append(render.strip((example.photo, example.mask), photo, said, truth, captions=captions, cell=160))
    sheet = render.sheet(rows, cell=160, title="Classes never trained on, one support each")
    sheet.convert("P", palette=Image.Palette.ADAPTIVE, colors=256).save(out, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:4])
