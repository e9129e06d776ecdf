"""Adversarial images as PNG files with a manifest, and their score as files hold them: 8 bits."""

import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from defquant.attacks import Attack, Composition, Single
from defquant.attacks.contract import Target, attacked, eight_bit
from defquant.checkpoint import Facts
from defquant.data import Dataset
from defquant.data.pictures import encode
from defquant.errors import UserError
from defquant.evaluate import Watch, answers, device_of
from defquant.files import owned_folder, write_bytes
from defquant.manifest import KIND, MANIFEST, Saved, fingerprint_of
from defquant.measure import Subject, measure
from defquant.results import EIGHT_BIT, Measurement, append

__all__ = ["Saver", "measure_and_save", "saver"]


def measure_and_save(
    folder: Path | None,
    run: Path,
    model: nn.Module,
    facts: Facts | Subject,
    images: Dataset,
    attacks: Sequence[Single | Composition],
    *,
    black_box: Sequence[Attack] = (),
    seed: int = 0,
    batch_size: int = 256,
    watch: Watch | None = None,
) -> Iterator[Measurement]:
    """`measure`; then the images of `attacks` in `folder`, if there is one, and their 8-bit scores.

    The images are made anew, with the same draws, because the score stops at an example's fall.
    """
    how: Any = {"black_box": black_box, "seed": seed, "batch_size": batch_size, "watch": watch}
    if folder is None:
        yield from measure(run, model, facts, images, attacks, **how)
        return
    with saver(folder, model, images, seed=seed) as keep:
        scores = []
        for measurement in measure(run, model, facts, images, attacks, **how):
            scores.append(measurement)
            yield measurement
        for measurement in keep.write(scores, attacks, batch_size):
            append(run / "results.jsonl", measurement)
            yield measurement
        keep.close(scores[0])


@contextmanager
def saver(folder: Path, model: nn.Module, images: Dataset, *, seed: int) -> Iterator["Saver"]:
    """Pictures into the empty `folder`; the manifest is written last, so that it is never half.

    Raises `UserError` where `folder` holds anything, or the images have not 1 or 3 channels.
    """
    with owned_folder(folder):
        found = sorted(path.name for path in folder.iterdir() if path.name != ".lock")
        if found:
            raise UserError(
                f"saved images need an empty folder; found {found[0]!r} in {folder}: remove it, or "
                "choose another"
            )
        yield Saver(folder, model, images, seed)


class Saver:
    """Makes the images of attacks, writes and scores them as 8 bits. See `saver`."""

    def __init__(self, folder: Path, model: nn.Module, images: Dataset, seed: int) -> None:
        device = device_of(model, images.images.device)
        self.folder, self.model, self.seed = folder, model, seed
        self.images = images.to(device)
        self.lines: list[Saved] = []
        self.scores: list[dict[str, Any]] = []

    def write(
        self,
        scores: Sequence[Measurement],
        attacks: Sequence[Single | Composition],
        batch_size: int,
    ) -> Iterator[Measurement]:
        """Save what `attacks` make, and what the network scores on it.

        Images that the network has wrong are saved as they are. Where a radius of a family leaves
        an image right that a smaller one did not, the smaller one's is saved.

        Args:
            scores: the clean measurement and those of the attacks, in floats.
            attacks: the same attacks.
            batch_size: images at a time.
        """
        clean = answers(self.model, self.images, batch_size=batch_size)
        floats = {(m.settings, m.eps): m for m in scores}
        self._put("00-clean", floats["clean", 0.0], self.images.images, clean, clean)
        before: dict[str, tuple[Tensor, Tensor]] = {}
        names = [attack.name for attack in attacks]
        order = sorted(attacks, key=lambda a: (names.index(a.name), a.eps))
        for place, attack in enumerate(order, 1):
            start = time.perf_counter()
            made, found = self._attacked(attack, clean, batch_size, before.get(attack.name))
            before[attack.name] = made, found
            name = re.sub(r"[^a-z0-9]+", "-", attack.name.lower()).strip("-")[:40]
            of = floats[repr(attack), attack.eps]
            correct = self._put(f"{place:02}-{name}-{attack.eps * 255:.4g}", of, made, clean, found)
            yield replace(
                of, attack=of.attack + EIGHT_BIT, correct=correct, total=len(found),
                settings=f"{of.settings} as 8-bit images",
                seconds=round(time.perf_counter() - start, 3),
            )  # fmt: skip

    def close(self, about: Measurement) -> Path:
        """Write the manifest, whole: one line on all, then one for each picture."""
        head = {
            "kind": KIND, "format": 1, "pictures": len(self.lines), "shape": self.images.shape,
            "run": about.run, "method": about.method, "model": about.model, "bits": about.bits,
            "beta": about.beta, "seed": about.seed, "data": self.images.name,
            "fingerprint": self.images.fingerprint, "classes": self.images.classes,
            "attack_seed": self.seed, "scores": self.scores, "evidence": about.evidence,
        }  # fmt: skip
        lines = [head, *map(asdict, self.lines)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        return write_bytes(self.folder / MANIFEST, text.encode())

    def _attacked(
        self,
        attack: Single | Composition,
        clean: Tensor,
        batch_size: int,
        before: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """uint8 pictures (n, c, h, w) and the network's answers to them, (n,)."""
        made, labels = self.images.images.clone(), self.images.labels
        target = Target(self.model, self.images.images, labels, self.seed, batch_size)
        make = partial(eight_bit, attack, self.model, seed=self.seed)
        for ids, found in attacked(make, target, (clean == labels).nonzero().squeeze(1)):
            made[ids] = found.mul(255).round().to(torch.uint8)
        given = answers(self.model, (made, labels), batch_size=batch_size)
        if before is not None:
            fell = (given == labels) & (before[1] != labels)
            made[fell], given[fell] = before[0][fell], before[1][fell]
        return made, given

    def _put(self, folder: str, of: Measurement, made: Tensor, clean: Tensor, found: Tensor) -> int:
        """Pictures and lines, beside the score `of` them in floats. Returns how many are right."""
        pixels, here, labels = made.cpu().numpy(), self.folder / folder, self.images.labels
        far = (made.int() - self.images.images.int()).abs().amax((1, 2, 3))
        columns = (column.tolist() for column in (labels, clean, found, far))
        about: dict[str, Any] = {"attack": of.attack, "eps": of.eps, "settings": of.settings}
        try:
            here.mkdir()
            for i, (label, was, now, distance) in enumerate(zip(*columns, strict=True)):
                name, digest = f"{i:06}.png", fingerprint_of(pixels[i])
                (here / name).write_bytes(encode(pixels[i]))
                after = {"clean": was, "adversarial": now, "distance": distance, "sha256": digest}
                self.lines.append(Saved(f"{folder}/{name}", i, label, **about, **after))
        except OSError as error:
            raise UserError(f"cannot write into {here}: {error.strerror or error}") from None
        right = int((found == labels).sum())
        eight_bit = {} if of.attack == "clean" else {"eight_bit": right}
        self.scores.append(about | {"correct": of.correct, "total": of.total} | eight_bit)
        return right
