"""The caches of a plan written, and nothing else of it: the work of `minillm cache`."""

import json
from datetime import datetime
from pathlib import Path

import transformers
import yaml

from minillm.config.loader.run_plan import RunPlan, Stage
from minillm.distributed import collectives, group
from minillm.storage.atomic import clean, write_text
from minillm.storage.environment import describe_environment
from minillm.storage.folder_lock import hold_folder
from minillm.train.model_cache import ModelCache
from minillm.train.run import interruption
from minillm.train.stage import StageBuilder


def write_caches(plan: RunPlan, *, console) -> list[Path]:
    """Write the cache of every stage that leaves one; returns their folders. What is there is kept, and grows.

    Models of earlier stages must be there. Raises UserError as StageBuilder.prepare does, KeyboardInterrupt on Ctrl-C or
    SIGTERM, after which the same call goes on.
    """
    stages = [stage for stage in plan.stages if stage.config.method.needs().result == "rows"]
    if all(stage.config.engine.type == "torch" for stage in stages):
        with hold_folder(plan.output_dir, note=console.note):
            return _write(plan, stages, console)
    group.join(plan.output_dir)
    if collectives.rank():
        folders = _write(plan, stages, console)
    else:
        with hold_folder(plan.output_dir, note=console.note):
            folders = _write(plan, stages, console)
    group.leave()
    return folders


def _write(plan: RunPlan, stages: list[Stage], console) -> list[Path]:
    output_dir = plan.output_dir
    started = datetime.now().astimezone()

    def prepare() -> str:
        for folder in (output_dir, output_dir / "stages"):
            clean(folder)
        if not (output_dir / "config.yaml").exists():  # else it is the run's that the cache is a stage of
            # env.json first: where config.yaml is, it is there too, whenever this is killed
            environment = {**describe_environment(), "started": started.isoformat(timespec="seconds")}
            write_text(output_dir / "env.json", json.dumps(environment, indent=1))
            document = yaml.safe_dump(plan.document, sort_keys=False, allow_unicode=True)
            write_text(output_dir / "config.yaml", document)
        return json.loads((output_dir / "env.json").read_text()).get("started", started.isoformat())

    began = datetime.fromisoformat(collectives.on_rank_0(prepare))
    transformers.utils.logging.disable_progress_bar()
    cache = ModelCache()
    builder = StageBuilder(console, output_dir, cache, started=began)
    with interruption(console.note, "stopping; the same command goes on") as interrupted:
        for stage in stages:
            builder.prepare(stage, interrupted)
    cache.close()
    return [output_dir / "stages" / stage.name for stage in stages]
