"""How good are samples: distances of images, memorization; perplexity and entropy of text."""

from genjax_lab.evaluation.answers import (
    answer_summary,
    avg_at_k,
    bootstrap_interval,
    maj_at_k,
    pass_at_k,
    std_at_n,
)
from genjax_lab.evaluation.categorical_laws import (
    gumbel_cap,
    lattice_categorical_probs,
    truncated_categorical_probs,
)
from genjax_lab.evaluation.classifier_training import ClassifierRecipe
from genjax_lab.evaluation.enumeration import (
    ancestral_law,
    consistent_table,
    first_hitting_law,
    prediction_table,
    total_variation,
)
from genjax_lab.evaluation.evaluate import METRICS, evaluate_samples, extract_features
from genjax_lab.evaluation.features import (
    FeatureExtractor,
    classifier_features,
    inception_features,
)
from genjax_lab.evaluation.frechet import FeatureStatistics, frechet_distance
from genjax_lab.evaluation.inception_score import InceptionScore, inception_score
from genjax_lab.evaluation.language import (
    GenerativePerplexity,
    TrigramJudge,
    generative_perplexity,
    nelbo,
    unigram_entropy,
)
from genjax_lab.evaluation.memorization import MemorizationReport, memorization_report
from genjax_lab.evaluation.precision_recall import PrecisionRecall, precision_recall
from genjax_lab.evaluation.summary import seed_range_summary

__all__ = [
    "METRICS",
    "ClassifierRecipe",
    "FeatureExtractor",
    "FeatureStatistics",
    "GenerativePerplexity",
    "InceptionScore",
    "MemorizationReport",
    "PrecisionRecall",
    "TrigramJudge",
    "ancestral_law",
    "answer_summary",
    "avg_at_k",
    "bootstrap_interval",
    "classifier_features",
    "consistent_table",
    "evaluate_samples",
    "extract_features",
    "first_hitting_law",
    "frechet_distance",
    "generative_perplexity",
    "gumbel_cap",
    "inception_features",
    "inception_score",
    "lattice_categorical_probs",
    "maj_at_k",
    "memorization_report",
    "nelbo",
    "pass_at_k",
    "precision_recall",
    "prediction_table",
    "seed_range_summary",
    "std_at_n",
    "total_variation",
    "truncated_categorical_probs",
    "unigram_entropy",
]
