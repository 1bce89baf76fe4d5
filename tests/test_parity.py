"""The golden archives are reproduced, and an archive that is not makes the command fail."""

from pathlib import Path

import numpy as np
import pytest

from tests.parity import TOLERANCE, main, parity

DATA = Path(__file__).parent / "data"


def test_published_ijepa_step_is_reproduced():
    errors = parity(DATA / "ijepa_step.npz")
    assert len(errors) > 200
    assert max(errors.values()) < 1e-5, max(errors, key=errors.get)


@pytest.mark.parametrize("key", ["s0/predictions", "s2/loss_mse", "final/target_encoder/norm.weight", "schedule/wd"])
def test_a_wrong_number_is_found(tmp_path, key, capsys):
    with np.load(DATA / "ijepa_step.npz") as archive:
        arrays = {name: archive[name] for name in archive.files}
    arrays[key] = arrays[key] * (1 + 3 * TOLERANCE)
    np.savez(tmp_path / "wrong.npz", **arrays)
    assert main([str(tmp_path / "wrong.npz")]) == 1
    assert key in capsys.readouterr().out.splitlines()[-1]


def test_usage():
    assert main([]) == 2
    assert main(["nowhere.npz"]) == 2
