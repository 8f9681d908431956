"""Whether the teacher in a reference checkpoint is an untouched random initialisation (spec §5.2)."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

#: A correlation above which two encoders are no independent draws.
RELATED = 0.5
#: Quantile of the Kolmogorov distribution at 1e-4: the limit for n independent values is this over sqrt(n).
KOLMOGOROV = 2.23

UNTOUCHED, UNTOUCHED_WEIGHTS, COPY, FOLLOWS, NEITHER = (
    "untouched", "untouched_weights", "copy", "follows_student", "neither",
)  # fmt: skip
_SENTENCES = {
    UNTOUCHED: "it equals an untouched initialisation, so it never followed the student",
    UNTOUCHED_WEIGHTS: "its weights are those of an untouched initialisation, its norms are not",
    COPY: "it is an exact copy of the student",
    FOLLOWS: "it is no independent initialisation: it follows the student",
    NEITHER: f"it equals no untouched initialisation and correlates with the student by at most {RELATED}",
}


@dataclasses.dataclass(frozen=True)
class TeacherCheck:
    """The evidence.

    Attributes:
        verdict: `UNTOUCHED`, `UNTOUCHED_WEIGHTS`, `COPY`, `FOLLOWS` or `NEITHER`.
        compared: where the compared weights lie: in the stem's convolutions and, if any, S4 layers' output linears.
        weights: how many they are.
        share_within_bound: of them, within the bound of the uniform distribution they are drawn from.
        distance: Kolmogorov-Smirnov distance of them, each divided by its bound, to U(-1, 1).
        distance_limit: what independent uniform draws exceed once in 10 000 times.
        correlation: with the student's, Pearson's.
        norms_untouched: share of the norms' scales and biases that are exactly 1 and 0.
        statistics_moved: whether a running mean of its BatchNorms is not 0.
    """

    verdict: str
    compared: str
    weights: int
    share_within_bound: float
    distance: float
    distance_limit: float
    correlation: float
    norms_untouched: float
    statistics_moved: bool

    def sentence(self) -> str:
        """One sentence for the console."""
        moved = "have moved" if self.statistics_moved else "have not moved"
        return (
            f"{_SENTENCES[self.verdict]} ({100 * self.share_within_bound:.4g} % of the {self.weights:,} weights of "
            f"its {self.compared} lie within the initialiser's bound, Kolmogorov-Smirnov distance to the uniform "
            f"distribution {self.distance:.2g} with a limit of {self.distance_limit:.2g}, correlation with the "
            f"student {self.correlation:.3f}, {100 * self.norms_untouched:.4g} % of its norms' scales and biases are "
            f"1 and 0, its batch statistics {moved})"
        )


def check_teacher(student: dict[str, Any], teacher: dict[str, Any]) -> TeacherCheck:
    """Compares a teacher with the initialiser's distribution and with the student.

    The weights are drawn from U(-1/sqrt(fan_in), 1/sqrt(fan_in)) (spec §2, §3.2), norms begin at scale 1 and bias 0.

    Args:
        student, teacher: collections `params` and `batch_stats` of `models.encoder.Encoder`.
    """
    pairs = list(_uniform_kernels(student["params"], teacher["params"]))
    bounds = [np.prod(theirs.shape[:-1]) ** -0.5 for _, theirs in pairs]
    u_student, u = (
        np.concatenate(
            [
                np.ravel(pair[side]).astype(np.float64) / bound
                for pair, bound in zip(pairs, bounds, strict=True)
            ]
        )
        for side in (0, 1)
    )
    within = float((np.abs(u) <= 1 + 1e-6).mean())
    cdf = np.clip((np.sort(u) + 1) / 2, 0.0, 1.0)
    steps = np.arange(len(u) + 1) / len(u)
    distance = float(max(np.abs(cdf - steps[1:]).max(), np.abs(cdf - steps[:-1]).max()))
    limit = KOLMOGOROV / len(u) ** 0.5
    spread = u.std() * u_student.std()
    correlation = float(((u - u.mean()) * (u_student - u_student.mean())).mean() / spread) if spread else 0.0
    norms = [value == untouched for value, untouched in _norms(teacher["params"])]
    norms_untouched = float(np.concatenate(norms).mean())

    independent = abs(correlation) <= max(5 / len(u) ** 0.5, 0.01)
    if _same(student["params"], teacher["params"]):
        verdict = COPY
    elif correlation > RELATED:
        verdict = FOLLOWS
    elif within == 1 and distance <= limit and independent:
        verdict = UNTOUCHED if norms_untouched == 1 else UNTOUCHED_WEIGHTS
    else:
        verdict = NEITHER
    means = [norm["mean"] for norm in teacher["batch_stats"]["stem"].values()]
    return TeacherCheck(
        verdict=verdict,
        compared="stem and S4 outputs" if len(pairs) > len(means) else "stem",
        weights=len(u),
        share_within_bound=within,
        distance=distance,
        distance_limit=limit,
        correlation=correlation,
        norms_untouched=norms_untouched,
        statistics_moved=any(np.any(mean != 0) for mean in means),
    )


def _uniform_kernels(student: dict, teacher: dict) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for name in sorted(teacher["stem"]):
        if name.startswith("conv"):
            yield student["stem"][name]["kernel"], teacher["stem"][name]["kernel"]
    for name, layer in sorted(teacher["backbone"].items()):
        if "C" in layer:  # an S4 layer
            yield student["backbone"][name]["output"]["kernel"], layer["output"]["kernel"]


def _norms(tree: dict) -> Iterator[tuple[np.ndarray, float]]:
    """Every scale with 1 and every bias beside one with 0."""
    if "scale" in tree:
        yield tree["scale"], 1.0
        yield tree["bias"], 0.0
    for child in tree.values():
        if isinstance(child, dict):
            yield from _norms(child)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return all(_same(a[name], b[name]) for name in a)
    return np.array_equal(a, b)
