"""What `hsnet evaluate --ways` and `hsnet analyze` print of N-way episodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from commands.terminal import table
from pipeline.common.text import printable
from pipeline.scores.tables import interval_text, policy_name

if TYPE_CHECKING:
    from pipeline.scores.way_scores import WayDifference, WayScore

FIGURES = {
    "miou": "mIoU",
    "fb_iou": "FB-IoU",
    "confused": "given to another class, of object pixels",
    "stray_pixels": "some shown: given to absent classes, of pixels",
    "stray_episodes": "some shown: of episodes",
    "alarm_pixels": "none shown: false alarms, of pixels",
    "alarm_episodes": "none shown: of episodes",
}
EXPLAINED = (
    "Percent; in brackets 95 % intervals, episodes drawn again within each class. An episode counts where at least 1 % "
    "of its query is wrongly given to a class."
)


def ways_text(scores: Sequence[WayScore | WayDifference]) -> str:
    """One table: a column per number of shots, fusion, policy and fold."""
    many = {(_fusion(one), one.policy, one.fold) for one in scores}
    head = [""]
    for one in scores:
        fold = "folds' mean" if one.fold is None else f"fold {one.fold}"
        more = f" {_fusion(one)}, {policy_name(one.policy)}, {fold}" if len(many) > 1 or " - " in _fusion(one) else ""
        head.append(f"{one.shots}-shot{more}")
    rows = []
    for name, title in FIGURES.items():
        values = [interval_text(getattr(one.figures, name), hasattr(one, "p")) for one in scores]
        if any(value != "-" for value in values):
            rows.append([title, *values])
    if any(hasattr(one, "p") for one in scores):
        rows.append(["p of the difference in mIoU", *(f"{getattr(one, 'p', 1):.4f}" for one in scores)])
    rows.append(["episodes", *(f"{one.episodes:,}" for one in scores)])
    for name, title in (("partial", "  showing some of the classes"), ("empty", "  showing none")):
        if any(getattr(one, name, 0) for one in scores):
            rows.append([title, *(f"{getattr(one, name):,}" for one in scores)])
    names = dict.fromkeys(part.name for one in scores for part in one.classes)
    for name in names:
        found = [{part.name: part.value for part in one.classes}.get(name) for one in scores]
        rows.append([f"  {printable(name)}", *(interval_text(one, hasattr(scores[0], "p")) for one in found)])
    return table(rows, head)


def _fusion(one: WayScore | WayDifference) -> str:
    """The way to combine supports; both, where a difference is of two."""
    return " - ".join(dict.fromkeys([one.fusion, getattr(one, "fusion_against", one.fusion)]))


def background_text(background: Mapping[str, Any]) -> str:
    """The background's score and where it comes from, as one line."""
    score, fit = background["score"], background["fit"]
    if not fit:
        return f"{score:g}, given" if score else "0: a class is found where its one-way answer is object"
    return (
        f"{score:.4g}, fitted on {fit['episodes']} one-shot episodes of training classes (mIoU {fit['miou']:.1f} there)"
    )
