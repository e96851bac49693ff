"""Questions, answers and who judges them: what learning from verifiable answers is made of."""

from genjax_lab.reasoning.answers import (
    evaluate_expression,
    extract_answer,
    minerva_normalize,
    strict_box,
)
from genjax_lab.reasoning.asking import ask, judged, received, verified
from genjax_lab.reasoning.problems import Problem, Task, addition, countdown, digit_sum, jsonl
from genjax_lab.reasoning.rollout import (
    AnsweredProblem,
    Collected,
    Ledger,
    collect_groups,
    is_useful,
)
from genjax_lab.reasoning.stream import (
    STATISTIC,
    STATISTICS,
    AnswerStream,
    JudgedAnswers,
    Reward,
    RolloutSettings,
    rollout_statistics,
)
from genjax_lab.reasoning.tokens import Codec, character_codec
from genjax_lab.reasoning.verifier import Verifier

__all__ = [
    "STATISTIC",
    "STATISTICS",
    "AnswerStream",
    "AnsweredProblem",
    "Codec",
    "Collected",
    "JudgedAnswers",
    "Ledger",
    "Problem",
    "Reward",
    "RolloutSettings",
    "Task",
    "Verifier",
    "addition",
    "ask",
    "character_codec",
    "collect_groups",
    "countdown",
    "digit_sum",
    "evaluate_expression",
    "extract_answer",
    "is_useful",
    "jsonl",
    "judged",
    "minerva_normalize",
    "received",
    "rollout_statistics",
    "strict_box",
    "verified",
]
