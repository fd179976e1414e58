"""Data: reading, chat templates, checks, encoding and the order of batches."""

from jaxalign.data.chat import encode
from jaxalign.data.checks import Problem, Report, admit, check, check_labels, problems, weight_ranges
from jaxalign.data.examples import Examples, encode_rows, from_list
from jaxalign.data.filters import Removed
from jaxalign.data.formats import Bad, DataConfig, normalise
from jaxalign.data.loading import Data, inspect, load
from jaxalign.data.margins import LengthBias, length_bias
from jaxalign.data.mixture import MixtureOrder
from jaxalign.data.pipeline import Batches, HostBatch
from jaxalign.data.reading import Rows, read
from jaxalign.data.settings import Filters, MixturePart
from jaxalign.data.stream import Stream
from jaxalign.data.streambatches import StreamBatch, StreamBatches
from jaxalign.data.tokenizer import prepare
from jaxalign.data.wrapping import wrap

__all__ = [
    "Bad",
    "Batches",
    "Data",
    "DataConfig",
    "Examples",
    "Filters",
    "HostBatch",
    "LengthBias",
    "MixtureOrder",
    "MixturePart",
    "Problem",
    "Removed",
    "Report",
    "Rows",
    "Stream",
    "StreamBatch",
    "StreamBatches",
    "admit",
    "check",
    "check_labels",
    "encode",
    "encode_rows",
    "from_list",
    "inspect",
    "length_bias",
    "load",
    "normalise",
    "prepare",
    "problems",
    "read",
    "weight_ranges",
    "wrap",
]
