"""Notebook 03 runs to its end with tiny parameters, in under a minute."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TINY = {"STEPS": 200, "N_SEEDS": 2, "ALPHAS": (0.0, 1.0), "DATA_SIZE": 2000}
TINY |= {"GRID_STEPS": 200, "LONG_STEPS": 400}
RUN = """import json, sys, time
for i, source in json.load(sys.stdin):
    exec(compile(source, f"cell {i}", "exec"))
print("seconds:", time.process_time())"""


def test_tiny_parameters(tmp_path):
    (path,) = (ROOT / "notebooks").glob("03_*.ipynb")
    sources = []
    for i, cell in enumerate(json.loads(path.read_text("utf-8"))["cells"], 1):
        tags = cell["metadata"].get("tags", [])
        if cell["cell_type"] == "code" and "nbval-check-output" not in tags:
            sources.append((i, "".join(cell["source"])))
        if "parameters" in tags:
            present = f"{{k: v for k, v in {TINY}.items() if k in globals()}}"
            sources.append((i, f"globals().update({present})"))
    options = {"cwd": path.parent, "capture_output": True, "text": True, "timeout": 600}
    options["env"] = os.environ | {"CQL_FIGS": str(tmp_path), "MPLBACKEND": "Agg"}
    command = [sys.executable, "-c", RUN]
    result = subprocess.run(command, input=json.dumps(sources), **options)
    assert result.returncode == 0, result.stderr[-3000:]
    assert float(result.stdout.split("seconds: ")[-1]) < 60
