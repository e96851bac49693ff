"""Evaluates a checkpoint; its path is all that is needed.

    python -m experiments.evaluate --checkpoint=DIR [--step=best] [--metrics=frechet,...]
    python -m experiments.evaluate --config=FILE --config.base=DIR --out=evaluation.json

The second evaluates what training would begin with, such as published weights, on the config's mesh
(with less than it names, --config.mesh.fsdp=1 --config.mesh.tensor=1).

The metrics are computed for several ranges of seeds. Of Frechet distances the minimum is reported,
as papers do, of others the mean; the value of fresh seeds, on which nothing was chosen, stands
beside it, and for intervals alone. Writes <checkpoint>/evaluation.json.
"""

import json
import statistics
from pathlib import Path

import jax
import ml_collections
from absl import app, flags

from experiments.chosen_model import CHANGES, CHECKPOINT, chosen_model
from experiments.launch import connect, quiet_libraries
from genjax_lab import evaluation

_METRICS = flags.DEFINE_list("metrics", None, "Metrics; default those of the config.")
_RANGES = flags.DEFINE_integer(
    "seed_ranges", 3, "Ranges of seeds to take the minimum of.", lower_bound=2
)
_NUM = flags.DEFINE_integer("num", None, "Samples in a range; default that of the config.")
_OUT = flags.DEFINE_string(
    "out", None, "Where to write the JSON file; default evaluation.json in the run's directory."
)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    quiet_libraries()
    connect()

    if CHECKPOINT.value is None and _OUT.value is None:
        raise app.UsageError("without --checkpoint, --out must say where the result goes")
    experiment, restored = chosen_model()
    num = _NUM.value or ml_collections.ConfigDict(restored.config).evaluation.num_samples
    ranges = [range(i * num, (i + 1) * num) for i in range(_RANGES.value + 1)]
    if rounds := restored.config.get("self_play"):  # which chose and reported on their first seeds
        first = max(ranges[-1].start, rounds["selection_seeds"] + rounds["fresh_seeds"])
        ranges[-1] = range(first, first + num)
    values = [
        experiment.evaluate(restored.state, seeds=seeds, metrics=_METRICS.value, progress=True)
        for seeds in ranges
    ]
    source = CHECKPOINT.value or restored.config.get("base")
    result = {"checkpoint": source, "step": restored.step, "num_samples": num}
    if "sampler" in restored.config:
        result["sampler"] = restored.config["sampler"]
    if CHANGES.value:
        result["set"] = CHANGES.value
    # The length of right answers, say, is told only where there are some.
    for metric in (name for name in values[0] if all(name in value for value in values)):
        by_range = dict(zip(ranges, (value[metric] for value in values), strict=True))
        fresh = {ranges[-1]: by_range.pop(ranges[-1])}
        if metric == "frechet":
            result |= evaluation.seed_range_summary(by_range, fresh, metric=metric)
        elif metric != "num_samples":  # a minimum would be the worst of these
            if not metric.endswith(("_low", "_high")):  # a mean of intervals is none
                result[f"{metric}_mean"] = statistics.fmean(by_range.values())
            result[f"{metric}_fresh"] = fresh[ranges[-1]]
    if jax.process_index() == 0:
        out = Path(_OUT.value or Path(CHECKPOINT.value) / "evaluation.json")
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n")
        print(json.dumps(result, indent=2))
        if "frechet_fresh" in result:
            print(f"Frechet distance (fresh seeds): {result['frechet_fresh']:.3f}")
        print(f"written to {out}")


if __name__ == "__main__":
    app.run(main)
