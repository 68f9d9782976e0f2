"""Record formats: detection, and conversion of records to rows of the recipe's kind."""

from align.data.formats.converters import CONVERTERS, FieldUsage, SourceFormat, convert
from align.data.formats.detection import DETECTION_RECORDS, Detection, detect
from align.data.formats.kinds import find_fault

__all__ = [
    "CONVERTERS",
    "DETECTION_RECORDS",
    "Detection",
    "FieldUsage",
    "SourceFormat",
    "convert",
    "detect",
    "find_fault",
]
