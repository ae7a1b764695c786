"""Damage and the name the doctor gives it; no alarm on good checkpoints:
`python -m benchmarks.doctor CHECKPOINT PACKS --json`.

Each damage of `tests/doctor/damage.py` is done to a copy of the checkpoint, or of the shards. The good checkpoint is
examined over some seeds, and as bfloat16.
"""

import argparse
import copy
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils import logging

from tests.doctor.damage import DAMAGE, damaged
from transformers_nextflow.doctor import examine
from transformers_nextflow.utils.loading import load_model

from .harness import machine, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a trained one")
    parser.add_argument("packs", type=Path, help="some of its training's shards")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="of the good checkpoint")
    parser.add_argument("--only", metavar="TEXT", help="damage whose title contains this")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/doctor.json"), metavar="FILE")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, processor = load_model(arguments.checkpoint)

    rows, alarms, seconds = [], {}, []
    for damage in tqdm(DAMAGE, desc="damage"):
        if arguments.only and arguments.only not in damage.title:
            continue
        with tempfile.TemporaryDirectory() as folder:
            patient, packs = damaged(damage, model, arguments.packs, Path(folder))
            found = examine(patient, processor, packs=packs).alarms
        right = [alarm for alarm in found if alarm.fault in damage.names and damage.where in alarm.measured]
        rows.append(
            {
                "damage": damage.title,
                "first alarm": found[0].fault if found else None,
                "alarms": [alarm.fault for alarm in found],
                "named": bool(right),
                "named first": bool(right) and right[0] is found[0],
            }
        )
    patients = {f"seed {seed}": (model, seed) for seed in range(arguments.seeds)}
    patients["bfloat16"] = (copy.deepcopy(model).to(torch.bfloat16), 0)
    for name, (patient, seed) in tqdm(patients.items(), desc="good checkpoint"):
        if not arguments.only:
            diagnosis = examine(patient, processor, packs=arguments.packs, seed=seed)
            seconds.append(round(diagnosis.seconds, 1))
            alarms[name] = [alarm.fault for alarm in diagnosis.alarms]
    result = {
        "damage": rows,
        "named": sum(row["named"] for row in rows),
        "of": len(rows),
        "alarms on the good checkpoint": alarms,
        "seconds of an examination": seconds,
        "machine": machine(torch.device("cpu")),
    }
    report(result, arguments.json, arguments.output if arguments.only is None else None)


if __name__ == "__main__":
    main()
