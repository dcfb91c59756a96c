"""What a benchmark leaves behind: tables, JSON, grids and one page. Drawn from `records` and from pictures on disk."""

from __future__ import annotations

from fewstep.report.grids import save_grids
from fewstep.report.layout import (
    CELLS,
    RECORD_FILE,
    RESULT_FILES,
    arm_folder,
    free_prompts,
    holds_benchmark,
    picture_path,
    refuse_another_run,
    save_picture,
)
from fewstep.report.merge import side_by_side
from fewstep.report.page import page
from fewstep.report.tables import markdown, results_csv, timing_csv
from fewstep.report.verdict import verdict

__all__ = [
    "CELLS",
    "RECORD_FILE",
    "RESULT_FILES",
    "arm_folder",
    "free_prompts",
    "holds_benchmark",
    "markdown",
    "page",
    "picture_path",
    "refuse_another_run",
    "results_csv",
    "save_grids",
    "save_picture",
    "side_by_side",
    "timing_csv",
    "verdict",
]
