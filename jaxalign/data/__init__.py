"""Data: reading, chat templates, checks, encoding and the order of batches."""

from jaxalign.data.chat import encode
from jaxalign.data.checks import Problem, Report, admit, check, check_labels, problems, weight_ranges
from jaxalign.data.examples import Data, Examples, encode_rows, from_list, inspect, load
from jaxalign.data.formats import Bad, DataConfig, normalise
from jaxalign.data.pipeline import Batches, HostBatch
from jaxalign.data.reading import Rows, read
from jaxalign.data.tokenizer import prepare

__all__ = [
    "Bad",
    "Batches",
    "Data",
    "DataConfig",
    "Examples",
    "HostBatch",
    "Problem",
    "Report",
    "Rows",
    "admit",
    "check",
    "check_labels",
    "encode",
    "encode_rows",
    "from_list",
    "inspect",
    "load",
    "normalise",
    "prepare",
    "problems",
    "read",
    "weight_ranges",
]
