"""``cllava-fast eval RUN``: accuracy of what was learned, on the run's own stream or another."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLE = """examples:
  cllava-fast eval runs/mine --output runs/mine-test         # predictions and a report, too
  cllava-fast eval runs/mine --split validation --after charts
  cllava-fast eval runs/mine --stream other.yaml
  cllava-fast eval runs/mine --frozen                        # the base model as it came, for comparison"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN", help="folder of a run")
    parser.add_argument("--stream", metavar="STREAM", help="a YAML or a ready stream's name (default: the run's own)")
    parser.add_argument("--base", metavar="DIR", help="folder that that stream's relative paths start from")
    parser.add_argument("--split", default="test", choices=("test", "validation"), help="(default: %(default)s)")
    parser.add_argument("--after", metavar="TASK", help="as the model was after this task (default: after the last)")
    parser.add_argument("--model", metavar="PATH", help="folder or hub name of the base (default: what RUN names)")
    parser.add_argument("--frozen", action="store_true", help="measure the base model without what was learned")
    parser.add_argument("--output", metavar="DIR", help="folder for predictions and a report (default: print only)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier evaluation in that folder")
    parser.add_argument("--batch-size", type=int, metavar="N", help="(default: as in training)")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="of an answer (default: as in training)")


def run(arguments: argparse.Namespace) -> int:
    from cllava_fast import distributed
    from cllava_fast.cli.running import check_positive, open_base, open_run, open_stream, run_config, said_of_run
    from cllava_fast.config import load_config
    from cllava_fast.evaluate.evaluation import check_output, check_tasks, evaluate_stream
    from cllava_fast.evaluate.report import print_table

    check_positive(arguments, "batch_size", "max_new_tokens")
    _check_flags(arguments)
    distributed.start()
    config = run_config(Path(arguments.run_dir), arguments.model)
    asked = config
    if arguments.stream is not None:
        asked = load_config(arguments.stream, {"model.path": config.model.path}, arguments.base)
    stream = open_stream(asked)
    check_tasks(stream, arguments.split)
    if arguments.output is not None:
        distributed.on_main(lambda: check_output(Path(arguments.output), arguments.overwrite))
    said = None
    if arguments.frozen:
        model, processor = open_base(config)
    else:
        said = said_of_run(Path(arguments.run_dir), config, arguments.after)
        model, processor = open_run(arguments.run_dir, arguments.after, arguments.model)
    results = evaluate_stream(
        model,
        processor,
        stream,
        arguments.output,
        split=arguments.split,
        batch_size=arguments.batch_size or config.training.eval_batch_size,
        max_new_tokens=arguments.max_new_tokens or config.training.max_new_tokens,
        image_feature_bytes=config.training.image_feature_bytes,
        dataloader_num_workers=config.training.dataloader_num_workers,
        seed=0 if arguments.frozen else config.training.seed,
        run=said,
        overwrite=arguments.overwrite,
        progress=config.training.progress,
    )
    if distributed.is_main():
        print_table(results)
        if arguments.output is not None:
            print(f"\nReport and predictions: {arguments.output}")
    distributed.finish()
    return 0


def _check_flags(arguments: argparse.Namespace) -> None:
    """Refuses what would have no effect."""
    if arguments.frozen and arguments.after is not None:
        raise ValueError(
            "--after is given, but --frozen measures the base, which learned nothing; leave one of them out"
        )
    if arguments.base is not None and arguments.stream is None:
        raise ValueError("--base is given without --stream, and the run's own stream knows its folder; leave it out")
    if arguments.overwrite and arguments.output is None:
        raise ValueError("--overwrite is given without --output, so nothing is written; name a folder, or leave it out")
