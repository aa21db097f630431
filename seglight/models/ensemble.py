"""`MaskEnsemble`: trained instance models that answer together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from seglight import ensemble
from seglight.checkpoints import load
from seglight.models.instance import InstanceModel

if TYPE_CHECKING:
    from seglight.types import Detections


class MaskEnsemble(InstanceModel):
    """Instance models of any architectures whose detections are merged by `seglight.ensemble`.

    PANet's entry of 2017 was one of seven networks, each with several scales and mirrored (46.7 AP on COCO's
    test-dev). Every member keeps its own preprocessing, its own size of images and its own test-time options; their
    networks take turns, so that only the weights add up in memory. There is nothing to train.

        MaskEnsemble(["a.ckpt", "b.ckpt"]).predict("street.jpg")

    Args:
        checkpoints: files of trained instance models with the same classes.
        num_classes: K, by default that of the members.
        classes: K names, by default those of the members; others are refused.
        palette: K RGB colours.
        test_options: test-time: options that replace those of all members, such as `{"test_flip": true}`.
        test_threshold: test-time: probability from which on a pixel belongs to an object.
        test_nms: test-time: overlap above which one box suppresses another of its class.
        test_vote: test-time: overlap from which on boxes and masks vote.
        test_score: test-time: "max", or "mean" over the members, in which those that miss an object count as 0.

    Raises:
        ValueError: no checkpoint, one that is of no instance model, or of other classes than the rest.
    """

    free = InstanceModel.free | {"checkpoints", "num_classes"}

    def __init__(
        self,
        checkpoints: list[str],
        num_classes: int | None = None,
        classes: list[str] | None = None,
        palette: list[tuple[int, int, int]] | None = None,
        test_options: dict[str, Any] | None = None,
        test_threshold: float = 0.5,
        test_nms: float = 0.5,
        test_vote: float = 0.5,
        test_score: ensemble.Score = "max",
    ):
        ensemble.check(test_nms, test_vote, test_score)
        if not checkpoints:
            raise ValueError("An ensemble needs the files of its members; name at least one in model.checkpoints.")
        wrong = [name for name in test_options or {} if not name.startswith("test_")]
        if wrong:
            raise ValueError(f"test_options names {', '.join(wrong)}; only options called test_* can be replaced.")
        members = [load(path, **(test_options or {})) for path in checkpoints]
        first = members[0]
        for path, member in zip(checkpoints, members, strict=True):
            if not isinstance(member, InstanceModel):
                raise ValueError(f"{path} holds a {type(member).__name__}, which is no instance model. Leave it out.")
            if member.agnostic != first.agnostic:
                raise ValueError(
                    f"{path} holds a {type(member).__name__}, {checkpoints[0]} a {type(first).__name__}: of these, one "
                    f"knows classes and the other does not. Merge models of one kind."
                )
        names, source = (list(classes), "the data") if classes else (first.classes, checkpoints[0])
        for path, member in zip(checkpoints, members, strict=True):
            if not member.agnostic and member.classes != names:
                raise ValueError(
                    f"{path} knows the {len(member.classes)} classes {_short(member.classes)}, but {source} has the "
                    f"{len(names)} classes {_short(names)}. The members must share them, in the same order."
                )
        self.agnostic, self.limits = first.agnostic, first.limits
        self.monitor, self.show = first.monitor, first.show
        super().__init__(
            network=nn.ModuleList(members),
            num_classes=num_classes or len(names),
            classes=names,
            palette=palette or first.palette,
            test_threshold=test_threshold,
        )
        self.merging = {"nms": test_nms, "vote": test_vote, "score": test_score}

    def train(self, mode: bool = True) -> MaskEnsemble:
        """Members always stay in evaluation mode."""
        super().train(False)
        return self

    def setup(self, stage: str) -> None:
        """Refuse to be trained, before anything is read.

        Raises:
            ValueError: the stage is "fit".
        """
        if stage == "fit":
            raise ValueError("An ensemble has nothing to train: train its members by themselves, then test them here.")
        super().setup(stage)

    def detect(self, images: list[Tensor]) -> list[Detections]:
        """Merged detections; see `InstanceModel.detect`."""
        views = zip(*(member.detect(images) for member in self.network), strict=True)
        return [ensemble.merge(list(of_image), limit=self.limits[-1], **self.merging) for of_image in views]


def _short(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
