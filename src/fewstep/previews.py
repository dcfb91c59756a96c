"""Previews: the same few prompts and noises at every promised step count beside the teacher, as training goes on."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fewstep.arms import Arm, teacher_arm
from fewstep.backbone import Backbone
from fewstep.files import write_bytes_atomic
from fewstep.methods.kstep import KStep
from fewstep.pictures import PictureBatch, encode_prompts, make_pictures, picture_ids

LABEL_HEIGHT = 16
"""Pixels for the names above the columns, and for the prompt below each row."""


class Previews:
    """One row a prompt: the student at each promised step count and the teacher, all from the same noise.

    Args:
        prompts: one a row.
        resolution: side of a picture in pixels.
        seed: of the noise; the same at every save, so that grids of different updates can be laid side by side.
        batch_size: pictures drawn at once; what a training has memory for.
    """

    def __init__(
        self,
        backbone: Backbone,
        method: KStep,
        prompts: Sequence[str],
        *,
        resolution: int,
        seed: int,
        batch_size: int = 8,
    ) -> None:
        timesteps = method.schedule.num_train_timesteps
        self._backbone, self._resolution, self._seed, self._batch_size = backbone, resolution, seed, batch_size
        self._conditioning = encode_prompts(backbone, prompts)
        self._students = [method.arm(steps) for steps in method.step_counts]
        self._teacher = teacher_arm(backbone.teacher_steps, method.guidance, timesteps)
        self._teachers: dict[int, Tensor] = {}  # picture of each prompt: they never change

    def take_up(self, batch: PictureBatch) -> None:
        """Keep the teacher's pictures of these prompts, drawn elsewhere with the same seed, guidance and resolution."""
        prompts = self._conditioning.prompts
        for (number, picture), prompt, pixels in zip(batch.ids, batch.prompts, batch.pixels, strict=True):
            if picture == 0 and number < len(prompts) and prompts[number] == prompt:
                self._teachers[number] = pixels

    def save(self, file: Path) -> Path:
        """Draw with the adapter as it is now, and write the grid as PNG."""
        prompts = range(len(self._conditioning.prompts))
        if len(self._teachers) < len(prompts):
            self._teachers = dict(enumerate(self._draw(self._teacher)))
        columns = {arm.title: self._draw(arm) for arm in self._students}
        columns[self._teacher.title] = torch.stack([self._teachers[number] for number in prompts])
        content = io.BytesIO()
        labelled_grid(columns, self._conditioning.prompts).save(content, "PNG")
        return write_bytes_atomic(file, content.getvalue())

    def _draw(self, arm: Arm) -> Tensor:
        """Pictures of an arm, uint8 [prompts, 3, H, W]."""
        ids = picture_ids(len(self._conditioning.prompts), 1)
        return make_pictures(
            self._backbone,
            arm,
            self._conditioning,
            ids,
            seed=self._seed,
            batch_size=self._batch_size,
            resolution=self._resolution,
        ).pixels


def labelled_grid(columns: Mapping[str, Tensor], prompts: Sequence[str]) -> Image.Image:
    """Named columns of pictures, uint8 [B, 3, H, W] each, side by side; one row a prompt, with the prompt below it."""
    rows = torch.cat(list(columns.values()), dim=3).permute(0, 2, 3, 1)  # [B, H, columns * W, 3]
    count, height, width, _ = rows.shape
    page = Image.new("RGB", (width, LABEL_HEIGHT + count * (height + LABEL_HEIGHT)), "white")
    ink, font = ImageDraw.Draw(page), ImageFont.load_default(size=11)
    for number, name in enumerate(columns):
        ink.text((number * width // len(columns) + 2, 1), name, fill="black", font=font)
    for number, prompt in enumerate(prompts):
        top = LABEL_HEIGHT + number * (height + LABEL_HEIGHT)
        page.paste(Image.fromarray(rows[number].contiguous().numpy()), (0, top))
        ink.text((2, top + height + 1), prompt, fill="black", font=font)
    return page
