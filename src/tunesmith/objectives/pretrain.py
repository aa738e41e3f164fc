"""Language modelling."""

from __future__ import annotations

from typing import ClassVar

from tunesmith.objectives.sft import Likelihood
from tunesmith.types import Form


class Pretrain(Likelihood):
    """The same likelihood over every token: continued pretraining on text."""

    form: ClassVar[Form] = "text"
