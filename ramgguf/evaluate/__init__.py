"""Evaluate: perplexity and KLD sequence by sequence, and what can be concluded from them."""

from ramgguf.evaluate.comparison import compare
from ramgguf.evaluate.continuations import Trajectories, TrajectoryResult, trajectories
from ramgguf.evaluate.draft_agreement import SECONDS as DRAFT_SECONDS
from ramgguf.evaluate.draft_agreement import DraftAgreement, draft_agreement
from ramgguf.evaluate.evaluation import Evaluation, evaluate
from ramgguf.evaluate.held_out import SECONDS as SCORE_SECONDS
from ramgguf.evaluate.held_out import (
    HeldOutScore,
    kept_bytes,
    score_held_out,
    scores_here,
    window_seconds,
)
from ramgguf.evaluate.multiple_choice import TaskResult, TaskResults, tasks
from ramgguf.evaluate.result import EvalResult

__all__ = [
    "DRAFT_SECONDS",
    "SCORE_SECONDS",
    "DraftAgreement",
    "EvalResult",
    "Evaluation",
    "HeldOutScore",
    "TaskResult",
    "TaskResults",
    "Trajectories",
    "TrajectoryResult",
    "compare",
    "draft_agreement",
    "evaluate",
    "kept_bytes",
    "score_held_out",
    "scores_here",
    "tasks",
    "trajectories",
    "window_seconds",
]
