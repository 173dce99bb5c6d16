"""Factor recovery: what a small probe, trained on original images, reads out of reconstructions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from featinv.errors import UserError
from featinv.metrics.intervals import Interval, bootstrap_mean, bootstrap_r2


class FactorSpec(NamedTuple):
    """Name of a factor, its kind ("categorical" or "continuous") and its number of classes."""

    name: str
    kind: str
    n_classes: int = 0


def _as_specs(schema: Sequence[tuple[str, str, int] | FactorSpec]) -> list[FactorSpec]:
    specs = [FactorSpec(*entry) for entry in schema]
    for spec in specs:
        if spec.kind not in ("categorical", "continuous"):
            raise UserError(f"Factor {spec.name!r} has kind {spec.kind!r}; use 'categorical' or 'continuous'.")
        if spec.kind == "categorical" and spec.n_classes < 2:
            raise UserError(f"Categorical factor {spec.name!r} needs at least two classes, not {spec.n_classes}.")
    return specs


class FactorProbe:
    """Ridge regression from embeddings to scene factors, closed form in float64.

    Continuous factors are regressed; categorical ones are regressed one-hot and the largest score is the
    prediction. Embeddings are standardised with the training set's mean and deviation. NaN means "not
    applicable" (an absent object's colour) and is left out, factor by factor. An angle that wraps should be
    given as its sine and cosine.

    Args:
        schema: (name, kind, n_classes) of each column of the values.
        ridge: Penalty on the squared weights per training image; the bias is free.

    Raises:
        UserError: If a kind is unknown or a categorical factor has fewer than two classes.
    """

    def __init__(self, schema: Sequence[tuple[str, str, int] | FactorSpec], ridge: float = 0.1) -> None:
        self.schema = _as_specs(schema)
        self.ridge = ridge
        # (D + 1, classes) or (D + 1, 1); the last row is the bias.
        self._heads: dict[str, Tensor] = {}
        self._mean = torch.zeros(0)
        self._std = torch.ones(0)

    def fit(self, embeddings: Tensor, values: Tensor) -> FactorProbe:
        """Fit one head per factor on original images.

        Args:
            embeddings: (N, D), of originals (or of their features).
            values: (N, F), one column per factor of the schema, NaN where it does not apply.

        Returns:
            The probe itself.

        Raises:
            UserError: If shapes disagree, something is not finite, or a class index is outside the schema.
        """
        embeddings, values = self._check(embeddings, values)
        self._mean, self._std = embeddings.mean(0), embeddings.std(0, correction=0)
        # A constant column carries nothing; dividing it by its rounding error would.
        self._std = torch.where(self._std > 1e-12 * (1 + self._mean.abs()), self._std, torch.inf)
        inputs = self._standardise(embeddings)
        self._heads = {}
        for spec, column in zip(self.schema, values.T, strict=True):
            known = ~column.isnan()
            if int(known.sum()) < 2:
                continue
            self._heads[spec.name] = self._fit_head(inputs[known], self._targets(spec, column[known]))
        return self

    def _fit_head(self, inputs: Tensor, targets: Tensor) -> Tensor:
        n = len(inputs)
        input_mean, target_mean = inputs.mean(0), targets.mean(0)
        x, y = inputs - input_mean, targets - target_mean
        if n < x.shape[1]:  # the same solution from the smaller of the two Gram matrices
            weight = x.T @ torch.linalg.solve(x @ x.T + self.ridge * n * torch.eye(n, dtype=x.dtype), y)
        else:
            weight = torch.linalg.solve(x.T @ x + self.ridge * n * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)
        return torch.cat([weight, (target_mean - input_mean @ weight)[None]])

    @staticmethod
    def _targets(spec: FactorSpec, column: Tensor) -> Tensor:
        if spec.kind == "continuous":
            return column[:, None]
        return torch.nn.functional.one_hot(column.long(), spec.n_classes).double()

    def predict(self, embeddings: Tensor) -> Tensor:
        """Predicted factors.

        Args:
            embeddings: (N, D).

        Returns:
            (N, F) float64: class indices or values; NaN in columns that had fewer than two training values, and in
            rows of embeddings that are not finite.

        Raises:
            UserError: If the probe is not fitted.
        """
        inputs = self._standardise(embeddings.detach().double().cpu())
        columns = []
        for spec in self.schema:
            head = self._heads.get(spec.name)
            if head is None:
                columns.append(torch.full((len(inputs),), torch.nan, dtype=torch.float64))
                continue
            scores = inputs @ head[:-1] + head[-1]
            best = scores.argmax(1).double() if spec.kind == "categorical" else scores[:, 0]
            columns.append(best.masked_fill(~scores.isfinite().all(1), torch.nan))
        return torch.stack(columns, dim=1)

    def score(self, embeddings: Tensor, values: Tensor, *, seed: int = 0, resamples: int = 1000) -> dict[str, Interval]:
        """Accuracy of categorical and R2 of continuous factors, with bootstrap intervals.

        Score held-out originals for the probe's own limit, reconstructions for what was recovered. R2
        compares with the mean of the scored values: 0 is no better than that mean, negative is worse.

        Args:
            embeddings: (N, D), for instance of reconstructions.
            values: (N, F), the true factors of their originals, NaN where they do not apply.
            seed: Seed of the bootstrap.
            resamples: Number of bootstrap resamples.

        Returns:
            Factor name -> interval; factors that never apply, or that had no training values, are left out.

        Raises:
            UserError: If shapes disagree, something is not finite, or the probe is not fitted.
        """
        embeddings, values = self._check(embeddings, values)
        return self.score_predicted(self.predict(embeddings), values, seed=seed, resamples=resamples)

    def score_predicted(
        self, predicted: Tensor, values: Tensor, *, seed: int = 0, resamples: int = 1000
    ) -> dict[str, Interval]:
        """As `score`, from predictions (N, F) that were made batch by batch."""
        predicted, values = predicted.double().cpu(), values.double().cpu()
        scores = {}
        for k, spec in enumerate(self.schema):
            known = ~values[:, k].isnan()
            truth, guess = values[known, k], predicted[known, k]
            if len(truth) == 0 or spec.name not in self._heads:
                continue
            if spec.kind == "categorical":
                scores[spec.name] = bootstrap_mean((truth == guess).double(), seed=seed, resamples=resamples)
            else:
                scores[spec.name] = bootstrap_r2(truth, guess, seed=seed, resamples=resamples)
        return scores

    def class_accuracy(self, predicted: Tensor, values: Tensor) -> Tensor:
        """Share of each image's categorical factors that are predicted right.

        Args:
            predicted: (N, F).
            values: (N, F), NaN where a factor does not apply.

        Returns:
            (N,) float64; NaN for an image without any.
        """
        columns = [k for k, spec in enumerate(self.schema) if spec.kind == "categorical" and spec.name in self._heads]
        truth, guess = values[:, columns].double().cpu(), predicted[:, columns].double().cpu()
        right = (truth == guess).double().masked_fill(truth.isnan(), torch.nan)
        return right.nanmean(1)

    def _standardise(self, embeddings: Tensor) -> Tensor:
        if self._mean.numel() == 0:
            raise UserError("The factor probe is not fitted; call fit on the originals first.")
        return (embeddings - self._mean) / self._std

    def _check(self, embeddings: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if embeddings.ndim != 2 or values.shape != (len(embeddings), len(self.schema)):
            raise UserError(
                f"Embeddings {tuple(embeddings.shape)} and values {tuple(values.shape)} do not fit "
                f"a schema of {len(self.schema)} factors; give (N, D) and (N, {len(self.schema)})."
            )
        embeddings, values = embeddings.detach().double().cpu(), values.detach().double().cpu()
        if not embeddings.isfinite().all():
            raise UserError("Some embeddings are not finite; remake those images before probing their factors.")
        for spec, column in zip(self.schema, values.T, strict=True):
            known = column[~column.isnan()]
            whole = bool((known == known.round()).all())
            if spec.kind == "categorical" and not (whole and bool(((known >= 0) & (known < spec.n_classes)).all())):
                raise UserError(f"Factor {spec.name!r} has values outside its classes 0..{spec.n_classes - 1}.")
            if not known.isfinite().all():
                raise UserError(f"Factor {spec.name!r} has infinite values; use NaN where it does not apply.")
        return embeddings, values
