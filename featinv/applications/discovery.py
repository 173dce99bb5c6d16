"""Concepts that nobody named: factors and subspaces found in feature vectors, and directions of a text."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from featinv.applications.batches import encode
from featinv.applications.concepts import Concept, Direction, Subspace, columns_of, linear_probe, make_direction
from featinv.errors import UserError
from featinv.files import first_line


def nmf_concepts(features: Tensor, count: int, limit: int = 4000, seed: int = 0) -> list[Direction]:
    """Non-negative factors of the feature vectors (CRAFT, Fel et al. 2023, arXiv 2211.10154), strongest first.

    Args:
        features: (N, C, H, W), of a layer without negative values.
        count: Number of factors.
        limit: Feature vectors that are factorised, drawn from all positions.
        seed: Of the draw and of the start.

    Returns:
        Directions; each reader is blind to the other factors. "weight" is the share of the summed activations,
        "explained" the share of energy that all factors reproduce.

    Raises:
        UserError: If the layer has negative values, or count is not in [1, C], or there are fewer vectors.
    """
    from sklearn.decomposition import NMF

    if float(features.min()) < 0:
        raise UserError("this layer has negative values, which NMF cannot factorise; use subspaces instead.")
    columns = columns_of(features, limit, seed).numpy()
    if not 1 <= count <= min(columns.shape):
        raise UserError(f"the number of concepts must be 1 to {min(columns.shape)}, not {count}.")
    model = NMF(count, init="nndsvda", random_state=seed, max_iter=500, tol=1e-3)
    weights = model.fit_transform(columns)
    explained = 1 - float(np.square(columns - weights @ model.components_).sum() / np.square(columns).sum())
    lengths = np.linalg.norm(model.components_, axis=1)
    share = weights.sum(0) * lengths / max(float((weights.sum(0) * lengths).sum()), 1e-30)
    readers = np.linalg.pinv(model.components_).T
    return [
        make_direction(
            f"factor {place}",
            torch.from_numpy(model.components_[k]),
            torch.from_numpy(readers[k]),
            features,
            {"weight": float(share[k]), "explained": explained},
        )
        for place, k in enumerate(np.argsort(-share))
        if lengths[k] > 0
    ]


def subspace_concepts(
    features: Tensor,
    count: int,
    energy: float = 0.9,
    max_dimensions: int = 16,
    limit: int = 500,
    seed: int = 0,
) -> list[Subspace]:
    """Sparse subspace clustering of the feature vectors, as in multi-dimensional concept discovery.

    Every vector is written as a sparse combination of the others (Elhamifar & Vidal 2013, arXiv 1203.1005; with an
    elastic net, so that the vectors of one subspace hang together: You et al. 2016, arXiv 1605.02633): those that it
    needs lie in its own subspace. Spectral clustering of these links gives the groups, whose principal components span
    the concepts (Vielhaben et al. 2023, arXiv 2301.11911).

    Args:
        features: (N, C, H, W), of any layer.
        count: Number of subspaces.
        energy: A basis is cut where it holds this share of its group's energy,
        max_dimensions: or at so many dimensions.
        limit: Feature vectors that are clustered, drawn from all positions.
        seed: Of the draw and the clustering.

    Returns:
        The subspaces, that of the largest group first; "weight" is the group's share of the vectors, "energy" the share
        of its energy that the basis holds.

    Raises:
        UserError: If there are too few vectors, or no subspaces are asked for.
    """
    columns = columns_of(features, limit, seed)
    columns = columns[columns.norm(dim=1) > 0]
    if count < 1:
        raise UserError(f"the number of subspaces must be 1 or more, not {count}.")
    if len(columns) < 2 * count:
        raise UserError(f"{len(columns)} feature vectors are too few for {count} subspaces; give more images.")
    groups = _cluster(_links(F.normalize(columns, dim=1).double().numpy()), count, seed)
    sizes = np.bincount(groups, minlength=count)
    order = [int(k) for k in np.argsort(-sizes, kind="stable") if sizes[k]]
    return [
        _span(f"subspace {i}", columns[torch.from_numpy(groups == k)], len(columns), energy, max_dimensions)
        for i, k in enumerate(order)
    ]


def _links(unit: np.ndarray, penalty: float = 0.02, l1_ratio: float = 0.9) -> np.ndarray:
    """|W| + |W|' of the sparse self-expression unit = W unit with an empty diagonal, (M, M).

    The penalty is a share of the one that would leave nothing of the combination.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import ElasticNet

    gram, count = unit @ unit.T, len(unit)
    weights = np.zeros((count, count))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=ConvergenceWarning)  # which vectors are linked is decided early
        for row in range(count):
            others = np.delete(np.arange(count), row)
            model = ElasticNet(
                alpha=penalty * max(float(np.abs(gram[others, row]).max()), 1e-12) / unit.shape[1],
                l1_ratio=l1_ratio,
                fit_intercept=False,
                precompute=np.ascontiguousarray(gram[np.ix_(others, others)]),
                tol=1e-3,
                max_iter=300,
            )
            weights[row, others] = model.fit(unit[others].T, unit[row]).coef_
    return np.abs(weights) + np.abs(weights).T


def _cluster(affinity: np.ndarray, count: int, seed: int) -> np.ndarray:
    from sklearn.cluster import SpectralClustering

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Graph is not fully connected")  # separate subspaces are not
        model = SpectralClustering(count, affinity="precomputed", assign_labels="cluster_qr", random_state=seed)
        return model.fit_predict(affinity)


def _span(name: str, members: Tensor, total: int, energy: float, max_dimensions: int) -> Subspace:
    _, values, vectors = torch.linalg.svd(members.double(), full_matrices=False)
    shares = values.square().cumsum(0) / values.square().sum()
    size = min(int((shares < energy).sum()) + 1, max_dimensions, len(values))
    basis = vectors[:size].float()
    scale = float((members @ basis.T).square().sum(1).mean().sqrt())
    return Subspace(name, basis, scale, {"weight": len(members) / total, "energy": float(shares[size - 1])})


def completeness(concepts: Sequence[Concept], features: Tensor) -> float:
    """Share of the energy of features (N, C, H, W) in the span of all concepts, in [0, 1] (arXiv 2301.11911)."""
    columns = columns_of(features).double()
    spanned, values, _ = torch.linalg.svd(torch.cat([concept.basis for concept in concepts]).double().T, False)
    spanned = spanned[:, values > 1e-9 * values[0]]
    return float((columns @ spanned).square().sum() / columns.square().sum())


def encode_texts(
    name: str, prompts: Sequence[str], pretrained: str | None, checkpoint_path: str | None = None
) -> Tensor:
    """Text embeddings (P, D) of an OpenCLIP model.

    Args:
        name: OpenCLIP's name of the model, such as "ViT-B-32".
        prompts: Texts.
        pretrained: OpenCLIP's weight tag; None draws random weights.
        checkpoint_path: A local file of the whole model instead of a tag.

    Raises:
        UserError: If the weights cannot be had.
    """
    import open_clip

    try:
        model = open_clip.create_model(name, pretrained=checkpoint_path or pretrained)
    except Exception as error:  # the hub client raises many kinds; all mean "not to be had"
        raise UserError(f"cannot get the text tower of {name}: {first_line(error)}") from error
    with torch.no_grad():
        return model.eval().encode_text(open_clip.get_tokenizer(name)(list(prompts))).float()


def text_directions(
    backbone: Any, images: Tensor, prompts: Sequence[str], texts: Tensor, neutral: Tensor | None = None, **settings: Any
) -> list[Direction]:
    """How features change when pictures come closer to a text, at any layer of an OpenCLIP image tower.

    The text lives in the joint space, behind pooling and projection; a regression of the pictures' similarity to the
    text on their features brings it back to the layer.

    Args:
        backbone: With `embed(images) -> (N, D)`, as `OpenCLIPBackbone`.
        images: (N, 3, H, W) in [0, 1], varied in what the texts name.
        prompts: P names.
        texts: (P, D) from `encode_texts`.
        neutral: (D,) of a text such as "a picture", whose similarity is subtracted.
        **settings: Of `linear_probe`.

    Raises:
        UserError: If the backbone has no joint space.
    """
    if not hasattr(backbone, "embed"):
        raise UserError("text directions need an OpenCLIP backbone, which shares a space with texts.")
    with torch.no_grad():
        embedded = torch.cat([backbone.embed(part.to(backbone.mean.device)).cpu() for part in images.split(64)])
    similar = F.normalize(embedded, dim=1) @ F.normalize(texts, dim=1).T
    if neutral is not None:
        similar = similar - (F.normalize(embedded, dim=1) @ F.normalize(neutral, dim=0))[:, None]
    features = encode(backbone, images)
    return [linear_probe(name, features, similar[:, k], **settings) for k, name in enumerate(prompts)]
