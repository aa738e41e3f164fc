"""Language modelling."""

from __future__ import annotations

from tunesmith.objectives.sft import Sft


class Pretrain(Sft):
    """The same likelihood over every token: continued pretraining on text."""

    learns_all = True
