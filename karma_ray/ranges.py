"""What a number in a configuration may be, as the type of its field.

`config.from_dict` checks them, so flags, files and searches all do.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Count = Annotated[int, Field(ge=1)]
"""At least 1."""
CountOrZero = Annotated[int, Field(ge=0)]
"""At least 0, where 0 says *none*, or *all*, or *decide yourself*."""
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""At least 0."""
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""Above 0."""
Share = Annotated[float, Field(ge=0, le=1)]
"""From 0 to 1."""
ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]
"""From 0 to below 1."""
