"""What the probe measures against brute force, and what its numbers are summed up to."""

import json

import numpy as np
import pytest

from scripts.reporting.instrument import PARTS, SIZE_STATES, measured

probe = pytest.importorskip("scripts.reporting.probe", reason="needs the training environment")
metrics = pytest.importorskip("sklearn.metrics")


@pytest.mark.parametrize("seed", range(5))
def test_auroc_and_pointing_game_are_those_of_the_pixels(seed):
    rng = np.random.default_rng(seed)
    map_SS = rng.normal(size=(4, 4)).astype("float32")
    map_SS[0, 0] = np.nan if seed % 2 else map_SS[1, 1]  # TinyLLaVA's missing token; a tie
    mask_HW = np.zeros((64, 64), bool)
    top, left = rng.integers(0, 40, 2)
    mask_HW[top : top + 20, left : left + 24] = True
    similarity_HW = map_SS.repeat(16, 0).repeat(16, 1)
    known_HW = np.isfinite(similarity_HW)
    found = probe.localisation(map_SS, mask_HW)
    assert found["auroc"] == pytest.approx(metrics.roc_auc_score(mask_HW[known_HW], similarity_HW[known_HW]))
    best = np.nanargmax(map_SS)
    assert found["hit"] == mask_HW[16 * (best // 4) :, 16 * (best % 4) :][:16, :16].any()
    touched = [mask_HW[16 * y : 16 * y + 16, 16 * x : 16 * x + 16].any() for y in range(4) for x in range(4)]
    assert found["hit_chance"] == np.mean(np.array(touched)[np.isfinite(map_SS.ravel())])


def test_a_mask_where_no_image_token_is_says_nothing():
    map_SS, mask_HW = np.full((4, 4), 0.5), np.zeros((64, 64), bool)
    map_SS[0, 0] = np.nan
    mask_HW[:8, :8] = True
    assert all(np.isnan(value) for value in probe.localisation(map_SS, mask_HW).values())


def arrays(seed, slope=-0.5):
    """A probe of 8 answers with 3 or 4 facts, of which KL falls by 0.01 and accuracy by `slope` % a token."""
    rng = np.random.default_rng(seed)
    token = np.sort([rng.permutation(60)[:4] for _ in range(8)]).astype("int32")
    right = (100 + slope * token).astype("float32") / 100
    token[0, 3], right[0, 3] = -1, np.nan
    kl = np.tile(2 - 0.01 * np.arange(60, dtype="float32"), (8, 1))
    sizes = {f"size_{t}": np.arange(4.0) for t in ("ce", "l2", "cosine")}
    return sizes | {
        "kl": kl, "fact_token": token, "fact_right": right,
        "stage_1_ce": np.full(5, 0.5) + 0.01 * np.arange(5), "stage_1_ce_swapped": np.full(5, 1.5),
        "auroc": np.array([0.5, 0.7, np.nan, 0.9]), "hit": np.array([0.0, 1, np.nan, 1]),
        "hit_chance": np.array([0.25, 0.25, np.nan, 0.5]),
        "map_type": np.array(["digits a", "digits a", "easy b", "easy b"]),
        **{f"grad_{t}": np.arange(12.0).reshape(4, 3) for t in ("ce", "l2", "cosine")},
    }  # fmt: skip


def test_the_numbers_say_what_the_arrays_hold():
    found = measured([arrays(0), arrays(0)])
    assert found["facts"]["right_slope"]["mean"] == pytest.approx(-0.5, abs=1e-4)
    assert found["facts"]["kl_slope"]["mean"] == pytest.approx(-0.01, abs=1e-5) and found["facts"]["kl_slope"]["n"] == 8
    assert found["facts"]["answer_tokens"] == 60
    assert found["stage_1"]["difference"]["mean"] == pytest.approx(0.98)
    low, high = found["stage_1"]["difference"]["ci95"]
    assert low < 0.98 < high
    assert found["maps"]["all"]["auroc"]["mean"] == pytest.approx(0.7) and found["maps"]["all"]["auroc"]["n"] == 3
    assert found["maps"]["easy b"]["hit"] == {"mean": 1.0, "ci95": None, "n": 1}
    assert found["sizes"][SIZE_STATES[1]]["l2"] == {"value": 1.0} | dict(zip(PARTS, (3.0, 4.0, 5.0), strict=True))
    json.dumps(found, allow_nan=False)
