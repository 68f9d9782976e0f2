"""Record formats: detection, and conversion of records to rows of the recipe's kind."""

from align.data.formats.converters import CONVERTERS, FieldUsage, SourceFormat, convert, find_fault
from align.data.formats.detection import DETECTION_RECORDS, Detection, detect

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
