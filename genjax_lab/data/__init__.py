"""Images and text: TFDS builders over packaged data, and the one pipeline to training batches."""

from genjax_lab.data.batch_order import BatchOrder
from genjax_lab.data.class_balance import balanced_labels
from genjax_lab.data.image_levels import (
    DatasetInfo,
    NonFiniteImagesError,
    dequantize,
    quantize,
)
from genjax_lab.data.loader import Loader, Prefetch, make_loader, make_loader_from_arrays
from genjax_lab.data.paired import PairedLoader
from genjax_lab.data.prepared import dataset_info, prepare
from genjax_lab.data.sample_pool import draw_pool, read_pool
from genjax_lab.data.text import (
    learn_tokenizer,
    make_token_loader,
    read_documents,
    read_levels,
    read_tokenizer,
    to_sequences,
)
from genjax_lab.data.transforms import center_crop, horizontal_flip

__all__ = [
    "BatchOrder",
    "DatasetInfo",
    "Loader",
    "NonFiniteImagesError",
    "PairedLoader",
    "Prefetch",
    "balanced_labels",
    "center_crop",
    "dataset_info",
    "dequantize",
    "draw_pool",
    "horizontal_flip",
    "learn_tokenizer",
    "make_loader",
    "make_loader_from_arrays",
    "make_token_loader",
    "prepare",
    "quantize",
    "read_documents",
    "read_levels",
    "read_pool",
    "read_tokenizer",
    "to_sequences",
]
