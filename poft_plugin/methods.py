"""THE TABLE of methods. This module is itself a plugin: its hooks register what the project ships."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from poft_plugin.data.columns import RANKS, REFERENCE_LOGP, REFERENCE_SUM_LOGPS
from poft_plugin.hookspecs import hookimpl
from poft_plugin.method import Method

if TYPE_CHECKING:
    from poft_plugin.data.preparation import RowFilter
    from poft_plugin.scoring.jobs import Preprocessor
    from poft_plugin.trainers.step import LossFunction


POFT = Method(
    name="poft",
    paper="Fan et al. 2025, arXiv:2412.12865",
    block="poft",
    config="poft_plugin.config:PoftConfig",
    step="poft_plugin.trainers.poft:poft_step",
    loss="poft",
    preprocessors=("reference_rewards",),
    columns=(REFERENCE_LOGP,),
    check="poft_plugin.preprocessors.reference_rewards:check_references",
)

PRO = Method(
    name="pro",
    paper="Song et al. 2023, arXiv:2306.17492",
    block="deft",
    config="poft_plugin.config:RankingConfig",
    step="poft_plugin.trainers.pro:pro_step",
    loss="pro",
    ranked=True,
    preprocessors=("response_scores",),
    columns=(RANKS,),
    defaults={"sft_weight": 0.05},
    check="poft_plugin.preprocessors.response_scores:check_ranking",
)

RRHF = replace(
    PRO,
    name="rrhf",
    paper="Yuan et al. 2023, arXiv:2304.05302",
    step="poft_plugin.trainers.rrhf:rrhf_step",
    loss="rrhf",
    defaults={"sft_weight": 1.0},
    unread=("pro_temperature",),
)

DPO = replace(
    PRO,
    name="dpo",
    paper="Rafailov et al. 2023, arXiv:2305.18290",
    step="poft_plugin.trainers.dpo:dpo_step",
    loss="dpo",
    max_responses=2,
    preprocessors=("response_scores", "reference_sum_logps"),
    columns=(RANKS, REFERENCE_SUM_LOGPS),
    keys="poft_plugin.config:DpoKeys",
    unread=("pro_temperature",),
    alone=False,  # the host has `rl: dpo`
)

SFT = replace(
    PRO,
    name="sft",
    paper="the best response's token-summed SFT loss (DEFT, Eq. 9)",
    step="poft_plugin.trainers.sft:sft_step",
    loss="sft",
    defaults={"sft_weight": 1.0},
    unread=("pro_temperature",),
    alone=False,  # without levels it is the host's own SFT
)

METHODS = (POFT, PRO, RRHF, DPO, SFT)

OMEGA = {"dpo": 2.5e-6, "pro": 2.5e-5}
"""DEFT's omega where the paper names one (Appendix A.1)."""


def deft(method: Method) -> Method | None:
    """`rl: deft_NAME` for every method of ranked responses (Eq. 18): a third party's too."""
    if not method.ranked or method.base is not None:
        return None
    same_block = method.block == "deft"
    inner_defaults = method.defaults if same_block else {}  # another block's defaults are filled in there
    others = (name for name in method.preprocessors if name != "response_scores")
    return replace(
        method,
        name=f"deft_{method.name}",
        paper=f"DEFT (anonymous ACL submission) around {method.paper}",
        block="deft",
        config="poft_plugin.config:DeftConfig",
        step="poft_plugin.trainers.deft:deft_step",
        preprocessors=("response_scores", *others, "grades"),
        defaults={**inner_defaults, "omega": OMEGA.get(method.name)},
        unread=method.unread if same_block else ("sft_weight", "pro_temperature"),
        alone=True,
        check="poft_plugin.preprocessors.response_scores:check_deft",
        base=method,
    )


@hookimpl
def register_methods(register: "Callable[[Method], None]") -> None:
    """Our rl types."""
    for method in METHODS:
        register(method)


@hookimpl
def register_wrappers(register: "Callable[[Callable[[Method], Method | None]], None]") -> None:
    """Our wrapper around other methods."""
    register(deft)


@hookimpl
def register_losses(register: "Callable[[str, LossFunction], None]") -> None:
    """Our losses."""
    from poft_plugin import losses

    register("poft", losses.poft_loss)
    register("pro", losses.pro_loss)
    register("rrhf", losses.rrhf_loss)
    register("dpo", losses.dpo_loss)
    register("sft", losses.sft_loss)


@hookimpl
def register_preprocessors(register: "Callable[[str, Preprocessor], None]") -> None:
    """Our preprocessors."""
    from poft_plugin.preprocessors.grades import grades
    from poft_plugin.preprocessors.reference_rewards import reference_rewards
    from poft_plugin.preprocessors.reference_sum_logps import reference_sum_logps
    from poft_plugin.preprocessors.response_scores import response_scores

    register("reference_rewards", reference_rewards)
    register("response_scores", response_scores)
    register("reference_sum_logps", reference_sum_logps)
    register("grades", grades)


@hookimpl
def register_row_filters(register: "Callable[[str, RowFilter], None]") -> None:
    """Our row filters."""
    from poft_plugin.data.filters import keep_levels, keep_top_percent

    register("keep_top_percent", keep_top_percent)
    register("keep_levels", keep_levels)
