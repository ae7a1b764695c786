"""From documents to packed training shards, and back (NextFlow sec. 3.1 and 4). Needs `datasets`; inference does not.

- `documents.py`: one schema for every kind of training document, and rows of any source brought to it.
- `sources.py`: Hub datasets, Parquet, JSON lines, image folders and webdataset tars as one indexable table.
- `sequences.py`: a document's compact ids, and their expansion to the model's inputs.
- `extraction.py`: documents to shards of ids and codes, resumable batch by batch.
- `costs.py`, `packing.py`: what a pack costs, and which documents share one.
- `shards.py`: files, manifest, hashes, and what is refused.
- `loading.py`: map-style dataset, sampler and collator. `raw.py`: documents that are coded when they are asked for.
- `inspection.py`: statistics and pictures. `cli.py`: the commands.

Names below are imported when they are first asked for, so that the console command need not import `datasets`.
"""

from ..utils.lazy import lazy_names

_MODULE_OF = {
    "BatchPadding": "packing",
    "ComputeBudget": "packing",
    "CostModel": "costs",
    "Document": "documents",
    "DocumentReader": "documents",
    "ExtractionSettings": "extraction",
    "FixedLength": "packing",
    "Message": "documents",
    "PackCollator": "loading",
    "PackSampler": "loading",
    "PackedDataset": "loading",
    "RawDocuments": "raw",
    "Pictures": "sources",
    "Source": "sources",
    "extract": "extraction",
    "open_shards": "shards",
    "pack": "packing",
    "push_to_hub": "shards",
    "verify": "shards",
}
__all__ = list(_MODULE_OF)
__getattr__ = lazy_names(__name__, _MODULE_OF)
