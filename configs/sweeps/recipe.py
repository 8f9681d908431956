"""How much of the published comparison is its recipe? What the paper describes against what its code does.

    ecg-jax sweep configs/sweeps/recipe.py --output=runs/recipe --store=stores/heedb --probe-store=stores/ptbxl
    ecg-jax sweep configs/sweeps/recipe.py:objective=jepa,switches --output=runs/recipe_jepa --store=stores/heedb \\
        --probe-store=stores/ptbxl
    ecg-jax sweep configs/sweeps/recipe.py:quick --output=runs/recipe_quick

Arguments: objective=all|cpc|jepa|data2vec|dinosr|hubertpp, backbone=s4|transformer|net1d, data=18k|45k|106k|753k|11m,
seeds=3|1|2|5, switches, quick. Groups OBJECTIVE-described and OBJECTIVE-released; at the defaults 30 runs of 180 000
windows, 5.4 million in all.

With `switches` also the described recipe with one switch (spec §11.1) turned to what the released code does:
    lr-groups         backbone and stem at a tenth and a hundredth of the learning rate (of CPC that is all of the
                      released recipe on S4, and has no group of its own)
    misordered        inputs standardised by the statistics of other leads
    teacher-random    a teacher that stays as it was drawn
    teacher-train     targets with dropout and batch statistics
    masks             spans a tenth as often, blocks of 64 tokens at least, the last token all but never
    last-layer        DinoSR: targets of the teacher's last layer alone
and one that neither has, for the confound of the published comparison, in which CPC alone saw millivolts: `raw`, no
standardisation, of masked objectives, and `standardised` of CPC. Of all objectives 37 groups,
at three seeds 111 runs and 20 million windows.

The table can tell what each switch does by itself, and whether all of them do more. It cannot tell how they act in
pairs, and not which recipe made the published numbers: the checkpoints are not public.
"""

from configs.sweeps import common

#: Switch -> fields, of every objective that has them.
SWITCHES = {
    "lr-groups": {
        "optimiser__factors__backbone": 0.1,
        "optimiser__factors__stem": 0.01,
        "optimiser__factors__ssm": 0.01,
    },
    "misordered": {"data__normalisation": "ptbxl_misordered"},
    "teacher-random": {"objective__teacher__mode": "frozen_random"},
    "teacher-train": {"objective__teacher__train_mode": True},
    "masks": {
        "objective__mask__probability": 0.0065,
        "objective__mask__min_keep": 64,
        "objective__mask__last_token": False,
    },
    "raw": {"data__normalisation": "none"},
}
LAST_LAYER = {"objective__top_k": 1, "objective__idle_logits": 256}
STANDARDISED = {"data__normalisation": "ptbxl_canonical"}


def switches(objective):
    """Switch -> fields of one objective."""
    if objective == "cpc":
        return {"standardised": STANDARDISED, "misordered": SWITCHES["misordered"]}
    return SWITCHES | ({"last-layer": LAST_LAYER} if objective == "dinosr" else {})


def sweep(arg=""):
    arg = common.arguments(arg, "switches", objective=("all", *common.OBJECTIVES))
    for objective in common.OBJECTIVES if arg.objective == "all" else (arg.objective,):
        groups = {recipe: {"recipe": recipe} for recipe in ("described", "released")}
        groups |= switches(objective) if arg.switches else {}
        for group, fields in groups.items():
            for seed in common.seeds(arg):
                yield common.run(
                    f"{objective}-{group}",
                    objective,
                    seed,
                    **common.settings(arg),
                    **fields,
                )
