"""One line on each divergence of an evaluation, to print beside its figure.

`docs/evaluation.md` has the formulas; `evaluate.py` computes them.
"""

DEFINITIONS = {
    "kl_kept": "KL to the kept entries, whose probabilities are divided by their sum",
    "kl_bound": "KL with all that was not kept as one entry: at most the full KL to the teacher",
    "kl_unbiased": "unbiased estimate of the full KL to the teacher, its entropy exact",
}
