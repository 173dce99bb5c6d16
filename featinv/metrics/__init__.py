"""Metrics: how close is a reconstruction to its original, in features, in pixels and as a distribution.

Every paired function takes `(original, reconstruction)` in this order and returns a float64 per image.
"""

from featinv.metrics.collection import (
    METRICS,
    PairedEvaluation,
    derangement,
    evaluate_floor,
    evaluate_images,
    same_class_partner,
)
from featinv.metrics.distribution import (
    distribution_meta,
    frechet_distance,
    identification,
    kernel_distance,
    pooled,
    precision_recall,
)
from featinv.metrics.factors import FactorProbe, FactorSpec
from featinv.metrics.features import (
    feature_cosine,
    label_accuracy,
    normalised_l2,
    position_cosine,
    share_of_span,
    topk_agreement,
)
from featinv.metrics.images import embedding_diversity, pixel_diversity, psnr, ssim
from featinv.metrics.intervals import Interval, bootstrap_mean, bootstrap_r2
from featinv.metrics.networks import inception_embedder, lpips_network
from featinv.metrics.summary import DISTRIBUTION_METRICS, metric_name, summarise
from featinv.metrics.views import ImagePairs

__all__ = [
    "DISTRIBUTION_METRICS",
    "METRICS",
    "FactorProbe",
    "FactorSpec",
    "ImagePairs",
    "Interval",
    "PairedEvaluation",
    "bootstrap_mean",
    "bootstrap_r2",
    "derangement",
    "distribution_meta",
    "embedding_diversity",
    "evaluate_floor",
    "evaluate_images",
    "feature_cosine",
    "frechet_distance",
    "identification",
    "inception_embedder",
    "kernel_distance",
    "label_accuracy",
    "lpips_network",
    "metric_name",
    "normalised_l2",
    "pixel_diversity",
    "pooled",
    "position_cosine",
    "precision_recall",
    "psnr",
    "same_class_partner",
    "share_of_span",
    "ssim",
    "summarise",
    "topk_agreement",
]
