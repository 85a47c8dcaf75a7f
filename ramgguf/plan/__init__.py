"""Plan: the format of every tensor, for a limit of size."""

from ramgguf.plan.divided import DividedPlan
from ramgguf.plan.division import Offloaded, Sites, divisions, everything
from ramgguf.plan.drafts import LEAST_DRAFT_BPW
from ramgguf.plan.frontier_result import Frontier
from ramgguf.plan.knapsack import Choice, efficient, price, smallest
from ramgguf.plan.limits import (
    ByteLimit,
    JointLimit,
    PlanAt,
    Room,
    SizeLimit,
    SourceSize,
    size_limit,
)
from ramgguf.plan.objectives import OBJECTIVE_NAMES, Costing, costing
from ramgguf.plan.planning import (
    PlanOptions,
    curve,
    diff,
    explain,
    follow,
    plan,
    problem,
    speed_front,
)
from ramgguf.plan.pools import DivisionRoom, Pools
from ramgguf.plan.problem import Problem
from ramgguf.plan.recipes import Recipe
from ramgguf.plan.result import DEFAULT_MIN_SQNR_DB, Plan
from ramgguf.plan.speed import N_PROMPT, SpeedLimit, TokenWork
from ramgguf.plan.speed_front import SpeedFront
from ramgguf.plan.targets import TARGETS, target

__all__ = [
    "DEFAULT_MIN_SQNR_DB",
    "LEAST_DRAFT_BPW",
    "N_PROMPT",
    "OBJECTIVE_NAMES",
    "TARGETS",
    "ByteLimit",
    "Choice",
    "Costing",
    "DividedPlan",
    "DivisionRoom",
    "Frontier",
    "JointLimit",
    "Offloaded",
    "Plan",
    "PlanAt",
    "PlanOptions",
    "Pools",
    "Problem",
    "Recipe",
    "Room",
    "Sites",
    "SizeLimit",
    "SourceSize",
    "SpeedFront",
    "SpeedLimit",
    "TokenWork",
    "costing",
    "curve",
    "diff",
    "divisions",
    "efficient",
    "everything",
    "explain",
    "follow",
    "plan",
    "price",
    "problem",
    "size_limit",
    "smallest",
    "speed_front",
    "target",
]
