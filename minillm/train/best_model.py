"""best/: the model of a stage that its evaluations have found best so far. Which one that was is in Progress.best."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from minillm.config.loader.run_plan import Stage
from minillm.distributed import collectives
from minillm.reporting.metric import find_metric
from minillm.storage.manifest import published_damage
from minillm.train.progress import Progress

FOLDER = "best"
# Keys of `eval` that do not change the value a model is chosen by.
FREE = ("steps", "samples", "batch_size")


class BestModel:
    """Keeps one stage's best model, where save.best says so.

    Args:
        note: hears why there is none.
        save: puts the student of the moment in the place of a folder.
    """

    def __init__(self, stage: Stage, output_dir: Path, note: Callable[[str], None], save: Callable[[Path], None]):
        self.stage, self.output_dir, self.note, self._save = stage, output_dir, note, save
        self._said_why_not = False

    def keep(self, mean: Mapping[str, float], progress: Progress) -> None:
        """Save the student if `mean`, the metrics of its evaluation, are the best yet by eval.metric."""
        metric = self.stage.config.eval.metric
        if not self.stage.config.save.best:
            return
        if metric not in mean:
            if not self._said_why_not:
                self.note(f"no best/ is kept: these eval.sets have nothing to measure eval.metric={metric} on")
            self._said_why_not = True
            return
        value, best = mean[metric], progress.best
        if not math.isfinite(value):
            return
        if best is None or find_metric(metric).better * (value - best["value"]) > 0:
            progress.best = {"metric": metric, "value": value, "step": progress.step, "stage": self.stage.name}
            self._save(self.output_dir / FOLDER)

    def forget_damaged(self, progress: Progress) -> None:
        """Compare with no value whose model has been lost since."""
        if progress.best is None:
            return
        folder = self.output_dir / FOLDER
        damage = collectives.on_rank_0(lambda: published_damage(folder) if folder.is_dir() else "it is missing")
        if damage is not None:
            self.note(f"best/ is not whole ({damage}): it is replaced at the next evaluation, whatever that finds")
            progress.best = None

    def forget_another_measure(self, before: Mapping[str, Any], progress: Progress) -> None:
        """Compare with no value that the stage's configuration of `before` has measured in another way."""
        now = self.stage.config.model_dump(mode="json")
        ours, theirs = (
            {key: one for key, one in config["eval"].items() if key not in FREE} for config in (now, before)
        )
        if progress.best is not None and ours != theirs:
            self.note("eval has changed: best/ is replaced at the next evaluation, whatever that finds")
            progress.best = None
