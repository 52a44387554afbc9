"""One call behind jobs/evaluate.py: judge a finished defence on the test split of the data given."""

from __future__ import annotations

import dataclasses

from dircluster import cli
from dircluster.config import ConfigError, refuse_secret


def main(argv: list[str]) -> int:
    """Print the table of the defence that ``argv`` names; -> exit code. Errors are one line on stderr."""
    return cli.execute(cli.EvaluateJob, argv, _judge)


def _judge(job: cli.EvaluateJob) -> int:
    import dircluster
    from dircluster.cluster.console import Terminal
    from dircluster.cluster.storage import check_bucket, is_remote, open_path, opener
    from dircluster.data.sources import load
    from dircluster.evaluation.benchmark import evaluate, to_plain
    from dircluster.models.classifiers import check_classes
    from dircluster.training.bundle import load_defense_folder
    from dircluster.training.parallel import local_workers
    from dircluster.training.pipeline import data_cache
    from dircluster.training.ports import Interrupted, interruptible

    if not job.defense:
        raise ConfigError("--defense is missing: give the folder of a checkpoint, or models:/NAME@champion")
    refuse_secret("--defense", job.defense)
    store = None
    if job.defense.startswith("models:/"):
        from dircluster.cluster.mlflow_tracker import default_uri

        store = default_uri(job.run)
    with Terminal() as terminal, local_workers(job.run.scaling) as parallel:
        if is_remote(job.defense):
            check_bucket(job.defense, job.run.storage)
            folder = open_path(job.defense, job.run.storage)
            defense = load_defense_folder(folder, trust_code=job.trust_code)
        else:
            defense = dircluster.load_defense(job.defense, tracking_uri=store, trust_code=job.trust_code)
        found = (defense.denoiser.channels, defense.denoiser.height, defense.denoiser.width)
        data = job.run.data
        if found != (data.channels, data.height, data.width):
            raise ConfigError(
                f"--defense takes {'x'.join(map(str, found))} images, but preset {job.preset} has"
                f" {data.channels}x{data.height}x{data.width}; name the preset it was trained with"
            )
        check_classes(defense.classifier, data)
        defense.to(parallel.device)
        config = dataclasses.replace(job.run, model=defense.denoiser.config, masking=defense.masking)
        test = load(data, config.seed, data_cache(config), opener(config.storage)).test
        try:
            with interruptible(defense.classifier, terminal):
                rows = to_plain(evaluate(defense.denoiser, defense.classifier, test, config, parallel, terminal.say))
        except Interrupted as stop:
            return 128 + stop.signal
        terminal.table(rows)
    cli.write_summary(job, {"defense": job.defense, "seed": config.seed, "results": rows})
    return 0
