"""From text to the tokens of one rank: packing, the data folder, the order of samples, the loader, the cursor."""

from megalong.data.cursor import Cursor
from megalong.data.dataset import SequenceDataset, open_dataset
from megalong.data.loader import MicroBatch, evaluation_batches, training_batches

__all__ = ["Cursor", "MicroBatch", "SequenceDataset", "evaluation_batches", "open_dataset", "training_batches"]
