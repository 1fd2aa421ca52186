"""Draws the schedules of `train-student` for the documentation: `schedules.py OUT.svg`."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
mpl.use("agg")
mpl.rcParams["svg.hashsalt"] = "schedules"

from matplotlib import pyplot

from student_train.objective.schedules import ALPHA_SCHEDULES, LR_SCHEDULES, Alpha, learning_rate

STEPS = 1000
PHASES = {"warmup_fraction": 0.1, "decay_fraction": 0.2}


def main(out: Path) -> None:
    """Two pictures side by side: alpha and learning rate over a run."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    part = [step / STEPS for step in range(STEPS)]
    for kind in ALPHA_SCHEDULES:
        alpha = Alpha(kind=kind, peak=0.9, num_steps=STEPS, **PHASES)
        left.plot(part, [alpha.at(step) for step in range(STEPS)], label=kind)
    for kind in LR_SCHEDULES:
        rate = learning_rate(kind, peak=1.0, num_steps=STEPS, floor=0.1, **PHASES)
        right.plot(part, [rate.at(step) for step in range(STEPS)], label=kind)
    left.set(title="--alpha-schedule, --alpha 0.9", xlabel="part of the run", ylim=(-0.02, 1.3))
    right.set(title="--lr-schedule, part of the highest", xlabel="part of the run", ylim=(0, 1.3))
    left.legend(ncols=3, loc="upper center", fontsize=8)
    right.legend(loc="upper center", ncols=4, fontsize=8)
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
