from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from dita.eval import memory
from dita.eval.memory import resident_growth

MIB = 1 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's high-water mark is Linux's")
def test_the_peak_of_a_block_is_its_own() -> None:
    found = []
    for size in (160, 48):
        with resident_growth() as growth:
            block = torch.ones(size * MIB // 4)
            del block
        found.append(growth.bytes)
    assert found[0] is not None and found[1] is not None
    assert 158 * MIB <= found[0] < 176 * MIB, "what was freed within the block counts"
    assert 46 * MIB <= found[1] < 64 * MIB, "an earlier, higher peak does not"


def test_where_it_cannot_be_told_there_is_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_PROC", tmp_path)
    with resident_growth() as growth:
        pass
    assert growth.bytes is None
    with pytest.raises(ValueError, match="inside"), resident_growth():
        raise ValueError("inside")
