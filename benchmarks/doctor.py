"""Planted faults and the name the doctor gives each first; no alarm on the good checkpoint:
`python -m benchmarks.doctor --json`.

Each of `tests/doctor/faults.py` is planted in the repository's checkpoint or in shards of its own drawings, and the
first finding compared with the fault's name. The good checkpoint is examined with its shards over some seeds.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils import logging

from tests.doctor.faults import FAULTS, LISTED, planted
from tests.doctor.own_pictures import build
from transformers_nextflow.doctor import examine
from transformers_nextflow.doctor.pictures import default_pictures
from transformers_nextflow.utils.loading import load_model, model_name

from .harness import machine, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seeds", type=int, default=5, metavar="N", help="of the good checkpoint (default: %(default)s)"
    )
    parser.add_argument("--documents", type=int, default=80, metavar="N", help="of the shards (default: %(default)s)")
    parser.add_argument("--only", metavar="TEXT", help="faults whose title contains this")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/doctor.json"), metavar="FILE")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, processor = load_model(None)
    pictures = default_pictures(model.model.schedules, seed=0, each=4)  # fewer than by default, for the faults alone

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder / "shards", model_name(None), arguments.documents, 1024)
        packs = folder / "shards" / "packs"
        rows = []
        for number, fault in enumerate(tqdm(FAULTS, desc="faults")):
            if arguments.only and arguments.only not in fault.title:
                continue
            torch.manual_seed(0)
            with planted(fault, model, processor, packs, folder) as patient:
                diagnosis = examine(**patient, pictures=pictures, stop_at_first=True)
            found = diagnosis.first.fault if diagnosis.first else None
            row = {"planted": fault.title, "expected": fault.expected, "first finding": found}
            rows.append(row | {"right": found == fault.expected, "listed": number < LISTED})
            if found != fault.expected:
                tqdm.write(f"{fault.title}: {found}, not {fault.expected}: {diagnosis.first}")
        alarms, seconds, processor_seconds = {}, [], []
        for seed in tqdm(range(arguments.seeds), desc="good checkpoint"):
            started = time.process_time()
            diagnosis = examine(model, processor, packs=packs, seed=seed)
            processor_seconds.append(round(time.process_time() - started, 1))
            seconds.append(round(diagnosis.seconds, 1))
            alarms[seed] = [finding.fault for finding in diagnosis.alarms]
    result = {
        "faults": rows,
        "right": sum(row["right"] for row in rows),
        "of": len(rows),
        "alarms on the good checkpoint, by seed": alarms,
        "seconds of an examination": seconds,
        "processor seconds of an examination": processor_seconds,
        "machine": machine(torch.device("cpu")),
    }
    report(result, arguments.json, arguments.output if arguments.only is None else None)


if __name__ == "__main__":
    main()
