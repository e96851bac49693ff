"""How good are samples: Frechet distance, precision and recall, Inception score, memorization."""

from genjax_lab.evaluation.classifier_training import ClassifierRecipe
from genjax_lab.evaluation.evaluate import METRICS, evaluate_samples, extract_features
from genjax_lab.evaluation.features import (
    FeatureExtractor,
    classifier_features,
    inception_features,
)
from genjax_lab.evaluation.frechet import FeatureStatistics, frechet_distance
from genjax_lab.evaluation.inception_score import InceptionScore, inception_score
from genjax_lab.evaluation.memorization import MemorizationReport, memorization_report
from genjax_lab.evaluation.precision_recall import PrecisionRecall, precision_recall
from genjax_lab.evaluation.summary import seed_range_summary

__all__ = [
    "METRICS",
    "ClassifierRecipe",
    "FeatureExtractor",
    "FeatureStatistics",
    "InceptionScore",
    "MemorizationReport",
    "PrecisionRecall",
    "classifier_features",
    "evaluate_samples",
    "extract_features",
    "frechet_distance",
    "inception_features",
    "inception_score",
    "memorization_report",
    "precision_recall",
    "seed_range_summary",
]
