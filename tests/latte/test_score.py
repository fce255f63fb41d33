"""What a score counts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from latte.score import score_prompts

ATTRIBUTES = ("colour", "size", "clean")


def test_an_image_with_specks_has_all_attributes_and_is_not_right() -> None:
    verdicts = {
        "right": {"colour": True, "size": True, "clean": True},
        "with a speck": {"colour": True, "size": True, "clean": False},
        "of another colour": {"colour": False, "size": True, "clean": True},
        "of no stated size": {"colour": True, "clean": False},
    }

    def judge(scenes: Sequence[str], images: np.ndarray) -> list[dict[str, bool]]:
        return [verdicts[scene] | {"all": all(verdicts[scene].values())} for scene in scenes]

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        return np.zeros((len(prompts), 64, 64, 3), np.uint8)

    score = score_prompts(draw, [(name, name) for name in verdicts], judge, ATTRIBUTES)
    assert score.share() == 1 / 4
    assert score.share("attributes") == 3 / 4
    assert (score.right["size"], score.stated["size"]) == (3, 3)
    assert [image.wrong for image in score.failures] == [("clean",), ("colour",), ("clean",)]
