"""The figures of a finished run, as one JSON to commit.

python benchmarks/main_job.py RUN_DIR OUT.json
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from largebatch.report.files import write_json_atomically


def main() -> None:
    run_dir, out = Path(sys.argv[1]), Path(sys.argv[2])
    read = {name: json.loads((run_dir / f"{name}.json").read_text()) for name in ("summary", "plan", "environment")}
    weights = hashlib.sha256((run_dir / "model.pt").read_bytes()).hexdigest()
    write_json_atomically(out, {**read, "sha256_of_model_pt": weights})


if __name__ == "__main__":
    main()
