import shlex

import numpy as np
import pytest

from m3asr.engines.trtexec import trtexec_inputs
from m3asr.errors import ModelError


def test_files_and_command(tmp_path):
    command = trtexec_inputs(2, 206, 40, tmp_path, plan="e.plan")
    feats = np.fromfile(tmp_path / "feats.2x206x40.bin", "<f4")
    assert feats.size == 2 * 206 * 40 and 0 <= feats.min() < feats.max() < 1
    assert np.fromfile(tmp_path / "lengths.2x206x40.bin", "<i4").tolist() == [206, 206]
    assert command.startswith("trtexec --loadEngine=e.plan --shapes=feats:2x206x40,lengths:2 --loadInputs=feats:")
    assert str(tmp_path / "lengths.2x206x40.bin") in command
    assert trtexec_inputs(1, 7, 80, tmp_path, package="tensorrt_rtx").startswith("tensorrt_rtx ")
    (tmp_path / "a b").mkdir()
    assert len(shlex.split(trtexec_inputs(1, 7, 80, tmp_path / "a b", plan="my plan"))) == 4


@pytest.mark.parametrize("sizes", [(0, 206, 40), (1, -1, 40), (1, 206, 0)])
def test_bad_sizes(sizes, tmp_path):
    with pytest.raises(ModelError, match="from 1 on"):
        trtexec_inputs(*sizes, tmp_path)
    for many in ((10**6, 10**6, 80), (10**20, 1, 1)):
        with pytest.raises(ModelError, match="expected at most"):
            trtexec_inputs(*many, tmp_path)
    with pytest.raises(ModelError, match="cannot be written"):
        trtexec_inputs(1, 2, 3, tmp_path / "missing")
    assert not list(tmp_path.iterdir())
