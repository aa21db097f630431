"""Runs a model over a split, writes the archive, and looks at what was written before it gets its name."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from seglight.data.findings import DataError, Fault, paragraphs
from seglight.submit.archive import Reader, Writer, new_archive
from seglight.submit.benchmark import Submission, Verdict

WAITING = 16
"""Images whose files may wait to be packed while the network works on."""


def make(submission: Submission, model: Any, data: Any, out: str | Path) -> Verdict:
    """Write an archive. If it is not what the server wants, or anything fails on the way, there is none.

    Args:
        submission: see `seglight.submit.BENCHMARKS`.
        model: a trained model in evaluation mode, of the same classes as `data`.
        data: the datamodule whose "test" split is submitted.
        out: the file to make.

    Raises:
        FileExistsError: it is there already.
        ValueError: the model or the name of the file does not fit.
        DataError: an image cannot be read, or the archive is not what the server wants.
    """
    out = Path(out)
    submission.name = out.name
    if not out.name.endswith(submission.suffixes):
        raise ValueError(f"--out {out} must end in {' or '.join(submission.suffixes)}, which is what the server takes.")
    if rule := submission.rule_of_name():
        raise ValueError(rule)
    _refuse_other_classes(model, data)
    submission.prepare(data)
    with new_archive(out, tgz=submission.suffixes != (".zip",)) as (writer, part):
        _predict(submission, model, data, writer)
        for name, content in submission.closing(data):
            writer.add(name, content)
        writer.close()
        verdict = check(submission, part, data)
        if verdict.faults:
            raise DataError("\n".join([f"{out} was not made: it would be refused.", *findings(verdict)]))
    return verdict


def check(submission: Submission, archive: str | Path, data: Any) -> Verdict:
    """Compare an archive with the "test" split of a datamodule, file by file.

    Raises:
        FileNotFoundError: no such archive.
        DataError: no whole archive.
    """
    submission.prepare(data)
    submission.name = submission.name or Path(archive).name
    with Reader(archive, submission.name) as reader:
        verdict = submission.look(reader, data)
    rule = submission.rule_of_name()
    if rule is None and not submission.name.endswith(submission.suffixes):
        rule = f"the server takes archives that end in {' or '.join(submission.suffixes)}."
    if rule is not None:
        verdict = verdict._replace(faults=[Fault(0, rule, submission.name), *verdict.faults], score=None)
    return verdict


def findings(verdict: Verdict) -> list[str]:
    """One paragraph per rule that is broken, worst first."""
    return paragraphs(verdict.faults, "case")


def _refuse_other_classes(model: Any, data: Any) -> None:
    if list(model.classes) != list(data.classes):
        raise ValueError(
            f"The model was trained on {len(model.classes)} classes ({', '.join(model.classes[:3])}, ...), but "
            f"{type(data).__name__} has {len(data.classes)} ({', '.join(data.classes[:3])}, ...). Labels would mean "
            "something else on the server."
        )


def _predict(submission: Submission, model: Any, data: Any, writer: Writer) -> None:
    from tqdm import tqdm

    places = {name: index for index, name in enumerate(data.split("test").ids)}
    loader = data.test_dataloader()
    waiting: deque[Future] = deque()

    def pack() -> None:
        for name, content in waiting.popleft().result():
            writer.add(name, content)

    with ThreadPoolExecutor(4) as pool, tqdm(total=len(places), unit="image", disable=None) as bar:
        for number, batch in enumerate(loader):
            batch = {**batch, "image": [image.to(model.device) for image in batch["image"]]}
            with torch.inference_mode():
                found = model.predict_step(batch, number)
            for i, name in enumerate(batch["image_id"]):
                prediction = _on_host(found, i)
                waiting.append(pool.submit(submission.entries, data, name, places[name], prediction))
                bar.update()
            while len(waiting) > WAITING:
                pack()
        while waiting:
            pack()


def _on_host(found: Any, i: int) -> Any:
    """The prediction of one image of a batch as arrays."""
    if isinstance(found, list):
        return found[i].to("cpu", torch.uint8).numpy()
    detections = found["detections"][i]
    arrays = {key: detections[key].float().cpu().numpy() for key in ("labels", "scores")}
    return {"labels": arrays["labels"].astype(int), "scores": arrays["scores"], "rles": found["rles"][i]}
