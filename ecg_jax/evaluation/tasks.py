"""What a probe predicts: which labels or numbers of which corpus, how it is split, by which score.

A task is data. `BENCHMARK` names the 26 tasks on 10 datasets of the study (spec §7.6); `TASKS` holds them and a
few beside them. `examples.choose_examples` turns a task and a store into targets and splits.

What is not annotated counts as negative, in the study and here. Single datasets of the Challenge are annotated with
their own list of diagnoses; `challenge_dx`, outside the benchmark, pools eight of them, so that a code which one
dataset never annotates is a negative of all its recordings there: its scores say partly from which dataset a
recording comes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ecg_jax.data.store import SYNTHETIC
from ecg_jax.data.stratify import ADULT_BINS, PAEDIATRIC_BINS
from ecg_jax.errors import UserError, closest

ADULT = "adult ECG"
PAEDIATRIC = "paediatric ECG"
STRUCTURE = "cardiac structure"
CARDIAC = "cardiac outcomes"
NON_CARDIAC = "non-cardiac outcomes"
ACUTE = "acute care"
PATIENT = "patient characteristics"
OTHER = "outside the benchmark"


#: Corpora that do not say which recordings are of one patient.
WITHOUT_PATIENTS = ("challenge",)


class TaskUnavailable(UserError):
    """A store cannot serve a task for want of records, classes, labels, numbers or folds; other tasks it may serve."""


@dataclass(frozen=True)
class Task:
    """One downstream task."""

    name: str
    corpus: str
    """Corpus of the stores it can be run on."""
    label_set: str
    """Key of `store.classes`, or of `store.values` if `source` is "values"."""
    group: str
    """Category it is reported under."""
    kind: str = "multilabel"
    """"multilabel": one binary target per class; "binary": one in all; "regression": numbers."""
    source: str = "labels"
    """"labels": a record has the labels of its column `labels_<label_set>`; "values": the numbers of its column
    `values_<label_set>`, unknown ones left out of training and scores."""
    dataset: str | None = None
    """Part of a corpus that holds several datasets, see `corpora.challenge.dataset_of`."""
    split: str = "corpus_folds"
    """Where folds come from: "corpus_folds", those the corpus was published with; or "stratified", ten folds made from
    labels and patients as far as known (`data.stratify`, seed 0). Either way test = highest fold, validation = the one
    below."""
    held_out: tuple[int, int] | None = None
    """(validation fold, test fold) of the corpus, for one of which parts may be missing; None for the two highest."""
    stratify_by: str | None = None
    """Label set to stratify by; None for the task's own. Tasks on columns of one table so share their records."""
    age_bins: tuple[float, ...] = ()
    """Limits of age groups by which, with sex, folds are stratified beside the labels (spec §7.4); none: neither."""
    unlabelled: str = "exclude"
    """What a record without any label of the set is: "exclude"d, or a "negative" of every class. A record whose labels
    are unknown (a null list, or one that the corpus' table does not have) is left out either way."""
    subset: str | None = None
    """ICD-10 classes taken: "cardiac" (chapter IX) or "non_cardiac" (the rest); None for all classes."""
    protocol: str | None = None
    """Value set whose first number is 1 for records that belong to the published evaluation; None for all."""
    min_seconds: float = 0.0
    """Shorter recordings are left out."""
    min_count: int = 10
    """A class with fewer positive (a target with fewer known) usable recordings is dropped and listed; diagnoses of
    MIMIC are counted over the whole store."""

    @property
    def metric(self) -> str:
        """The score it is reported by: macro AUROC, for regressions the mean absolute error."""
        return "mae" if self.kind == "regression" else "macro_auroc"


#: Validation and test folds of MIMIC-IV-ECG-ICD (`strat_fold`), and those given to EchoNext's splits val and test.
_MIMIC_HELD_OUT, _ECHONEXT_HELD_OUT = (18, 19), (8, 9)


def _challenge(name: str, dataset: str, group: str = ADULT, min_seconds: float = 0.0) -> Task:
    return Task(name, "challenge", "dx", group, dataset=dataset, split="stratified", min_seconds=min_seconds)


def _mimic(name: str, label_set: str, group: str, kind: str = "multilabel") -> Task:
    return Task(
        name, "mimic", label_set, group, kind, source="values", protocol="protocol", held_out=_MIMIC_HELD_OUT
    )


def _icd10(subset: str, group: str) -> Task:
    return Task(
        f"mimic_{subset}", "mimic", "icd10", group, subset=subset, protocol="protocol", min_count=2000,
        unlabelled="negative", held_out=_MIMIC_HELD_OUT,
    )  # fmt: skip


_BENCHMARK = (
    _challenge("ningbo", "ningbo"),
    # The reference takes recordings of at least 10 s of these three (spec §7.4).
    _challenge("cpsc2018", "cpsc2018", min_seconds=10.0),
    _challenge("cpsc_extra", "cpsc_extra", min_seconds=10.0),
    _challenge("georgia", "georgia", min_seconds=10.0),
    Task("chapman", "chapman", "all", ADULT, split="stratified"),
    # In the study a column subset of the model above, so on the same records.
    Task("chapman_rhythm", "chapman", "rhythm", ADULT, split="stratified", stratify_by="all"),
    Task("sph", "sph", "aha", ADULT, split="stratified", age_bins=ADULT_BINS),
    # PTB-XL's benchmark (Strodthoff et al. 2021) leaves out records without any statement of the label set.
    *(Task(f"ptbxl_{s}", "ptbxl", s, ADULT) for s in ("super", "sub", "diag", "form", "rhythm", "all")),
    Task(
        "zzu_pecg", "zzu", "aha", PAEDIATRIC, split="stratified", age_bins=PAEDIATRIC_BINS, min_seconds=10.0
    ),
    Task("echonext", "echonext", "echo", STRUCTURE, unlabelled="negative", held_out=_ECHONEXT_HELD_OUT),
    _icd10("cardiac", CARDIAC),
    _icd10("non_cardiac", NON_CARDIAC),
    _mimic("mimic_deterioration", "deterioration", ACUTE),
    _mimic("mimic_mortality", "mortality", ACUTE),
    _mimic("mimic_icu", "icu", ACUTE),
    _mimic("mimic_sex", "sex", PATIENT, "binary"),
    _mimic("mimic_age", "age", PATIENT, "regression"),
    _mimic("mimic_biometrics", "biometrics", PATIENT, "regression"),
    _mimic("mimic_ecg_features", "ecg", PATIENT, "regression"),
    _mimic("mimic_labs", "labs", PATIENT, "regression"),
    _mimic("mimic_vitals", "vitals", PATIENT, "regression"),
)

_BESIDE = (
    Task("ptb", "ptb", "diagnosis", OTHER, split="stratified"),
    Task(
        "code15",
        "code15",
        "code15",
        OTHER,
        split="stratified",
        age_bins=ADULT_BINS,
        unlabelled="negative",
        min_seconds=10.0,
    ),
    Task("challenge_dx", "challenge", "dx", OTHER),
    _challenge("challenge_chapman", "chapman", OTHER),
    # Generated recordings: what they score says that the machinery works, and nothing about ECGs.
    *(Task(f"synthetic_{s}", SYNTHETIC, s, OTHER) for s in ("rhythm", "conduction", "axis", "st_t", "noise")),
)

#: Names of the 26 tasks of the study, in the order they are reported in.
BENCHMARK = tuple(task.name for task in _BENCHMARK)

#: Every task by name.
TASKS = {task.name: task for task in (*_BENCHMARK, *_BESIDE)}

#: What `task=` takes for every task that a store can serve.
ALL = "all"


def get_task(name: str) -> Task:
    """The task of that name.

    Raises:
        UserError: there is none; the message names a similar one or lists all.
    """
    if name not in TASKS:
        raise UserError(f"There is no task {name!r}{closest(name, TASKS)}")
    return TASKS[name]


def fits(task: Task, corpus: str, label_sets: Sequence[str], value_sets: Sequence[str]) -> bool:
    """Whether a store has what a task needs.

    Args:
        task: the task.
        corpus: the store's corpus.
        label_sets: names of its label sets.
        value_sets: names of its value sets of which a number is known, see `targets.known_value_sets`.
    """
    return corpus == task.corpus and not _missing(task, label_sets, value_sets)


def _missing(task: Task, label_sets: Sequence[str], value_sets: Sequence[str]) -> list[tuple[str, str]]:
    """("label" or "value", name) of the sets that a task needs and a store lacks."""
    labels = [task.label_set] if task.source == "labels" else []
    labels += [task.stratify_by] if task.stratify_by else []
    values = [task.label_set] if task.source == "values" else []
    values += [task.protocol] if task.protocol else []
    return [("label", name) for name in labels if name not in label_sets] + [
        ("value", name) for name in values if name not in value_sets
    ]


def check_store(
    task: Task, corpus: str, label_sets: Sequence[str], value_sets: Sequence[str], store: str
) -> None:
    """Checks that a store can serve a task.

    Args:
        task: the task.
        corpus: the store's corpus.
        label_sets, value_sets: as in `fits`.
        store: how to call the store in the message.

    Raises:
        UserError: it is of another corpus.
        TaskUnavailable: it lacks the labels or numbers.
    """
    if corpus != task.corpus:
        raise UserError(
            f"Task {task.name} needs a store of corpus {task.corpus!r}, but {store} was prepared from "
            f"{corpus!r}; choose another task or store."
        )
    missing = _missing(task, label_sets, value_sets)
    if missing:
        what, name = missing[0]
        there = ", ".join(label_sets if what == "label" else value_sets) or "none"
        raise TaskUnavailable(
            f"Task {task.name} needs the {what} set {name!r}, but {store} has only {there}; prepare the store "
            "from a source with the tables that these come from."
        )


def fitting(corpus: str, label_sets: Sequence[str], value_sets: Sequence[str]) -> list[Task]:
    """The tasks that a store can serve, in order of `TASKS`; arguments as in `fits`."""
    return [task for task in TASKS.values() if fits(task, corpus, label_sets, value_sets)]
