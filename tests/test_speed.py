import os

import pytest
import torch

from eval.speed import Cost, _alone, compare, extrapolated, measure_ours, measure_reference
from eval.speed_ways import OURS
from featinv.errors import UserError


@pytest.mark.slow
def test_every_way_is_measured_and_the_light_one_computes_least(monkeypatch) -> None:
    monkeypatch.setattr("eval.speed.matmul_peak", lambda device, dtype: 1e11)
    monkeypatch.setattr("eval.speed._alone", lambda measurement, *arguments: measurement(*arguments))  # memory aside
    found = dict(compare("small", 1, 1, False, 1, only="sampling"))
    assert list(found) == ["reference sampling", "default sampling", "light sampling"]
    assert all(x.images_per_second > 0 and x.share > 0 and x.gigabytes > 0 for x in found.values())
    # Operations of one image, whatever the clock says: 100 evaluations, then 6, then 2 without a branch in them.
    each = {name: x.share / x.images_per_second for name, x in found.items()}
    assert each["reference sampling"] > 10 * each["default sampling"] > 20 * each["light sampling"]


def test_the_rest_of_the_steps_follows_from_those_that_were_timed() -> None:
    few, more = Cost(2.0, 10.0, 5), Cost(3.0, 14.0, 6)
    assert extrapolated(few, more, 49 / 4) == Cost(2.0 + 49 / 4, 10.0 + 49.0, 6)
    assert extrapolated(few, Cost(1.5, 14.0, 6), 49 / 4).seconds == 2.0  # an interruption while `few` was timed


def test_a_training_step_is_measured_without_the_first_stage() -> None:
    device = torch.device("cpu")
    full, light = (measure_ours("small", 1, 1, False, device, "training", OURS[name]) for name in ("default", "light"))
    assert 0 < light.flops < full.flops


def test_a_reference_that_recomputes_its_activations_computes_more() -> None:
    device = torch.device("cpu")
    kept, again = (measure_reference("small", 1, 1, 1, device, "training", recompute).flops for recompute in (0, 1))
    assert 1.05 * kept < again < 1.5 * kept


def test_a_measurement_that_is_killed_ends_in_a_sentence() -> None:
    with pytest.raises(UserError, match="killed.*smaller --batch"):
        _alone(os._exit, 9)  # type: ignore[arg-type]
