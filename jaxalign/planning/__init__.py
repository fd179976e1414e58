"""Plans: what a run needs and how long a step takes, before anything is loaded or paid for."""

from jaxalign.planning.neighbours import Neighbour, what_fits
from jaxalign.planning.plan import Plan, plan_stage, prepare_plan
from jaxalign.planning.shardings import describe_stage
from jaxalign.planning.stages import planned_stages
from jaxalign.planning.tables import neighbour_line, plan_tables, shardings_table

__all__ = [
    "Neighbour",
    "Plan",
    "describe_stage",
    "neighbour_line",
    "plan_stage",
    "plan_tables",
    "planned_stages",
    "prepare_plan",
    "shardings_table",
    "what_fits",
]
