"""What the tests of the benchmarks share: the schema of results, and the command line as a process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema

ROOT = Path(__file__).parent.parent
SCHEMA = json.loads((ROOT / "bench" / "schema.json").read_text())


def validate(records):
    """Raises unless the records follow the schema."""
    jsonschema.Draft202012Validator(SCHEMA).validate(records)


def bench(*arguments, **options):
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    return subprocess.run(
        [sys.executable, "-m", "bench", *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT, check=False, env=environment, **options,
    )  # fmt: skip
