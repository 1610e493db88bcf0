"""cutlass_library's vocabulary: number formats, schedules, and their C++ tags.

Importing that package also imports its own generator, which reads this process's arguments and answers --help in our
place, unless it takes the process for a run of `-m cutlass_library.generator`.
"""

import sys
from unittest import mock

with mock.patch.object(sys, "argv", ["", "-m"]):
    from cutlass_library import (
        DataType,
        DataTypeTag,
        EpilogueScheduleTag,
        EpilogueScheduleType,
        KernelScheduleSuffixes,
        KernelScheduleTag,
        KernelScheduleType,
    )

__all__ = [
    "DataType",
    "DataTypeTag",
    "EpilogueScheduleTag",
    "EpilogueScheduleType",
    "KernelScheduleSuffixes",
    "KernelScheduleTag",
    "KernelScheduleType",
]
