"""Data: reading, chat templates, checks, encoding and the order of batches."""

from jaxalign.data.chat import encode
from jaxalign.data.checks import Problem, Report, admit, check, problems
from jaxalign.data.examples import Data, Examples, encode_rows, from_list, inspect, load
from jaxalign.data.formats import Bad, DataConfig, normalise
from jaxalign.data.pipeline import Batches, HostBatch
from jaxalign.data.reading import Rows, read
from jaxalign.data.tokenizer import prepare
from jaxalign.data.wrapping import wrap

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
    "encode",
    "encode_rows",
    "from_list",
    "inspect",
    "load",
    "normalise",
    "prepare",
    "problems",
    "read",
    "wrap",
]
